"""Settings of `jaxrlhf plan`: models, cluster and prices; what PPO has a flag for keeps that flag's name."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxrlhf.config import REQUIRED, field, like
from jaxrlhf.errors import InputError
from jaxrlhf.plan.devices import DEVICES, OVERRIDES, Device, find_device, topology_of
from jaxrlhf.rl.config import PPOConfig

_PPO = {f.name for f in dataclasses.fields(PPOConfig)}
_same = partial(like, PPOConfig)


@dataclass(frozen=True)
class ClusterConfig:
    """The devices, their price, and figures that replace those of the table."""

    device: str = field(REQUIRED, f"kind of accelerator: {', '.join(DEVICES)}")
    devices: int = field(1, "number of them")
    devices_per_host: int | None = field(None, "devices in one host, with fast links among them; default: the device's")
    topology: str | None = field(None, "shape of a TPU slice, such as 4x4x4; default: the usual one of that size")
    price_per_device_hour: float = field(0.0, "what one device costs in an hour, in any currency")
    roofline_share: float = field(
        1.0, "share of the roofline that a run reaches: times are divided by it; 1 gives the lower bound"
    )
    device_memory_gib: float | None = field(None, "memory of a device in GiB; default: the device's")
    device_tflops: float | None = field(None, "peak of a device in 10¹² bfloat16 FLOP/s; default: the device's")
    device_bandwidth_gbs: float | None = field(None, "memory bandwidth in GB/s; default: the device's")
    link_gbs: float | None = field(None, "link of a device to its peers in GB/s, one way; default: the device's")
    network_gbs: float | None = field(None, "network of a device between hosts in GB/s; default: the device's")


@dataclass(frozen=True)
class PlanConfig(ClusterConfig):
    """The run that is planned, and what is written about it."""

    actor: str = field(
        REQUIRED,
        "model to train: a known name such as opt-13b, or a folder",
        aliases=("actor_model_name_or_path", "model_name_or_path"),
    )
    reward: str = field(
        "opt-350m",
        "reward model, also the critic's starting point: a known name, or a folder",
        aliases=("critic_model_name_or_path", "reward_model_name_or_path"),
    )
    train_rows: int = field(131_900, "prompts of the data set; default: DeepSpeed-Chat's published run")
    mesh_data: int = _same("mesh_data")
    mesh_fsdp: int = _same("mesh_fsdp")
    mesh_tensor: int = _same("mesh_tensor")
    generate_tensor_parallel: int = _same("generate_tensor_parallel")
    generation_batches: int = _same("generation_batches")
    kv_cache_dtype: str = _same("kv_cache_dtype")
    dtype: str = _same("dtype")
    per_device_train_batch_size: int = _same("per_device_train_batch_size")
    gradient_accumulation_steps: int = _same("gradient_accumulation_steps")
    num_mini_batches: int = _same("num_mini_batches")
    ppo_epochs: int = _same("ppo_epochs")
    max_prompt_seq_len: int = _same("max_prompt_seq_len")
    max_answer_seq_len: int = _same("max_answer_seq_len")
    lora_r: int = _same("lora_r")
    lora_target_modules: tuple[str, ...] = _same("lora_target_modules")
    critic_lora_r: int = _same("critic_lora_r")
    critic_lora_target_modules: tuple[str, ...] = _same("critic_lora_target_modules")
    zero_stage: int = _same("zero_stage")
    critic_zero_stage: int | None = _same("critic_zero_stage")
    reference_zero_stage: int | None = _same("reference_zero_stage")
    reward_zero_stage: int | None = _same("reward_zero_stage")
    offload_reference_model: bool = _same("offload_reference_model")
    offload_reward_model: bool = _same("offload_reward_model")
    offload_optimizer: bool = _same("offload_optimizer")
    gradient_checkpointing: bool = _same("gradient_checkpointing")
    remat_policy: str = _same("remat_policy")
    enable_ema: bool = _same("enable_ema")
    num_train_epochs: float = _same("num_train_epochs")
    compile: bool = field(False, "prove it with the device's own compiler; needs no device, only its package")
    json: str | None = field(None, "write all figures to this file")
    plot: str | None = field(None, "draw memory per device over one iteration to this .png or .svg file")

    def __post_init__(self) -> None:
        for name in ("devices", "train_rows", "devices_per_host"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if self.price_per_device_hour < 0:
            raise InputError(f"price_per_device_hour={self.price_per_device_hour} must be 0 or more")
        if not 0 < self.roofline_share <= 1:
            raise InputError(f"roofline_share={self.roofline_share} must be above 0 and at most 1")
        if self.num_train_epochs <= 0:
            raise InputError(f"num_train_epochs={self.num_train_epochs} must be above 0")
        if self.plot is not None and not self.plot.endswith((".png", ".svg")):
            raise InputError(f"plot={self.plot!r} must end in .png or .svg")
        accelerator, _, _ = self.accelerator, self.shape, self.ppo  # all three refuse bad values by name
        offloads = [name for name in self.shared if name.startswith("offload_") and getattr(self, name)]
        if offloads and not accelerator.pinned_host:
            raise InputError(
                f"{offloads[0]}: {accelerator.name} devices have no pinned host memory to offload to; leave it out"
            )

    @property
    def accelerator(self) -> Device:
        """The device with this cluster's figures."""
        device = find_device(self.device, {flag: getattr(self, flag) for flag in OVERRIDES})
        per_host = self.devices_per_host or device.devices_per_host
        return dataclasses.replace(device, devices_per_host=min(per_host, self.devices))

    @property
    def shape(self) -> str:
        """Of the TPU slice; empty for other devices."""
        return topology_of(self.accelerator, self.devices, self.topology)

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that `jaxrlhf ppo` has under the same names."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in _PPO}

    @property
    def ppo(self) -> PPOConfig:
        """The settings of the planned run."""
        values = dict(self.shared)
        if self.dtype == "auto":
            values["dtype"] = "float32" if self.accelerator.platform == "cpu" else "bfloat16"
        return PPOConfig(**values)
