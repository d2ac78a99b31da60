"""Sums, means, whitening and last tokens under an explicit mask."""

import jax
import jax.numpy as jnp
from jax import Array


def real(x) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def keep_where(x, keep: Array) -> Array:
    """`x` as float with zeros outside `keep`; selecting before any arithmetic is what keeps gradients clean."""
    return jnp.where(keep, real(x), 0)


def divide(total: Array, denominator) -> Array:
    denominator = jnp.asarray(denominator).astype(total.dtype)
    usable = denominator > 0
    return jnp.where(usable, total / jnp.where(usable, denominator, 1), 0)


def masked_sum(x, mask) -> Array:
    """Sum of `x` where `mask` is set. `x` and `mask` have one shape; the result is a scalar."""
    return jnp.sum(keep_where(x, jnp.asarray(mask) != 0))


def masked_mean(x, mask, denominator=None) -> Array:
    """Sum of `x` where `mask` is set, over `denominator` (default: how many entries are set); 0 over nothing."""
    keep = jnp.asarray(mask) != 0
    return divide(masked_sum(x, keep), jnp.sum(keep, dtype=jnp.int32) if denominator is None else denominator)


def masked_variance(x, mask) -> Array:
    """The unbiased variance (divided by n - 1) of the entries of `x` where `mask` is set; 0 for fewer than two."""
    keep = jnp.asarray(mask) != 0
    deviation = jnp.where(keep, keep_where(x, keep) - masked_mean(x, keep), 0)
    return divide(jnp.sum(jnp.square(deviation)), jnp.maximum(jnp.sum(keep, dtype=jnp.int32) - 1, 1))


def masked_whiten(x, mask, shift_mean: bool = True, epsilon: float = 1e-8) -> Array:
    """Scales `x` to unit variance, and to zero mean unless `shift_mean` is false, over all entries where `mask` is set.

    Returns an array of the shape of `x` with zeros where the mask is not set. The variance is the unbiased one (divided
    by n - 1), as TRL and verl do; DeepSpeed-Chat does not whiten. A single entry has no variance: its deviation is 0.
    `epsilon` is added to the variance.
    """
    keep = jnp.asarray(mask) != 0
    mean = masked_mean(x, keep)
    deviation = jnp.where(keep, keep_where(x, keep) - mean, 0)
    variance = masked_variance(x, keep)
    whitened = deviation * jax.lax.rsqrt(variance + epsilon)
    return whitened if shift_mean else jnp.where(keep, whitened + mean, 0)


def last_token_index(mask) -> Array:
    """Index [B] int32 of the last set entry in each row of `mask` [B, T], on either side of any padding; 0 if none."""
    mask = jnp.asarray(mask)
    return jnp.max(jnp.where(mask != 0, jnp.arange(mask.shape[1], dtype=jnp.int32), 0), axis=1)


def is_last(mask) -> Array:
    mask = jnp.asarray(mask)
    return (jnp.arange(mask.shape[1]) == last_token_index(mask)[:, None]) & (mask != 0)


def score_at_last_token(values, mask) -> Array:
    """The entry of `values` [B, T] at the last set position of `mask` [B, T], as [B]; 0 for a row without any."""
    return jnp.sum(keep_where(values, is_last(mask)), axis=1)
