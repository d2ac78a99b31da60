"""The least arithmetic and memory traffic that a piece of work needs, and its time by the roofline.

Counted is what any implementation must do: causal attention over live positions only (in each layer those within its
local window), the output head on response tokens only, weights and cache once per pass. What a program does beyond that
(padding, masked positions, activations that leave the chip, recomputation) shows as a lower fraction of the roofline.
The planner counts what our programs do (jaxrlhf/plan/cost.py).
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxrlhf.kernels import KV_CACHE_DTYPES
from jaxrlhf.models import Decoder, param_shapes
from jaxrlhf.plan.cost import ADAM_BYTES, matrix_elements


@dataclass(frozen=True)
class Peaks:
    """What the devices were measured to reach."""

    flops: float
    """FLOP/s of a large matrix product in the compute dtype."""
    bandwidth: float
    """Bytes/s, read and written, of a large copy."""


@dataclass(frozen=True)
class Work:
    """Stages that run one after the other, each (FLOPs, bytes)."""

    stages: tuple[tuple[float, float], ...]

    def __add__(self, other: "Work") -> "Work":
        return Work(self.stages + other.stages)

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.stages)

    @property
    def bytes(self) -> float:
        return sum(size for _, size in self.stages)

    def seconds(self, peaks: Peaks) -> float:
        """The roofline: every stage takes the longer of its arithmetic and its traffic."""
        return sum(max(flops / peaks.flops, size / peaks.bandwidth) for flops, size in self.stages)


def itemsize(module: Decoder) -> int:
    return jnp.dtype(module.dtype).itemsize


def matrices(module: Decoder) -> tuple[int, int]:
    """(elements of the matrices that every token is multiplied by, of the output head)."""
    c = module.config
    return matrix_elements(module)[0], c.vocab_size * c.embedding_size if module.head == "lm" else c.embedding_size


def attention_flops(module: Decoder, rows: int, pairs: float) -> float:
    """`QKᵀ` and `PV` for `pairs` (query, key) pairs per row, summed over layers."""
    c = module.config
    return 4.0 * rows * pairs * c.num_heads * c.head_dim


def visible(positions: int, window: int) -> int:
    """How many of `positions` the last one's query sees; a window of 0 is none."""
    return min(positions, window) if window else positions


def causal_pairs(length: int, window: int) -> float:
    """(query, key) pairs of one row and layer."""
    seen = visible(length, window)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def windows(module: Decoder) -> tuple[int, ...]:
    """Of each layer."""
    return module.config.windows or (0,) * module.config.num_layers


def cache_bytes(module: Decoder, positions: int) -> int:
    """Of the cache of one row that the last of `positions` sees."""
    c, dtype = module.config, KV_CACHE_DTYPES[module.kv_cache_dtype]
    width = c.head_dim * itemsize(module) if dtype is None else c.head_dim * jnp.dtype(dtype).itemsize + 4
    return 2 * c.num_kv_heads * width * sum(visible(positions, window) for window in windows(module))


def forward_work(module: Decoder, rows: int, length: int, headed: int) -> Work:
    """One pass over `[rows, length]` tokens of which `headed` per row reach the output head."""
    body, head = matrices(module)
    pairs = sum(causal_pairs(length, window) for window in windows(module))
    flops = 2.0 * rows * (length * body + headed * head) + attention_flops(module, rows, pairs)
    return Work(((flops, (body + head) * itemsize(module)),))


def decode_work(module: Decoder, rows: int, positions: int) -> Work:
    """One token for each row, the last of `positions` positions."""
    body, head = matrices(module)
    pairs = sum(visible(positions, window) for window in windows(module))
    flops = 2.0 * rows * (body + head) + attention_flops(module, rows, pairs)
    return Work(((flops, (body + head) * itemsize(module) + rows * cache_bytes(module, positions)),))


def generate_work(module: Decoder, rows: int, prompt: int, answer: int) -> Work:
    """Prefill of the prompt, which gives the first token, and decoding of the others."""
    work = forward_work(module, rows, prompt, 1)
    work += Work(((0.0, float(rows * cache_bytes(module, prompt))),))
    for step in range(1, answer):
        work += decode_work(module, rows, prompt + step)
    return work


def score_work(actor: Decoder, critic: Decoder, rows: int, prompt: int, answer: int) -> Work:
    """Four passes: actor and reference, critic and reward model."""
    both = forward_work(actor, rows, prompt + answer, answer) + forward_work(critic, rows, prompt + answer, answer)
    return both + both


def train_work(actor: Decoder, critic: Decoder, rows: int, prompt: int, answer: int) -> Work:
    """Forward and backward pass (three times the arithmetic of a forward one) and Adam, of actor and critic."""
    work = Work(())
    for module in (actor, critic):
        ((flops, size),) = forward_work(module, rows, prompt + answer, answer).stages
        parameters = sum(math.prod(x.shape) for x in flatten_dict(param_shapes(module)).values())
        work += Work(((3 * flops, 3 * size), (0.0, float(ADAM_BYTES * parameters))))
    return work


def attention_work(module: Decoder, rows: int, length: int, window: int, backward: bool) -> Work:
    """Causal attention of one layer with this window; backward: twice the forward products on top."""
    c = module.config
    flops = attention_flops(module, rows, causal_pairs(length, window))
    size = rows * length * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) * itemsize(module)
    return Work(((3.0 * flops, 3.0 * size),) if backward else ((flops, float(size)),))


def logprobs_work(module: Decoder, rows: int, length: int, backward: bool) -> Work:
    """The output head on `[rows, length]` hidden states; backward: one product more for each gradient."""
    _, head = matrices(module)
    tokens = rows * length
    size = (head + tokens * module.config.embedding_size) * itemsize(module)
    return Work(((6.0 * tokens * head, 3.0 * size),) if backward else ((2.0 * tokens * head, float(size)),))
