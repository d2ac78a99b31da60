"""`--fit auto`: the planner's search for the devices at hand, and the way out when they run out of memory."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxrlhf.config import load_yaml, settings
from jaxrlhf.config.remote import fetch, is_url
from jaxrlhf.config.settings import default_of
from jaxrlhf.data import vocabulary_size
from jaxrlhf.distributed import from_primary, gather, is_primary, joined
from jaxrlhf.errors import InputError, OutOfMemory
from jaxrlhf.models import DecoderConfig, config_from_dict, read_config
from jaxrlhf.plan.compile import OUT_OF_MEMORY
from jaxrlhf.plan.devices import Device
from jaxrlhf.plan.memory import estimate
from jaxrlhf.plan.report import gib
from jaxrlhf.plan.search import (
    ALIKE,
    STAGES,
    Nearest,
    capacity,
    flags_between,
    nearest_on_mesh,
    nearest_with_more_devices,
    peak,
)
from jaxrlhf.plan.settings import SUPERVISED, PlanConfig
from jaxrlhf.plan.system import build_system
from jaxrlhf.rl.config import PPOConfig, RolloutConfig
from jaxrlhf.rl.run import check_models
from jaxrlhf.runs.console import Console
from jaxrlhf.runs.system import available_memory
from jaxrlhf.trainers.distill import DistillConfig, teacher_of
from jaxrlhf.trainers.settings import FitConfig, SharedConfig
from jaxrlhf.trainers.supervised import SupervisedConfig

C = TypeVar("C", bound=SharedConfig)
T = TypeVar("T")

EVAL_ROWS = "per_device_eval_batch_size"
OFFLOADS = ("offload_reference_model", "offload_reward_model", "offload_optimizer")
FITTED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", EVAL_ROWS, "generation_batches"),
    "per_device_score_batch_size",
    *("generate_tensor_parallel", "remat_policy", "zero_stage", *STAGES),
    *("mesh_tensor", "mesh_fsdp", "mesh_expert", *OFFLOADS),
)
"""Settings that `--fit auto` may choose."""
MARGIN = 0.95
"""Share of the memory that the runtime gives to programs up to which estimates are trusted."""


def run_fitted(train: Callable[[C], T], config: C, section: str = "") -> T:
    """Trains with the flags that fit.

    Args:
        train: A trainer, such as `train_sft`.
        config: Its settings.
        section: Section of the run of all steps that has the step's own flags; empty for a single step.

    Raises:
        OutOfMemory: A device ran out of memory, at compilation or in a step; it names the flags that need less.
    """
    config = fitted(config, section)
    try:
        return train(config)
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        raise OutOfMemory("\n  ".join(_way_out(config, str(error), section))) from error


def fitted(config: C, section: str = "") -> C:
    """The config with the flags that `--fit auto` chooses, and `fit` off; the same config without `--fit auto`.

    It changes how a run lies on the devices, never what is trained, and no flag that was given. A resumed run gets the
    flags that its folder's config.yaml has. The arguments are those of `run_fitted`.

    Raises:
        InputError: No choice fits; it names the planner's next step.
    """
    if config.fitting.fit == "none":
        return config
    config = joined(config)
    kept, asked = _kept(config), dataclasses.replace(config, fitting=FitConfig())
    recorded = _recorded(asked, kept) if config.folder.resume else None
    if recorded is not None:
        return asked.replace(**recorded)
    console = Console(quiet=not is_primary())
    device = device_at_hand()
    device = dataclasses.replace(device, memory=min(gather("comparing the devices' memory", device.memory)))
    plan = plan_of(asked, device)
    need = _peak(plan)
    where = f"{plan.devices} × {device.name}, {gib(capacity(plan))} GiB each"
    if need <= capacity(plan):
        console.print(f"fit: no flag needs a change: {gib(need)} GiB per device on {where}")
        return asked
    nearest = nearest_on_mesh(plan, kept)
    if nearest is None or not nearest.same_training:
        raise InputError(
            "\n  ".join([f"fit=auto: {gib(need)} GiB per device do not fit {where}", *_next_step(plan, kept, section)])
        )
    found = nearest.config
    console.print(f"fit: {gib(need)} GiB per device as asked, {gib(_peak(found))} with the flags below, on {where}")
    for line in _choices(plan, found, nearest.reasons, section):
        console.print(f"  {line}")
    chosen = {name: found.value(name) for name in FITTED if name in settings(PlanConfig)}
    chosen = {name: value for name, value in chosen.items() if value != plan.value(name)}
    rows = found.ppo.rows_per_device // found.value("generation_batches")
    rows = min(found.value("per_device_train_batch_size"), rows)
    if EVAL_ROWS not in kept and rows < asked.value(EVAL_ROWS):
        console.print(f"  {_flag(EVAL_ROWS, section)} {rows}: no more rows than in training")
        chosen[EVAL_ROWS] = rows
    return asked.replace(**chosen)


def _kept(config: SharedConfig) -> frozenset[str]:
    """The settings in FITTED that were given, in whatever way."""
    cls, given = type(config), set(config.fitting.given)
    if "gradient_checkpointing" in given:
        given.add("remat_policy")
    known = [name for name in FITTED if name in settings(cls)]
    return frozenset(name for name in known if name in given or config.value(name) != default_of(cls, name))


def _recorded(config: SharedConfig, kept: Collection[str]) -> dict[str, object] | None:
    """The settings in FITTED, but those given, of the run that is resumed; None where there is no such run."""

    def read() -> dict[str, object] | None:
        folder = Path(config.folder.output_dir)
        if is_url(config.folder.output_dir):
            folder = fetch(config.folder.output_dir, lambda names: {"config.yaml"}.intersection(names))
        path = folder / "config.yaml"
        before = load_yaml(type(config), path) if config.folder.output_dir and path.is_file() else None
        names = [name for name in FITTED if name in settings(type(config)) and name not in kept]
        return None if before is None else {name: before.value(name) for name in names}

    return from_primary("reading the flags of the run to resume", read)


def device_at_hand() -> Device:
    """This process's kind of device, with the least memory of them; rates are unknown and of no use to a search.

    Raises:
        InputError: The devices do not report their memory.
    """
    local = jax.local_devices()
    kind, platform = local[0].device_kind, local[0].platform
    if platform == "cpu":
        memory, usable = available_memory() // len(local), 0.9
    else:
        limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in local]
        if not min(limits):
            raise InputError(f"fit=auto: {kind} devices do not report their memory, so there is nothing to fit to")
        memory, usable = min(limits), MARGIN
    rates = dict.fromkeys(("flops", "bandwidth", "link", "network", "host_link"), 1.0)
    return Device(
        name=kind,
        platform="tpu" if platform == "tpu" else "cpu" if platform == "cpu" else "cuda",
        memory=memory,
        devices_per_host=len(local),
        usable=usable,
        source="the runtime",
        compute_capability=str(getattr(local[0], "compute_capability", "")),
        pinned_host=platform != "cpu",
        **rates,
    )


def plan_of(config: Any, device: Device) -> PlanConfig:
    """The plan of a trainer's run on all its devices."""
    own: dict[str, Any] = {}
    trainer: Any = next((name for name, kind in SUPERVISED.items() if isinstance(config, kind)), None)
    if trainer is None:
        actor, reward = check_models(config), config.models.reward_model_name_or_path
        trainer, ppo = config.algorithm.algorithm.name, config
        shapes = {"actor": read_config(actor)} | ({} if reward is None else {"reward": read_config(reward)})
    else:
        actor, reward, shapes = config.model.model_name_or_path or "", None, {"actor": _shape(config)}
        parts = {name: getattr(config, name) for name in ("run", "optimizer", "routers", "data", "mesh", "compute")}
        if isinstance(config, DistillConfig):
            teacher = None if config.teaching.teacher_log_probs else teacher_of(config)
            if teacher is not None:
                shapes["teacher"] = read_config(teacher)
            parts |= {"generation": config.generation, "sampling": config.sampling.replace(temperature=1.0)}
            parts["rollout"] = RolloutConfig(generation_batches=config.pieces.generation_batches)
            own = {"teacher": teacher, "teaching": config.teaching}
        ppo = dataclasses.replace(PPOConfig(), lora=dataclasses.replace(config.lora, lora_dropout=0.0), **parts)
    if not device.pinned_host:  # the host's memory is the devices'
        ppo = ppo.replace(**dict.fromkeys(OFFLOADS, False))
    return PlanConfig(
        trainer=trainer,
        actor=actor,
        reward=reward,
        shapes=shapes,
        ppo=ppo,
        device=device.name,
        devices=jax.device_count(),
        hardware=device,
        **own,
    )


