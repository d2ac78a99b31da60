"""The decode-attention kernel on TPUs: the grid goes over a row's live blocks of columns, one after the other.

The first live column and the length of each row lie in scalar memory, so that block indices stop at the last live
block: what is not live is not fetched. The running sums of the softmax stay in vector memory between a row's blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxrlhf.kernels import pallas
from jaxrlhf.kernels.attention import NEGATIVE
from jaxrlhf.kernels.kv_cache import Cache, quantised, widened
from jaxrlhf.kernels.pallas import LANES, dot, pl

COLUMNS = 512
"""Columns of the cache per step."""
TILE = 32
"""Rows of the cache per write: a tile of eight-bit elements."""


def decode_attention_blocks(
    first_ref, length_ref, *refs, scale: float, alibi: bool, scaled: bool, appends: bool
) -> None:
    refs = iter(refs)
    take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
    (q_ref,) = take(1)
    (slopes_ref,) = take(1) if alibi else (None,)
    k_ref, v_ref = take(2)
    scale_refs = take(2) if scaled else []
    new_refs = take(2 + len(scale_refs)) if appends else []
    (o_ref,) = take(1)
    written_refs = take(len(new_refs))
    sum_ref, top_ref, total_ref = refs
    row, head, step = (pl.program_id(i) for i in range(3))
    first, length = first_ref[row], length_ref[row]
    last, size = length - 1, k_ref.shape[0]
    low, high = _bounds(first, length, size)
    block = jnp.minimum(low + step, high)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        top_ref[...] = jnp.full(top_ref.shape, NEGATIVE)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    def read(i: int) -> jax.Array:
        """Keys (0) or values (1) of this block's live columns."""
        columns = block * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        x = widened((k_ref, v_ref)[i][...], q_ref.dtype)
        x = jnp.where((columns >= first) & (columns < length), x, 0)
        return jnp.where(columns == last, widened(new_refs[i][...], q_ref.dtype), x) if appends else x

    def own_scales(i: int, columns: jax.Array) -> jax.Array:
        x = scale_refs[i][pl.ds(head, 1), :]
        return jnp.where(columns == last, new_refs[2 + i][pl.ds(head, 1), :], x) if appends else x

    @pl.when((low + step <= high) & (first < length))
    def _():
        columns = block * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        inside = (columns >= first) & (columns < length)
        scores = dot(q_ref[...], read(0).T) * scale
        if scaled:
            scores *= own_scales(0, columns)
        if slopes_ref is not None:
            scores += slopes_ref[...] * (columns - last).astype(jnp.float32)
        scores = jnp.where(inside, scores, NEGATIVE)
        top = top_ref[:, :1]
        new_top = jnp.maximum(top, scores.max(1, keepdims=True))
        weights = jnp.where(inside, jnp.exp(scores - new_top), 0.0)
        shrink = jnp.exp(top - new_top)
        total = total_ref[:, :1] * shrink + weights.sum(1, keepdims=True)
        if scaled:
            weights = jnp.where(inside, weights * own_scales(1, columns), 0.0)
        sum_ref[...] = sum_ref[...] * shrink + dot(weights.astype(q_ref.dtype), read(1))
        top_ref[...] = jnp.broadcast_to(new_top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = total_ref[:, :1]
        o_ref[...] = (sum_ref[...] / jnp.where(total > 0, total, 1.0)).astype(o_ref.dtype)
        for ref, new_ref, old_ref in zip(written_refs[:2], new_refs[:2], (k_ref, v_ref), strict=False):
            begin = _tile(last, ref.shape[0]) * ref.shape[0]
            old = old_ref[pl.ds(pl.multiple_of(begin - high * size, ref.shape[0]), ref.shape[0]), :]
            at = begin + jax.lax.broadcasted_iota(jnp.int32, (ref.shape[0], 1), 0)
            wide = jnp.float32 if jnp.issubdtype(old.dtype, jnp.floating) else jnp.int32
            ref[...] = jnp.where(at == last, new_ref[...].astype(wide), old.astype(wide)).astype(old.dtype)
        # A tile of scales is that of all heads, and so each of them writes the same one.
        for ref, new_ref, old_ref in zip(written_refs[2:], new_refs[2:], scale_refs, strict=False):
            begin = _tile(last, ref.shape[1]) * ref.shape[1]
            old = old_ref[:, pl.ds(pl.multiple_of(begin - high * size, ref.shape[1]), ref.shape[1])]
            at = begin + jax.lax.broadcasted_iota(jnp.int32, (1, ref.shape[1]), 1)
            ref[...] = jnp.where(at == last, new_ref[...], old)


def _bounds(first: jax.Array, length: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The first and the last block of columns that a row reads."""
    return jnp.maximum(first, 0) // size, jnp.maximum(length - 1, 0) // size


def _tile(last: jax.Array, size: int) -> jax.Array:
    """The tile of so many columns that has the newest one."""
    return jnp.maximum(last, 0) // size


def attend(
    query: jax.Array,
    first: jax.Array,
    length: jax.Array,
    slopes: jax.Array | None,
    cache: Cache,
    new: Cache | None,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, Cache]:
    """`append_attention` of a cache's `entries` (kernels/kv_cache.py), or `decode_attention` where `new` is None."""
    batch, heads, width = query.shape
    kv_heads, cache_length = cache[0].shape[1:3]
    group = heads // kv_heads
    size = min(COLUMNS, cache_length)
    scaled = quantised(cache)

    def of_block(b, h, j, first, length):
        low, high = _bounds(first[b], length[b], size)
        return b, h, jnp.minimum(low + j, high), 0

    own = lambda b, h, j, *_: (b, h, 0, 0)  # noqa: E731
    block = pl.BlockSpec((None, None, size, width), of_block)
    arrays = [query.reshape(batch, kv_heads, group, width)]
    in_specs = [pl.BlockSpec((None, None, group, width), own)]
    if slopes is not None:
        arrays.append(slopes.astype(jnp.float32).reshape(kv_heads, group, 1))
        in_specs.append(pl.BlockSpec((None, group, 1), lambda b, h, j, *_: (h, 0, 0)))
    at = 2 + len(arrays)
    arrays += cache
    in_specs += [block, block]
    if scaled:
        in_specs += [pl.BlockSpec((None, kv_heads, size), lambda *at: (at[0], 0, of_block(*at)[2]))] * 2
    out_specs = [pl.BlockSpec((None, None, group, width), own)]
    out_shape = [jax.ShapeDtypeStruct((batch, kv_heads, group, width), query.dtype)]
    if new is not None:
        arrays += [x[:, :, None] for x in new]
        in_specs += [pl.BlockSpec((None, None, 1, width), own)] * 2
        rows, lanes = (cache_length if size % tile else tile for tile in (TILE, LANES))
        rows_at = lambda b, h, j, first, length: (b, h, _tile(length[b] - 1, rows), 0)  # noqa: E731
        out_specs += [pl.BlockSpec((None, None, rows, width), rows_at)] * 2
        if scaled:
            in_specs += [pl.BlockSpec((None, kv_heads, 1), lambda b, h, j, *_: (b, 0, 0))] * 2
            lanes_at = lambda b, h, j, first, length: (b, 0, _tile(length[b] - 1, lanes))  # noqa: E731
            out_specs += [pl.BlockSpec((None, kv_heads, lanes), lanes_at)] * 2
        out_shape += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache]
    scratch = [pallas.tpu.VMEM((group, wide), jnp.float32) for wide in (width, LANES, LANES)]
    output, *written = pallas.launch_tpu(
        partial(decode_attention_blocks, scale=scale, alibi=slopes is not None, scaled=scaled, appends=new is not None),
        [first, length, *arrays],
        grid=(batch, kv_heads, pl.cdiv(cache_length, size)),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        semantics=("parallel", "arbitrary", "arbitrary"),
        name="decode_attention_share",
        scalars=2,
        scratch=scratch,
        aliases={at + i: 1 + i for i in range(len(cache))} if new is not None else {},
        interpret=interpret,
    )
    return output.reshape(query.shape), tuple(written) or cache
