"""Attention as the layers call it: which kernel runs, and how its work is split over a mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.errors import InputError
from jaxrlhf.kernels import choose, decode_attention
from jaxrlhf.sharding import map_shards


def _choose(kernel: str, implementation: str, query: jax.Array, alibi: bool) -> str:
    try:
        return choose(kernel, implementation, dtype=query.dtype, head_dim=query.shape[-1], alibi=alibi)
    except ValueError as error:
        raise InputError(f"attention_implementation: {error}") from error


def _by_heads(
    function: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    length: jax.Array,
    slopes: jax.Array | None,
) -> jax.Array:
    """`function(query, key, value, start, length, slopes)`, each device with its own rows and heads.

    Query heads go where their key/value head is; where all share one, they are split by themselves.
    """
    kv_heads = key.shape[1]
    inner = "heads" if kv_heads == 1 else None
    grouped = query.reshape(query.shape[0], kv_heads, -1, *query.shape[2:])
    query_axes = ("batch", "kv_heads", inner, *[None] * (query.ndim - 2))
    cache_axes = ("batch", "kv_heads", None, None)
    arrays = [grouped, key, value, start, length]
    axes = [query_axes, cache_axes, cache_axes, ("batch",), ("batch",)]
    if slopes is not None:
        arrays.append(slopes.reshape(kv_heads, -1))
        axes.append(("kv_heads", inner))

    def local(grouped, key, value, start, length, slopes=None):
        query = grouped.reshape(grouped.shape[0], -1, *grouped.shape[3:])
        slopes = None if slopes is None else slopes.reshape(-1)
        return function(query, key, value, start, length, slopes).reshape(grouped.shape)

    return map_shards(local, arrays, axes, out=0).reshape(query.shape)


def attend_to_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    column: jax.Array,
    *,
    scale: float,
    window: int,
    alibi_slopes: jax.Array | None,
    implementation: str,
) -> jax.Array:
    """Decoding: query `[B, H, 1, D]` of the token in cache `column` (one, or `[B]`) on columns `start` … `column`.

    key, value `[B, H_kv, S, D]`. Returns `[B, H, 1, D]`; see kernels/decode_attention.py. InputError for an
    implementation that cannot run here.
    """
    implementation = _choose("decode_attention", implementation, query, alibi_slopes is not None)

    def call(query, key, value, start, length, slopes):
        options = {"scale": scale, "window": window, "alibi_slopes": slopes, "implementation": implementation}
        return decode_attention(query, key, value, start, length, **options)

    length = jnp.broadcast_to(column + 1, start.shape)
    arrays = query[:, :, 0], key, value, start, length, alibi_slopes
    return (call(*arrays) if implementation == "xla" else _by_heads(call, *arrays))[:, :, None]
