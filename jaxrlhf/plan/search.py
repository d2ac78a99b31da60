"""The nearest setting that fits: the smallest set of changes that suffices, the cheapest first."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jaxrlhf.errors import InputError
from jaxrlhf.plan.memory import ProgramMemory, estimate
from jaxrlhf.plan.settings import SUPERVISED, PlanConfig
from jaxrlhf.plan.system import build_system

MOST_DEVICES = 65_536
LORA_RANK = 64


@dataclass(frozen=True)
class Nearest:
    """A setting that fits, and how it differs from the one that was asked for."""

    config: PlanConfig
    flags: str
    """Flags to add to the command line."""
    reasons: tuple[str, ...]
    bytes_per_device: int
    same_training: bool
    """True for the training that was asked for in another layout."""


def capacity(config: PlanConfig) -> int:
    """Bytes of a device that programs may fill."""
    return int(config.accelerator.memory * config.accelerator.usable)


def peak(programs: dict[str, ProgramMemory]) -> int:
    """Most bytes on a device over an iteration."""
    return max(program.bytes_per_device for program in programs.values())


_PEAKS: dict[str, float] = {}


def _peak_of(config: PlanConfig) -> float:
    """Most bytes on a device; infinite for a setting that is refused: a mesh or a group that does not divide."""
    key = repr(config)  # settings with a dict in them have no hash
    if key not in _PEAKS:
        try:
            _PEAKS[key] = peak(estimate(build_system(config), config.accelerator.platform))
        except InputError:
            _PEAKS[key] = math.inf
    return _PEAKS[key]


def _fits(config: PlanConfig) -> bool:
    return _peak_of(config) <= capacity(config)


class Change(NamedTuple):
    """A change of the settings that saves memory."""

    reason: str
    """Its effect and its price."""
    values: Callable[[PlanConfig], Mapping[str, object]]
    """The settings to change and their new values; none where it cannot help."""
    same_training: bool = True
    """False for a change of what is computed."""

    def changed(self, config: PlanConfig) -> dict[str, object]:
        """The settings that change, with their new values."""
        return {name: new for name, new in self.values(config).items() if config.value(name) != new}

    def apply(self, config: PlanConfig, kept: Collection[str] = ()) -> PlanConfig:
        """The changed config; `config` itself where nothing changes, or a setting in `kept` would."""
        values = self.changed(config)
        return config.replace(**values) if values and not values.keys() & set(kept) else config


def _smaller_micro_batches(c: PlanConfig) -> Mapping[str, object]:
    """The same rollout batch in micro-batches of one row, in scoring too."""
    rows = c.value("per_device_train_batch_size")
    steps = rows * c.value("gradient_accumulation_steps")
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps, SCORE_ROWS: 0}


def _pieces(c: PlanConfig) -> Mapping[str, object]:
    """The rollout batch generated in pieces, as many as eight."""
    if "generate" not in c.programs:
        return {}
    system = build_system(c)
    prompts = system.rows // system.config.sampling.samples_per_prompt
    return {"generation_batches": max(math.gcd(prompts, 8), c.value("generation_batches"))}


def _wider_generation(c: PlanConfig) -> Mapping[str, object]:
    """Generation split over the largest group that divides the heads."""
    if c.trainer in SUPERVISED:
        return {}
    system = build_system(c)
    tensor, fsdp = system.tensor, system.mesh.shape["fsdp"]
    group = max(_groups(fsdp, tensor, system.modules["actor"].config.num_heads))
    return {"generate_tensor_parallel": group} if group > system.generate_tensor else {}


def _groups(fsdp: int, tensor: int, heads: int) -> list[int]:
    """Sizes of the groups of devices that can generate together (`generate_mesh`)."""
    return [tensor * n for n in range(1, fsdp + 1) if fsdp % n == 0 and heads % (tensor * n) == 0]


def _split_experts(c: PlanConfig) -> Mapping[str, object]:
    """Experts split over the devices of a host, as many as divide those of every sparse model.

    These devices are taken from `mesh_fsdp`, so a group that generates together may have to be smaller.
    """
    system = build_system(c)
    counts = [n for module in system.modules.values() if (n := module.config.num_experts)]
    together = system.mesh.shape["fsdp"] * system.expert
    wanted = math.gcd(c.accelerator.devices_per_host, together, *counts)
    if not counts or wanted <= system.expert:
        return {}
    values: dict[str, object] = {"mesh_expert": wanted}
    values["mesh_fsdp"] = -1 if c.value("mesh_fsdp") == -1 else together // wanted
    if c.value("generate_tensor_parallel"):
        groups = _groups(together // wanted, system.tensor, system.modules["actor"].config.num_heads)
        values["generate_tensor_parallel"] = max(n for n in groups if n <= system.generate_tensor)
    return values


def _tensor_parallel(c: PlanConfig) -> Mapping[str, object]:
    """Training split over the devices of a host too, as many as divide heads and MLP of the trained models.

    Fewer devices then split the batch, so there are more micro-batches, for the same rollout batch.
    """
    system = build_system(c)
    configs = [system.modules[name].config for name in system.trained]
    sizes = [size for x in configs for size in (x.num_heads, x.expert_size)]
    together = system.mesh.shape["fsdp"] * system.tensor
    wanted = math.gcd(c.accelerator.devices_per_host, together, *sizes)
    if wanted <= system.tensor:
        return {}
    return {
        "mesh_tensor": wanted,
        "mesh_fsdp": -1 if c.value("mesh_fsdp") == -1 else together // wanted,
        "gradient_accumulation_steps": c.value("gradient_accumulation_steps") * (wanted // system.tensor),
    }


def _offload_frozen(c: PlanConfig) -> Mapping[str, object]:
    """Frozen copies in host memory; with adapters there is no copy."""
    if c.trainer in SUPERVISED:
        return {}
    flags = {"offload_reference_model": not c.value("lora_r"), "offload_reward_model": not c.value("critic_lora_r")}
    if c.reward is None:
        del flags["offload_reward_model"]
    return flags if c.accelerator.pinned_host else {}


def _lora(c: PlanConfig) -> Mapping[str, object]:
    """Adapters on the actor, whose base is the reference then."""
    shared = {"offload_reference_model": False, "reference_zero_stage": None}
    return {} if c.value("lora_r") else {"lora_r": LORA_RANK} | shared


SCORE_ROWS = "per_device_score_batch_size"
ONE_ROW = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "generation_batches")
STAGES = ("critic_zero_stage", "reference_zero_stage", "reward_zero_stage")
EXPERTS = Change("experts split over the devices of a host: tokens are exchanged in each sparse layer", _split_experts)
CHANGES = (
    Change("smaller micro-batches: the same results, a little slower", _smaller_micro_batches),
    Change("generation in pieces: the same responses, decoded with a smaller batch", _pieces),
    Change("generation over more devices: more communication per token", _wider_generation),
    Change(
        "recompute layers in the backward pass: about a third more arithmetic in training",
        lambda c: {} if c.planned.run.remat == "full" else {"remat_policy": "full"},
    ),
    Change(
        "split parameters, gradients and optimizer state over all of mesh_fsdp",
        lambda c: {"zero_stage": 3} | dict.fromkeys(STAGES),
    ),
    EXPERTS,
    Change("layers split over the devices of a host in training: sums after each", _tensor_parallel),
    Change("frozen models wait in host memory: a transfer per iteration", _offload_frozen),
    Change(
        "Adam's moments wait in host memory: two transfers per update",
        lambda c: {"offload_optimizer": True} if c.accelerator.pinned_host else {},
    ),
    # One row per device shortens the cache.
    Change("a smaller batch: other training dynamics", lambda c: dict.fromkeys(ONE_ROW, 1) | {SCORE_ROWS: 0}, False),
    Change(f"adapters of rank {LORA_RANK} instead of all parameters: another kind of training", _lora, False),
)
ALIKE = [change for change in CHANGES if change.same_training]
OTHER = [change for change in CHANGES if not change.same_training]


def flags_between(old: PlanConfig, new: PlanConfig) -> str:
    """The flags that turn one setting into another."""
    words = []
    for name, after in new.items():
        if old.value(name) != after:
            words.append(f"--{name} {str(after).lower() if isinstance(after, bool | None) else after}")
    return " ".join(words)


def _combined(config: PlanConfig, changes: Sequence[Change], kept: Collection[str] = ()) -> PlanConfig:
    for change in changes:
        config = change.apply(config, kept)
    return config


def _ways(config: PlanConfig) -> list[list[Change]]:
    """Changes that keep the training, in order. Sparse models may need less on a mesh without an axis for experts."""
    plain = [change for change in ALIKE if change is not EXPERTS]
    return [ALIKE, plain] if EXPERTS.changed(config) else [plain]


def nearest_on_mesh(config: PlanConfig, kept: Collection[str] = ()) -> Nearest | None:
    """The nearest setting that fits the devices that were asked for; None when nothing does.

    It is the first change that suffices alone, else the shortest run of changes from the top, without those that turn
    out superfluous. Changes of the training itself come last. No setting in `kept` changes.
    """
    ways = _ways(config)
    candidates = [[change] for change in ways[0]] + [way[:n] for n in range(2, len(ALIKE) + 1) for way in ways]
    candidates += [[change] for change in OTHER] + [[*way, change] for change in OTHER for way in ways]
    candidates += [way + OTHER for way in ways]
    chosen = next((changes for changes in candidates if _fits(_combined(config, changes, kept))), None)
    if chosen is None:
        return None
    for change in reversed(chosen[:-1]):
        fewer = [other for other in chosen if other is not change]
        chosen = fewer if _fits(_combined(config, fewer, kept)) else chosen
    found, reasons = config, []
    for change in chosen:
        before, found = found, change.apply(found, kept)
        reasons += [change.reason] if found is not before else []
    found = eased(config, found)
    same = all(change.same_training for change in chosen)
    return Nearest(found, flags_between(config, found), tuple(reasons), int(_peak_of(found)), same)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def eased(asked: PlanConfig, found: PlanConfig) -> PlanConfig:
    """`found` with the largest micro-batches and the fewest pieces of generation that fit, within those of `asked`.

    `nearest_on_mesh` tries only the ends: micro-batches of one row and eight pieces.
    """
    rows, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
    most, total = asked.value(rows), found.value(rows) * found.value(steps)
    if found.value(rows) < most:
        sizes = [n for n in reversed(_divisors(total)) if n <= most]
        micro = (found.replace(**{rows: n, steps: total // n}) for n in sizes)
        found = next((config for config in micro if _fits(config)), found)
    least, pieces = asked.value("generation_batches"), found.value("generation_batches")
    if pieces > least:
        split = (found.replace(generation_batches=n) for n in _divisors(pieces) if n >= least)
        found = next((config for config in split if _fits(config)), found)
    return found


def largest_micro_batches(config: PlanConfig) -> PlanConfig:
    """The same run with the largest micro-batches that fit, in training and then in scoring."""
    rows, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
    total = config.value(rows) * config.value(steps)
    sizes = [n for n in reversed(_divisors(total)) if n > config.value(rows)]
    larger = (config.replace(**{rows: n, steps: total // n}) for n in sizes)
    found = next((c for c in larger if _fits(c)), config)
    if config.trainer in SUPERVISED:
        return found
    batch = found.ppo.rows_per_device
    sizes = [n for n in reversed(_divisors(batch)) if n > found.ppo.score_rows]
    return next((c for c in (found.replace(**{SCORE_ROWS: n}) for n in sizes) if _fits(c)), found)


def _shared_out(config: PlanConfig, devices: int) -> dict[str, int]:
    """Batch settings that keep the rollout batch on more devices, as far as it divides."""
    times = devices // config.devices
    steps = math.gcd(times, config.value("gradient_accumulation_steps"))
    rows = math.gcd(times // steps, config.value("per_device_train_batch_size"))
    return {
        "gradient_accumulation_steps": config.value("gradient_accumulation_steps") // steps,
        "per_device_train_batch_size": config.value("per_device_train_batch_size") // rows,
    }


def nearest_with_more_devices(config: PlanConfig) -> Nearest | None:
    """The same run, all parameters trained, on the smallest larger cluster that holds it."""
    free: Mapping[str, object] = {"mesh_fsdp": -1, "topology": None}
    if config.devices < config.accelerator.devices_per_host:
        free["devices_per_host"] = None
    count, ways = config.devices, _ways(config)
    while count < MOST_DEVICES:
        count *= 2
        try:
            larger = config.replace(devices=count, **free, **_shared_out(config, count))
        except InputError:  # there is no slice of that size
            continue
        for chosen in (way[:number] for number in range(len(ALIKE) + 1) for way in ways):
            found = _combined(larger, chosen)
            if _fits(found):
                reasons = (f"{count} devices", *(change.reason for change in chosen))
                return Nearest(found, flags_between(config, found), reasons, int(_peak_of(found)), True)
    return None
