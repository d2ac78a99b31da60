"""Decode attention in plain XLA for CPUs: long caches block by block, up to the longest live row.

There the time of a step is that of reading memory, and a server's cache is mostly empty. A block without a live column
of a row changes nothing of that row's result, not even its rounding, so a row does not depend on the others. The
arithmetic is float32: XLA's CPU backend is four times slower at these small products in bfloat16.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.kernels.attention import NEGATIVE, soft_capped
from jaxrlhf.kernels.kv_cache import Cache, widened

WHOLE = 512
"""Columns of the largest cache that is read as one block: a copy of a block costs more than its empty columns."""
COLUMNS = 128
"""Columns of a block of a larger cache; larger blocks leave the processor's cache."""


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

    query `[B, H, D]`; start, length int `[B]`. Returns `[B, H, D]` in the query's dtype.
    """
    kv_heads, columns = cache[0].shape[1:3]
    grouped = query.astype(jnp.float32).reshape(query.shape[0], kv_heads, -1, query.shape[2])
    length = jnp.minimum(length, columns)
    first = jnp.maximum(start, length - window) if window > 0 else start
    slopes = None if alibi_slopes is None else alibi_slopes.astype(jnp.float32).reshape(1, kv_heads, -1, 1)

    def attend(part: Cache, at: jax.Array, top: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weighted values and the sum of weights of the columns `at`, and the new top, the largest score so far."""
        (key, value), scales = (widened(x, jnp.dtype(jnp.float32)) for x in part[:2]), part[2:]
        live = ((at >= first[:, None]) & (at < length[:, None]))[:, None]
        products = jnp.einsum("bhsd,bhgd->bhsg", key, grouped)
        # The barrier keeps the keys on the left: with the query there, XLA first transposes all keys.
        scores = jax.lax.optimization_barrier(products).swapaxes(2, 3) * scale
        if scales:
            scores *= scales[0][:, :, None]
        scores = soft_capped(scores, softcap)
        if slopes is not None:
            scores += slopes * (at - (length[:, None] - 1)).astype(jnp.float32)[:, None, None]
        scores = jnp.where(live[:, None], scores, NEGATIVE)
        top = scores.max(-1) if top is None else jnp.maximum(top, scores.max(-1))
        weights = jnp.where(live[:, None], jnp.exp(scores - top[..., None]), 0.0)
        total = weights.sum(-1)
        if scales:
            weights *= jnp.where(live, scales[1], 0.0)[:, :, None]
        return jnp.einsum("bhgs,bhsd->bhgd", weights, value), total, top

    def block(i: jax.Array, carry: tuple) -> tuple:
        output, total, top = carry
        begin = jnp.minimum(i * COLUMNS, columns - COLUMNS)  # the last block may begin within the one before it
        part = tuple(jax.lax.dynamic_slice_in_dim(x, begin, COLUMNS, 2) for x in cache)
        at = begin + jnp.arange(COLUMNS)
        added, more, new_top = attend(part, jnp.where(at < i * COLUMNS, -1, at), top)
        shrink = jnp.exp(top - new_top)
        return output * shrink[..., None] + added, total * shrink + more, new_top

    if columns <= WHOLE:
        output, total, _ = attend(cache, jnp.arange(columns))
    else:
        nothing = jnp.zeros(grouped.shape, jnp.float32)
        carry = nothing, nothing[..., 0], nothing[..., 0] + NEGATIVE
        begin = jnp.min(jnp.where(length > first, first, columns)) // COLUMNS
        output, total, _ = jax.lax.fori_loop(begin, -(-jnp.max(length) // COLUMNS), block, carry)
    output = output / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return output.reshape(query.shape).astype(query.dtype)
