"""Work and roofline time of one PPO iteration: FLOPs, bytes of device memory, bytes over links; and what a run costs.

A phase takes the longest of arithmetic, memory traffic and the communication that overlaps with them, and then what
cannot overlap: the flip, and the sums of tensor parallelism, which the next layer waits for. Nothing is lost to
latency or to kernels below their peak, so times are lower bounds; `roofline_share` scales them to what is measured.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxrlhf.models import Decoder, param_shapes
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.memory import cache_bytes, generation_view_bytes
from jaxrlhf.plan.programs import System, local_shape, tree_bytes
from jaxrlhf.plan.settings import PlanConfig

PyTree = Any
ADAM_BYTES = 28  # per trained element: gradient, weight and two moments read, weight and moments written, in float32
ACTIVATION_PASSES = 16  # times that a layer reads or writes an array `[B, T, D]` or its like in one forward pass


@dataclass(frozen=True)
class Work:
    """What one device does in a phase."""

    flops: float = 0.0
    memory: float = 0.0
    """Bytes to and from device memory."""
    hidden: float = 0.0
    """Seconds on links while computing."""
    exposed: float = 0.0
    """Seconds on links that computing waits for."""
    links: float = 0.0
    """Bytes over links."""
    host: float = 0.0
    """Bytes between device and host memory."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, times: float) -> "Work":
        return Work(*(getattr(self, name) * times for name in self.__dataclass_fields__))

    def seconds(self, device: Device, half: float = 1.0) -> float:
        """Roofline time; `half` scales the arithmetic peak (float32 runs at a lower one)."""
        overlapped = max(self.flops / (device.flops * half), self.memory / device.bandwidth, self.hidden)
        return overlapped + self.exposed + self.host / device.host_link


def matrix_elements(module: Decoder) -> tuple[int, int]:
    """(elements of the matrices that every token is multiplied by, of the output head)."""
    c = module.config
    flat = flatten_dict(param_shapes(module.clone(lora=None)))
    body = sum(
        math.prod(x.shape) for path, x in flat.items() if path[-1] == "kernel" and path[0] not in ("lm_head", "score")
    )
    return body, c.padded_vocab_size * c.embedding_size if module.head == "lm" else c.embedding_size


def adapter_elements(module: Decoder) -> int:
    return sum(math.prod(x.shape) for path, x in flatten_dict(param_shapes(module)).items() if "lora" in path[-1])


def forward_flops(module: Decoder, rows: float, queries: int, keys: int, heads_on: int | None = None) -> float:
    """Of `rows × queries` tokens that each see `keys` positions; `heads_on`: tokens of a row that reach the head.

    Plain attention multiplies masked positions too, so nothing is taken off for causality.
    """
    c = module.config
    body, head = matrix_elements(module)
    tokens = rows * queries
    attention = 4 * tokens * keys * c.num_heads * c.head_dim * c.num_layers
    reached = queries if heads_on is None else heads_on
    return 2 * tokens * (body + adapter_elements(module)) + 2 * rows * reached * head + attention


class Links:
    """Collectives on a mesh: how long a device is busy with them, by the ring formulas."""

    def __init__(self, system: System, device: Device) -> None:
        self.device = device
        self.size = system.mesh.size

    def bandwidth(self, group: int, stride: int = 1) -> float:
        """Bytes/s per device in a group of `group` devices that lie `stride` apart."""
        device = self.device
        if device.platform == "tpu" or group * stride <= device.devices_per_host:
            return device.link
        members = max(1, device.devices_per_host // stride)  # of the group in one host; all their adapters carry
        return min(device.link, device.network * members)

    def gather(self, whole: float, group: int, stride: int = 1) -> tuple[float, float]:
        """(seconds, bytes) of an all-gather to, or a reduce-scatter from, `whole` bytes per device."""
        moved = whole * (group - 1) / group
        return moved / self.bandwidth(group, stride), moved

    def reduce(self, whole: float, group: int, stride: int = 1) -> tuple[float, float]:
        """(seconds, bytes) of an all-reduce of `whole` bytes per device."""
        seconds, moved = self.gather(whole, group, stride)
        return 2 * seconds, 2 * moved


def _passes(system: System, name: str, rows: float, forwards: int, backwards: int, links: Links) -> Work:
    """`forwards` and `backwards` through a model by the train rules on a device that has `rows` rows of a batch."""
    module, length = system.modules[name], system.length
    c, tensor, fsdp = module.config, system.tensor, system.mesh.shape["fsdp"]
    itemsize = jnp.dtype(module.dtype).itemsize
    body, head = matrix_elements(module)
    weights = (body + head) * itemsize / tensor
    forward = forward_flops(module, rows, length, length, system.config.max_answer_seq_len) / tensor
    # a frozen base needs no gradients of its weights, only those of what flows through it
    back = 1 if module.lora is not None else 2
    stream = rows * length * c.hidden_size * itemsize
    scores = 4 * rows * c.num_heads / tensor * length * length
    layer = ACTIVATION_PASSES * stream + 4 * scores
    turns = forwards + back * backwards
    hidden = moved = 0.0
    if fsdp > 1 and module.zero_stage == 3:
        seconds, sent = links.gather(weights, fsdp, tensor)
        hidden, moved = (forwards + backwards) * seconds, (forwards + backwards) * sent
    exposed = 0.0
    if tensor > 1:
        seconds, sent = links.reduce(stream, tensor)
        sums = 2 * c.num_layers * (forwards + backwards)
        exposed, moved = sums * seconds, moved + sums * sent
    traffic = turns * (weights + c.num_layers * layer)
    return Work(turns * forward, traffic, hidden, exposed, moved)


def _update(system: System, name: str, links: Links) -> Work:
    """Reduction of the gradients, and Adam."""
    module, fsdp = system.modules[name], system.mesh.shape["fsdp"]
    trainable = system.trainable(name)
    local = sum(math.prod(local_shape(x)) for x in jax.tree.leaves(trainable))
    whole = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(trainable)) / system.tensor
    data, tensor = system.mesh.shape["data"], system.tensor
    seconds = moved = 0.0
    if fsdp > 1:
        collective = links.gather if module.zero_stage >= 2 else links.reduce
        seconds, moved = collective(whole, fsdp, tensor)
        if module.zero_stage in (1, 2):  # the working copy
            more, sent = links.gather(whole / 2, fsdp, tensor)
            seconds, moved = seconds + more, moved + sent
    if data > 1:
        more, sent = links.reduce(4 * local, data, fsdp * tensor)
        seconds, moved = seconds + more, moved + sent
    host = 0
    if f"{name}_optimizer" in system.on_host:
        host = 2 * tree_bytes(system.trees[f"{name}_optimizer"])
    return Work(2 * local, ADAM_BYTES * local, seconds, 0.0, moved, host)


