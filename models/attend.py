"""Attention as the layers call it: chooses the kernel and splits its rows and heads over a mesh."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

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
    live_attention,
    log_once,
    varies,
    write_columns,
)
from jaxrlhf.models.sequences import SequenceContext
from jaxrlhf.sharding import constrain, current_device, map_shards, platform, split


@dataclass(frozen=True)
class AttentionOptions:
    """Options of a layer's attention, and the kernel that computes it."""

    scale: jax.Array | float
    """Factor on the products of query and key."""
    window: jax.Array | int = 0
    """A query sees the last `window` positions, its own included; 0: all of them."""
    alibi_slopes: jax.Array | None = None
    """`[H]`: adds slope · key position to the scores."""
    implementation: str = "auto"
    """One of kernels.IMPLEMENTATIONS."""
    softcap: float | None = None
    """Scores s become softcap · tanh(s / softcap); only XLA's implementation has it."""

    def kernel(self, name: str, query: jax.Array, packed: bool = False, holes: bool = False) -> str:
        """The implementation of the kernel `name` for this query; InputError for one that cannot run here.

        `packed` and `holes` are those of `kernels.decide`.
        """
        with _as_input_error():
            return choose(
                name,
                self.implementation,
                dtype=query.dtype,
                head_dim=query.shape[-1],
                alibi=self.alibi_slopes is not None,
                varies=varies(self.scale, self.window),
                packed=packed,
                softcap=self.softcap is not None,
                holes=holes,
                device=current_device(),
            )


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
    """`function(query, held, rows, slopes)`, computed by each device for its own rows and heads.

    query `[B, H, …]`; held, each `[B, H_kv, …]`; rows, each `[B, …]`. Returns an output shaped as query, and new values
    of the last `updated` of held. Query heads go where their key/value head is. When all of them share one key/value
    head, they are split on their own.
    """
    kv_heads = held[0].shape[1]
    heads = ("batch", "kv_heads", "heads" if kv_heads == 1 else None)
    grouped = query.reshape(query.shape[0], kv_heads, -1, *query.shape[2:])
    arrays = [grouped, *held, *rows]
    axes = [(*heads, *[None] * (query.ndim - 2))]
    axes += [("batch", "kv_heads", *[None] * (x.ndim - 2)) for x in held]
    axes += [("batch", *[None] * (x.ndim - 1)) for x in rows]
    if slopes is not None:  # with an axis for rows, so that they are split like the query's heads
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
    options: AttentionOptions,
) -> tuple[jax.Array, Cache]:
    """Decoding: writes one token's key and value into the cache, and attends to the cache.

    On a CPU, the implementation "auto" is that of kernels/live_blocks.py.

    Args:
        query: `[B, H, 1, D]`; it sees columns `start` … `column`.
        key: `[B, H_kv, 1, D]`.
        value: `[B, H_kv, 1, D]`.
        cache: The layer's cache (kernels/kv_cache.py).
        start: First live column of each row, int `[B]`.
        column: Column to write, int scalar or `[B]`.
        options: With `scale` and `window` as plain numbers.

    Returns:
        The output `[B, H, 1, D]` in the query's dtype, and the new cache.

    Raises:
        InputError: The implementation cannot run here.
    """
    implementation = options.kernel("decode_attention", query)
    length = jnp.broadcast_to(column + 1, start.shape)
    scale, window = float(options.scale), int(options.window)
    if implementation == "xla":
        keys, values, *scales = cache = write_columns(cache, entries(key, value, cache), column)
        if options.implementation == "auto" and platform() == "cpu":
            return _by_live_blocks(query[:, :, 0], cache, start, length, options)[:, :, None], cache
        pair = (scales[0], scales[1]) if scales else None
        attend = partial(decode_attention, scale=scale, window=window, softcap=options.softcap, implementation="xla")
        output = attend(query[:, :, 0], keys, values, start, length, alibi_slopes=options.alibi_slopes, scales=pair)
        return output[:, :, None], cache

    def call(query, held, rows, slopes):
        (key, value, *cache), (start, length) = held, rows
        attend = partial(append_attention, scale=scale, window=window, implementation=implementation)
        output, new = attend(query, key, value, tuple(cache), start, length, alibi_slopes=slopes)
        return output, *new

    held = key[:, :, 0], value[:, :, 0], *cache
    with _as_input_error():
        output, *new = _by_heads(call, query[:, :, 0], held, (start, length), options.alibi_slopes, len(cache))
    return output[:, :, None], tuple(new)


def _by_live_blocks(
    query: jax.Array, cache: Cache, start: jax.Array, length: jax.Array, options: AttentionOptions
) -> jax.Array:
    """Attention of query `[B, H, D]` to the cache on CPUs."""

    def call(query, cache, rows, slopes):
        output = live_attention(
            query,
            tuple(cache),
            *rows,
            scale=float(options.scale),
            window=int(options.window),
            softcap=options.softcap,
            alibi_slopes=slopes,
        )
        return (output,)

    return _by_heads(call, query, cache, (start, length), options.alibi_slopes)[0]


