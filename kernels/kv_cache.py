"""The key/value cache of one layer: as it is computed, or in eight bits with a scale per head and token.

A cache is the tuple (key, value), each `[B, H_kv, S, D]`, or (key, value, key scale, value scale) with scales float32
`[B, H_kv, S]`, where what was written is about stored · scale. Elements are then int8, or uint8 that hold the bytes of
float8_e4m3fn: not every device or compiler can convert that type, but all can shift its bits into place.
"""

import jax
import jax.numpy as jnp

Cache = tuple[jax.Array, ...]
KV_CACHE_DTYPES = {"auto": None, "int8": jnp.int8, "fp8": jnp.uint8}
"""Dtypes of elements by the name of the option; auto: the compute dtype (on a CPU float32), no scales."""


def quantise(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x `[…, D]` in eight bits and its scales `[…]` float32: a vector's largest element becomes the largest number.

    An element is off by at most half a scale in int8, by 2⁻⁴ of itself (or 2⁻¹⁰ scales) in fp8. Zeros stay zeros.
    """
    whole = jnp.dtype(dtype) == jnp.int8
    largest = 127.0 if whole else float(jnp.finfo(jnp.float8_e4m3fn).max)
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / largest
    ratio = jnp.clip(x / jnp.where(scale > 0, scale, 1.0)[..., None], -largest, largest)
    if whole:
        return jnp.round(ratio).astype(jnp.int8), scale
    return jax.lax.bitcast_convert_type(ratio.astype(jnp.float8_e4m3fn), jnp.uint8), scale


def quantised(cache: Cache) -> bool:
    """True for a cache in eight bits."""
    return len(cache) == 4


def entries(key: jax.Array, value: jax.Array, cache: Cache) -> Cache:
    """New keys and values `[B, H_kv, …, D]` in the form in which `cache` holds them."""
    if not quantised(cache):
        return key.astype(cache[0].dtype), value.astype(cache[1].dtype)
    (key, key_scale), (value, value_scale) = (quantise(x, cache[0].dtype) for x in (key, value))
    return key, value, key_scale, value_scale


def widened(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Elements of a cache for a matrix product, exactly."""
    if x.dtype != jnp.uint8:
        return x.astype(dtype)
    bits = x.astype(jnp.int32)
    bits = jax.lax.shift_left(bits & 0x80, 24) | jax.lax.shift_left(bits & 0x7F, 20)
    return (jax.lax.bitcast_convert_type(bits, jnp.float32) * 2.0**120).astype(dtype)


def write_columns(cache: Cache, new: Cache, column: jax.Array | int) -> Cache:
    """The cache with `entries` of T tokens, `[B, H_kv, T, …]`, from `column` on (one, or `[B]`); in place under jit."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.ndim(column):
            return jax.lax.dynamic_update_slice_in_dim(old, new, column, 2)
        row = lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 1)  # noqa: E731
        return jax.vmap(row)(old, new, column)

    return tuple(write(*arrays) for arrays in zip(cache, new, strict=True))