def generate_work(system: System, links: Links) -> dict[str, Work]:
    """Of the generate program: the flip, the prefill, and all steps of decoding."""
    module, config = system.modules["actor"], system.config
    c, tensor = module.config, system.generate_tensor
    itemsize = jnp.dtype(module.dtype).itemsize
    rows, pieces = system.generate_rows * tensor / system.mesh.size, config.generation_batches
    prompt, steps = config.max_prompt_seq_len, config.max_answer_seq_len - 1
    view, cache = generation_view_bytes(system), cache_bytes(system)
    stored = tree_bytes(system.trees["actor"])
    stored_cast = sum(math.prod(local_shape(x)) for x in jax.tree.leaves(system.trees["actor"])) * itemsize
    arriving = max(0, view - stored_cast)
    groups = max(1, system.mesh.shape["fsdp"] * system.tensor // tensor)
    flip = Work(0, stored + view, 0, arriving / links.bandwidth(groups, tensor), arriving)

    def sums(tokens: float) -> tuple[float, float]:
        if tensor == 1:
            return 0.0, 0.0
        seconds, sent = links.reduce(tokens * c.hidden_size * itemsize, tensor)
        return 2 * c.num_layers * seconds, 2 * c.num_layers * sent

    seconds, sent = sums(rows * prompt)
    flops = forward_flops(module.clone(lora=None), rows, prompt, prompt, heads_on=1) / tensor
    layers = ACTIVATION_PASSES * rows * prompt * c.hidden_size * itemsize * c.num_layers
    prefill = Work(flops, view + layers, 0, seconds, sent)
    seconds, sent = sums(rows)
    flops = forward_flops(module.clone(lora=None), rows, 1, system.length) / tensor
    decode = Work(flops, view + cache, 0, seconds, sent) * steps
    return {"flip": flip * pieces, "prefill": prefill * pieces, "decode": decode * pieces}


def iteration_work(system: System, device: Device) -> dict[str, Work]:
    """Work of each phase of an iteration on one device: flip, prefill, decode, score, train."""
    links, config = Links(system, device), system.config
    rows = system.rows / system.batch_devices
    phases = generate_work(system, links)
    score = Work()
    for name in ("actor", "critic", "reference", "reward"):
        score += _passes(system, name, rows, 1, 0, links)
        if name in system.on_host:
            score += Work(host=tree_bytes(system.trees[name]))
    phases["score"] = score
    train = Work()
    again = {"none": 1, "full": 2, "dots": 1}[config.remat]
    updates = config.num_mini_batches * config.ppo_epochs
    for name in ("actor", "critic"):
        train += _passes(system, name, rows, again, 1, links) * config.ppo_epochs
        train += _update(system, name, links) * updates
    phases["train"] = train
    return phases


@dataclass(frozen=True)
class Cost:
    """Time and money of the planned run."""

    work: dict[str, Work]
    seconds: dict[str, float]
    """Of each phase."""
    seconds_per_iteration: float
    tokens_per_second: float
    """Prompt and answer tokens of all devices."""
    sequences_per_second: float
    iterations: int
    """Of the whole run."""
    hours: float
    cost: float
    """`hours` × devices × price."""


def run_cost(system: System, config: PlanConfig) -> Cost:
    """What the run takes by the roofline; float32 arithmetic is taken at half the bfloat16 peak."""
    device = config.accelerator
    work = iteration_work(system, device)
    half = 1.0 if jnp.dtype(system.config.compute_dtype).itemsize == 2 else 0.5
    seconds = {name: phase.seconds(device, half) / config.roofline_share for name, phase in work.items()}
    total = sum(seconds.values())
    iterations = math.ceil(config.train_rows * config.num_train_epochs / system.rows)
    hours = iterations * total / 3600
    return Cost(
        work=work,
        seconds=seconds,
        seconds_per_iteration=total,
        tokens_per_second=system.rows * system.length / total,
        sequences_per_second=system.rows / total,
        iterations=iterations,
        hours=hours,
        cost=hours * config.devices * config.price_per_device_hour,
    )
