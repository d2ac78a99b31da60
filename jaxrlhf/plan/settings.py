"""Settings of `jaxrlhf plan`: trainer, models, cluster, prices, and the trainers' flags that decide memory and time."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from jaxrlhf.config import (
    Derived,
    Gt,
    Le,
    NonNegative,
    Positive,
    PositiveInt,
    Settings,
    alias,
    default_of,
    settings,
)
from jaxrlhf.config.settings import names_of
from jaxrlhf.errors import InputError
from jaxrlhf.plan.devices import OVERRIDES, Device, find_device, topology_of
from jaxrlhf.rl.config import CONFIGS, PPOConfig
from jaxrlhf.trainers.distill import DistillConfig, TeachingOptions
from jaxrlhf.trainers.dpo import DPOConfig
from jaxrlhf.trainers.kto import KTOConfig
from jaxrlhf.trainers.reward import RewardConfig
from jaxrlhf.trainers.sft import SFTConfig

Labelled = Literal["sft", "reward", "dpo", "kto", "distill"]
OnRollouts = Literal["ppo", "grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "online_dpo", "reinforce++"]
SUPERVISED = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig}
SUPERVISED |= {"distill": DistillConfig}
PROGRAMS = ("generate", "score", "train")

SHOWN = {
    *("mesh_data", "mesh_fsdp", "mesh_expert", "mesh_context", "mesh_tensor"),
    *("generate_tensor_parallel", "generation_batches", "kv_cache_dtype", "per_device_score_batch_size"),
    *("async_steps", "replay_steps", "importance_sampling_correction"),
    *("dtype", "per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "ppo_epochs"),
    *(
        "max_prompt_seq_len",
        "max_new_tokens",
        "top_k",
        "top_p",
        "samples_per_prompt",
        "max_length",
        "packing",
        "lora_r",
        "lora_target_modules",
        "critic_lora_r",
    ),
    *("critic_lora_target_modules", "zero_stage", "critic_zero_stage", "reference_zero_stage", "reward_zero_stage"),
    *("offload_reference_model", "offload_reward_model", "offload_optimizer", "gradient_checkpointing"),
    *("remat_policy", "attention_implementation", "logprob_implementation", "enable_ema", "num_train_epochs"),
}
"""Settings of the trainers that a plan takes."""


@dataclass(frozen=True)
class ClusterConfig(Settings):
    """The devices, their price, and numbers that replace those of the table."""

    device: str
    """Kind of accelerator, such as a100-80g, h100, v5e; an unknown name lists all."""
    devices: PositiveInt = 1
    """Number of devices."""
    devices_per_host: PositiveInt | None = None
    """Devices in one host, with fast links among them; default: the device's."""
    topology: str | None = None
    """Shape of a TPU slice, such as 4x4x4; default: the usual one of that size."""
    price_per_device_hour: NonNegative = 0.0
    """Price of one device per hour, in any currency."""
    roofline_share: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the roofline that a run reaches: times are divided by it; 1 gives the lower bound."""
    device_memory_gib: Positive | None = None
    """Memory of a device in GiB; default: the device's."""
    device_tflops: Positive | None = None
    """Peak of a device in 10¹² bfloat16 FLOP/s; default: the device's."""
    device_bandwidth_gbs: Positive | None = None
    """Memory bandwidth in GB/s; default: the device's."""
    link_gbs: Positive | None = None
    """Link of a device to its peers in GB/s, one way; default: the device's."""
    network_gbs: Positive | None = None
    """Network of a device between hosts in GB/s; default: the device's."""

    hardware: Derived[Any] = None
    """A `Device` that is at hand, in place of the table's."""

    @property
    def accelerator(self) -> Device:
        """The device with this cluster's numbers."""
        if self.hardware is not None:
            return dataclasses.replace(
                self.hardware, devices_per_host=min(self.hardware.devices_per_host, self.devices)
            )
        device = find_device(self.device, {flag: getattr(self, flag) for flag in OVERRIDES})
        per_host = self.devices_per_host or device.devices_per_host
        return dataclasses.replace(device, devices_per_host=min(per_host, self.devices))

    @property
    def shape(self) -> str:
        """Shape of the TPU slice; empty for other devices."""
        return "" if self.hardware is not None else topology_of(self.accelerator, self.devices, self.topology)


