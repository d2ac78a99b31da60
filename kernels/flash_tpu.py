"""The flash-attention kernels on TPUs: the grid's last axis goes over the blocks of the other side that a mask leaves.

Bounds, scale and slopes lie in scalar memory, so that block indices stay within what is seen: other blocks are not
fetched. Sums stay in vector memory until the last step.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxrlhf.kernels import pallas
from jaxrlhf.kernels.attention import NEGATIVE, block_scores
from jaxrlhf.kernels.pallas import LANES, PyTree, Ref, dot, pl

QUERIES = 256
KEYS = 512


def _along(begin: jax.Array, size: int, axis: int) -> jax.Array:
    """Columns or rows from `begin` on, along one axis of a block."""
    shape = (size, 1) if axis == 0 else (1, size)
    return begin + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _real(ref: Ref, begin: jax.Array, start: jax.Array | int, length: jax.Array | int) -> jax.Array:
    """A block of rows, those outside of start … length - 1 as 0: they may hold anything."""
    x = ref[...]
    rows = _along(begin, x.shape[0], 0)
    return jnp.where((rows >= start) & (rows < length), x, 0)


def _starts(start_ref: Ref, edge_ref: Ref | None) -> tuple[jax.Array, jax.Array]:
    """The first key that any query of this block sees, and that of each query (`[queries, 1]`, or one for all)."""
    if edge_ref is None:
        start = start_ref[pl.program_id(0)]
        return start, start
    return start_ref[pl.program_id(0) * pl.num_programs(2) + pl.program_id(2)], edge_ref[...]


def _blocks_of_keys(row, start, length, window, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """First and last block of keys that the queries from `row` on may see."""
    low = jnp.maximum(start, row - window + 1)
    high = jnp.minimum(length, row + queries) - 1
    return jnp.maximum(low, 0) // keys, jnp.maximum(high, 0) // keys


def _blocks_of_queries(column, window, stop, queries: int, keys: int) -> tuple[jax.Array, jax.Array]:
    """First and last block of queries, those before row `stop`, that may see the keys from `column` on."""
    return column // queries, jnp.minimum(stop - 1, column + keys - 1 + window - 1) // queries


def flash_attention_forward(
    start_ref, length_ref, window_ref, scale_ref, slopes_ref, edge_ref, q_ref, k_ref, v_ref, o_ref, log_ref, sum_ref,
    top_ref, total_ref, *, alibi: bool, total: int
) -> None:  # fmt: skip
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    queries, keys = q_ref.shape[0], k_ref.shape[0]
    first, start = _starts(start_ref, edge_ref)
    bounds = start, length_ref[b], window_ref[0], scale_ref[0]
    low, high = _blocks_of_keys(i * queries, first, *bounds[1:3], queries, keys)

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        top_ref[...] = jnp.full(top_ref.shape, NEGATIVE)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    @pl.when(low + j <= high)
    def _():
        column = (low + j) * keys
        products = dot(q_ref[...], k_ref[...].T)
        at = _along(i * queries, queries, 0), _along(column, keys, 1)
        scores, seen = block_scores(products, *at, bounds, slopes_ref[h], alibi)
        scores = jnp.where(seen, scores, NEGATIVE)
        top = top_ref[:, :1]
        new_top = jnp.maximum(top, scores.max(1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        sums = total_ref[:, :1] * shrink + weights.sum(1, keepdims=True)
        values = _real(v_ref, column, first, bounds[1])
        sum_ref[...] = sum_ref[...] * shrink + dot(weights.astype(values.dtype), values)
        top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(sums, total_ref.shape)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        sums = total_ref[:, :1]
        safe = jnp.where(sums > 0, sums, 1.0)
        o_ref[...] = (sum_ref[...] / safe).astype(o_ref.dtype)
        log_ref[...] = top_ref[:, :1] + jnp.log(safe)


def flash_attention_query_gradient(
    start_ref, length_ref, window_ref, scale_ref, slopes_ref, edge_ref, q_ref, k_ref, v_ref, do_ref, log_ref, delta_ref,
    dq_ref, sum_ref, *, alibi: bool, total: int
) -> None:  # fmt: skip
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    queries, keys = q_ref.shape[0], k_ref.shape[0]
    first, start = _starts(start_ref, edge_ref)
    bounds = start, length_ref[b], window_ref[0], scale_ref[0]
    low, high = _blocks_of_keys(i * queries, first, *bounds[1:3], queries, keys)

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    @pl.when(low + j <= high)
    def _():
        column = (low + j) * keys
        key = _real(k_ref, column, first, bounds[1])
        at = _along(i * queries, queries, 0), _along(column, keys, 1)
        scores, seen = block_scores(dot(q_ref[...], key.T), *at, bounds, slopes_ref[h], alibi)
        weights = jnp.where(seen, jnp.exp(scores - log_ref[...]), 0.0)
        inner = dot(do_ref[...], _real(v_ref, column, first, bounds[1]).T)
        sum_ref[...] += dot((weights * (inner - delta_ref[...])).astype(key.dtype), key)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = (sum_ref[...] * bounds[3]).astype(dq_ref.dtype)


def flash_attention_key_gradient(
    start_ref, length_ref, window_ref, scale_ref, slopes_ref, edge_ref, q_ref, k_ref, v_ref, do_ref, log_ref, delta_ref,
    dk_ref, dv_ref, dk_sum_ref, dv_sum_ref, *, alibi: bool, total: int, group: int
) -> None:  # fmt: skip
    """Gradients of one block of keys and values, over the queries of all heads that share it; scores lie transposed.

    For packed rows `edge_ref` `[keys, 1]` holds the row after the last query that sees each key, and `start_ref` that
    of each block's last key.
    """
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    keys, queries = k_ref.shape[0], q_ref.shape[0]
    packed = edge_ref is not None
    edge = start_ref[b * pl.num_programs(2) + i if packed else b]
    start, stop = (0, edge) if packed else (edge, total)
    length, window, scale = length_ref[b], window_ref[0], scale_ref[0]
    bounds = start, length, window, scale
    steps = pl.num_programs(3) // group
    head, step = j // steps, j % steps
    column = i * keys
    low, high = _blocks_of_queries(column, window, stop, queries, keys)

    @pl.when(j == 0)
    def _():
        dk_sum_ref[...] = jnp.zeros(dk_sum_ref.shape, jnp.float32)
        dv_sum_ref[...] = jnp.zeros(dv_sum_ref.shape, jnp.float32)

    @pl.when((low + step <= high) & (column < length) & (column + keys > start))
    def _():
        row = (low + step) * queries
        query, upstream = (_real(ref, row, 0, total) for ref in (q_ref, do_ref))
        rows = _along(row, queries, 1)
        at = rows, _along(column, keys, 0)
        scores, seen = block_scores(dot(k_ref[...], query.T), *at, bounds, slopes_ref[h * group + head], alibi)
        seen &= rows < (edge_ref[...] if packed else total)
        weights = jnp.where(seen, jnp.exp(scores - log_ref[...]), 0.0)
        dv_sum_ref[...] += dot(weights.astype(upstream.dtype), upstream)
        inner = jnp.where(seen, dot(v_ref[...], upstream.T) - delta_ref[...], 0.0)
        dk_sum_ref[...] += dot((weights * inner).astype(query.dtype), query)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = (dk_sum_ref[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def query_stops(starts: jax.Array) -> jax.Array:
    """The column after the last query that may see each key, int32 `[B, T]`.

    `starts` `[B, T]`, the first key that each query may see, never decreases along a row.
    """
    columns = jnp.arange(starts.shape[1])
    return (starts[:, :, None] <= columns).sum(1, dtype=jnp.int32)


def _edges(edge: jax.Array, size: int, last: bool) -> tuple[jax.Array, list[jax.Array], list["pl.BlockSpec"]]:
    """Kernel inputs from first live keys `[B]` or, for packed rows, from numbers `[B, T]` that never decrease.

    Returns the scalars, of packed rows the first or the `last` number of each block of `size` columns, and for packed
    rows all the numbers and their spec.
    """
    if edge.ndim == 1:
        return edge, [], []
    total = edge.shape[1]
    begins = jnp.arange(0, total, size)
    at = jnp.minimum(begins + size, total) - 1 if last else begins
    spec = pl.BlockSpec((None, size, 1), lambda b, h, i, *_: (b, i, 0))
    return edge[:, at].reshape(-1), [edge[..., None]], [spec]


def _call(body, scalars, arrays, grid, in_specs, out_specs, out_shape, scratch, interpret) -> PyTree:
    """`scalars` start with what `_edges` returns."""
    (start, edges, edge_specs), length, window, scale, slopes = scalars
    scalars = start.astype(jnp.int32), length.astype(jnp.int32), window, scale, slopes

    def run(*refs: Ref) -> None:
        body(*refs[: len(scalars)], *([] if edges else [None]), *refs[len(scalars) :])

    return pallas.launch_tpu(
        run,
        [*scalars, *edges, *arrays],
        grid=grid,
        in_specs=[*edge_specs, *in_specs],
        out_specs=out_specs,
        out_shape=out_shape,
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        name=body.func.__name__,
        scalars=5,
        scratch=[pallas.tpu.VMEM(shape, jnp.float32) for shape in scratch],
        interpret=interpret,
    )


def _query_specs(
    total: int, width: int, group: int, packed: bool
) -> tuple[int, int, "pl.BlockSpec", "pl.BlockSpec", "pl.BlockSpec"]:
    """Blocks of queries and of keys, and the specs of queries, of numbers per query, and of keys, query by query."""
    queries, keys = min(QUERIES, total), min(KEYS, total)

    def of_keys(b, h, i, j, start, length, window, *_):
        row = i * queries
        first = start[b * pl.cdiv(total, queries) + i if packed else b]
        low, high = _blocks_of_keys(row, first, length[b], window[0], queries, keys)
        return b, h // group, jnp.minimum(low + j, jnp.maximum(high, low)), 0

    own = lambda b, h, i, *_: (b, h, i, 0)  # noqa: E731
    specs = (pl.BlockSpec((None, None, queries, width), own), pl.BlockSpec((None, None, queries, 1), own))
    return queries, keys, *specs, pl.BlockSpec((None, None, keys, width), of_keys)


def forward(query, key, value, start, *scalars, alibi: bool, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Output `[B, H, T, D]` and the logarithm of each query's normaliser `[B, H, T]`."""
    batch, heads, total, width = query.shape
    queries, keys, rows, numbers, columns = _query_specs(total, width, heads // key.shape[1], start.ndim == 2)
    output, log_total = _call(
        partial(flash_attention_forward, alibi=alibi, total=total),
        (_edges(start, queries, last=False), *scalars),
        [query, key, value],
        (batch, heads, pl.cdiv(total, queries), pl.cdiv(total, keys)),
        [rows, columns, columns],
        [rows, numbers],
        [jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((batch, heads, total, 1), jnp.float32)],
        [(queries, width), (queries, LANES), (queries, LANES)],
        interpret,
    )
    return output, log_total[..., 0]


def backward(
    query, key, value, upstream, log_total, delta, start, *scalars, alibi: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value."""
    batch, heads, total, width = query.shape
    kv_heads = key.shape[1]
    group, packed = heads // kv_heads, start.ndim == 2
    queries, keys, rows, numbers, columns = _query_specs(total, width, group, packed)
    grid = batch, heads, pl.cdiv(total, queries), pl.cdiv(total, keys)
    d_query = _call(
        partial(flash_attention_query_gradient, alibi=alibi, total=total),
        (_edges(start, queries, last=False), *scalars),
        [query, key, value, upstream, log_total[..., None], delta[..., None]],
        grid,
        [rows, columns, columns, rows, numbers, numbers],
        rows,
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        [(queries, width)],
        interpret,
    )

    def of_queries(b, h, i, j, start, length, window, *_):
        stop = start[b * grid[3] + i] if packed else total
        low, high = _blocks_of_queries(i * keys, window[0], stop, queries, keys)
        return b, h * group + j // grid[2], jnp.minimum(low + j % grid[2], high)

    own = pl.BlockSpec((None, None, keys, width), lambda b, h, i, *_: (b, h, i, 0))
    rows = pl.BlockSpec((None, None, queries, width), lambda *at: (*of_queries(*at), 0))
    numbers = pl.BlockSpec((None, None, 1, queries), lambda *at: (*of_queries(*at)[:2], 0, of_queries(*at)[2]))
    d_key, d_value = _call(
        partial(flash_attention_key_gradient, alibi=alibi, total=total, group=group),
        (_edges(query_stops(start) if packed else start, keys, last=True), *scalars),
        [query, key, value, upstream, log_total[:, :, None], delta[:, :, None]],
        (batch, kv_heads, grid[3], group * grid[2]),
        [rows, own, own, rows, numbers, numbers],
        [own, own],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        [(keys, width)] * 2,
        interpret,
    )
    return d_query, d_key, d_value
