"""Causal attention over whole sequences, forward and backward, without a `[T, T]` array in memory.

Each program of a kernel holds one block of queries (or, for the gradients of keys and values, of keys) and goes over
the blocks of the other side that its mask leaves, with a running softmax in float32 registers (Dao 2023, arXiv
2307.08691).
"""

import importlib
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxrlhf.kernels import flash_tpu, pallas
from jaxrlhf.kernels.attention import NEGATIVE, attention, attention_mask, block_scores
from jaxrlhf.kernels.choice import LIBRARIES, decide
from jaxrlhf.kernels.pallas import ceil_div, dot, load, pl, power_of_two, store

NO_WINDOW = 1 << 30


@dataclass(frozen=True)
class FlashBlocks:
    """Block sizes of a kernel, powers of two of at least 16."""

    queries: int
    keys: int
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        pallas.check_blocks(self, "queries", "keys")

    def shared_memory(self, head_dim: int, dtype: jnp.dtype) -> int:
        """Bytes that a kernel with these blocks holds at a time."""
        rows = self.queries + 2 * self.num_stages * self.keys
        return rows * power_of_two(head_dim) * jnp.dtype(dtype).itemsize


def flash_blocks(
    head_dim: int, dtype: jnp.dtype, length: int, device: pallas.Device | None = None
) -> tuple[FlashBlocks, FlashBlocks]:
    """Blocks of the forward and of the backward kernels for a `device` (the one at hand).

    They are as large as registers hold without spilling, or as shared memory has room for.
    """
    device = device or pallas.device()
    width = power_of_two(head_dim)
    if jnp.dtype(dtype) == jnp.float32:
        sizes = ((32, 16, 8) if width <= 64 else (16, 16, 4)), ((16, 16, 4) if 64 < width <= 128 else (32, 16, 8))
    elif width <= 128:
        sizes = ((128, 64, 8), (64, 64, 8))
    else:
        sizes = ((64, 32, 8), (32, 32, 8))
    # Two steps at least: loops of one are unrolled, and want more registers.
    most = max(16, power_of_two(length) // 2)
    wanted = (FlashBlocks(min(queries, most), min(keys, most), warps) for queries, keys, warps in sizes)
    forward, backward = (_fitting(blocks, head_dim, dtype, device.shared_memory) for blocks in wanted)
    return forward, backward


def _fitting(blocks: FlashBlocks, head_dim: int, dtype: jnp.dtype, room: int) -> FlashBlocks:
    while blocks.shared_memory(head_dim, dtype) > room and max(blocks.num_stages - 1, blocks.queries // 16 - 1) > 0:
        if blocks.num_stages > 1:
            blocks = replace(blocks, num_stages=1)
        else:
            blocks = replace(blocks, queries=blocks.queries // 2, keys=max(16, blocks.keys // 2))
    return blocks


def varies(scale: jax.Array | float, window: jax.Array | int) -> bool:
    """True if scale or window are not plain numbers, as in a scan over layers that differ in them."""
    return any(isinstance(x, Tracer) for x in (scale, window))


def _check(query, key, value, start, length, slopes) -> None:
    if query.ndim != 4 or key.ndim != 4 or value.shape != key.shape:
        raise ValueError(
            "flash_attention takes query [B, H, T, D] and key and value [B, H_kv, T, D]; "
            f"found {query.shape}, {key.shape} and {value.shape}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value of flash_attention have the dtypes {query.dtype}, {key.dtype} and {value.dtype}; "
            "give all in one"
        )
    (batch, heads, *rest), (key_batch, kv_heads, *key_rest) = query.shape, key.shape
    if batch != key_batch or rest != key_rest or heads % kv_heads:
        raise ValueError(
            f"query {query.shape} does not fit key {key.shape}: B, T and D must be equal, H a multiple of H_kv"
        )
    starts = (batch, rest[0]) if start.ndim == 2 else (batch,)
    for name, x, shape in (("start", start, starts), ("length", length, (batch,)), ("slopes", slopes, (heads,))):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; for query {query.shape} it must be {shape}")


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    scale: jax.Array | float,
    window: jax.Array | int = 0,
    alibi_slopes: jax.Array | None = None,
    implementation: str = "auto",
    blocks: tuple[FlashBlocks, FlashBlocks] | None = None,
) -> jax.Array:
    """Causal attention of whole sequences, differentiable in query, key and value.

    query `[B, H, T, D]`; key, value `[B, H_kv, T, D]`, H a multiple of H_kv; `start`, `length` int `[B]`: keys in
    columns start … length - 1 are live. In packed rows `start` is `[B, T]`, for each query the first column of its
    segment, and never decreases along a row. With `window` > 0 a query sees the last `window` columns including its
    own. `alibi_slopes` `[H]` adds slope · key column. Softmax in float32. Returns `[B, H, T, D]` in the query's dtype;
    queries that see no key are 0.

    `implementation`: "xla" (kernels/attention.py); "pallas" (NVIDIA, or interpreted on CPU); "cudnn" (NVIDIA, 16-bit;
    rows with start > 0 come out as NaN) and "tokamax" (the library of that name; NVIDIA, or its XLA form on CPU), both
    without ALiBi or packed rows, and with `scale` and `window` as numbers; "auto" (kernels/choice.py: as for training,
    of rows that are padded on the right). Raises ValueError for what does not fit. It works on the arrays of one
    device; models/attend.py splits rows and heads over a mesh, through jaxrlhf.sharding.map_shards.
    """
    _check(query, key, value, start, length, alibi_slopes)
    if not query.size:
        return jnp.zeros_like(query)
    width, alibi = query.shape[-1], alibi_slopes is not None
    facts = {"dtype": query.dtype, "head_dim": width, "alibi": alibi}
    facts |= {"varies": varies(scale, window), "packed": start.ndim == 2}
    chosen = decide("flash_attention", implementation, **facts).implementation
    if chosen == "xla":
        return _reference(query, key, value, start, length, scale, window, alibi_slopes)
    if chosen in LIBRARIES:
        return _library(chosen, query, key, value, start, length, scale, window, alibi)
    pallas.check_taken("flash_attention", query.dtype, width)
    size = query.shape[2]
    window = jnp.asarray(window, jnp.int32).reshape(1)
    scalars = (
        jnp.clip(start, 0, size).astype(jnp.int32),
        jnp.clip(length, 0, size).astype(jnp.int32),
        jnp.where(window > 0, window, NO_WINDOW),
        jnp.asarray(scale, jnp.float32).reshape(1),
        jnp.zeros(query.shape[1]) if alibi_slopes is None else alibi_slopes.astype(jnp.float32),
    )
    blocks = blocks or flash_blocks(width, query.dtype, size)
    for one in blocks:
        pallas.check_shared_memory("flash_attention", one, one.shared_memory(width, query.dtype))
    return _flash(query, key, value, scalars, alibi, blocks)


def _reference(query, key, value, start, length, scale, window, slopes) -> jax.Array:
    """The same in plain jnp, with scores `[B, H, T, T]`."""
    columns = jnp.arange(key.shape[2])[None]
    if start.ndim == 2:
        mask = attention_mask(columns < length[:, None], query.shape[2], window=window, starts=start)
        positions = columns - start
    else:
        live = (columns >= start[:, None]) & (columns < length[:, None])
        mask = attention_mask(live, query.shape[2], window=window)
        positions = jnp.broadcast_to(columns, live.shape)
    return attention(query, key, value, mask, scale=scale, alibi_slopes=slopes, positions=positions)


def _library(name, query, key, value, start, length, scale, window, alibi) -> jax.Array:
    """The same by cuDNN or tokamax, which leave anything in rows that see no key."""
    width, size = query.shape[-1], query.shape[2]
    problems = {
        "ALiBi": alibi,
        "a scale or window that differs between layers": varies(scale, window),
    }
    if name == "cudnn":
        takes = "bfloat16 or float16, head sizes that are multiples of 8 up to 256 (128 before Hopper)"
        problems |= {
            f"dtype {query.dtype}": query.dtype not in (jnp.bfloat16, jnp.float16),
            f"head size {width}": width % 8 or width > 256,
        }
    else:
        takes = "one scale and one window for all layers, without ALiBi"
    found = [problem for problem, bad in problems.items() if bad]
    if found:
        raise ValueError(
            f"implementation={name!r} of flash_attention does not take {', '.join(found)}; it takes {takes}: "
            "take 'xla' or 'pallas'"
        )
    attend = _cudnn if name == "cudnn" else _tokamax
    options = {"scale": float(scale), "local_window_size": (int(window) - 1, 0) if window > 0 else None}
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    output = attend(query, key, value, start, is_causal=True, key_value_seq_lengths=length, **options).swapaxes(1, 2)
    rows = jnp.arange(size)
    oldest = jnp.maximum(rows - (window if window > 0 else NO_WINDOW) + 1, start[:, None])
    sees = oldest <= jnp.minimum(rows, length[:, None] - 1)
    output = jnp.where(sees[:, None, :, None], output, 0)
    # cuDNN's padding is on the right: a row padded on the left must not pass for a result.
    return jnp.where((start <= 0)[:, None, None, None], output, jnp.nan) if name == "cudnn" else output


def _cudnn(query, key, value, start, **options) -> jax.Array:
    del start  # see _library
    lengths = jnp.full(query.shape[:1], query.shape[1], jnp.int32)
    return jax.nn.dot_product_attention(query, key, value, query_seq_lengths=lengths, implementation="cudnn", **options)


def _tokamax(query, key, value, start, **options) -> jax.Array:
    """One named kernel of theirs, so that what it cannot do is an error and never XLA's form with its `[T, T]`."""
    try:
        tokamax = importlib.import_module("tokamax")
    except ImportError as error:
        raise ValueError(
            "implementation='tokamax' of flash_attention needs the package tokamax (Python 3.12, JAX 0.11.1 or newer), "
            f"which cannot be imported here ({error}): pip install 'jaxrlhf[tokamax]', or take 'xla' or 'pallas'"
        ) from error
    kernel = "xla"
    if jax.default_backend() == "gpu":
        hopper = float(jax.devices()[0].compute_capability) >= 9  # before it their Mosaic form has no gradient
        kernel = "mosaic" if hopper and query.dtype in (jnp.bfloat16, jnp.float16) else "triton"
    live = (jnp.arange(key.shape[1]) >= start[:, None])[:, None, None]
    try:
        return tokamax.dot_product_attention(query, key, value, mask=live, implementation=kernel, **options)
    except NotImplementedError as error:
        raise ValueError(
            f"implementation='tokamax' of flash_attention: its kernel {kernel!r} does not take head size "
            f"{query.shape[-1]} in {query.dtype} here ({error}): take 'xla' or 'pallas'"
        ) from error


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(query, key, value, scalars, alibi, blocks) -> jax.Array:
    return _forward(query, key, value, scalars, alibi, blocks)[0]


def _flash_forward(query, key, value, scalars, alibi, blocks):
    output, log_total = _forward(query, key, value, scalars, alibi, blocks)
    return output, (query, key, value, scalars, output, log_total)


def _flash_backward(alibi, blocks, saved, gradient):
    query, key, value, scalars, output, log_total = saved
    delta = (gradient.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
    arrays = query, key, value, gradient.astype(query.dtype), log_total, delta, *scalars
    return *_backward(arrays, alibi, blocks[1]), None


_flash.defvjp(_flash_forward, _flash_backward)


@dataclass(frozen=True)
class _Shape:
    """Static facts of a launch."""

    length: int
    width: int
    group: int
    alibi: bool
    blocks: FlashBlocks
    packed: bool
    """The first live key differs between the queries of a row."""


def _block(ref, begin, size: int, shape: _Shape, *lead) -> jax.Array:
    """`size` rows of a `[…, T, D]` reference from row `begin`, zeros beyond its edges."""
    there = (begin + jnp.arange(size) < shape.length)[:, None]
    inside = there & (jnp.arange(ref.shape[-1]) < shape.width)[None]
    return load(ref.at[(*lead, pl.ds(begin, size), slice(None))], inside)


def _vector(ref, begin, size: int, shape: _Shape, *lead) -> jax.Array:
    return load(ref.at[(*lead, pl.ds(begin, size))], begin + jnp.arange(size) < shape.length)


def _starts(ref, begin, shape: _Shape) -> tuple[jax.Array, jax.Array]:
    """First key column that any query of the block from row `begin` on sees, and that of each query."""
    if not shape.packed:
        start = ref[()]
        return start, start
    return ref[begin], _vector(ref, begin, shape.blocks.queries, shape)[:, None]


def _keys_of(begin, shape: _Shape, start, length, window) -> tuple[jax.Array, jax.Array]:
    """First key column, and number of key blocks, that queries from row `begin` on see."""
    low = jnp.maximum(start, begin - window + 1)
    high = jnp.minimum(length, begin + shape.blocks.queries)
    return low, ceil_div(jnp.maximum(high - low, 0), shape.blocks.keys)


def flash_attention_forward(
    q_ref, k_ref, v_ref, start_ref, length_ref, window_ref, scale_ref, slope_ref, o_ref, log_ref, *, shape: _Shape
) -> None:
    size, keys = shape.blocks.queries, shape.blocks.keys
    begin = pl.program_id(2) * size
    rows = begin + jnp.arange(size)
    first, start = _starts(start_ref, begin, shape)
    bounds = start, length_ref[()], window_ref[()], scale_ref[()]
    slope = slope_ref[()]
    query = _block(q_ref, begin, size, shape)
    low, steps = _keys_of(begin, shape, first, *bounds[1:3])

    def step(i, carry):
        output, top, total = carry
        column = low + i * keys
        columns = column + jnp.arange(keys)
        products = dot(query, _block(k_ref, column, keys, shape).T)
        scores, seen = block_scores(products, rows[:, None], columns[None], bounds, slope, shape.alibi)
        new_top = jnp.maximum(top, jnp.where(seen, scores, NEGATIVE).max(1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
        shrink = jnp.exp(top - new_top)
        values = _block(v_ref, column, keys, shape)
        output = output * shrink[:, None] + dot(weights.astype(values.dtype), values)
        return output, new_top, total * shrink + weights.sum(1)

    nothing = jnp.zeros(size, jnp.float32)
    carry = jnp.zeros((size, q_ref.shape[-1]), jnp.float32), nothing + NEGATIVE, nothing
    output, top, total = jax.lax.fori_loop(0, steps, step, carry)
    safe = jnp.where(total > 0, total, 1.0)
    there = rows < shape.length
    corner = there[:, None] & (jnp.arange(q_ref.shape[-1]) < shape.width)[None]
    at = pl.ds(begin, size)
    store(o_ref.at[at, :], output / safe[:, None], corner)
    store(log_ref.at[at], top + jnp.log(safe), there)


def flash_attention_query_gradient(
    q_ref, k_ref, v_ref, do_ref, log_ref, delta_ref, start_ref, length_ref, window_ref, scale_ref, slope_ref, dq_ref,
    *, shape: _Shape
) -> None:  # fmt: skip
    size, keys = shape.blocks.queries, shape.blocks.keys
    begin = pl.program_id(2) * size
    rows = begin + jnp.arange(size)
    first, start = _starts(start_ref, begin, shape)
    bounds = start, length_ref[()], window_ref[()], scale_ref[()]
    slope = slope_ref[()]
    query, upstream = _block(q_ref, begin, size, shape), _block(do_ref, begin, size, shape)
    log_total, delta = _vector(log_ref, begin, size, shape), _vector(delta_ref, begin, size, shape)
    low, steps = _keys_of(begin, shape, first, *bounds[1:3])

    def step(i, gradient):
        column = low + i * keys
        columns = column + jnp.arange(keys)
        key = _block(k_ref, column, keys, shape)
        scores, seen = block_scores(dot(query, key.T), rows[:, None], columns[None], bounds, slope, shape.alibi)
        weights = jnp.where(seen, jnp.exp(scores - log_total[:, None]), 0.0)
        inner = dot(upstream, _block(v_ref, column, keys, shape).T)
        return gradient + dot((weights * (inner - delta[:, None])).astype(key.dtype), key)

    gradient = jax.lax.fori_loop(0, steps, step, jnp.zeros((size, q_ref.shape[-1]), jnp.float32)) * bounds[3]
    corner = (rows < shape.length)[:, None] & (jnp.arange(q_ref.shape[-1]) < shape.width)[None]
    store(dq_ref.at[pl.ds(begin, size), :], gradient, corner)


def _end_of_queries(start_ref, begin, high, size: int, shape: _Shape) -> jax.Array:
    """The row, whole blocks after `begin`, from which on no query before `high` sees `size` keys from `begin` on."""

    def sees(row):
        return (row < high) & (start_ref[jnp.minimum(row, shape.length - 1)] < begin + size)

    return jax.lax.while_loop(sees, lambda row: row + shape.blocks.queries, begin)


def flash_attention_key_gradient(
    q_ref, k_ref, v_ref, do_ref, log_ref, delta_ref, start_ref, length_ref, window_ref, scale_ref, slope_ref, dk_ref,
    dv_ref, *, shape: _Shape
) -> None:  # fmt: skip
    """Gradients of one block of keys and values, over the queries of all heads that share it; scores lie transposed."""
    size, queries = shape.blocks.keys, shape.blocks.queries
    begin = pl.program_id(2) * size
    columns = begin + jnp.arange(size)
    start = 0 if shape.packed else start_ref[()]
    length, window, scale = length_ref[()], window_ref[()], scale_ref[()]
    bounds = start, length, window, scale
    key, value = _block(k_ref, begin, size, shape), _block(v_ref, begin, size, shape)
    live = (begin < length) & (begin + size > start)
    high = jnp.where(live, jnp.minimum(shape.length, begin + size - 1 + window), begin)
    if shape.packed:
        high = _end_of_queries(start_ref, begin, high, size, shape)
    steps = ceil_div(jnp.maximum(high - begin, 0), queries)

    def step(i, carry):
        key_gradient, value_gradient = carry
        head = jax.lax.div(i, steps)
        row = begin + (i - head * steps) * queries
        rows = row + jnp.arange(queries)
        query, upstream = (_block(ref, row, queries, shape, head) for ref in (q_ref, do_ref))
        log_total, delta = (_vector(ref, row, queries, shape, head) for ref in (log_ref, delta_ref))
        products = dot(key, query.T)
        scores, seen = block_scores(products, rows[None], columns[:, None], bounds, slope_ref[head], shape.alibi)
        seen &= (rows < shape.length)[None]
        if shape.packed:
            seen &= columns[:, None] >= _vector(start_ref, row, queries, shape)[None]
        weights = jnp.where(seen, jnp.exp(scores - log_total[None]), 0.0)
        value_gradient += dot(weights.astype(upstream.dtype), upstream)
        inner = dot(value, upstream.T)
        key_gradient += dot((weights * (inner - delta[None])).astype(query.dtype), query)
        return key_gradient, value_gradient

    nothing = jnp.zeros((size, k_ref.shape[-1]), jnp.float32)
    key_gradient, value_gradient = jax.lax.fori_loop(0, steps * shape.group, step, (nothing, nothing))
    corner = (columns < shape.length)[:, None] & (jnp.arange(k_ref.shape[-1]) < shape.width)[None]
    at = pl.ds(begin, size)
    store(dk_ref.at[at, :], key_gradient * scale, corner)
    store(dv_ref.at[at, :], value_gradient, corner)


def _specs(shape: _Shape) -> dict[str, "pl.BlockSpec"]:
    """Blocks of the grid's head (q, t), of its key/value head (k), of all its query heads (qs, ts), and scalars.

    Those of the first live key (start) are one per row or, for packed rows, one per query.
    """
    width = max(16, power_of_two(shape.width))
    size, group = shape.length, shape.group
    row = pl.BlockSpec((None,), lambda b, h, i: (b,))
    return {
        "q": pl.BlockSpec((None, None, size, width), lambda b, h, i: (b, h, 0, 0)),
        "t": pl.BlockSpec((None, None, size), lambda b, h, i: (b, h, 0)),
        "k": pl.BlockSpec((None, None, size, width), lambda b, h, i: (b, jax.lax.div(h, jnp.int32(group)), 0, 0)),
        "qs": pl.BlockSpec((None, None, group, size, width), lambda b, h, i: (b, h, 0, 0, 0)),
        "ts": pl.BlockSpec((None, None, group, size), lambda b, h, i: (b, h, 0, 0)),
        "row": row,
        "start": pl.BlockSpec((None, size), lambda b, h, i: (b, 0)) if shape.packed else row,
        "one": pl.BlockSpec((None,), lambda b, h, i: (0,)),
        "head": pl.BlockSpec((None,), lambda b, h, i: (h,)),
        "heads": pl.BlockSpec((None, group), lambda b, h, i: (h, 0)),
    }


def _forward(query, key, value, scalars, alibi, blocks) -> tuple[jax.Array, jax.Array]:
    batch, heads, length, width = query.shape
    shape = _Shape(length, width, heads // key.shape[1], alibi, blocks[0], scalars[0].ndim == 2)

    def launch(*arrays: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
        specs = _specs(shape)
        output, log_total = pallas.launch(
            partial(flash_attention_forward, shape=shape),
            arrays,
            grid=(batch, heads, pl.cdiv(length, blocks[0].queries)),
            in_specs=[specs[name] for name in ("q", "k", "k", "start", "row", "one", "one", "head")],
            out_specs=[specs["q"], specs["t"]],
            out_shape=[
                jax.ShapeDtypeStruct(query.shape, query.dtype),
                jax.ShapeDtypeStruct(query.shape[:3], jnp.float32),
            ],
            num_warps=blocks[0].num_warps,
            num_stages=blocks[0].num_stages,
            interpret=interpret,
        )
        return output, log_total

    return pallas.dispatch(launch, partial(flash_tpu.forward, alibi=alibi), query, key, value, *scalars)


def _backward(arrays, alibi, blocks: FlashBlocks) -> tuple[jax.Array, jax.Array, jax.Array]:
    launch = partial(_launch_backward, alibi=alibi, blocks=blocks)
    return pallas.dispatch(launch, partial(flash_tpu.backward, alibi=alibi), *arrays)


def _launch_backward(*arrays, alibi, blocks: FlashBlocks, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, gradient, log_total, delta, *scalars = arrays
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    shape = _Shape(length, width, heads // kv_heads, alibi, blocks, scalars[0].ndim == 2)
    specs = _specs(shape)
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, "interpret": interpret}
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    query_gradient = pallas.launch(
        partial(flash_attention_query_gradient, shape=shape),
        arrays,
        grid=(batch, heads, pl.cdiv(length, blocks.queries)),
        in_specs=[specs[name] for name in ("q", "k", "k", "q", "t", "t", "start", "row", "one", "one", "head")],
        out_specs=specs["q"],
        out_shape=like(query),
        **options,
    )
    grouped = lambda x: x.reshape(batch, kv_heads, shape.group, *x.shape[2:])  # noqa: E731
    slopes = scalars[-1].reshape(kv_heads, shape.group)
    arrays = grouped(query), key, value, grouped(gradient), grouped(log_total), grouped(delta), *scalars[:-1], slopes
    names = ("qs", "q", "q", "qs", "ts", "ts", "start", "row", "one", "one", "heads")
    key_gradient, value_gradient = pallas.launch(
        partial(flash_attention_key_gradient, shape=shape),
        arrays,
        grid=(batch, kv_heads, pl.cdiv(length, blocks.keys)),
        in_specs=[specs[name] for name in names],
        out_specs=[specs["q"]] * 2,
        out_shape=[like(key), like(value)],
        **options,
    )
    return query_gradient, key_gradient, value_gradient
