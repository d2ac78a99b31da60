"""The fused kernels of token log-probs: a block of logits is made, used and dropped without leaving the chip.

Forward, each program goes over its share of the vocabulary with the tokens' running statistics in registers. Backward,
it recomputes a block of logits and writes only their gradient, which matrix products then consume. On TPUs the grid
itself goes over the vocabulary, one block after the other, and the statistics stay in the output's block.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from jaxrlhf.kernels import pallas
from jaxrlhf.kernels.logit_blocks import Statistics, empty_statistics, logit_gradient, merge, rescaled, scaled
from jaxrlhf.kernels.pallas import LANES, dot, load, pl, power_of_two, store


@dataclass(frozen=True)
class HeadBlocks:
    """Block sizes of the kernels, powers of two of at least 16."""

    tokens: int
    vocab: int
    width: int
    """Features of hidden states per step of a product."""
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        pallas.check_blocks(self, "tokens", "vocab", "width")

    def shared_memory(self, dtype: jnp.dtype) -> int:
        """Bytes that a kernel with these blocks holds at a time."""
        return (self.tokens + self.vocab) * self.width * self.num_stages * jnp.dtype(dtype).itemsize


def head_blocks(tokens: int, width: int, dtype: jnp.dtype, device: pallas.Device | None = None) -> HeadBlocks:
    """Blocks for an NVIDIA `device` (the one at hand): sums of 128 × 128 in registers, half of that where float32
    products need them, and as many stages of up to three as shared memory has room for."""
    single = jnp.dtype(dtype) == jnp.float32
    rows = min(64 if single else 128, max(16, power_of_two(tokens)))
    width = min(32 if single else 64, max(16, power_of_two(width)))
    blocks = HeadBlocks(rows, 64 if single else 128, width, num_stages=1)
    room = (device or pallas.device()).shared_memory // blocks.shared_memory(dtype)
    return replace(blocks, num_stages=max(1, min(3, room)))


@dataclass(frozen=True)
class _Shape:
    tokens: int
    vocab: int
    width: int
    temperature: float
    blocks: HeadBlocks
    share: int = 1
    """Blocks of the vocabulary per program."""


def _block(refs: tuple, row: jax.Array, column: jax.Array, shape: _Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits `[t, v]` of the block that begins at (row, column), its vocabulary entries `[1, v]` and which rows are."""
    h_ref, w_ref, b_ref, c_ref = refs
    blocks = shape.blocks
    rows, columns = row + jnp.arange(blocks.tokens), column + jnp.arange(blocks.vocab)
    there, inside = rows < shape.tokens, columns < shape.vocab

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        real = (k * blocks.width + jnp.arange(blocks.width) < shape.width)[None]
        part = pl.ds(k * blocks.width, blocks.width)
        states = load(h_ref.at[pl.ds(row, blocks.tokens), part], there[:, None] & real)
        return total + dot(states, load(w_ref.at[pl.ds(column, blocks.vocab), part], inside[:, None] & real).T)

    products = jnp.zeros((blocks.tokens, blocks.vocab), jnp.float32)
    products = jax.lax.fori_loop(0, -(-shape.width // blocks.width), step, products)
    at = pl.ds(column, blocks.vocab)
    entries = jnp.where(inside, load(c_ref.at[at], inside), -1)[None]
    return scaled(products, load(b_ref.at[at], inside)[None], entries, shape.temperature), entries, there


def token_logprobs_forward(h_ref, w_ref, b_ref, c_ref, l_ref, *outputs, shape: _Shape) -> None:
    row = pl.program_id(0) * shape.blocks.tokens
    low = pl.program_id(1) * shape.share
    at = pl.ds(row, shape.blocks.tokens)
    labels = load(l_ref.at[at], row + jnp.arange(shape.blocks.tokens) < shape.tokens)[:, None]

    def step(j: jax.Array, statistics: Statistics) -> Statistics:
        logits, entries, _ = _block((h_ref, w_ref, b_ref, c_ref), row, (low + j) * shape.blocks.vocab, shape)
        return merge(statistics, logits, entries, labels)

    steps = jnp.minimum(shape.share, pl.cdiv(shape.vocab, shape.blocks.vocab) - low)
    statistics = jax.lax.fori_loop(0, steps, step, empty_statistics(shape.blocks.tokens))
    for ref, statistic in zip(outputs, statistics, strict=True):
        store(ref.at[at], statistic[:, 0], row + jnp.arange(shape.blocks.tokens) < shape.tokens)


def token_logprobs_logit_gradient(h_ref, w_ref, b_ref, c_ref, l_ref, *rest, shape: _Shape) -> None:
    *per_token, o_ref = rest
    blocks = shape.blocks
    row, column = pl.program_id(0) * blocks.tokens, pl.program_id(1) * blocks.vocab
    logits, entries, there = _block((h_ref, w_ref, b_ref, c_ref), row, column, shape)
    at = pl.ds(row, blocks.tokens)
    labels, *statistics = (load(ref.at[at], there)[:, None] for ref in (l_ref, *per_token))
    gradient = logit_gradient(logits, entries, labels, tuple(statistics), shape.temperature)
    inside = column + jnp.arange(blocks.vocab) < shape.vocab
    store(o_ref.at[at, pl.ds(column, blocks.vocab)], gradient, there[:, None] & inside[None])


def _whole(*shape: int) -> "pl.BlockSpec":
    return pl.BlockSpec(shape, lambda i, j: (0,) * len(shape))


def statistics_of(hidden, part, bias, columns, labels, temperature: float, blocks: HeadBlocks | None) -> Statistics:
    """Statistics, each `[n, 1]`, of hidden `[n, D]` over a part `[v, D]` of the head; `columns` as in `scaled`."""
    (tokens, width), vocab = hidden.shape, part.shape[0]
    blocks = blocks or head_blocks(tokens, width, hidden.dtype)
    rows, steps = pl.cdiv(tokens, blocks.tokens), pl.cdiv(vocab, blocks.vocab)
    # Four programs for each multiprocessor, so that none waits long for the last ones.
    splits = max(1, min(steps, 4 * pallas.device().multiprocessors // rows))
    share = -(-steps // splits)
    splits = -(-steps // share)
    shape = _Shape(tokens, vocab, width, temperature, blocks, share)

    def launch(*arrays: jax.Array, interpret: bool) -> Statistics:
        shares = pallas.launch(
            partial(token_logprobs_forward, shape=shape),
            arrays,
            grid=(rows, splits),
            in_specs=[_whole(tokens, width), _whole(vocab, width), _whole(vocab), _whole(vocab), _whole(tokens)],
            out_specs=[pl.BlockSpec((None, tokens), lambda i, j: (j, 0))] * 4,
            out_shape=[jax.ShapeDtypeStruct((splits, tokens), jnp.float32)] * 4,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            interpret=interpret,
        )
        top = shares[0].max(0)
        _, *sums = rescaled(tuple(shares), top)
        return cast(Statistics, tuple(x[:, None] for x in (top, *(x.sum(0) for x in sums))))

    arrays = hidden, part, bias, columns, labels
    return pallas.dispatch(launch, partial(_tpu_statistics, temperature=temperature), *arrays)


def logit_gradient_of(
    hidden, part, bias, columns, labels, per_token, temperature: float, blocks: HeadBlocks | None
) -> jax.Array:
    """`logit_gradient` `[n, v]` in the dtype of hidden `[n, D]`, for a part `[v, D]` of the head; statistics `[n]`."""
    (tokens, width), vocab = hidden.shape, part.shape[0]
    blocks = blocks or head_blocks(tokens, width, hidden.dtype)
    launch = partial(
        pallas.launch,
        partial(token_logprobs_logit_gradient, shape=_Shape(tokens, vocab, width, temperature, blocks)),
        grid=(pl.cdiv(tokens, blocks.tokens), pl.cdiv(vocab, blocks.vocab)),
        in_specs=[_whole(tokens, width), _whole(vocab, width), _whole(vocab), _whole(vocab), *[_whole(tokens)] * 6],
        out_specs=_whole(tokens, vocab),
        out_shape=jax.ShapeDtypeStruct((tokens, vocab), hidden.dtype),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    arrays = hidden, part, bias, columns, labels, *per_token
    tpu_form = partial(_tpu_logit_gradient, temperature=temperature)
    return pallas.dispatch(lambda *arrays, interpret: launch(arrays, interpret=interpret), tpu_form, *arrays)


# ---- on TPUs


def _tpu_blocks(tokens: int, vocab: int, width: int, itemsize: int) -> tuple[int, int]:
    """Tokens and vocabulary entries per step: two of each block of states and weights are in 16 MiB of the chip."""
    room = 16 * 2**20 // (2 * width * itemsize)
    rows = min(256, max(16, power_of_two(room // 3)), max(16, -(-tokens // 16) * 16))
    return rows, min(512, max(LANES, (room - rows) // LANES * LANES), -(-vocab // LANES) * LANES)


def tpu_forward(h_ref, w_ref, b_ref, c_ref, l_ref, o_ref, *, vocab: int, temperature: float) -> None:
    """The statistics lie in the first four lanes of the output's block `[t, LANES]`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, o_ref.shape, 1)
    pack = lambda statistics: sum(jnp.where(lane == i, x, 0.0) for i, x in enumerate(statistics))  # noqa: E731

    @pl.when(pl.program_id(1) == 0)
    def _():
        o_ref[...] = pack(empty_statistics(o_ref.shape[0]))

    at = pl.program_id(1) * c_ref.shape[1] + jax.lax.broadcasted_iota(jnp.int32, c_ref.shape, 1)
    entries = jnp.where(at < vocab, c_ref[...], -1)
    logits = scaled(dot(h_ref[...], w_ref[...], (1, 1)), b_ref[...], entries, temperature)
    o_ref[...] = pack(merge(tuple(o_ref[:, i : i + 1] for i in range(4)), logits, entries, l_ref[...]))


def tpu_logit_gradient(h_ref, w_ref, b_ref, c_ref, l_ref, *rest, temperature: float) -> None:
    *per_token, o_ref = rest
    entries = c_ref[...]
    logits = scaled(dot(h_ref[...], w_ref[...], (1, 1)), b_ref[...], entries, temperature)
    gradient = logit_gradient(logits, entries, l_ref[...], tuple(x[...] for x in per_token), temperature)
    o_ref[...] = gradient.astype(o_ref.dtype)


def _tpu_specs(tokens: int, vocab: int, width: int) -> list["pl.BlockSpec"]:
    """Specs of hidden states, head, bias, columns and labels; then that of one more vector `[n, 1]`."""
    across = pl.BlockSpec((1, vocab), lambda i, j: (0, j))
    down = pl.BlockSpec((tokens, 1), lambda i, j: (i, 0))
    states = pl.BlockSpec((tokens, width), lambda i, j: (i, 0))
    return [states, pl.BlockSpec((vocab, width), lambda i, j: (j, 0)), across, across, down, down]


def _tpu_statistics(hidden, part, bias, columns, labels, *, temperature: float, interpret: bool = False) -> Statistics:
    (tokens, width), vocab = hidden.shape, part.shape[0]
    rows, entries = _tpu_blocks(tokens, vocab, width, hidden.dtype.itemsize)
    packed = pallas.launch_tpu(
        partial(tpu_forward, vocab=vocab, temperature=temperature),
        [hidden, part, bias[None], columns[None], labels[:, None]],
        grid=(pl.cdiv(tokens, rows), pl.cdiv(vocab, entries)),
        in_specs=_tpu_specs(rows, entries, width)[:5],
        out_specs=pl.BlockSpec((rows, LANES), lambda i, j: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((tokens, LANES), jnp.float32),
        semantics=("parallel", "arbitrary"),
        name=token_logprobs_forward.__name__,
        interpret=interpret,
    )
    return tuple(packed[:, i : i + 1] for i in range(4))


def _tpu_logit_gradient(
    hidden, part, bias, columns, labels, *per_token, temperature: float, interpret: bool = False
) -> jax.Array:
    (tokens, width), vocab = hidden.shape, part.shape[0]
    rows, entries = _tpu_blocks(tokens, vocab, width, hidden.dtype.itemsize)
    *specs, vector = _tpu_specs(rows, entries, width)
    return pallas.launch_tpu(
        partial(tpu_logit_gradient, temperature=temperature),
        [hidden, part, bias[None], columns[None], *(x[:, None] for x in (labels, *per_token))],
        grid=(pl.cdiv(tokens, rows), pl.cdiv(vocab, entries)),
        in_specs=[*specs, *[vector] * 5],
        out_specs=pl.BlockSpec((rows, entries), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((tokens, vocab), hidden.dtype),
        semantics=("parallel", "parallel"),
        name=token_logprobs_logit_gradient.__name__,
        interpret=interpret,
    )
