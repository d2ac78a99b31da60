"""One roofline for `jaxrlhf plan` and `jaxrlhf bench`: FLOPs and bytes of the programs, and the time that they need.

Both commands use the same formulas and count in two ways, chosen by `padded`:

- `padded=False` counts what every implementation must do: attention over live positions (inside each layer's local
  window) and the vocabulary's own rows. The benchmark measures against this bound.
- `padded=True` counts what plain XLA computes with static shapes: attention multiplies masked positions too, and the
  head has the rows that pad the vocabulary. The planner predicts programs, so it counts this way.

Both count matrix products only, read weights once per pass, and run the head on response tokens alone. Of a sparse
model's experts they count those that tokens choose, evenly spread; `padded` counts all of them for every token where
the module's `expert_implementation` is "dense". Times are lower bounds: no latency, and every kernel at its peak.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxrlhf.kernels import KV_CACHE_DTYPES
from jaxrlhf.models import Decoder, count_params, logical_axes, param_shapes

ADAM_BYTES = 28  # per trained element: gradient, weight and two moments read, weight and moments written, in float32


@dataclass(frozen=True)
class Peaks:
    """Peak rates of the devices that a program runs on."""

    flops: float
    """FLOP/s of a large matrix product in the compute dtype."""
    bandwidth: float
    """Bytes/s, read and written, of device memory."""
    host_link: float = math.inf
    """Bytes/s between device and host memory."""


@dataclass(frozen=True)
class Cost:
    """Cost of a stage. Arithmetic, memory traffic and `hidden` communication overlap; the rest adds to the time."""

    flops: float = 0.0
    bytes: float = 0.0
    """Bytes to and from device memory."""
    hidden: float = 0.0
    """Seconds of communication that overlaps with computation."""
    exposed: float = 0.0
    """Seconds of communication that computation waits for."""
    links: float = 0.0
    """Bytes over links."""
    host: float = 0.0
    """Bytes between device and host memory."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(getattr(self, f.name) * times for f in fields(self)))

    def seconds(self, peaks: Peaks) -> float:
        """Roofline time of the stage."""
        overlapped = max(self.flops / peaks.flops, self.bytes / peaks.bandwidth, self.hidden)
        return overlapped + self.exposed + self.host / peaks.host_link


Stages = tuple[Cost, ...]
"""Stages of a program that run one after the other."""


def total(stages: Iterable[Cost]) -> Cost:
    """Sum of the stages' costs."""
    return sum(stages, Cost())


def roofline_seconds(stages: Iterable[Cost], peaks: Peaks) -> float:
    """Least time of a program: each stage takes its own roofline time."""
    return sum(stage.seconds(peaks) for stage in stages)


def itemsize(module: Decoder) -> int:
    """Bytes of an element in the compute dtype."""
    return jnp.dtype(module.dtype).itemsize


def flat_shapes(module: Decoder) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shapes of the parameters by path."""
    return cast(Any, flatten_dict(param_shapes(module)))


def matrices(module: Decoder, padded: bool = False) -> tuple[int, int]:
    """(elements of the matrices that multiply every token, those of the output head), without experts or adapters."""
    c = module.config
    flat = flat_shapes(module).items()
    kernels = (x for path, x in flat if path[-1] == "kernel" and path[0] not in ("lm_head", "score"))
    vocab = c.padded_vocab_size if padded else c.vocab_size
    body = sum(x.size for x in kernels) - expert_elements(module)
    return body, c.embedding_size * (vocab if module.head == "lm" else 1)


def expert_elements(module: Decoder) -> int:
    """Elements of all experts of all layers; 0 for a model without experts."""
    axes: dict[tuple[str, ...], tuple[str | None, ...]] = cast(Any, flatten_dict(logical_axes(module)))
    return sum(x.size for path, x in flat_shapes(module).items() if "expert" in axes[path])


def active_params(module: Decoder) -> int:
    """Parameters that compute one token: all but the experts that its routers do not choose."""
    c = module.config
    idle = expert_elements(module) * (c.num_experts - c.experts_per_token) // max(c.num_experts, 1)
    return count_params(param_shapes(module)) - idle


def computed_share(module: Decoder, padded: bool) -> float:
    """Share of the experts that compute each token."""
    c = module.config
    if not c.num_experts or (padded and module.expert_implementation == "dense"):
        return 1.0
    return c.experts_per_token / c.num_experts


def read_share(module: Decoder, tokens: float, devices: int = 1, padded: bool = False) -> float:
    """Share of its experts that a device reads in a pass over `tokens` tokens of each of `devices` that split them."""
    return min(1.0, tokens * devices * computed_share(module, padded))


def _adapters(module: Decoder) -> int:
    """Elements of LoRA adapters."""
    return sum(x.size for path, x in flat_shapes(module).items() if path[-1] in ("lora_a", "lora_b"))


def visible(positions: int, window: int) -> int:
    """Number of `positions` that the last one's query attends to; window 0 is no window."""
    return min(positions, window) if window else positions