def attend_to_sequence(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: SequenceContext,
    options: AttentionOptions,
    *,
    prefill: bool = False,
    dropout: tuple[float, jax.Array] | None = None,
) -> jax.Array:
    """Training, scoring and prefill: causal attention of whole sequences.

    The implementation "auto" computes one head after the other on a CPU (kernels/head_attention.py), unless scores are
    soft-capped. Elsewhere it is the one that kernels/choice.py names for training or for prefill. Kernels other than
    XLA's need the real columns of a row side by side and, for ALiBi, positions that count those of a segment: "auto"
    takes them where the context says so (`contiguous`). One that was asked for returns NaN for other rows.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, H_kv, T, D]`.
        value: `[B, H_kv, T, D]`.
        context: Real columns, positions (for ALiBi) and segments.
        options: Scale, window and implementation.
        prefill: A cache is being written, so rows are padded on the left.
        dropout: Rate and key of the dropout on the attention weights; only XLA's implementation has it.

    Returns:
        `[B, H, T, D]` in the query's dtype.

    Raises:
        InputError: The implementation cannot run here, has no dropout, or cannot see segments.
    """
    kernel = "prefill_attention" if prefill else "flash_attention"
    key, value = (_for_every_part(x, query.shape[1]) for x in (key, value))
    if dropout is not None and dropout[0] > 0:
        if options.implementation not in ("auto", "xla"):
            raise InputError(
                f"attention_implementation={options.implementation!r} has no dropout, but attention_dropout="
                f"{dropout[0]}: use 'xla', or turn dropout off (--disable_dropout)"
            )
        implementation = "xla"
    elif options.implementation == "auto" and platform() == "cpu" and options.softcap is None:
        log_once(f"{kernel}: head by head: a CPU is slow at batched small products")
        return _head_by_head(query, key, value, context, options)
    else:
        facts = {"packed": context.starts is not None, "holes": not context.contiguous}
        dropout, implementation = None, options.kernel(kernel, query, **facts)
    if implementation == "xla":
        return _masked(query, key, value, context, options, dropout)
    return _on_spans(query, key, value, context, replace(options, implementation=implementation))


def _masked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: SequenceContext,
    options: AttentionOptions,
    dropout: tuple[float, jax.Array] | None,
) -> jax.Array:
    """Attention of whole sequences as plain XLA: any mask, with dropout."""
    mask = attention_mask(context.key_mask, query.shape[2], window=options.window, starts=context.starts)
    rate, dropout_key = dropout or (0.0, None)
    return attention(
        query,
        key,
        value,
        mask,
        scale=options.scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        positions=context.positions,
        dropout_rate=rate,
        dropout_key=dropout_key,
    )


def _on_spans(
    query: jax.Array, key: jax.Array, value: jax.Array, context: SequenceContext, options: AttentionOptions
) -> jax.Array:
    """Attention of whole sequences by a kernel that reads a row's real columns side by side; NaN for other rows."""
    start, length, unfit = _span(context.key_mask)
    if context.starts is not None:
        start = context.starts
    if context.contiguous:
        return _flash(query, key, value, start, length, options)
    if options.alibi_slopes is not None:
        columns = jnp.arange(query.shape[2])
        counted = columns - (start if start.ndim == 2 else start[:, None])
        unfit |= (context.key_mask & (context.positions != counted)).any(1)
    output = _flash(query, key, value, start, length, options)
    return jnp.where(unfit[:, None, None, None], jnp.nan, output)


def _for_every_part(x: jax.Array, heads: int) -> jax.Array:
    """Repeats key/value heads `[B, H_kv, T, D]` where the mesh splits the `heads` query heads into more parts.

    Each part then has key/value heads of its own. One key/value head stays as it is: `_by_heads` shares it.
    """
    kv_heads, parts = x.shape[1], split("heads", heads)
    copies = math.lcm(kv_heads, parts) // kv_heads
    if kv_heads == 1 or copies == 1 or heads % (kv_heads * copies):
        return x
    return constrain(jnp.repeat(x, copies, axis=1), "batch", "kv_heads", None, None)


def _head_by_head(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: SequenceContext,
    options: AttentionOptions,
) -> jax.Array:
    """`attend_to_sequence` on CPUs."""

    def call(query, held, rows, slopes):
        (key, value), (mask, positions, *starts) = held, rows
        attend = partial(
            head_attention, scale=options.scale, window=options.window, starts=starts[0] if starts else None
        )
        return (attend(query, key, value, mask, alibi_slopes=slopes, positions=positions),)

    rows = [context.key_mask, context.positions]
    if context.starts is not None:
        rows.append(context.starts)
    return _by_heads(call, query, (key, value), rows, options.alibi_slopes)[0]


def _span(mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A mask `[B, T]` as the first real column and the one after the last (0 and 0 if none), and whether it has holes.

    Each `[B]`.
    """
    count = mask.sum(1, dtype=jnp.int32)
    start = jnp.argmax(mask, axis=1).astype(jnp.int32)
    length = jnp.where(count > 0, mask.shape[1] - jnp.argmax(mask[:, ::-1], axis=1).astype(jnp.int32), 0)
    return start, length, count != length - start


def _flash(
    query: jax.Array, key: jax.Array, value: jax.Array, start: jax.Array, length: jax.Array, options: AttentionOptions
) -> jax.Array:
    """`attend_to_sequence` by `flash_attention`, of rows whose real columns are `start` … `length` - 1.

    `start` is `[B]`, or `[B, T]` for packed rows: that of each column's segment.
    """

    def call(query, held, rows, slopes):
        (key, value), (start, length) = held, rows
        numbers = {"scale": options.scale, "window": options.window}
        attend = partial(flash_attention, implementation=options.implementation, **numbers)
        return (attend(query, key, value, start, length, alibi_slopes=slopes),)

    with _as_input_error():
        return _by_heads(call, query, (key, value), (start, length), options.alibi_slopes)[0]