def _shape(config: SupervisedConfig) -> DecoderConfig:
    """Config of the model that a supervised trainer starts from."""
    config.model.tokenizer_source  # noqa: B018 - refuses contradictory flags
    start = config.model.start
    if start.model_type is None:
        path: Any = config.model.model_name_or_path  # not None: `tokenizer_source` refuses that
        shape = read_config(path)
    else:
        rows = vocabulary_size(config.model.load_tokenizer(config.data.template))
        options = {"model_type": start.model_type, "vocab_size": rows, **start.config_overrides}
        shape = config_from_dict(options, f"config_overrides of {start.model_type}", strict=True)
    dropped = dict.fromkeys(("embed_dropout", "attention_dropout", "residual_dropout"), 0.0)
    return shape.replace(**dropped) if start.disable_dropout else shape


def _peak(plan: PlanConfig) -> int:
    """Most bytes on a device."""
    return peak(estimate(build_system(plan), plan.accelerator.platform))


def _flag(name: str, section: str) -> str:
    """A setting as a flag; a step's own one is in its section."""
    return f"--{name}" if not section or name in settings(SharedConfig) else f"--{section}.{name}"


def _flags(old: PlanConfig, new: PlanConfig, section: str) -> str:
    """The flags of a trainer that turn one plan into another."""
    words = flags_between(old.replace(devices=new.devices, devices_per_host=new.devices_per_host), new).split()
    return " ".join(_flag(word[2:], section) if word.startswith("--") else word for word in words)


