"""LayerNorm and RMSNorm in float32, with a backward pass that reads the input as it came instead of float32 copies."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class NormOptions:
    """The form of a norm, which is static."""

    epsilon: float
    centred: bool
    """True for LayerNorm, which subtracts the mean; False for RMSNorm."""
    plus_one: bool
    """The factor is 1 + scale."""
    dtype: DTypeLike
    """Dtype of the result."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, options: NormOptions) -> jax.Array:
    """Normalises `x` over its last axes, those of `scale`.

    For the backward pass it keeps `x` in its own dtype, and the mean and the deviation of each row.

    Args:
        x: `[…, *scale.shape]`.
        scale: Factor on the normalised values.
        bias: Summand of the same shape, or None.
        options: The form.

    Returns:
        An array of the shape of `x`, in `options.dtype`, computed in float32.
    """
    return _forward(x, scale, bias, options)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array | None, options: NormOptions) -> tuple[jax.Array, tuple]:
    over = tuple(range(-scale.ndim, 0))
    y, factor = x.astype(jnp.float32), scale.astype(jnp.float32)
    mean = y.mean(over, keepdims=True) if options.centred else None
    y = y if mean is None else y - mean
    inverse = jax.lax.rsqrt(jnp.square(y).mean(over, keepdims=True) + options.epsilon)
    y = y * inverse * (1 + factor if options.plus_one else factor)
    y = y if bias is None else y + bias.astype(jnp.float32)
    return y.astype(options.dtype), (x, scale, bias, mean, inverse)


def _backward(options: NormOptions, kept: tuple, upstream: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, scale, bias, mean, inverse = kept
    over, rows = tuple(range(-scale.ndim, 0)), tuple(range(x.ndim - scale.ndim))
    upstream, normal, factor = (y.astype(jnp.float32) for y in (upstream, x, scale))
    normal = (normal if mean is None else normal - mean) * inverse
    inner = upstream * (1 + factor if options.plus_one else factor)
    d_x = inner - normal * (inner * normal).mean(over, keepdims=True)
    if options.centred:
        d_x = d_x - inner.mean(over, keepdims=True)
    d_scale = (upstream * normal).sum(rows).astype(scale.dtype)
    d_bias = None if bias is None else upstream.sum(rows).astype(bias.dtype)
    return (d_x * inverse).astype(x.dtype), d_scale, d_bias


normalise.defvjp(_forward, _backward)
