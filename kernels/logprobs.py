"""Token log-probs and entropy straight from hidden states, forward and backward, block by block of the logits.

Both passes go over blocks of tokens × vocabulary; the forward pass keeps of each token its largest logit, the logarithm
of its normaliser and its entropy, and the backward pass makes every block of logits anew. Where the vocabulary is split
over devices, each works on its own part of it and the tokens' statistics are joined (Shoeybi et al. 2019, arXiv
1909.08053, section 3).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxrlhf.kernels import pallas
from jaxrlhf.kernels.attention import NEGATIVE, soft_capped
from jaxrlhf.kernels.choice import decide
from jaxrlhf.kernels.logit_blocks import Statistics, empty_statistics, logit_gradient, merge, rescaled, scaled
from jaxrlhf.kernels.logprobs_kernel import HeadBlocks, head_blocks, logit_gradient_of, statistics_of
from jaxrlhf.kernels.pallas import PyTree
from jaxrlhf.kernels.products import outputs_first_product, sum_of_rows


def project_logits(
    hidden: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    vocab_size: int,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    on_cpu: bool = False,
) -> jax.Array:
    """Float32 logits `[..., V_padded]` of hidden `[..., D]` and weight `[V_padded, D]`; padded columns get -1e30.

    `scale` multiplies the logits, then `softcap` turns logits z into softcap · tanh(z / softcap). `on_cpu` multiplies
    in the order that a CPU does fastest.
    """
    if on_cpu:
        logits = outputs_first_product(hidden, weight, dtype=jnp.float32)
    else:
        logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if scale != 1:
        logits = logits * scale
    logits = soft_capped(logits, softcap)
    if weight.shape[0] != vocab_size:
        logits = jnp.where(jnp.arange(weight.shape[0]) < vocab_size, logits, NEGATIVE)
    return logits


@dataclass(frozen=True)
class HeadPlacement:
    """The places of hidden states and the head on a mesh.

    Over axes in `tokens` the head comes in blocks, over others never.
    """

    mesh: Mesh
    rows: tuple[str, ...] = ()
    """Mesh axes that split the batch."""
    columns: tuple[str, ...] = ()
    """Mesh axes that split the columns of sequences."""
    vocab: tuple[str, ...] = ()
    """Mesh axes that split the head's vocabulary, slowest first; those in `tokens` last."""
    width: tuple[str, ...] = ()
    """Mesh axes, all of them in `tokens`, that split the head's width."""

    def __post_init__(self) -> None:
        own = [axis for axis in self.vocab if axis not in self.tokens]
        if self.vocab[: len(own)] != tuple(own):
            raise ValueError(f"vocab={self.vocab} of HeadPlacement must name the axes of tokens={self.tokens} last")
        if set(self.width) - set(self.tokens):
            raise ValueError(f"width={self.width} of HeadPlacement must be among tokens={self.tokens}")

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes over which each device has its own tokens."""
        return self.rows + self.columns

    @property
    def parts(self) -> tuple[str, ...]:
        """The axes over which each device works on its own part of the vocabulary."""
        return tuple(axis for axis in self.vocab if axis not in self.tokens)

    @property
    def gathered(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.vocab if axis in self.tokens)

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform


@dataclass(frozen=True)
class LogprobBlocks:
    """The tokens and vocabulary entries that a step computes."""

    tokens: int
    vocab: int

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} of LogprobBlocks must be at least 1")


def logprob_blocks(tokens: int, vocab: int, platform: str) -> LogprobBlocks:
    """Blocks of about 1/192 of the logits, near square: each sum is then written rarely and logits stay small.

    Accelerators take at least 2²⁴ logits at a time, 64 MiB in float32: smaller products leave most of one idle, and
    each block costs it a dozen kernels. A CPU gains nothing from larger blocks and faults in their pages.
    """
    elements = max(tokens * vocab // 192, 1 << (16 if platform == "cpu" else 24))
    rows = _even(tokens, max(math.isqrt(elements), elements // vocab))
    return LogprobBlocks(rows, _even(vocab, elements // rows))


def gathered_blocks(tokens: int, vocab: int) -> LogprobBlocks:
    """Blocks where the head comes from other devices: it should come once, or seldom, and in pieces worth sending."""
    return LogprobBlocks(_even(tokens, 8192), _even(vocab, 4096))


def _even(size: int, most: int) -> int:
    """The length of equal parts of `size` of at most about `most`: a multiple of 16 or the whole."""
    part = math.ceil(size / math.ceil(size / max(1, most)))
    return min(size, -(-part // 16) * 16)


@dataclass(frozen=True)
class _Task:
    vocab_size: int
    temperature: float
    softcap: float | None
    padded: bool
    """True if the weight has more rows than `vocab_size`."""
    implementation: str
    blocks: LogprobBlocks | None
    kernel_blocks: HeadBlocks | None
    placement: HeadPlacement | None
    on_cpu: bool


def token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    vocab_size: int,
    bias: jax.Array | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    placement: HeadPlacement | None = None,
    blocks: LogprobBlocks | None = None,
    kernel_blocks: HeadBlocks | None = None,
    on_cpu: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden · weightᵀ / temperature)[label] and the entropy of that distribution, per token.

    hidden `[B, T, D]`; weight `[V_padded, D]`, of which the first `vocab_size` rows are real; bias `[V_padded]`; labels
    `[B, T]` int: one outside 0 … vocab_size - 1 (-100, say) has log-prob 0 and no gradient from it, but its entropy as
    any token. `softcap` turns logits z into softcap · tanh(z / softcap) before the temperature, in "xla" only. Products
    are taken in the dtype of `hidden` and summed in float32. Returns two float32 arrays `[B, T]`,
    differentiable in hidden, weight and bias. Peak extra memory on accelerators is a few blocks, 1 to 2 % of the logits
    in float32, and for the gradient of a weight in bfloat16 as much again as that weight (where devices' rows are added
    up, two and a half times), in float16 twice as much; CPUs cast to float32 what is in 16 bits. `placement` says how
    the arrays lie on a mesh.

    `implementation`: "xla"; "pallas" (logits stay on the chip: NVIDIA, TPU, or interpreted on CPU); "auto"
    (kernels/choice.py). `blocks` cuts the work for both, `kernel_blocks` a kernel's further. `on_cpu` multiplies in the
    forms that CPUs are fast at. Raises ValueError for shapes that do not fit each other, or what the implementation
    does not take.
    """
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"token_logprobs takes hidden [B, T, D] and weight [V, D]; found {hidden.shape} and {weight.shape}"
        )
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels has shape {labels.shape}; for hidden {hidden.shape} it must be {hidden.shape[:2]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {bias.shape}; for weight {weight.shape} it must be {weight.shape[:1]}")
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size={vocab_size} must be between 1 and the {weight.shape[0]} rows of the weight")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if not hidden.size:
        return jnp.zeros(labels.shape), jnp.zeros(labels.shape)
    facts = {"dtype": hidden.dtype, "head_dim": hidden.shape[-1], "alibi": False, "softcap": softcap is not None}
    chosen = decide("token_logprobs", implementation, **facts).implementation
    if chosen == "pallas":
        pallas.check_taken("token_logprobs", hidden.dtype)
        cut = kernel_blocks or head_blocks(labels.size, hidden.shape[-1], hidden.dtype)
        pallas.check_shared_memory("token_logprobs", cut, cut.shared_memory(hidden.dtype))
    padded = vocab_size != weight.shape[0]
    task = _Task(vocab_size, float(temperature), softcap, padded, chosen, blocks, kernel_blocks, placement, on_cpu)
    real = (labels >= 0) & (labels < vocab_size)
    results = _logprobs(hidden, weight, bias, jnp.where(real, labels, 0), task)
    logprobs, entropy = cast(tuple[jax.Array, jax.Array], results)
    return jnp.where(real, logprobs, 0.0), entropy


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs(hidden, weight, bias, labels, task: _Task) -> tuple[jax.Array, jax.Array]:
    return _forward(hidden, weight, bias, labels, task)[0]


def _forward(hidden, weight, bias, labels, task: _Task) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
    def local(hidden, weight, bias, labels):
        flat, tokens = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        statistics = head_statistics(flat, weight, bias, tokens, task)
        top, total, spread, picked = (x[:, 0] for x in _join(statistics, task.placement))
        log_total = jnp.log(total)
        results = (picked - top) - log_total, log_total - spread / total, top, log_total
        return tuple(x.reshape(labels.shape) for x in results)

    rows, head = _specs(bias, task.placement)
    logprobs, entropy, top, log_total = _map(local, task.placement, (rows, *head, rows), (rows,) * 4)(
        hidden, weight, bias, labels
    )
    return (logprobs, entropy), (hidden, weight, bias, labels, top, log_total, entropy)


def _backward(task: _Task, kept: PyTree, upstream: tuple[jax.Array, jax.Array]) -> tuple[PyTree, ...]:
    hidden, weight, bias, labels, *statistics = kept

    def local(hidden, weight, bias, labels, *per_token):
        flat, tokens = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        per_token = [x.reshape(-1) for x in per_token]
        d_hidden, d_weight, d_bias = gradients(flat, weight, bias, tokens, per_token, task)
        if task.placement is not None:
            d_hidden, d_weight, d_bias = _sum_over_devices(d_hidden, d_weight, d_bias, task.placement)
        d_weight = _bfloat16(d_weight[0]) if len(d_weight) == 2 else d_weight[0].astype(weight.dtype)
        d_bias = None if bias is None else d_bias.astype(bias.dtype)
        return d_hidden.reshape(hidden.shape), d_weight, d_bias

    rows, head = _specs(bias, task.placement)
    run = _map(local, task.placement, (rows, *head, *(rows,) * 6), (rows, *head))
    return *run(hidden, weight, bias, labels, *statistics, *upstream), None


_logprobs.defvjp(_forward, _backward)


def _specs(bias: jax.Array | None, placement: HeadPlacement | None) -> tuple[P, tuple[P, P | None]]:
    """Specs of arrays `[B, …]`, and of weight and bias."""
    if placement is None:
        return P(), (P(), None)
    vocab, width = (axes or None for axes in (placement.vocab, placement.width))
    return P(placement.rows or None, placement.columns or None), (P(vocab, width), None if bias is None else P(vocab))


def _map(function: Callable, placement: HeadPlacement | None, in_specs: PyTree, out_specs: PyTree) -> Callable:
    if placement is None:
        return function
    return jax.shard_map(function, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _sum_over_devices(
    d_hidden, d_weight, d_bias, placement: HeadPlacement
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Hidden states got a share of their gradient from each part of the vocabulary, the head from each share of rows.

    Over the axes that gathered a block of the head, blocks of its gradient are already summed.
    """
    rest = [axis for axis in placement.tokens if axis not in placement.gathered]
    of_weight = tuple(axis for axis in rest if axis not in placement.width)
    d_hidden = jax.lax.psum(d_hidden, placement.parts) if placement.parts else d_hidden
    d_weight = (jax.lax.psum(_total(d_weight), of_weight),) if of_weight else d_weight
    return d_hidden, d_weight, jax.lax.psum(d_bias, tuple(rest)) if rest else d_bias


def _gather(block: jax.Array, placement: HeadPlacement | None) -> jax.Array:
    """The same block of the head of all devices that work on one part of the vocabulary; `[v]` or `[v, D]`."""
    for dimension, axes in _gathers(block, placement):
        block = jax.lax.all_gather(block, axes, axis=dimension, tiled=True)
    return block


def _scatter(gradient: jax.Array, placement: HeadPlacement | None) -> jax.Array:
    """Sums a gathered block's gradient over these devices' rows; each device keeps the part that it stores."""
    for dimension, axes in _gathers(gradient, placement):
        gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
    return gradient


def _gathers(x: jax.Array, placement: HeadPlacement | None) -> list[tuple[int, tuple[str, ...]]]:
    axes = () if placement is None else (placement.gathered, placement.width)[: x.ndim]
    return [(dimension, names) for dimension, names in enumerate(axes) if names]


def _join(statistics: Statistics, placement: HeadPlacement | None) -> Statistics:
    """The tokens' statistics over the whole vocabulary from those over the devices' parts."""
    if placement is None or not placement.parts:
        return statistics
    top, *sums = rescaled(statistics, jax.lax.pmax(statistics[0], placement.parts))
    return top, *jax.lax.psum(sums, placement.parts)


def _head_block(weight, bias, i, size: int, dtype, task: _Task):
    """Block i of the head: its begin in the stored part, its vocabulary entries `[v]`, -1 for dead ones, weights
    `[v, D]` and biases `[v]`; v is `size`, or that of all devices that the block is gathered from.

    The last block reaches back so that it is whole: what a block before it had is dead there.
    """
    stored, placement = weight.shape[0], task.placement
    begin = jnp.minimum(i * size, stored - size)
    rows = begin + jnp.arange(size)
    first, devices = 0, 1
    if placement is not None and placement.vocab:
        devices = math.prod(placement.mesh.shape[axis] for axis in placement.gathered)
        first = jax.lax.axis_index(placement.parts) * devices * stored if placement.parts else 0
    columns = (first + jnp.arange(devices)[:, None] * stored + rows).astype(jnp.int32)
    columns = jnp.where((rows >= i * size) & (columns < task.vocab_size), columns, -1).reshape(-1)
    part = _gather(jax.lax.dynamic_slice_in_dim(weight, begin, size).astype(dtype), placement)
    if bias is not None:
        bias = _gather(jax.lax.dynamic_slice_in_dim(bias, begin, size).astype(jnp.float32), placement)
    elif task.implementation == "pallas":
        bias = jnp.zeros(columns.shape, jnp.float32)
    return begin, columns, part, bias


def _blocks(tokens: int, stored: int, task: _Task) -> tuple[int, int]:
    """Tokens, and vocabulary entries of what this device stores of the head, that are worked on at a time."""
    placement = task.placement
    devices = 1 if placement is None else math.prod(placement.mesh.shape[axis] for axis in placement.gathered)
    if task.blocks is not None:
        blocks = task.blocks
    elif placement is not None and (placement.gathered or placement.width):
        blocks = gathered_blocks(tokens, devices * stored)
    else:
        platform = jax.default_backend() if placement is None else placement.platform
        blocks = logprob_blocks(tokens, stored, platform)
    return min(blocks.tokens, tokens), min(max(1, blocks.vocab // devices), stored)


def _sliced(begin: jax.Array, size: int, *arrays: jax.Array) -> list[jax.Array]:
    return [jax.lax.dynamic_slice_in_dim(x, begin, size) for x in arrays]


def head_statistics(hidden, weight, bias, labels, task: _Task) -> Statistics:
    """Statistics, each `[n, 1]`, of hidden `[n, D]` over this device's part of the vocabulary; weight as stored."""
    count, vocab = hidden.shape[0], weight.shape[0]
    if task.implementation == "pallas":
        # A part of the head at a time, cast for it; the kernel cuts it up further.
        wide = min(vocab, max(_blocks(count, vocab, task)[1], -(-vocab // 16)))

        def of_part(j, statistics):
            _, columns, part, part_bias = _head_block(weight, bias, j, wide, hidden.dtype, task)
            new = statistics_of(hidden, part, part_bias, columns, labels, task.temperature, task.kernel_blocks)
            top = jnp.maximum(statistics[0], new[0])
            _, *sums = (x + y for x, y in zip(rescaled(statistics, top), rescaled(new, top), strict=True))
            return top, *sums

        return jax.lax.fori_loop(0, -(-vocab // wide), of_part, empty_statistics(count))
    size, wide = _blocks(count, vocab, task)

    def of_tokens(i, results):
        begin = jnp.minimum(i * size, count - size)
        block, own = _sliced(begin, size, hidden, labels)

        def of_vocab(j, statistics):
            _, columns, part, part_bias = _head_block(weight, bias, j, wide, hidden.dtype, task)
            products = pallas.dot(block, part, (1, 1))
            logits = scaled(products, part_bias, columns[None], task.temperature, task.softcap)
            return merge(statistics, logits, columns[None], own[:, None])

        statistics = jax.lax.fori_loop(0, -(-vocab // wide), of_vocab, empty_statistics(size))
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, new, begin, 0) for x, new in zip(results, statistics, strict=True)
        )

    return jax.lax.fori_loop(0, -(-count // size), of_tokens, empty_statistics(count))


def _logit_gradient(block, part, part_bias, columns, own, statistics, task: _Task) -> jax.Array:
    """The gradient of one block of logits, in the compute dtype."""
    if task.implementation == "pallas":
        return logit_gradient_of(block, part, part_bias, columns, own, statistics, task.temperature, task.kernel_blocks)
    logits = scaled(pallas.dot(block, part, (1, 1)), part_bias, columns[None], task.temperature, task.softcap)
    statistics = tuple(x[:, None] for x in statistics)
    gradient = logit_gradient(logits, columns[None], own[:, None], statistics, task.temperature, task.softcap)
    return gradient.astype(block.dtype)


def _no_sum(weight: jax.Array) -> tuple[jax.Array, ...]:
    """The empty sum of gradients of a weight: float32, or for bfloat16 the bits of two parts that add up to it.

    The first part is the sum rounded to bfloat16, in the end the gradient, so that only the second is extra memory.
    They are integers to a compiler, as one for CPUs would cast all of a bfloat16 array to write to a part of it.
    """
    if weight.dtype != jnp.bfloat16:
        return (jnp.zeros(weight.shape, jnp.float32),)
    return (jnp.zeros(weight.shape, jnp.uint16),) * 2


def _bfloat16(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _total(sums: Sequence[jax.Array]) -> jax.Array:
    """The value of a sum (`_no_sum`), in float32."""
    return sums[0] if len(sums) == 1 else cast(jax.Array, sum(_bfloat16(x).astype(jnp.float32) for x in sums))


def _add_rows(sums: tuple[jax.Array, ...], begin: jax.Array, new: jax.Array) -> tuple[jax.Array, ...]:
    """A sum (`_no_sum`) `[V, D]` with float32 `new` `[v, D]` added to its rows from `begin` on."""
    parts = [_total(_sliced(begin, new.shape[0], *sums)) + new]
    if len(sums) == 2:
        # Rounded by what no compiler takes back to keep more precision than was asked for.
        near = jax.lax.reduce_precision(parts[0], exponent_bits=8, mantissa_bits=7)
        parts = [jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16) for x in (near, parts[0] - near)]
    return tuple(jax.lax.dynamic_update_slice_in_dim(x, part, begin, 0) for x, part in zip(sums, parts, strict=True))


def gradients(hidden, weight, bias, labels, per_token, task: _Task) -> tuple[jax.Array, tuple, jax.Array]:
    """Gradients of hidden `[n, D]` in its dtype, of the stored weight as a sum (`_no_sum`), of the bias in float32."""
    count, vocab, dtype = hidden.shape[0], weight.shape[0], hidden.dtype
    size, wide = _blocks(count, vocab, task)

    def of_tokens(i, carry):
        d_hidden, d_weight, d_bias = carry
        begin = jnp.minimum(i * size, count - size)
        block, own, *statistics = _sliced(begin, size, hidden, labels, *per_token)
        fresh = begin + jnp.arange(size) >= i * size
        statistics[3:] = (jnp.where(fresh, x, 0.0) for x in statistics[3:])

        def of_vocab(j, carry):
            d_block, d_weight, d_bias = carry
            at, columns, part, part_bias = _head_block(weight, bias, j, wide, dtype, task)
            d_logits = _logit_gradient(block, part, part_bias, columns, own, statistics, task)
            if bias is not None:
                (old,) = _sliced(at, wide, d_bias)
                new = old + _scatter(d_logits.sum(0, dtype=jnp.float32), task.placement)
                d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, new, at, 0)
            if task.padded:
                part = jnp.where((columns >= 0)[:, None], part, 0)
            d_block += pallas.dot(d_logits, part)
            fast = task.on_cpu and d_logits.dtype.itemsize == 2
            new = sum_of_rows(d_logits, block, 1) if fast else pallas.dot(d_logits, block, (0, 0))
            new = _scatter(new, task.placement)
            return d_block, _add_rows(d_weight, at, new), d_bias

        zeros = jnp.zeros(block.shape, jnp.float32)
        d_block, d_weight, d_bias = jax.lax.fori_loop(0, -(-vocab // wide), of_vocab, (zeros, d_weight, d_bias))
        (old,) = _sliced(begin, size, d_hidden)
        new = jnp.where(fresh[:, None], d_block.astype(dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(d_hidden, new, begin, 0), d_weight, d_bias

    zeros = jnp.zeros(hidden.shape, dtype), _no_sum(weight), jnp.zeros(vocab, jnp.float32)
    return jax.lax.fori_loop(0, -(-count // size), of_tokens, zeros)