def _choices(asked: PlanConfig, found: PlanConfig, reasons: Collection[str], section: str) -> list[str]:
    """The flags that differ, by the change that sets them, each with its reason."""
    lines, told = [], set()
    differing = {name for name in FITTED if name != EVAL_ROWS and asked.value(name) != found.value(name)}
    for change in (change for change in ALIKE if change.reason in reasons):
        names = [name for name in change.changed(asked) if name in differing - told]
        told |= set(names)
        if names:
            part = asked.replace(**{name: found.value(name) for name in names})
            lines.append(f"{_flags(asked, part, section)}: {change.reason}")
    return lines


def _next_step(plan: PlanConfig, kept: Collection[str], section: str) -> list[str]:
    """Lines of the error when no allowed change fits: flags that fit these devices, and a number of devices."""
    found: list[tuple[str, Nearest]] = []
    here = nearest_on_mesh(plan)
    if here is not None:
        found.append((f"fits these devices ({gib(here.bytes_per_device)} GiB)", here))
    if here is None or not here.same_training:
        larger = nearest_with_more_devices(plan)
        if larger is not None:
            size = gib(larger.bytes_per_device)
            found.append((f"fits {larger.config.devices} devices of this kind ({size} GiB each)", larger))
    lines = []
    for where, nearest in found:
        other = "" if nearest.same_training else ", which trains otherwise"
        lines.append(f"{where}{other}: {_flags(plan, nearest.config, section) or 'no other flag'}")
    if here is not None and here.same_training and kept:
        lines.append(f"leave out {', '.join(_flag(name, section) for name in sorted(kept))}, so that fit may choose")
    return lines or ["no setting of this model fits, on any number of devices; take a smaller model"]


def _way_out(config: SharedConfig, error: str, section: str) -> list[str]:
    """The message about a real lack of memory: whatever was estimated, the next setting needs a tenth less."""
    said = next(line for line in error.splitlines() if OUT_OF_MEMORY in line).strip()[:300]
    lines = [f"a device ran out of memory: {said}"]
    plan = plan_of(config, device_at_hand())
    need, device = _peak(plan), plan.hardware
    memory = min(device.memory, int(0.9 * need / device.usable))
    plan = plan.replace(hardware=dataclasses.replace(device, memory=memory))
    lines.append(f"the planner counts {gib(need)} GiB per device for this run")
    return lines + _next_step(plan, (), section)
