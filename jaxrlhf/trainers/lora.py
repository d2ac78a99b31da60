"""LoRA in the trainers: the settings, the model to train, the export, and what a checkpoint tells about it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import field
from jaxrlhf.distributed import is_primary
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    LoRAConfig,
    Model,
    add_lora,
    cast_matrices,
    config_to_dict,
    join,
    save_adapter,
    save_pretrained,
    split_trainable,
)
from jaxrlhf.trainers.settings import check_needs, next_post_init

EXPORTS = ("merged", "adapter", "both")


@dataclass(frozen=True)
class LoRAOptions:
    """Low-rank adapters: with `lora_r` above 0 the base model is frozen, without gradients or optimizer state."""

    lora_r: int = field(
        0,
        "rank of LoRA adapters; only they (and a scalar head) are trained then, best at a larger learning rate, such "
        "as 1e-4; 0: train all parameters",
        aliases=("lora_dim",),
    )
    lora_alpha: float = field(32.0, "adapters are scaled by lora_alpha / lora_r")
    lora_dropout: float = field(0.0, "dropout on the input of adapters (ppo and dpo never drop out)")
    lora_target_modules: tuple[str, ...] = field(
        (),
        "linear maps that get adapters: names such as q_proj or c_attn, patterns such as attn/query, or all-linear; "
        "default: all of attention and MLP",
        aliases=("lora_module_name",),
    )
    lora_export: str = field(
        "merged",
        "what a LoRA run exports: the merged model, a PEFT folder output_dir/adapter, or both",
        choices=EXPORTS,
    )

    def __post_init__(self) -> None:
        if self.lora_r < 0:
            raise InputError(f"lora_r={self.lora_r} must be 0 (no adapters) or more")
        LoRAConfig(max(self.lora_r, 1), self.lora_alpha, self.lora_dropout, self.lora_target_modules)
        names = () if any(self.adapter_ranks) else ("lora_alpha", "lora_dropout", "lora_export")
        check_needs(self, dict.fromkeys((*names, "lora_target_modules"), "lora_r"))
        next_post_init(self, LoRAOptions)

    @property
    def adapter_ranks(self) -> tuple[int, ...]:
        """Of each model that may have adapters."""
        return (self.lora_r,)


def with_adapters(
    model: Model, options: LoRAOptions, key: jax.Array, rank: int | None = None, targets: tuple[str, ...] | None = None
) -> Model:
    """The model with the adapters that the options ask for; `rank` and `targets` replace theirs.

    The matrices of the frozen base are held in the compute dtype, in which they are read.
    """
    rank = options.lora_r if rank is None else rank
    targets = options.lora_target_modules if targets is None else targets
    if not rank:
        return model
    model = add_lora(model, LoRAConfig(rank, options.lora_alpha, options.lora_dropout, targets), key)
    trainable, frozen = split_trainable(model.params, model.module)
    return model.replace(params=join(trainable, cast_matrices(frozen, model.module.dtype)))


def export_model(
    model: Model, folder: Path, tokenizer: Any, options: LoRAOptions, base: str | None, **save_options: Any
) -> None:
    """Write the trained model as `lora_export` says; `base` is noted in an adapter, the rest is for save_pretrained."""
    adapter = model.module.lora is not None and options.lora_export != "merged"
    if adapter:
        save_adapter(model, folder / "adapter", base)
        if is_primary():
            tokenizer.save_pretrained(folder / "adapter")
    if not adapter or options.lora_export == "both":
        save_pretrained(model, folder, tokenizer, **save_options)


def describe_model(model: Model, **more: Any) -> dict[str, Any]:
    """What `jaxrlhf convert` must know of parameters in a checkpoint, as JSON values."""
    head, lora = model.module.head, model.module.lora
    adapters = {} if lora is None else {"lora": dataclasses.asdict(lora) | {"targets": list(lora.targets)}}
    return {"head": head, "config": config_to_dict(model.config, head)} | adapters | more
