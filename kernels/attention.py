"""Softmax attention over whole sequences (training, scoring, prefill): the plain XLA reference."""

import jax
import jax.numpy as jnp

from jaxrlhf.kernels.kv_cache import widened

NEGATIVE = -1e30  # finite, so that rows without any key stay free of NaN


def attention_mask(
    key_mask: jax.Array,
    query_length: int,
    *,
    window: jax.Array | int | None = None,
    query_offset: jax.Array | int = 0,
    starts: jax.Array | None = None,
) -> jax.Array:
    """Boolean `[B, 1, T, S]`: which keys a query may see.

    Causal, real keys only (`key_mask` `[B, S]`), and, with `window` > 0, only the last `window` positions including
    the query's own. `query_offset` is the column of the first query, one for all rows or `[B]`. `starts` int `[B, T]`
    is the first column that each query may see, that of its segment in packed rows.
    """
    columns = jnp.arange(key_mask.shape[1])
    first = jnp.reshape(query_offset, (-1, 1, 1))
    distance = first + jnp.arange(query_length)[None, :, None] - columns[None, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= (distance < window) | (jnp.asarray(window) <= 0)
    if starts is not None:
        allowed = allowed & (columns >= starts[:, :, None])
    return allowed[:, None] & key_mask.astype(bool)[:, None, None, :]


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the last axis in float32; entries outside `mask` get 0, rows without any entry are all 0."""
    scores = jnp.where(mask, scores.astype(jnp.float32), NEGATIVE)
    weights = jnp.where(mask, jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))), 0.0)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def soft_capped(x: jax.Array, softcap: float | None) -> jax.Array:
    """softcap · tanh(x / softcap); `x` itself without a soft-cap."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def block_scores(products, rows, columns, bounds, slope, alibi: bool) -> tuple[jax.Array, jax.Array]:
    """Scores of one block of causal attention from its products, and which of them its mask leaves.

    `rows` of queries and `columns` of keys broadcast to it; `bounds` are start (one, or one per query), length, window
    and scale.
    """
    start, length, window, scale = bounds
    scores = products * scale
    if alibi:
        scores += slope * (columns - rows).astype(jnp.float32)
    seen = (columns <= rows) & (rows - columns < window) & (columns >= start) & (columns < length)
    return scores, seen


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: jax.Array | float,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    positions: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Multi-head attention with grouped keys and values.

    query `[B, H, T, D]`; key, value `[B, H_kv, S, D]`, of any dtype, with H a multiple of H_kv; mask boolean
    `[B, 1, T, S]`. `softcap` turns scores s into softcap · tanh(s / softcap).
    `alibi_slopes` `[H]` adds slope · key position, with `positions` `[B, S]`. `scales`, two `[B, H_kv, S]`, multiply
    keys and values that are quantised (kernels/kv_cache.py). Dropout acts on the attention weights
    when a key is given. Returns `[B, H, T, D]` in the query's dtype; rows that see no key are 0.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, length, head_dim)
    key, value = (widened(x, query.dtype) for x in (key, value))
    scores = jnp.einsum("bhgtd,bhsd->bhgts", grouped, key, preferred_element_type=jnp.float32) * scale
    if scales is not None:
        scores *= scales[0][:, :, None, None]
    scores = soft_capped(scores, softcap)
    if alibi_slopes is not None:
        assert positions is not None
        slopes = alibi_slopes.astype(jnp.float32).reshape(1, kv_heads, heads // kv_heads, 1, 1)
        scores = scores + slopes * positions[:, None, None, None, :].astype(jnp.float32)
    weights = masked_softmax(scores, mask[:, :, None])
    if dropout_key is not None and dropout_rate > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1 - dropout_rate), 0.0)
    if scales is not None:
        weights = jnp.where(mask[:, :, None], weights * scales[1][:, :, None, None], 0.0)
    # For one query XLA multiplies and adds elements, in the type of the result; products of more sum in float32 anyway.
    dtype = jnp.float32 if length == 1 else None
    output = jnp.einsum("bhgts,bhsd->bhgtd", weights.astype(query.dtype), value, preferred_element_type=dtype)
    return output.astype(query.dtype).reshape(batch, heads, length, head_dim)
