"""The nearest setting that fits: the smallest set of changes that suffices, the cheapest first."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from jaxrlhf.errors import InputError
from jaxrlhf.plan.memory import ProgramMemory, estimate
from jaxrlhf.plan.programs import build_system
from jaxrlhf.plan.settings import PlanConfig

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


@lru_cache(maxsize=512)
def _peak_of(config: PlanConfig) -> float:
    """Most bytes on a device; infinite for a setting that is refused: a mesh or a group that does not divide."""
    try:
        return peak(estimate(build_system(config), config.accelerator.platform))
    except InputError:
        return math.inf


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

    def apply(self, config: PlanConfig) -> PlanConfig:
        """The changed config, or `config` itself where nothing changes."""
        values = self.values(config)
        return config.replace(**values) if any(config.value(name) != new for name, new in values.items()) else config


def _smaller_micro_batches(c: PlanConfig) -> Mapping[str, object]:
    """The same rollout batch in micro-batches of one row."""
    rows = c.value("per_device_train_batch_size")
    steps = rows * c.value("gradient_accumulation_steps")
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}


def _pieces(c: PlanConfig) -> Mapping[str, object]:
    """The rollout batch generated in pieces, as many as eight."""
    return {"generation_batches": max(math.gcd(build_system(c).rows, 8), c.value("generation_batches"))}


def _wider_generation(c: PlanConfig) -> Mapping[str, object]:
    """Generation split over the largest group that divides the heads."""
    system = build_system(c)
    tensor, fsdp = system.tensor, system.mesh.shape["fsdp"]
    heads = system.modules["actor"].config.num_heads
    group = max(tensor * n for n in range(1, fsdp + 1) if fsdp % n == 0 and heads % (tensor * n) == 0)
    return {"generate_tensor_parallel": group} if group > system.generate_tensor else {}


def _tensor_parallel(c: PlanConfig) -> Mapping[str, object]:
    """Training split over the devices of a host too, as many as divide heads and MLP of both models.

    Fewer devices then split the batch, so there are more micro-batches, for the same rollout batch.
    """
    system = build_system(c)
    configs = [system.modules[name].config for name in ("actor", "critic")]
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
    flags = {"offload_reference_model": not c.value("lora_r"), "offload_reward_model": not c.value("critic_lora_r")}
    return flags if c.accelerator.pinned_host else {}


def _lora(c: PlanConfig) -> Mapping[str, object]:
    """Adapters on the actor, whose base is the reference then."""
    shared = {"offload_reference_model": False, "reference_zero_stage": None}
    return {} if c.value("lora_r") else {"lora_r": LORA_RANK} | shared


ONE_ROW = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "generation_batches")
STAGES = ("critic_zero_stage", "reference_zero_stage", "reward_zero_stage")
CHANGES = (
    Change("micro-batches of one row: the same results, a little slower", _smaller_micro_batches),
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
    Change("layers split over the devices of a host in training: sums after each", _tensor_parallel),
    Change("frozen models wait in host memory: a transfer per iteration", _offload_frozen),
    Change(
        "Adam's moments wait in host memory: two transfers per update",
        lambda c: {"offload_optimizer": True} if c.accelerator.pinned_host else {},
    ),
    # One row per device shortens the cache.
    Change("a smaller rollout batch: other training dynamics", lambda c: dict.fromkeys(ONE_ROW, 1), False),
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


def _combined(config: PlanConfig, changes: Sequence[Change]) -> PlanConfig:
    for change in changes:
        config = change.apply(config)
    return config


def nearest_on_mesh(config: PlanConfig) -> Nearest | None:
    """The nearest setting that fits the devices that were asked for; None when nothing does.

    It is the first change that suffices alone, else the shortest run of changes from the top, without those that turn
    out superfluous. Changes of the training itself come last.
    """
    candidates = [[change] for change in ALIKE] + [ALIKE[:count] for count in range(2, len(ALIKE) + 1)]
    candidates += [[change] for change in OTHER] + [[*ALIKE, change] for change in OTHER] + [ALIKE + OTHER]
    chosen = next((changes for changes in candidates if _fits(_combined(config, changes))), None)
    if chosen is None:
        return None
    for change in reversed(chosen[:-1]):
        fewer = [other for other in chosen if other is not change]
        chosen = fewer if _fits(_combined(config, fewer)) else chosen
    found, reasons = config, []
    for change in chosen:
        before, found = found, change.apply(found)
        reasons += [change.reason] if found is not before else []
    same = all(change.same_training for change in chosen)
    return Nearest(found, flags_between(config, found), tuple(reasons), int(_peak_of(found)), same)


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
    count = config.devices
    while count < MOST_DEVICES:
        count *= 2
        try:
            larger = config.replace(devices=count, **free, **_shared_out(config, count))
        except InputError:  # there is no slice of that size
            continue
        for chosen in (ALIKE[:number] for number in range(len(ALIKE) + 1)):
            found = _combined(larger, chosen)
            if _fits(found):
                reasons = (f"{count} devices", *(change.reason for change in chosen))
                return Nearest(found, flags_between(config, found), reasons, int(_peak_of(found)), True)
    return None
