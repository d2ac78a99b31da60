"""Softmax attention of whole sequences one head after the other: the form that XLA's CPU backend is fast at.

There, batched products of small matrices run at a fraction of the speed of plain ones, and `[B, H, T, T]` arrays of
scores leave the caches. Here a loop takes one key/value head of one row at a time, in two dimensions, and its backward
pass computes the scores anew, as `[keys, queries]`: of a plain product's operands only the second is fast transposed.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.kernels.attention import NEGATIVE

_UNSEEN = -NEGATIVE  # log-sum-exp of a query that sees no key: all its weights come out as 0


def head_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array,
    *,
    scale: jax.Array | float,
    window: jax.Array | int = 0,
    alibi_slopes: jax.Array | None = None,
    positions: jax.Array | None = None,
    starts: jax.Array | None = None,
) -> jax.Array:
    """Causal attention with grouped keys and values: `attention` under `attention_mask(key_mask, T, window, starts)`.

    query `[B, H, T, D]`; key, value `[B, H_kv, T, D]` with H a multiple of H_kv; key_mask bool `[B, T]`; `window` > 0
    limits what a query sees to so many positions; `alibi_slopes` `[H]` adds slope · key position, with
    `positions` `[B, T]`; `starts` int `[B, T]` is the first column that each query of a packed row sees. Products take
    operands in the query's dtype and are summed in float32, and all else is float32. It keeps query, key, value, output
    and one number per query for its gradients. Returns `[B, H, T, D]` in the query's dtype; rows that see no key are 0.
    It works on the arrays of one device; models/attend.py splits rows and heads over a mesh, through
    jaxrlhf.sharding.map_shards.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    bias = jnp.where(key_mask.astype(bool), 0.0, NEGATIVE)[:, None, None]
    if alibi_slopes is not None:
        assert positions is not None
        slopes = alibi_slopes.astype(jnp.float32).reshape(kv_heads, group, 1)
        bias = bias + slopes * positions[:, None, None].astype(jnp.float32)
    bias = jnp.broadcast_to(bias, (batch, kv_heads, group, length)).reshape(-1, group, length)
    flat = (query.reshape(-1, group, length, width), *(x.reshape(-1, length, width) for x in (key, value)))
    if starts is not None:
        starts = jnp.repeat(starts, kv_heads, axis=0)
    flat = (x.astype(query.dtype) for x in flat)
    return _attend(*flat, bias, starts, jnp.float32(scale), jnp.int32(window)).reshape(query.shape)


def _dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`a · b` or `a · bᵀ`, rounded to the narrower dtype of the two and summed in float32.

    It is a batch of one, because remat policies that keep plain products are not to keep scores.
    """
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    dims = ((2,), (2 if transposed else 1,)), ((0,), (0,))
    operands = a.astype(dtype)[None], b.astype(dtype)[None]
    return jax.lax.dot_general(*operands, dims, preferred_element_type=jnp.float32)[0]


def _causal(query: jax.Array, key: jax.Array, window: jax.Array) -> jax.Array:
    """Float32 0 where a query in one column may see a key in another, else NEGATIVE."""
    distance = query - key
    return jnp.where((distance >= 0) & ((distance < window) | (window <= 0)), 0.0, NEGATIVE)


@jax.custom_vjp
def _attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    starts: jax.Array | None,
    scale: jax.Array,
    window: jax.Array,
) -> jax.Array:
    """query `[N, G, T, D]`: what shares each of N key/value heads.

    key, value `[N, T, D]`; bias `[N, G, T]`; starts `[N, T]` or None.
    """
    return _forward(query, key, value, bias, starts, scale, window)[0]


def _forward(query, key, value, bias, starts, scale, window):
    columns = jnp.arange(key.shape[1])
    causal = _causal(columns[:, None], columns, window)
    heads = (query, key, value, bias), starts
    output, log_sum = jax.lax.map(lambda head: _forward_head(causal, scale, *head), heads)
    return output, (query, key, value, bias, starts, scale, window, output, log_sum)


def _forward_head(
    causal: jax.Array, scale: jax.Array, head: tuple[jax.Array, ...], starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Output `[G, T, D]` and log-sum-exp `[G, T]`."""
    query, key, value, bias = head
    group, length, width = query.shape
    if starts is not None:
        causal = jnp.where(jnp.arange(length) >= starts[:, None], causal, NEGATIVE)
    scores = _dot(query.reshape(-1, width), key, transposed=True).reshape(group, length, length)
    scores = scores * scale + bias[:, None] + causal
    largest = jnp.maximum(scores.max(-1, keepdims=True), NEGATIVE)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    seen = largest > NEGATIVE / 2
    output = _dot(weights.reshape(-1, length), value).reshape(query.shape)
    output = jnp.where(seen, output / total, 0.0).astype(query.dtype)
    return output, jnp.where(seen, largest + jnp.log(total), _UNSEEN)[..., 0]


def _backward(kept, grad):
    query, key, value, bias, starts, scale, window, output, log_sum = kept
    columns = jnp.arange(key.shape[1])
    causal = _causal(columns, columns[:, None], window)
    along = (grad.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
    heads = (query, key, key.swapaxes(1, 2), value, bias, log_sum, along, grad), starts
    gradients = jax.lax.map(lambda head: _backward_head(causal, scale, *head), heads)
    grad_query, grad_key, grad_value = (x.astype(query.dtype) for x in gradients)
    return grad_query.swapaxes(1, 2).reshape(query.shape), grad_key, grad_value, None, None, None, None


def _backward_head(
    causal: jax.Array, scale: jax.Array, head: tuple[jax.Array, ...], starts: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by query `[D, G·T]`, key and value `[T, D]`; scores and weights are `[T (keys), G, T]` here."""
    query, key, key_transposed, value, bias, log_sum, along, grad = head
    group, length, width = query.shape
    if starts is not None:
        causal = jnp.where(jnp.arange(length)[:, None] >= starts, causal, NEGATIVE)
    queries, grads = query.reshape(-1, width), grad.reshape(-1, width)
    scores = _dot(key, queries, transposed=True).reshape(length, group, length)
    weights = jnp.exp(scores * scale + bias.T[:, :, None] + causal[:, None] - log_sum)
    by_weight = _dot(value, grads, transposed=True).reshape(weights.shape)
    by_score = (weights * (by_weight - along) * scale).reshape(length, -1)
    return _dot(key_transposed, by_score), _dot(by_score, queries), _dot(weights.reshape(length, -1), grads)


_attend.defvjp(_forward, _backward)
