"""Attention as the layers call it: which kernel runs, and how its work is split over a mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrlhf.errors import InputError
from jaxrlhf.kernels import (
    Cache,
    append_attention,
    attention,
    attention_mask,
    choose,
    decode_attention,
    entries,
    flash_attention,
    head_attention,
    log_once,
    write_columns,
)
from jaxrlhf.sharding import map_shards, platform


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
    rows: tuple[jax.Array, jax.Array],
    slopes: jax.Array | None,
) -> jax.Array:
    """`function(query, key, value, *rows, slopes)`, each device with its own rows and heads; `rows` are `[B, …]`.

    Query heads go where their key/value head is; where all share one, they are split by themselves.
    """
    kv_heads = key.shape[1]
    inner = "heads" if kv_heads == 1 else None
    grouped = query.reshape(query.shape[0], kv_heads, -1, *query.shape[2:])
    query_axes = ("batch", "kv_heads", inner, *[None] * (query.ndim - 2))
    cache_axes = ("batch", "kv_heads", None, None)
    arrays = [grouped, key, value, *rows]
    axes = [query_axes, cache_axes, cache_axes, *(("batch", *[None] * (x.ndim - 1)) for x in rows)]
    if slopes is not None:  # with rows of their own, so that they are split as the heads of the query are
        arrays.append(jnp.broadcast_to(slopes.reshape(kv_heads, -1), grouped.shape[:3]))
        axes.append(query_axes[:3])

    def local(grouped, key, value, first, second, slopes=None):
        query = grouped.reshape(grouped.shape[0], -1, *grouped.shape[3:])
        slopes = None if slopes is None else slopes[0].reshape(-1)
        return function(query, key, value, first, second, slopes).reshape(grouped.shape)

    return map_shards(local, arrays, axes, out=0).reshape(query.shape)


def attend_to_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: Cache,
    start: jax.Array,
    column: jax.Array,
    *,
    scale: float,
    window: int,
    alibi_slopes: jax.Array | None,
    implementation: str,
) -> tuple[jax.Array, Cache]:
    """Decoding: write key, value `[B, H_kv, 1, D]` of one token at cache `column` (one, or `[B]`), and attend to it.

    query `[B, H, 1, D]` sees columns `start` … `column`. Returns `[B, H, 1, D]` and the cache; see
    kernels/decode_attention.py. InputError for an implementation that cannot run here.
    """
    implementation = _choose("decode_attention", implementation, query, alibi_slopes is not None)
    options = {"scale": scale, "window": window, "implementation": implementation}
    length = jnp.broadcast_to(column + 1, start.shape)
    if implementation == "xla":
        cache = write_columns(cache, entries(key, value, cache), column)
        held = {"alibi_slopes": alibi_slopes, "scales": cache[2:] or None}
        return decode_attention(query[:, :, 0], *cache[:2], start, length, **options, **held)[:, :, None], cache
    kv_heads = key.shape[1]
    inner = "heads" if kv_heads == 1 else None
    grouped = query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])
    arrays = [grouped, key[:, :, 0], value[:, :, 0], start, length, *cache]
    axes: list[tuple[str | None, ...]] = [("batch", "kv_heads", inner, None), *[("batch", "kv_heads", None)] * 2]
    axes += [("batch",), ("batch",), *(("batch", "kv_heads", *[None] * (x.ndim - 2)) for x in cache)]
    if alibi_slopes is not None:
        arrays.append(jnp.broadcast_to(alibi_slopes.reshape(kv_heads, -1), grouped.shape[:3]))
        axes.append(("batch", "kv_heads", inner))

    def local(grouped, key, value, start, length, *rest):
        cache, slopes = rest[: len(cache_at)], rest[len(cache_at) :]
        query = grouped.reshape(grouped.shape[0], -1, grouped.shape[-1])
        slopes = slopes[0][0].reshape(-1) if slopes else None
        output, cache = append_attention(query, key, value, cache, start, length, alibi_slopes=slopes, **options)
        return output.reshape(grouped.shape), *cache

    cache_at = tuple(range(5, 5 + len(cache)))
    output, *cache = map_shards(local, arrays, axes, out=(0, *cache_at))
    return output.reshape(query.shape), tuple(cache)


def _span(mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a mask `[B, T]`: its first real column, the one after its last (both 0 where there is none), and holes."""
    count = mask.sum(1, dtype=jnp.int32)
    start = jnp.argmax(mask, axis=1).astype(jnp.int32)
    length = jnp.where(count > 0, mask.shape[1] - jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32), 0)
    return start, length, count != length - start


def attend_to_sequence(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array,
    positions: jax.Array,
    *,
    scale: jax.Array | float,
    window: jax.Array | int,
    alibi_slopes: jax.Array | None,
    implementation: str,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Training, scoring and prefill: causal attention of whole sequences, real where `key_mask` `[B, T]` is.

    query `[B, H, T, D]`; key, value `[B, H_kv, T, D]`; `positions` `[B, T]` for ALiBi. "auto" takes one head after the
    other on a CPU (kernels/head_attention.py), elsewhere what kernels/choice.py says. Kernels other than XLA's want
    the real columns of a row beside each other and, for ALiBi, positions that count them: other rows come out as NaN.
    InputError for an implementation that cannot run here, or for dropout with one other than XLA's.
    """
    drops = dropout_key is not None and dropout_rate > 0
    if drops and implementation not in ("auto", "xla"):
        raise InputError(
            f"attention_implementation={implementation!r} has no dropout, but attention_dropout={dropout_rate}: take "
            "'xla', or turn dropout off (--disable_dropout)"
        )
    if not drops and implementation == "auto" and platform() == "cpu":
        log_once("flash_attention: head by head: a CPU is slow at batched small products")

        def call_head(query, key, value, key_mask, positions, slopes):
            options = {"scale": scale, "window": window, "alibi_slopes": slopes, "positions": positions}
            return head_attention(query, key, value, key_mask, **options)

        return _by_heads(call_head, query, key, value, (key_mask, positions), alibi_slopes)
    if not drops:
        implementation = _choose("flash_attention", implementation, query, alibi_slopes is not None)
    if drops or implementation == "xla":
        return attention(
            query,
            key,
            value,
            attention_mask(key_mask, query.shape[2], window=window),
            scale=scale,
            alibi_slopes=alibi_slopes,
            positions=positions,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )

    def call(query, key, value, start, length, slopes):
        options = {"scale": scale, "window": window, "alibi_slopes": slopes, "implementation": implementation}
        return flash_attention(query, key, value, start, length, **options)

    start, length, unfit = _span(key_mask)
    if alibi_slopes is not None:
        columns = jnp.arange(key_mask.shape[1])
        unfit |= (key_mask & (positions != columns - start[:, None])).any(1)
    try:
        output = _by_heads(call, query, key, value, (start, length), alibi_slopes)
    except ValueError as error:
        raise InputError(f"attention_implementation: {error}") from error
    return jnp.where(unfit[:, None, None, None], jnp.nan, output)
