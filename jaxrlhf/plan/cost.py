"""Time and money of a planned run: the roofline of each phase of an iteration on one device of the mesh.

A phase takes the longest of arithmetic, memory traffic and overlapping communication. It then waits for what cannot
overlap: the reshard of the weights, and the sums of tensor parallelism, which the next layer needs. `roofline_share`
scales these lower bounds to a measured run.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrlhf.plan.activations import attends_in_blocks
from jaxrlhf.plan.copies import generation_view_bytes
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.memory import cache_bytes
from jaxrlhf.plan.roofline import Cost, adam, expert_elements, forward, itemsize, read_share, total
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import System, local_shape, tree_bytes

ACTIVATION_PASSES = 16  # times that a layer reads or writes an array `[B, T, D]` or its like in one forward pass


class Links:
    """Collectives on a mesh, by the ring formulas."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def bandwidth(self, group: int, stride: int = 1) -> float:
        """Bytes/s per device in a group of `group` devices that lie `stride` apart."""
        device = self.device
        if device.platform == "tpu" or group * stride <= device.devices_per_host:
            return device.link
        members = max(1, device.devices_per_host // stride)  # of the group in one host; all their adapters carry
        return min(device.link, device.network * members)

    def gather(self, whole: float, group: int, stride: int = 1) -> Cost:
        """All-gather to, or reduce-scatter from, `whole` bytes per device, hidden behind computation."""
        moved = whole * (group - 1) / group
        return Cost(hidden=moved / self.bandwidth(group, stride), links=moved)

    def reduce(self, whole: float, group: int, stride: int = 1) -> Cost:
        """All-reduce of `whole` bytes per device, hidden behind computation."""
        return self.gather(whole, group, stride) * 2

    def layer_sums(self, system: System, name: str, tensor: int, tokens: float) -> Cost:
        """The two all-reduces of each layer's hidden states in one pass of a tensor-parallel model, which waits."""
        module = system.modules[name]
        c = module.config
        sums = self.reduce(tokens * c.hidden_size * itemsize(module), tensor) * (2 * c.num_layers)
        return Cost(exposed=sums.hidden, links=sums.links)

    def expert_exchange(self, system: System, name: str, tokens: float) -> Cost:
        """The gather of tokens for experts and the scatter of their sums, in each layer of one pass, which waits."""
        module, expert = system.modules[name], system.expert
        c = module.config
        if not c.num_experts:
            return Cost()
        once = self.gather(expert * tokens * c.hidden_size * itemsize(module), expert, system.tensor)
        moved = once * (2 * c.sparse_layers)
        return Cost(exposed=moved.hidden, links=moved.links)

    def context_exchange(self, system: System, name: str, tokens: float) -> Cost:
        """The all-to-alls of query, key, value and output in each layer of one pass over split sequences."""
        module, context = system.modules[name], system.context
        c = module.config
        width = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim / system.tensor
        moved = self.gather(tokens * width * itemsize(module), context, system.tensor) * c.num_layers
        return Cost(exposed=moved.hidden, links=moved.links)


def _elements(tree: object) -> int:
    """Elements on one device."""
    return sum(math.prod(local_shape(x)) for x in jax.tree.leaves(tree))


def _passes(system: System, name: str, rows: float, forwards: int, backwards: int, links: Links) -> Cost:
    """`forwards` and `backwards` through a model by the train rules, on a device with `rows` rows of the batch.

    Of split sequences, each device has a part of a row.
    """
    module, length = system.modules[name], system.length
    c, tensor, expert = module.config, system.tensor, system.expert
    fsdp = system.mesh.shape["fsdp"] * system.context  # which split parameters alike
    once = forward(module, rows, length, length, system.headed, padded=True, expert=expert) * (1 / tensor)
    stream = rows * length * c.hidden_size * itemsize(module)
    scores = 0 if attends_in_blocks(system, name) else 4 * rows * c.num_heads / tensor * length * length
    activations = Cost(bytes=c.num_layers * (ACTIVATION_PASSES * stream + 4 * scores))
    # A frozen base needs no gradients of its weights, only those of what flows through it.
    cost = (once + activations) * (forwards + (1 if module.lora is not None else 2) * backwards)
    passes = forwards + backwards
    if module.zero_stage == 3:
        experts = expert_elements(module) * itemsize(module) / (tensor * expert)
        cost += links.gather(once.bytes - experts, fsdp * expert, tensor) * passes
        cost += links.gather(experts, fsdp, tensor * expert) * passes
    cost += links.expert_exchange(system, name, rows * length) * passes
    cost += links.context_exchange(system, name, rows * length) * passes
    return cost + links.layer_sums(system, name, tensor, rows * length) * passes


def _update(system: System, name: str, links: Links) -> Cost:
    """Reduction of the gradients, and Adam."""
    module, trainable = system.modules[name], system.trainable(name)
    data, expert, tensor = (system.mesh.shape[axis] for axis in ("data", "expert", "tensor"))
    fsdp = system.mesh.shape["fsdp"] * system.context
    local = _elements(trainable)
    experts = 0 if module.lora is not None else 4 * expert_elements(module) / (tensor * expert)
    whole = 4 * sum(x.size for x in jax.tree.leaves(trainable)) / tensor - expert * experts
    reduce = links.gather if module.zero_stage >= 2 else links.reduce
    cost = adam(local) + reduce(whole, fsdp * expert, tensor) + reduce(experts, fsdp, tensor * expert)
    if module.zero_stage in (1, 2):  # the working copy
        cost += links.gather(whole / 2, fsdp * expert, tensor) + links.gather(experts / 2, fsdp, tensor * expert)
    cost += links.reduce(4 * local, data, fsdp * expert * tensor)
    if f"{name}_optimizer" in system.on_host:
        cost += Cost(host=2 * tree_bytes(system.trees[f"{name}_optimizer"]))
    return cost


def _generate(system: System, links: Links) -> dict[str, Cost]:
    """Phases of the generate program: the reshard, the prefill, and all steps of decoding."""
    config, module, params = system.config, system.modules["actor"].clone(lora=None), system.trees["actor"]
    c, tensor = module.config, system.generate_tensor
    rows, prompt = system.generate_rows * tensor / system.mesh.size, config.data.max_prompt_seq_len
    view = generation_view_bytes(system)
    arriving = max(0, view - _elements(params) * itemsize(module))
    groups = max(1, system.mesh.size // system.mesh.shape["data"] // tensor)
    reshard = Cost(bytes=tree_bytes(params) + view, exposed=arriving / links.bandwidth(groups, tensor), links=arriving)

    def step(queries: int, keys: int, traffic: float) -> Cost:
        """Pass over `queries` tokens per row; `traffic`: bytes besides the weights, which lie as the view has them."""
        cost = forward(module, rows, queries, keys, 1, padded=True) * (1 / tensor)
        read = generation_view_bytes(system, experts=read_share(module, rows * queries, system.expert, padded=True))
        cost = dataclasses.replace(cost, bytes=read + traffic) + links.expert_exchange(system, "actor", rows * queries)
        return cost + links.layer_sums(system, "actor", tensor, rows * queries)

    prefill = step(prompt, prompt, ACTIVATION_PASSES * rows * prompt * c.hidden_size * itemsize(module) * c.num_layers)
    decode = step(1, system.length, cache_bytes(system)) * (config.sampling.max_new_tokens - 1)
    phases = {"reshard": reshard, "prefill": prefill, "decode": decode}
    return {name: cost * config.rollout.generation_batches for name, cost in phases.items()}


def iteration_cost(system: System, device: Device) -> dict[str, Cost]:
    """Cost on one device of each phase of an iteration that the trainer has: reshard, prefill, decode, score, train."""
    links, config = Links(device), system.config
    rows = system.rows * system.sequences / system.batch_devices / system.context
    uses = 1 + config.rollout.reuses  # each is an update, with log-probs of its own and the scores of the first one
    passes = {n: times * (1 if n == "reward" else uses) for n, times in system.score_passes.items()}
    score = [_passes(system, name, rows * times, 1, 0, links) for name, times in passes.items()]
    score += [Cost(host=tree_bytes(system.trees[name])) for name in system.scoring if name in system.on_host]
    forwards = 2 if config.run.remat == "full" else 1
    updates = config.algorithm.num_mini_batches * config.algorithm.ppo_epochs * uses
    epochs = config.algorithm.ppo_epochs * uses
    train = [_passes(system, name, rows, forwards, 1, links) * epochs for name in system.trained]
    train += [_update(system, name, links) * updates for name in system.trained]
    phases: dict[str, Cost] = {}
    for name, share in system.samplers.items():
        for phase, cost in _generate(system.sampled_by(name), links).items():
            phases[phase] = phases.get(phase, Cost()) + cost * share
    return phases | ({"score": total(score)} if "score" in system.programs else {}) | {"train": total(train)}


@dataclass(frozen=True)
class RunCost:
    """Time and money of the planned run."""

    phases: dict[str, Cost]
    seconds: dict[str, float]
    """Seconds of each phase."""
    seconds_per_iteration: float
    tokens_per_second: float
    """Prompt and response tokens of all devices."""
    sequences_per_second: float
    iterations: int
    """Iterations of the whole run."""
    hours: float
    cost: float
    """`hours` × devices × price."""


def run_cost(system: System, config: PlanConfig) -> RunCost:
    """Roofline time and price of the run; float32 arithmetic runs at half the bfloat16 peak."""
    single = jnp.dtype(system.config.mesh.compute_dtype).itemsize > 2
    peaks = config.accelerator.peaks(0.5 if single else 1.0)
    phases = iteration_cost(system, config.accelerator)
    seconds = {name: phase.seconds(peaks) / config.roofline_share for name, phase in phases.items()}
    iteration = sum(seconds.values())
    rows = config.train_rows * system.config.sampling.samples_per_prompt
    iterations = math.ceil(rows * config.ppo.run.num_train_epochs / system.rows)
    hours = iterations * iteration / 3600
    return RunCost(
        phases=phases,
        seconds=seconds,
        seconds_per_iteration=iteration,
        tokens_per_second=system.rows * system.sequences * system.length / iteration,
        sequences_per_second=system.rows / iteration,
        iterations=iterations,
        hours=hours,
        cost=hours * config.devices * config.price_per_device_hour,
    )
