"""The nearest setting that fits: changes in order of what they cost, the fewest of them that suffice."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from jaxrlhf.errors import InputError
from jaxrlhf.plan.memory import ProgramMemory, estimate
from jaxrlhf.plan.programs import build_system
from jaxrlhf.plan.settings import PlanConfig

Change = Callable[[PlanConfig], PlanConfig | None]
MOST_DEVICES = 65_536
LORA_RANK = 64


@dataclass(frozen=True)
class Nearest:
    """A setting that fits, and how it differs from the one that was asked for."""

    config: PlanConfig
    flags: str
    """What to add to the command line."""
    reasons: tuple[str, ...]
    bytes_per_device: int
    same_training: bool
    """Whether it computes what was asked for, only laid out otherwise."""


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


def _smaller_micro_batches(c: PlanConfig) -> PlanConfig | None:
    """The same rollout batch in micro-batches of one row."""
    rows = c.value("per_device_train_batch_size")
    steps = rows * c.value("gradient_accumulation_steps")
    return _changed(c, per_device_train_batch_size=1, gradient_accumulation_steps=steps) if rows > 1 else None


def _pieces(c: PlanConfig) -> PlanConfig | None:
    """The rollout batch generated in pieces, as many as eight."""
    pieces = math.gcd(build_system(c).rows, 8)
    return _changed(c, generation_batches=pieces) if pieces > c.value("generation_batches") else None


def _wider_generation(c: PlanConfig) -> PlanConfig | None:
    """Generation split over the largest group that divides the heads."""
    system = build_system(c)
    tensor, fsdp = system.tensor, system.mesh.shape["fsdp"]
    heads = system.modules["actor"].config.num_heads
    groups = [tensor * n for n in range(1, fsdp + 1) if fsdp % n == 0 and heads % (tensor * n) == 0]
    return _changed(c, generate_tensor_parallel=max(groups)) if max(groups) > system.generate_tensor else None


def _changed(c: PlanConfig, **values: object) -> PlanConfig | None:
    return c.replace(**values) if any(c.value(name) != value for name, value in values.items()) else None


def _remat(c: PlanConfig) -> PlanConfig | None:
    return None if c.planned.run.remat == "full" else _changed(c, remat_policy="full")


def _full_sharding(c: PlanConfig) -> PlanConfig | None:
    stages = {"zero_stage": 3} | {
        name: None for name in ("critic_zero_stage", "reference_zero_stage", "reward_zero_stage")
    }
    return _changed(c, **stages)


def _tensor_parallel(c: PlanConfig) -> PlanConfig | None:
    """Training split over the devices of a host too, as many as divide heads and MLP of both models.

    Fewer devices then split the batch, so there are more micro-batches, for the same rollout batch.
    """
    system = build_system(c)
    configs = [system.modules[name].config for name in ("actor", "critic")]
    sizes = [size for x in configs for size in (x.num_heads, x.intermediate_size)]
    together = system.mesh.shape["fsdp"] * system.tensor
    wanted = math.gcd(c.accelerator.devices_per_host, together, *sizes)
    if wanted <= system.tensor:
        return None
    fsdp = c.value("mesh_fsdp") if c.value("mesh_fsdp") == -1 else together // wanted
    steps = c.value("gradient_accumulation_steps") * (wanted // system.tensor)
    return _changed(c, mesh_tensor=wanted, mesh_fsdp=fsdp, gradient_accumulation_steps=steps)


def _offload_frozen(c: PlanConfig) -> PlanConfig | None:
    if not c.accelerator.pinned_host:
        return None
    return _changed(c, offload_reference_model=not c.value("lora_r"), offload_reward_model=not c.value("critic_lora_r"))


def _offload_optimizer(c: PlanConfig) -> PlanConfig | None:
    return _changed(c, offload_optimizer=True) if c.accelerator.pinned_host else None


def _lora(c: PlanConfig) -> PlanConfig | None:
    shared = {"offload_reference_model": False, "reference_zero_stage": None}
    return None if c.value("lora_r") else _changed(c, lora_r=LORA_RANK, **shared)


def _fewer_rows(c: PlanConfig) -> PlanConfig | None:
    """A rollout batch of one row per device: it shortens the cache, and changes what is trained on at once."""
    smallest = {"gradient_accumulation_steps": 1, "num_mini_batches": 1, "generation_batches": 1}
    return _changed(c, per_device_train_batch_size=1, **smallest)


CHANGES: tuple[tuple[str, Change], ...] = (
    ("micro-batches of one row: the same results, a little slower", _smaller_micro_batches),
    ("generation in pieces: the same answers, decoded with a smaller batch", _pieces),
    ("generation over more devices: more communication per token", _wider_generation),
    ("recompute layers in the backward pass: about a third more arithmetic in training", _remat),
    ("split parameters, gradients and optimizer state over all of mesh_fsdp", _full_sharding),
    ("layers split over the devices of a host in training: sums after each", _tensor_parallel),
    ("frozen models wait in host memory: a transfer per iteration", _offload_frozen),
    ("Adam's moments wait in host memory: two transfers per update", _offload_optimizer),
    ("a smaller rollout batch: other training dynamics", _fewer_rows),
    (f"adapters of rank {LORA_RANK} instead of all parameters: another kind of training", _lora),
)

OTHER_TRAINING = (_fewer_rows, _lora)


def flags_between(old: PlanConfig, new: PlanConfig) -> str:
    """The flags that turn one setting into another."""
    words = []
    for name, after in new.items():
        if old.value(name) != after:
            words.append(f"--{name} {str(after).lower() if isinstance(after, bool | None) else after}")
    return " ".join(words)


def _combined(config: PlanConfig, chosen: list[int]) -> PlanConfig:
    for number in chosen:
        config = CHANGES[number][1](config) or config
    return config


def nearest_on_mesh(config: PlanConfig) -> Nearest | None:
    """The nearest setting that fits the devices that were asked for; None when nothing does.

    The first change that suffices alone, else the shortest run of them from the top, thinned out; what changes the
    training itself comes last.
    """
    alike = [n for n, (_, change) in enumerate(CHANGES) if change not in OTHER_TRAINING]
    other = [n for n in range(len(CHANGES)) if n not in alike]
    candidates = [[n] for n in alike] + [alike[:count] for count in range(2, len(alike) + 1)]
    candidates += [[n] for n in other] + [[*alike, n] for n in other] + [alike + other]
    chosen = next((numbers for numbers in candidates if _fits(_combined(config, numbers))), None)
    if chosen is None:
        return None
    for number in reversed(chosen[:-1]):
        fewer = [n for n in chosen if n != number]
        chosen = fewer if _fits(_combined(config, fewer)) else chosen
    found = _combined(config, chosen)
    reasons = tuple(
        CHANGES[n][0] for i, n in enumerate(chosen) if CHANGES[n][1](_combined(config, chosen[:i])) is not None
    )
    same = not any(CHANGES[n][1] in OTHER_TRAINING for n in chosen)
    return Nearest(found, flags_between(config, found), reasons, int(_peak_of(found)), same)


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
    free = {"mesh_fsdp": -1, "topology": None}
    device = config.accelerator
    count = config.devices
    alike = [n for n, (_, change) in enumerate(CHANGES) if change not in OTHER_TRAINING]
    while count < MOST_DEVICES:
        count *= 2
        hosts = {"devices_per_host": None} if config.devices < device.devices_per_host else {}
        try:
            larger = config.replace(devices=count, **free, **hosts, **_shared_out(config, count))
        except InputError:  # there is no slice of that size
            continue
        for chosen in (alike[:number] for number in range(len(alike) + 1)):
            found = _combined(larger, chosen)
            if _fits(found):
                reasons = (f"{count} devices", *(CHANGES[n][0] for n in chosen))
                return Nearest(found, flags_between(config, found), reasons, int(_peak_of(found)), True)
    return None
