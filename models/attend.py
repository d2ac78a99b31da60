"""Attention as the layers call it: which kernel runs, and how its rows and heads are split over a mesh."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
    varies,
    write_columns,
)
from jaxrlhf.sharding import map_shards, platform


@contextmanager
def _as_input_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f"attention_implementation: {error}") from error


def _by_heads(
    function: Callable[..., tuple[jax.Array, ...]],
    query: jax.Array,
    held: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    slopes: jax.Array | None,
    updated: int = 0,
) -> tuple[jax.Array, ...]:
    """`function(query, held, rows, slopes)`, each device with its own rows and heads.

    query `[B, H, …]`; held, each `[B, H_kv, …]`; rows, each `[B, …]`. Gives an output shaped as query, and new values
    of the last `updated` of held. Query heads go where their key/value head is; where all share one, they are split by
    themselves.
    """
    kv_heads = held[0].shape[1]
    heads = ("batch", "kv_heads", "heads" if kv_heads == 1 else None)
    grouped = query.reshape(query.shape[0], kv_heads, -1, *query.shape[2:])
    arrays = [grouped, *held, *rows]
    axes = [(*heads, *[None] * (query.ndim - 2))]
    axes += [("batch", "kv_heads", *[None] * (x.ndim - 2)) for x in held]
    axes += [("batch", *[None] * (x.ndim - 1)) for x in rows]
    if slopes is not None:  # with rows of their own, so that they are split as the heads of the query are
        arrays.append(jnp.broadcast_to(slopes.reshape(kv_heads, -1), grouped.shape[:3]))
        axes.append(heads)

    def local(grouped, *rest):
        own, given, slopes = rest[: len(held)], rest[len(held) : len(held) + len(rows)], rest[len(held) + len(rows) :]
        query = grouped.reshape(grouped.shape[0], -1, *grouped.shape[3:])
        output, *new = function(query, own, given, slopes[0][0].reshape(-1) if slopes else None)
        return output.reshape(grouped.shape), *new

    back = range(1 + len(held) - updated, 1 + len(held))
    output, *new = map_shards(local, arrays, axes, out=(0, *back))
    return output.reshape(query.shape), *new


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
    facts = {"dtype": query.dtype, "head_dim": query.shape[-1], "alibi": alibi_slopes is not None}
    with _as_input_error():
        options = {"implementation": choose("decode_attention", implementation, **facts)}
    options |= {"scale": scale, "window": window}
    length = jnp.broadcast_to(column + 1, start.shape)
    if options["implementation"] == "xla":
        cache = write_columns(cache, entries(key, value, cache), column)
        options |= {"alibi_slopes": alibi_slopes, "scales": cache[2:] or None}
        return decode_attention(query[:, :, 0], *cache[:2], start, length, **options)[:, :, None], cache

    def call(query, held, rows, slopes):
        key, value, *cache = held
        output, cache = append_attention(query, key, value, tuple(cache), *rows, alibi_slopes=slopes, **options)
        return output, *cache

    held = key[:, :, 0], value[:, :, 0], *cache
    with _as_input_error():
        output, *cache = _by_heads(call, query[:, :, 0], held, (start, length), alibi_slopes, updated=len(cache))
    return output[:, :, None], tuple(cache)


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
    prefill: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Training, scoring and prefill: causal attention of whole sequences, real where `key_mask` `[B, T]` is.

    query `[B, H, T, D]`; key, value `[B, H_kv, T, D]`; `positions` `[B, T]` for ALiBi. `prefill`: a cache is
    written, so rows are padded on the left. "auto" takes one head after the other on a CPU (kernels/head_attention.py),
    elsewhere what kernels/choice.py says of training or of prefill. Kernels other than XLA's want
    the real columns of a row beside each other and, for ALiBi, positions that count them: other rows come out as NaN.
    InputError for an implementation that cannot run here, or for dropout with one other than XLA's.
    """
    drops = dropout_key is not None and dropout_rate > 0
    if drops and implementation not in ("auto", "xla"):
        raise InputError(
            f"attention_implementation={implementation!r} has no dropout, but attention_dropout={dropout_rate}: take "
            "'xla', or turn dropout off (--disable_dropout)"
        )
    kernel = "prefill_attention" if prefill else "flash_attention"
    if not drops and implementation == "auto" and platform() == "cpu":
        log_once(f"{kernel}: head by head: a CPU is slow at batched small products")

        def call_head(query, held, rows, slopes):
            options = {"scale": scale, "window": window, "alibi_slopes": slopes, "positions": rows[1]}
            return (head_attention(query, *held, rows[0], **options),)

        return _by_heads(call_head, query, (key, value), (key_mask, positions), alibi_slopes)[0]
    if not drops:
        facts = {"dtype": query.dtype, "head_dim": query.shape[-1], "alibi": alibi_slopes is not None}
        with _as_input_error():
            implementation = choose(kernel, implementation, **facts, varies=varies(scale, window))
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

    def call(query, held, rows, slopes):
        options = {"scale": scale, "window": window, "alibi_slopes": slopes, "implementation": implementation}
        return (flash_attention(query, *held, *rows, **options),)

    start, length, unfit = _span(key_mask)
    if alibi_slopes is not None:
        columns = jnp.arange(key_mask.shape[1])
        unfit |= (key_mask & (positions != columns - start[:, None])).any(1)
    with _as_input_error():
        (output,) = _by_heads(call, query, (key, value), (start, length), alibi_slopes)
    return jnp.where(unfit[:, None, None, None], jnp.nan, output)
