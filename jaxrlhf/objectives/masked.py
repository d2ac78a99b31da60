"""Sums, means, whitening and last tokens under an explicit mask, of whole rows and of the segments of packed rows."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def real(x: ArrayLike) -> Array:
    """`x` as float32, or float64 if it is that."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def keep_where(x: ArrayLike, keep: Array) -> Array:
    """`x` as float with zeros outside `keep`. It selects before any arithmetic, which keeps NaN out of gradients."""
    return jnp.where(keep, real(x), 0)


def divide(total: Array, denominator: ArrayLike) -> Array:
    """`total / denominator`, 0 where the denominator is not positive."""
    denominator = jnp.asarray(denominator).astype(total.dtype)
    usable = denominator > 0
    return jnp.where(usable, total / jnp.where(usable, denominator, 1), 0)


def masked_sum(x: ArrayLike, mask: ArrayLike) -> Array:
    """Computes the sum of `x` where `mask` is set, a scalar; `x` and `mask` have the same shape."""
    return jnp.sum(keep_where(x, jnp.asarray(mask) != 0))


def masked_mean(x: ArrayLike, mask: ArrayLike, denominator: ArrayLike | None = None) -> Array:
    """Computes the sum of `x` where `mask` is set over `denominator` (default: the number of set entries)."""
    keep = jnp.asarray(mask) != 0
    return divide(masked_sum(x, keep), jnp.sum(keep, dtype=jnp.int32) if denominator is None else denominator)


def masked_variance(x: ArrayLike, mask: ArrayLike) -> Array:
    """Computes the unbiased variance (divided by n - 1) of `x` where `mask` is set; 0 for fewer than two entries."""
    keep = jnp.asarray(mask) != 0
    deviation = jnp.where(keep, keep_where(x, keep) - masked_mean(x, keep), 0)
    return divide(jnp.sum(jnp.square(deviation)), jnp.maximum(jnp.sum(keep, dtype=jnp.int32) - 1, 1))


def masked_whiten(x: ArrayLike, mask: ArrayLike, shift_mean: bool = True, epsilon: float = 1e-8) -> Array:
    """Scales `x` to unit variance, and to zero mean, over all entries where `mask` is set.

    The variance is the unbiased one (divided by n - 1), as in TRL and verl; DeepSpeed-Chat does not whiten. A single
    entry has no variance: its deviation is 0.

    Args:
        x: `[B, T]`.
        mask: `[B, T]`.
        shift_mean: False keeps the mean of `x`.
        epsilon: Added to the variance.

    Returns:
        `[B, T]`, zeros where the mask is not set.
    """
    keep = jnp.asarray(mask) != 0
    mean = masked_mean(x, keep)
    deviation = jnp.where(keep, keep_where(x, keep) - mean, 0)
    variance = masked_variance(x, keep)
    whitened = deviation * jax.lax.rsqrt(variance + epsilon)
    return whitened if shift_mean else jnp.where(keep, whitened + mean, 0)


def last_token_index(mask: ArrayLike) -> Array:
    """Finds the last set entry in each row of `mask` `[B, T]`: its index, int32 `[B]`, 0 for a row without any."""
    mask = jnp.asarray(mask)
    return jnp.max(jnp.where(mask != 0, jnp.arange(mask.shape[1], dtype=jnp.int32), 0), axis=1)


def is_last(mask: ArrayLike) -> Array:
    """Marks the last set entry in each row of `mask` `[B, T]`: bool `[B, T]`."""
    mask = jnp.asarray(mask)
    return (jnp.arange(mask.shape[1]) == last_token_index(mask)[:, None]) & (mask != 0)


def score_at_last_token(values: ArrayLike, mask: ArrayLike) -> Array:
    """Reads `values` `[B, T]` at the last set entry of `mask` `[B, T]`: `[B]`, 0 for a row without any."""
    return jnp.sum(keep_where(values, is_last(mask)), axis=1)


def segment_sums(x: ArrayLike, mask: ArrayLike, segment_ids: ArrayLike, segments: int) -> Array:
    """Sums `x` over each segment of packed rows.

    Args:
        x: `[B, T]`.
        mask: `[B, T]`, set for the entries that count.
        segment_ids: int `[B, T]`: 1, 2, … for the segments of a row, 0 on padding.
        segments: S, the most segments of a row. Segments with a higher number are left out.

    Returns:
        `[B, S]`: segment s in column s - 1, 0 for a segment without an entry that counts.
    """
    # A comparison with every number instead of a scatter: XLA fuses it into the sum, and the order of the sum is fixed.
    numbers = jnp.arange(1, segments + 1)
    belongs = (jnp.asarray(segment_ids)[:, :, None] == numbers) & (jnp.asarray(mask) != 0)[:, :, None]
    return jnp.sum(keep_where(jnp.asarray(x)[:, :, None], belongs), axis=1)


def score_at_segment_ends(values: ArrayLike, segment_ids: ArrayLike, segments: int) -> Array:
    """Reads `values` `[B, T]` at the last column of each segment of packed rows.

    Args:
        values: `[B, T]`.
        segment_ids: int `[B, T]`: 1, 2, … for the segments of a row, each contiguous, 0 on padding.
        segments: S, the most segments of a row.

    Returns:
        `[B, S]`: segment s in column s - 1, 0 for a segment that the row does not have.
    """
    segment_ids = jnp.asarray(segment_ids)
    following = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return segment_sums(values, segment_ids != following, segment_ids, segments)
