"""Decode attention: one query per row against the live columns of a key/value cache, split over the cache.

Each program of the kernel reads one share of one row's live columns once for all query heads of a key/value head, with
a running softmax in float32 registers; shares are combined after it (Dao et al. 2023, "Flash-Decoding"). The newest
token's key and value may come with the query: the kernel that reads a row's columns then writes that one too, in place.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxrlhf.kernels import decode_tpu, pallas
from jaxrlhf.kernels.attention import NEGATIVE, attention
from jaxrlhf.kernels.choice import decide
from jaxrlhf.kernels.kv_cache import Cache, entries, quantised, widened, write_columns
from jaxrlhf.kernels.pallas import ceil_div, dot, load, pl, power_of_two, store

QUANTISED = ("int8", "uint8")


@dataclass(frozen=True)
class DecodeBlocks:
    """Block sizes of the kernel."""

    columns: int
    """Cache columns per step; a power of two of at least 16."""
    splits: int
    """Shares of a row's live columns; one program computes each."""
    num_warps: int = 4
    num_stages: int = 3
    """Blocks of keys and values in flight at a time."""

    def __post_init__(self) -> None:
        pallas.check_blocks(self, "columns")
        if self.splits < 1:
            raise ValueError(f"splits={self.splits} of DecodeBlocks must be at least 1")


