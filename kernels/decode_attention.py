"""Decode attention: one query per row against the live columns of a key/value cache, split over the cache.

Each program of the kernel reads one share of one row's live columns once for all query heads of a key/value head, with
a running softmax in float32 registers; shares are combined after it (Dao et al. 2023, "Flash-Decoding").
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxrlhf.kernels import pallas
from jaxrlhf.kernels.attention import attention
from jaxrlhf.kernels.choice import choose
from jaxrlhf.kernels.pallas import LOG_ZERO, ceil_div, dot, load, pl, power_of_two, store

MAX_HEAD_DIM = 256
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DecodeBlocks:
    """How the kernel cuts its work."""

    columns: int
    """Cache columns per step; a power of two of at least 16."""
    splits: int
    """Shares of a row's live columns, each worked through by its own program."""
    num_warps: int = 4
    num_stages: int = 3
    """Blocks of keys and values under way at a time."""

    def __post_init__(self) -> None:
        if self.columns < 16 or self.columns != power_of_two(self.columns):
            raise ValueError(f"columns={self.columns} of DecodeBlocks must be a power of two of at least 16")
        if self.splits < 1:
            raise ValueError(f"splits={self.splits} of DecodeBlocks must be at least 1")


def decode_blocks(
    head_dim: int, dtype: jnp.dtype, *, programs: int, cache_length: int, device: str | None = None
) -> DecodeBlocks:
    """Blocks for `programs` = B · H_kv pairs on a `device` (a key of pallas.MULTIPROCESSORS; the one at hand).

    Keys and values of a step are 32 KiB, so that those in flight cover the latency of the memory, and rows are split
    until every multiprocessor has two programs, or a share is down to two steps.
    """
    device = device or pallas.device_name()
    row = power_of_two(head_dim) * jnp.dtype(dtype).itemsize
    columns = max(16, min(128, 16 * 1024 // row, power_of_two(cache_length)))
    wanted = math.ceil(2 * pallas.MULTIPROCESSORS[device] / programs)
    splits = max(1, min(wanted, cache_length // (2 * columns)))
    room = pallas.SHARED_MEMORY[device] // (2 * columns * row) - 1
    # Float32 products are no matter of matrix units: with four warps they would spill registers.
    num_warps = 8 if jnp.dtype(dtype) == jnp.float32 else 4
    return DecodeBlocks(columns, splits, num_warps, max(1, min(3, room)))


def _check(query, key, value, start, length, slopes) -> None:
    if query.ndim != 3 or key.ndim != 4 or value.shape != key.shape:
        raise ValueError(
            "decode_attention takes query [B, H, D] and key and value [B, H_kv, S, D]; "
            f"found {query.shape}, {key.shape} and {value.shape}"
        )
    (batch, heads, width), (key_batch, kv_heads, _, key_width) = query.shape, key.shape
    if (batch, width) != (key_batch, key_width) or heads % kv_heads:
        raise ValueError(
            f"query {query.shape} does not fit key {key.shape}: B and D must be equal, H a multiple of H_kv"
        )
    for name, x, shape in (("start", start, (batch,)), ("length", length, (batch,)), ("slopes", slopes, (heads,))):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; for query {query.shape} it must be {shape}")


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    window: int = 0,
    alibi_slopes: jax.Array | None = None,
    implementation: str = "auto",
    blocks: DecodeBlocks | None = None,
) -> jax.Array:
    """Attention of each row's newest token, which stands in cache column `length` - 1.

    query `[B, H, D]`; key, value `[B, H_kv, S, D]`, H a multiple of H_kv; `start`, `length` int `[B]`: columns start …
    length - 1 are live, and of those with `window` > 0 the last `window`. `alibi_slopes` `[H]` adds slope · column.
    Softmax in float32. Returns `[B, H, D]` in the query's dtype; rows without a live column are 0.

    `implementation`: "xla", "pallas" (reads live columns only, whatever the others hold; NVIDIA, or interpreted on
    CPU), or "auto" (kernels/choice.py). Raises ValueError for shapes, dtypes or head sizes that do not fit.
    """
    _check(query, key, value, start, length, alibi_slopes)
    width = query.shape[-1]
    chosen = choose("decode_attention", implementation, dtype=key.dtype, head_dim=width, alibi=alibi_slopes is not None)
    first = jnp.maximum(start, 0)
    if window > 0:
        first = jnp.maximum(first, length - window)
    length = jnp.minimum(length, key.shape[2])
    if chosen == "xla":
        return _reference(query, key, value, first, length, scale, alibi_slopes)
    if width > MAX_HEAD_DIM or jnp.dtype(key.dtype).name not in DTYPES:
        raise ValueError(
            f"implementation='pallas' of decode_attention takes head sizes up to {MAX_HEAD_DIM} in "
            f"{', '.join(DTYPES)}; found {width} in {key.dtype}: take 'xla'"
        )
    blocks = blocks or decode_blocks(width, key.dtype, programs=key.shape[0] * key.shape[1], cache_length=key.shape[2])
    return _kernel(query, key, value, first, length, scale, alibi_slopes, blocks)


def _reference(query, key, value, first, length, scale, slopes) -> jax.Array:
    """The same in plain jnp; reads all columns."""
    columns = jnp.arange(key.shape[2])[None]
    mask = (columns >= first[:, None]) & (columns < length[:, None])
    positions = columns - (length[:, None] - 1)  # of distances, the nearest keys' scores lose no digits
    output = attention(
        query[:, :, None],
        key,
        value,
        mask[:, None, None],
        scale=scale,
        alibi_slopes=slopes,
        positions=positions,
    )
    return output[:, :, 0]


def decode_attention_share(*refs, blocks: DecodeBlocks, group: int, width: int, scale: float, alibi: bool) -> None:
    """One share of the columns of one row and key/value head; references are blocks of what `_kernel` passes."""
    q_ref, k_ref, v_ref, first_ref, length_ref, *rest = refs
    slopes_ref, outputs = (rest[0], rest[1:]) if alibi else (None, rest)
    rows, padded = q_ref.shape
    real_rows, real_width = jnp.arange(rows) < group, jnp.arange(padded) < width
    corner = real_rows[:, None] & real_width[None]
    first, length = first_ref[()], length_ref[()]
    share = ceil_div(ceil_div(jnp.maximum(length - first, 0), blocks.splits), blocks.columns) * blocks.columns
    low = first + pl.program_id(2) * share
    high = jnp.minimum(low + share, length)
    query = load(q_ref, corner)
    slopes = load(slopes_ref, real_rows) if alibi else None

    def step(i: jax.Array, carry: tuple) -> tuple:
        output, top, total = carry
        begin = low + i * blocks.columns
        columns = begin + jnp.arange(blocks.columns)
        inside = columns < high
        there = pl.ds(begin, blocks.columns), slice(None)
        keys = load(k_ref.at[there], inside[:, None] & real_width[None])
        scores = dot(query, keys.T) * scale
        if alibi:
            scores += slopes[:, None] * (columns - (length - 1)).astype(jnp.float32)[None]
        scores = jnp.where(inside[None], scores, LOG_ZERO)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.where(inside[None], jnp.exp(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        values = load(v_ref.at[there], inside[:, None] & real_width[None])
        output = output * shrink[:, None] + dot(weights.astype(values.dtype), values)
        return output, new_top, total * shrink + weights.sum(1)

    nothing = jnp.zeros(rows, jnp.float32)
    carry = jnp.zeros((rows, padded), jnp.float32), nothing + LOG_ZERO, nothing
    steps = ceil_div(jnp.maximum(high - low, 0), blocks.columns)
    output, top, total = jax.lax.fori_loop(0, steps, step, carry)
    store(outputs[0], output / jnp.where(total > 0, total, 1.0)[:, None], corner)
    if blocks.splits > 1:
        store(outputs[1], jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), LOG_ZERO), real_rows)


def _kernel(query, key, value, first, length, scale, slopes, blocks: DecodeBlocks) -> jax.Array:
    batch, heads, width = query.shape
    kv_heads, cache_length = key.shape[1:3]
    group = heads // kv_heads
    rows, padded = max(16, power_of_two(group)), max(16, power_of_two(width))  # the least that matrix units take
    per_row = pl.BlockSpec((None,), lambda b, h, s: (b,))
    cache = pl.BlockSpec((None, None, cache_length, padded), lambda b, h, s: (b, h, 0, 0))
    arrays = [query.reshape(batch, kv_heads, group, width), key, value, first, length]
    in_specs = [pl.BlockSpec((None, None, rows, padded), lambda b, h, s: (b, h, 0, 0)), cache, cache, per_row, per_row]
    if slopes is not None:
        arrays.append(slopes.astype(jnp.float32).reshape(kv_heads, group))
        in_specs.append(pl.BlockSpec((None, rows), lambda b, h, s: (h, 0)))
    splits, one = blocks.splits, blocks.splits == 1
    out_shape = [
        jax.ShapeDtypeStruct((batch, kv_heads, splits, group, width), query.dtype if one else jnp.float32),
        jax.ShapeDtypeStruct((batch, kv_heads, splits, group), jnp.float32),
    ]
    out_specs = [
        pl.BlockSpec((None, None, None, rows, padded), lambda b, h, s: (b, h, s, 0, 0)),
        pl.BlockSpec((None, None, None, rows), lambda b, h, s: (b, h, s, 0)),
    ]
    outputs = pallas.launch(
        partial(
            decode_attention_share,
            blocks=blocks,
            group=group,
            width=width,
            scale=float(scale),
            alibi=slopes is not None,
        ),
        arrays,
        grid=(batch, kv_heads, splits),
        in_specs=in_specs,
        out_specs=out_specs[:1] if one else out_specs,
        out_shape=out_shape[:1] if one else out_shape,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    if one:
        return outputs[0].reshape(query.shape)
    shares, log_total = outputs
    top = log_total.max(2, keepdims=True)
    weights = jnp.where(log_total > LOG_ZERO / 2, jnp.exp(log_total - top), 0.0)
    weights /= jnp.maximum(weights.sum(2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (shares * weights[..., None]).sum(2).astype(query.dtype).reshape(query.shape)