@dataclass(frozen=True)
class PlanConfig(ClusterConfig):
    """The run that is planned, and what is written about it."""

    HIDDEN = frozenset(settings(PPOConfig)) - SHOWN

    trainer: Literal[Labelled, OnRollouts] = "ppo"
    """Training to plan."""
    actor: Annotated[str, alias("actor_model_name_or_path", "model_name_or_path", "model")] = dataclasses.field(
        kw_only=True
    )
    """Model to train: a known name such as opt-13b, or a folder."""
    reward: Annotated[str | None, alias("critic_model_name_or_path", "reward_model_name_or_path")] = "opt-350m"
    """Reward model, also ppo's start of the critic: a known name, or a folder; none: reward functions alone score.
    sft, reward, dpo, kto and distill have none."""
    teacher: Annotated[str | None, alias("teacher_model_name_or_path")] = None
    """Teacher of distill: a known name, or a folder."""
    teaching: TeachingOptions = TeachingOptions()
    shapes: Derived[Any] = None
    """The models' configs by `actor`, `reward` and `teacher`, where they are known already."""
    train_rows: PositiveInt = 131_900
    """Rows of the data set (prompts, pairs); default: those of DeepSpeed-Chat's published run."""
    ppo: PPOConfig = PPOConfig()
    compile: bool = False
    """Prove the plan with the device's own compiler; needs no device, only its package."""
    json: str | None = None
    """Write all numbers to this file."""
    plot: str | None = None
    """Draw memory per device over one iteration to this .png or .svg file."""

    @classmethod
    def create(cls, **values: object) -> Self:
        """As `Settings.create`; a trainer on rollouts starts from its own defaults."""
        kind: type[PPOConfig] = CONFIGS.get(str(values.get("trainer")), PPOConfig)
        given = {names_of(cls).get(name, name): value for name, value in values.items()}
        if kind is PPOConfig or not {"actor", "device"} <= given.keys():
            return super().create(**values)
        check_used(str(values["trainer"]), lambda name: given.get(name, default_of(cls, name)))
        own: Any = {f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}
        return cls(ppo=kind(), **own).replace(**values)

    def check(self) -> None:
        if self.plot is not None and not self.plot.endswith((".png", ".svg")):
            raise InputError(f"plot={self.plot!r} must end in .png or .svg")
        check_used(self.trainer, self.value)
        if self.trainer == "distill" and self.teacher is None and not self.teaching.teacher_log_probs:
            raise InputError("teacher: name the teacher of distill, a known name or a folder")
        accelerator, _ = self.accelerator, self.shape  # both refuse bad values by name
        offloads = [name for name in SHOWN if name.startswith("offload_") and self.ppo.value(name)]
        if offloads and not accelerator.pinned_host:
            raise InputError(
                f"{offloads[0]}: {accelerator.name} devices have no pinned host memory to offload to; leave it out"
            )

    @property
    def programs(self) -> tuple[str, ...]:
        """Programs of a step, those of PROGRAMS that the trainer runs."""
        if self.trainer not in SUPERVISED or self.teaching.sampled:
            return PROGRAMS
        scores = self.trainer in ("dpo", "kto") or (self.trainer == "distill" and not self.teaching.teacher_log_probs)
        return PROGRAMS[1:] if scores else PROGRAMS[2:]

    @property
    def planned(self) -> PPOConfig:
        """The settings of the planned run, with the precision that the device chooses."""
        values: dict[str, Any] = {}
        if self.ppo.mesh.dtype == "auto":
            values["dtype"] = "float32" if self.accelerator.platform == "cpu" else "bfloat16"
        if self.trainer == "distill":  # a prompt is as long as a row may be
            values["max_prompt_seq_len"] = self.ppo.data.max_length
        return self.ppo.replace(**values)


def check_used(trainer: str, value: Callable[[str], object]) -> None:
    """Refuses a setting that a trainer does not have; `value` has the settings of a plan by name."""
    names = sorted(SHOWN - settings(SUPERVISED.get(trainer) or CONFIGS[trainer]).keys())
    if trainer != "distill":
        names += ["teacher", *settings(TeachingOptions)]
    for name in names:
        if value(name) != default_of(PlanConfig, name):
            raise InputError(f"{name}={value(name)} is no setting of {trainer}; leave it out")
