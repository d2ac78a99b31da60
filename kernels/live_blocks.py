"""Decode attention in plain XLA for CPUs: long caches block by block, up to the longest live row.

There the time of a step is that of reading memory, and a server's cache is mostly empty. A block without a live column
of a row changes nothing of that row's result, not even its rounding, so a row does not depend on the others.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.kernels.attention import NEGATIVE, soft_capped
from jaxrlhf.kernels.kv_cache import Cache, widened

COLUMNS = 256
"""Cache columns of a block."""


def live_attention(
    query: jax.Array,
    cache: Cache,
    start: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
) -> jax.Array:
    """`decode_attention` (kernels/decode_attention.py) with a running softmax over blocks of columns, in float32.

    query `[B, H, D]`; start, length int `[B]`. A cache of at most COLUMNS columns is read whole. Returns `[B, H, D]` in
    the query's dtype.
    """
    batch, heads, width = query.shape
    kv_heads, columns = cache[0].shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, width)
    length = jnp.minimum(length, columns)
    first = jnp.maximum(start, length - window) if window > 0 else start
    slopes = None
    if alibi_slopes is not None:
        slopes = alibi_slopes.astype(jnp.float32).reshape(1, kv_heads, -1, 1)

    def score(key: jax.Array, scales: list[jax.Array], at: jax.Array, live: jax.Array) -> jax.Array:
        """Scores `[B, H_kv, g, s]` of the columns `at`; dead ones are NEGATIVE."""
        products = jnp.einsum("bhsd,bhgd->bhsg", key, grouped, preferred_element_type=jnp.float32)
        # The barrier keeps the keys on the left: with the query there, XLA first transposes all keys.
        scores = jax.lax.optimization_barrier(products).swapaxes(2, 3) * scale
        if scales:
            scores *= scales[0][:, :, None]
        scores = soft_capped(scores, softcap)
        if slopes is not None:
            scores += slopes * (at - (length[:, None] - 1)).astype(jnp.float32)[:, None, None]
        return jnp.where(live[:, None, None], scores, NEGATIVE)

    def weigh(weights: jax.Array, value: jax.Array, scales: list[jax.Array], live: jax.Array) -> jax.Array:
        if scales:
            weights *= jnp.where(live[:, None], scales[1], 0.0)[:, :, None]
        weights = weights.astype(query.dtype)
        return jnp.einsum("bhgs,bhsd->bhgd", weights, value, preferred_element_type=jnp.float32)

    def finished(output: jax.Array, total: jax.Array) -> jax.Array:
        output = output / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
        return output.reshape(query.shape).astype(query.dtype)

    if columns <= COLUMNS:
        key, value, *scales = cache
        key, value = (widened(x, query.dtype) for x in (key, value))
        at = jnp.arange(columns)
        live = (at >= first[:, None]) & (at < length[:, None])
        scores = score(key, scales, at, live)
        weights = jnp.where(live[:, None, None], jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        return finished(weigh(weights, value, scales, live), weights.sum(-1))

    def block(i: jax.Array, carry: tuple) -> tuple:
        output, top, total = carry
        begin = jnp.minimum(i * COLUMNS, columns - COLUMNS)  # the last block may begin within the one before it
        key, value, *scales = (jax.lax.dynamic_slice_in_dim(x, begin, COLUMNS, 2) for x in cache)
        key, value = (widened(x, query.dtype) for x in (key, value))
        at = begin + jnp.arange(COLUMNS)
        live = (at >= first[:, None]) & (at < length[:, None]) & (at >= i * COLUMNS)
        scores = score(key, scales, at, live)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(live[:, None, None], jnp.exp(scores - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(-1)
        return output * shrink[..., None] + weigh(weights, value, scales, live), new_top, total

    nothing = jnp.zeros(grouped.shape[:3], jnp.float32)
    carry = jnp.zeros(grouped.shape, jnp.float32), nothing + NEGATIVE, nothing
    begin = jnp.min(jnp.where(length > first, first, columns)) // COLUMNS
    end = -(-jnp.max(length) // COLUMNS)
    output, _, total = jax.lax.fori_loop(begin, end, block, carry)
    return finished(output, total)