def causal_pairs(length: int, window: int) -> float:
    """(query, key) pairs of one row and layer."""
    seen = visible(length, window)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def _windows(module: Decoder) -> tuple[int, ...]:
    """Local window of each layer, 0 for none."""
    return module.config.windows or (0,) * module.config.num_layers


def attention_pairs(module: Decoder, queries: int, keys: int, padded: bool = False) -> float:
    """(query, key) pairs of one row over all layers; the queries are the last of the `keys` positions."""
    if padded:
        return queries * keys * module.config.num_layers
    return sum(causal_pairs(keys, w) - causal_pairs(keys - queries, w) for w in _windows(module))


def _attention_flops(module: Decoder, rows: float, pairs: float) -> float:
    """FLOPs of `QKᵀ` and `PV`."""
    return 4.0 * rows * pairs * module.config.num_heads * module.config.head_dim


def forward(
    module: Decoder, rows: float, queries: int, keys: int, headed: int, *, padded: bool = False, expert: int = 1
) -> Cost:
    """Forward pass over `rows × queries` tokens; it reads the weights once.

    Args:
        module: The model.
        rows: Sequences of the batch.
        queries: Tokens per row that pass through the layers.
        keys: Positions per row that attention sees, `queries` among them.
        headed: Tokens per row that reach the output head.
        padded: Count masked positions and padded vocabulary rows.
        expert: Devices that split the experts, each with as many tokens of its own.
    """
    body, head = matrices(module, padded)
    experts = expert_elements(module)
    used = body + _adapters(module) + experts * computed_share(module, padded)
    flops = 2.0 * rows * (queries * used + headed * head)
    flops += _attention_flops(module, rows, attention_pairs(module, queries, keys, padded))
    read = body + head + experts / expert * read_share(module, rows * queries, expert, padded)
    return Cost(flops, float(read * itemsize(module)))


def cached_vector_bytes(module: Decoder, lanes: int = 1) -> int:
    """Bytes of one cached key or value of a head; a quantised one (`kv_cache_dtype`) has a float32 scale.

    `lanes` pads head_dim to a multiple, as a TPU does.
    """
    width = -(-module.config.head_dim // lanes) * lanes
    quantised = KV_CACHE_DTYPES[module.kv_cache_dtype]
    return width * itemsize(module) if quantised is None else width * jnp.dtype(quantised).itemsize + 4


def cache_bytes(module: Decoder, positions: int) -> int:
    """Bytes of one row's key/value cache that the query at the last of `positions` reads."""
    seen = sum(visible(positions, window) for window in _windows(module))
    return 2 * module.config.num_kv_heads * cached_vector_bytes(module) * seen


def decode(module: Decoder, rows: float, positions: int) -> Cost:
    """Decode step: one token per row, at the last of `positions`."""
    return forward(module, rows, 1, positions, 1) + Cost(bytes=rows * cache_bytes(module, positions))


def generate(module: Decoder, rows: int, prompt: int, response: int) -> Stages:
    """Prefill, which samples the first token, write of the prompt's cache, and a decode step per further token."""
    steps = (decode(module, rows, prompt + step) for step in range(1, response))
    return forward(module, rows, prompt, prompt, 1), Cost(bytes=rows * cache_bytes(module, prompt)), *steps


def score(actor: Decoder, critic: Decoder, rows: int, prompt: int, response: int) -> Stages:
    """Forward passes of actor, critic, reference and reward model."""
    length = prompt + response
    return tuple(forward(module, rows, length, length, response) for module in (actor, critic)) * 2


def adam(elements: float) -> Cost:
    """Adam's update of `elements` float32 parameters on one device."""
    return Cost(bytes=ADAM_BYTES * elements)


def train(actor: Decoder, critic: Decoder, rows: int, prompt: int, response: int) -> Stages:
    """Forward and backward pass (three times the forward cost) and Adam, of actor and critic."""
    length = prompt + response
    return tuple(
        stage
        for module in (actor, critic)
        for stage in (forward(module, rows, length, length, response) * 3, adam(count_params(param_shapes(module))))
    )


def attention_layer(module: Decoder, rows: int, length: int, window: int, backward: bool) -> Stages:
    """Causal attention of one layer with this window; gradients add twice the forward products."""
    c = module.config
    flops = _attention_flops(module, rows, causal_pairs(length, window))
    once = Cost(flops, rows * length * c.head_dim * (2.0 * c.num_heads + 2 * c.num_kv_heads) * itemsize(module))
    return (once * 3 if backward else once,)


def logprobs(module: Decoder, rows: int, length: int, backward: bool) -> Stages:
    """Output head on `[rows, length]` hidden states; each of the two gradients adds a product."""
    _, head = matrices(module)
    tokens = rows * length
    once = Cost(2.0 * tokens * head, (head + tokens * module.config.embedding_size) * float(itemsize(module)))
    return (once * 3 if backward else once,)