def decode_blocks(
    head_dim: int,
    dtype: jnp.dtype,
    *,
    programs: int,
    cache_length: int,
    device: pallas.Device | None = None,
) -> DecodeBlocks:
    """Blocks for `programs` = B · H_kv pairs on a `device` (the one at hand).

    Keys and values of a step are 16 KiB in the compute `dtype` (8 KiB in float32): a few of them in flight cover the
    latency of the memory, and registers hold them without spilling. Rows are split until every multiprocessor has two
    programs, or a share is down to two steps.
    """
    device = device or pallas.device()
    single = jnp.dtype(dtype) == jnp.float32
    row = power_of_two(head_dim) * jnp.dtype(dtype).itemsize
    room = (4 if single else 8) * 1024
    columns = max(16, min(128, room // row, power_of_two(cache_length)))
    wanted = math.ceil(2 * device.multiprocessors / programs)
    splits = max(1, min(wanted, cache_length // (2 * columns)))
    stages = device.shared_memory // (2 * columns * row) - 1
    # Float32 products are no matter of matrix units: fewer warps or more stages would spill registers.
    if single:
        return DecodeBlocks(columns, splits, *((8, max(1, min(2, stages))) if row <= 512 else (16, 1)))
    return DecodeBlocks(columns, splits, 4, max(1, min(3, stages)))


def _check(query, cache, start, length, slopes, new=()) -> None:
    key, value = cache[:2]
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
    shapes = [("start", start, (batch,)), ("length", length, (batch,)), ("slopes", slopes, (heads,))]
    shapes += [(name, x, key.shape[:3]) for name, x in zip(("key_scale", "value_scale"), cache[2:], strict=False)]
    shapes += [(name, x, (batch, kv_heads, width)) for name, x in zip(("new_key", "new_value"), new, strict=False)]
    for name, x, shape in shapes:
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; for query {query.shape} it must be {shape}")
    if (key.dtype.name in QUANTISED) != quantised(cache) or value.dtype != key.dtype:
        raise ValueError(
            f"a cache of {key.dtype} and {value.dtype} with {len(cache) - 2} scales: keys and values must be of one "
            f"dtype, and {' and '.join(QUANTISED)} (float8_e4m3fn) go with a key and a value scale, others without"
        )


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    window: int = 0,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    implementation: str = "auto",
    blocks: DecodeBlocks | None = None,
) -> jax.Array:
    """Attention of each row's newest token, which stands in cache column `length` - 1.

    query `[B, H, D]`; key, value `[B, H_kv, S, D]`, H a multiple of H_kv, with `scales` `[B, H_kv, S]` each where they
    are quantised (kernels/kv_cache.py); `start`, `length` int `[B]`: columns start … length - 1 are live,
    and of those with `window` > 0 the last `window`. `softcap` turns scores s into softcap · tanh(s / softcap), in
    "xla" only. `alibi_slopes` `[H]` adds slope · column. Softmax in float32.
    Returns `[B, H, D]` in the query's dtype; rows without a live column are 0.

    `implementation`: "xla", "pallas" (reads live columns only, whatever the others hold; NVIDIA, TPU, or interpreted on
    CPU), or "auto" (kernels/choice.py). Raises ValueError for shapes, dtypes or head sizes that do not fit. It works on
    the arrays of one device; models/attend.py splits rows and heads over a mesh, through jaxrlhf.sharding.map_shards.
    """
    cache = (key, value, *(scales or ()))
    _check(query, cache, start, length, alibi_slopes)
    options = {"scale": scale, "window": window, "slopes": alibi_slopes, "softcap": softcap}
    return _attend(query, None, cache, start, length, implementation, blocks, **options)[0]


def append_attention(
    query: jax.Array,
    new_key: jax.Array,
    new_value: jax.Array,
    cache: Cache,
    start: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    window: int = 0,
    alibi_slopes: jax.Array | None = None,
    implementation: str = "auto",
    blocks: DecodeBlocks | None = None,
) -> tuple[jax.Array, Cache]:
    """`decode_attention` after the newest token's key and value `[B, H_kv, D]` were written at column `length` - 1.

    Returns its result and the cache (kernels/kv_cache.py), which is updated in place under jit where its old value is
    not used again; "pallas" writes it in the kernel itself. A column beyond the cache is its last one; a row of
    length 0 has nothing to keep, and may get the new column as its first. On a mesh as `decode_attention`.
    """
    _check(query, cache, start, length, alibi_slopes, (new_key, new_value))
    options = {"scale": scale, "window": window, "slopes": alibi_slopes}
    new = entries(new_key, new_value, cache)
    return _attend(query, new, cache, start, length, implementation, blocks, **options)


def _attend(query, new, cache, start, length, implementation, blocks, *, scale, window, slopes, softcap=None):
    key, width = cache[0], query.shape[-1]
    facts = {"dtype": query.dtype, "head_dim": width, "alibi": slopes is not None, "softcap": softcap is not None}
    chosen = decide("decode_attention", implementation, **facts).implementation
    length = jnp.minimum(length, key.shape[2])
    first = jnp.maximum(start, 0)
    if window > 0:
        first = jnp.maximum(first, length - window)
    if chosen == "xla":
        if new is not None:
            cache = write_columns(cache, tuple(x[:, :, None] for x in new), jnp.maximum(length - 1, 0))
        return _reference(query, cache, first, length, scale, slopes, softcap), cache
    pallas.check_taken("decode_attention", query.dtype, width, None if quantised(cache) else key.dtype)
    programs = key.shape[0] * key.shape[1]
    blocks = blocks or decode_blocks(width, query.dtype, programs=programs, cache_length=key.shape[2])
    step = 2 * blocks.columns * power_of_two(width) * query.dtype.itemsize
    pallas.check_shared_memory("decode_attention", blocks, blocks.num_stages * step)
    return _kernel(query, new, cache, first, length, float(scale), slopes, blocks)


def _reference(query, cache, first, length, scale, slopes, softcap) -> jax.Array:
    """The same in plain jnp; reads all columns."""
    key, value, *scales = cache
    columns = jnp.arange(key.shape[2])[None]
    mask = (columns >= first[:, None]) & (columns < length[:, None])
    positions = columns - (length[:, None] - 1)  # of distances, the nearest keys' scores lose no digits
    output = attention(
        query[:, :, None],
        key,
        value,
        mask[:, None, None],
        scale=scale,
        softcap=softcap,
        alibi_slopes=slopes,
        positions=positions,
        scales=tuple(scales) or None,
    )
    return output[:, :, 0]


@dataclass(frozen=True)
class _Task:
    """Static facts that the kernel's body is specialised for."""

    blocks: DecodeBlocks
    group: int
    width: int
    scale: float
    alibi: bool
    quantised: bool
    appends: bool


def decode_attention_share(*refs, task: _Task) -> None:
    """One share of the columns of one row and key/value head; references are blocks of what `_kernel` passes."""
    blocks, refs = task.blocks, iter(refs)
    take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
    q_ref, first_ref, length_ref = take(3)
    (slopes_ref,) = take(1) if task.alibi else (None,)
    count = 4 if task.quantised else 2
    cache_refs = take(count)
    new_refs = take(count) if task.appends else []
    outputs = list(refs)
    rows, padded = q_ref.shape
    real_rows, real_width = jnp.arange(rows) < task.group, jnp.arange(padded) < task.width
    corner = real_rows[:, None] & real_width[None]
    first, length = first_ref[()], length_ref[()]
    last = length - 1
    share = ceil_div(ceil_div(jnp.maximum(length - first, 0), blocks.splits), blocks.columns) * blocks.columns
    low = first + pl.program_id(2) * share
    high = jnp.minimum(low + share, length)
    query = load(q_ref, corner)
    slopes = load(slopes_ref, real_rows) if task.alibi else None
    new = [load(ref, real_width) for ref in new_refs[:2]] + [ref[()] for ref in new_refs[2:]]

    def step(i: jax.Array, carry: tuple) -> tuple:
        output, top, total = carry
        begin = low + i * blocks.columns
        columns = begin + jnp.arange(blocks.columns)
        inside = columns < high
        newest = columns == last
        old = inside & ~newest if task.appends else inside

        def read(i: int) -> jax.Array:
            """Reads these columns of the keys (0), the values (1) or their scales (2, 3)."""
            if i > 1:
                x = load(cache_refs[i].at[pl.ds(begin, blocks.columns)], old)
                return jnp.where(newest, new[i], x) if task.appends else x
            x = load(cache_refs[i].at[pl.ds(begin, blocks.columns), :], old[:, None] & real_width[None])
            x = widened(x, query.dtype)
            return jnp.where(newest[:, None], widened(new[i], query.dtype)[None], x) if task.appends else x

        scores = dot(query, read(0).T) * task.scale
        if task.quantised:
            scores *= read(2)[None]
        if slopes is not None:
            scores += slopes[:, None] * (columns - last).astype(jnp.float32)[None]
        scores = jnp.where(inside[None], scores, NEGATIVE)
        new_top = jnp.maximum(top, scores.max(1))
        weights = jnp.where(inside[None], jnp.exp(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total * shrink + weights.sum(1)
        if task.quantised:
            weights *= read(3)[None]
        return output * shrink[:, None] + dot(weights.astype(query.dtype), read(1)), new_top, total

    nothing = jnp.zeros(rows, jnp.float32)
    carry = jnp.zeros((rows, padded), jnp.float32), nothing + NEGATIVE, nothing
    steps = ceil_div(jnp.maximum(high - low, 0), blocks.columns)
    output, top, total = jax.lax.fori_loop(0, steps, step, carry)
    store(outputs[0], output / jnp.where(total > 0, total, 1.0)[:, None], corner)
    if blocks.splits > 1:
        store(outputs[1], jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), NEGATIVE), real_rows)
    if task.appends:
        owner = (low <= last) & (last < high)
        here = (last >= 0) & jnp.where(first < length, owner, pl.program_id(2) == 0)
        for ref, x in zip(outputs[-count:], new, strict=True):
            at = pl.ds(jnp.maximum(last, 0), 1)
            if x.ndim:
                store(ref.at[at, :], x[None], here & real_width[None])
            else:
                store(ref.at[at], jnp.full(1, x), jnp.full(1, here))


def _kernel(query, new, cache, first, length, scale, slopes, blocks: DecodeBlocks) -> tuple[jax.Array, Cache]:
    batch, heads, width = query.shape
    kv_heads, cache_length = cache[0].shape[1:3]
    group = heads // kv_heads
    rows, padded = max(16, power_of_two(group)), max(16, power_of_two(width))  # the least that matrix units take
    splits, one = blocks.splits, blocks.splits == 1
    task = _Task(blocks, group, width, scale, slopes is not None, quantised(cache), new is not None)

    def launch(query, first, length, slopes, cache, new, interpret: bool) -> tuple[jax.Array, Cache]:
        new = new or ()
        per_row = pl.BlockSpec((None,), lambda b, h, s: (b,))
        vector = pl.BlockSpec((None, None, cache_length), lambda b, h, s: (b, h, 0))
        matrix = pl.BlockSpec((None, None, cache_length, padded), lambda b, h, s: (b, h, 0, 0))
        cache_specs = [matrix, matrix, vector, vector][: len(cache)]
        number = pl.BlockSpec((None, None), lambda b, h, s: (b, h))
        element = pl.BlockSpec((None, None, padded), lambda b, h, s: (b, h, 0))
        arrays = [query.reshape(batch, kv_heads, group, width), first, length]
        in_specs = [pl.BlockSpec((None, None, rows, padded), lambda b, h, s: (b, h, 0, 0)), per_row, per_row]
        if slopes is not None:
            arrays.append(slopes.astype(jnp.float32).reshape(kv_heads, group))
            in_specs.append(pl.BlockSpec((None, rows), lambda b, h, s: (h, 0)))
        out_shape = [jax.ShapeDtypeStruct((batch, kv_heads, splits, group, width), query.dtype if one else jnp.float32)]
        out_specs = [pl.BlockSpec((None, None, None, rows, padded), lambda b, h, s: (b, h, s, 0, 0))]
        if not one:
            out_shape.append(jax.ShapeDtypeStruct((batch, kv_heads, splits, group), jnp.float32))
            out_specs.append(pl.BlockSpec((None, None, None, rows), lambda b, h, s: (b, h, s, 0)))
        aliases = {}
        if task.appends:
            aliases = {len(arrays) + i: len(out_shape) + i for i in range(len(cache))}
            out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache]
            out_specs += cache_specs
        outputs = pallas.launch(
            partial(decode_attention_share, task=task),
            [*arrays, *cache, *new],
            grid=(batch, kv_heads, splits),
            in_specs=in_specs + cache_specs + [element, element, number, number][: len(new)],
            out_specs=out_specs,
            out_shape=out_shape,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            aliases=aliases,
            interpret=interpret,
        )
        written = tuple(outputs[-len(cache) :]) if task.appends else cache
        output = outputs[0] if one else _combine(*outputs[:2])
        return output.astype(query.dtype).reshape(query.shape), written

    return pallas.dispatch(
        launch, partial(decode_tpu.attend, scale=scale), query, first, length, slopes, tuple(cache), new
    )


def _combine(shares: jax.Array, log_total: jax.Array) -> jax.Array:
    """`[B, H_kv, group, D]` over all columns, from what came of shares of them, `[B, H_kv, splits, group, …]`."""
    top = log_total.max(2, keepdims=True)
    weights = jnp.where(log_total > NEGATIVE / 2, jnp.exp(log_total - top), 0.0)
    weights /= jnp.maximum(weights.sum(2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (shares * weights[..., None]).sum(2)
