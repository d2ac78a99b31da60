"""LoRA in the trainers: settings, the model to train, its export, and its description in checkpoints."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax

from jaxrlhf.config import Ge, Lt, MayChange, NonNegativeInt, Positive, Settings, alias, check_needs
from jaxrlhf.config.model_folder import is_adapter
from jaxrlhf.data import Tokenizer
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    SCORE_FIELDS,
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


@dataclass(frozen=True)
class LoRAOptions(Settings):
    """Low-rank adapters: with lora_r above 0 the base model is frozen."""

    lora_r: Annotated[NonNegativeInt, alias("lora_dim", "actor_lora_r", "actor_lora_dim")] = 0
    """Rank of LoRA adapters; 0 trains all parameters. Use a larger learning rate with adapters, such as 1e-4. In ppo
    the frozen base serves as the reference."""
    lora_alpha: Positive = 32.0
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on the input of adapters (ppo and dpo never drop out)."""
    lora_target_modules: Annotated[tuple[str, ...], alias("lora_module_name", "actor_lora_module_name")] = ()
    """Linear maps that get adapters: names such as q_proj or c_attn, patterns such as attn/query, or all-linear;
    default: all of attention and MLP."""
    lora_export: MayChange[Literal["merged", "adapter", "both"]] = "merged"
    """Export of a LoRA run: the merged model, a PEFT folder output_dir/adapter, or both."""

    def check(self) -> None:
        LoRAConfig(max(self.lora_r, 1), self.lora_alpha, self.lora_dropout, self.lora_target_modules)
        check_needs(self, {"lora_target_modules": "lora_r"})


def with_adapters(
    model: Model, options: LoRAOptions, key: jax.Array, rank: int | None = None, targets: tuple[str, ...] | None = None
) -> Model:
    """Adds the adapters that the options ask for; `rank` and `targets` replace theirs.

    The matrices of the frozen base are held in the compute dtype, in which they are read.
    """
    rank = options.lora_r if rank is None else rank
    targets = options.lora_target_modules if targets is None else targets
    if not rank:
        return model
    model = add_lora(model, LoRAConfig(rank, options.lora_alpha, options.lora_dropout, targets), key)
    trainable, frozen = split_trainable(model.params, model.module)
    return model.replace(params=join(trainable, cast_matrices(frozen, model.module.dtype)))


def check_base(options: LoRAOptions, base: str | None) -> None:
    """Raises InputError if the run exports an adapter whose base would be an adapter folder, which PEFT cannot load."""
    if options.lora_r and options.lora_export != "merged" and base is not None and is_adapter(Path(base)):
        raise InputError(
            f"lora_export={options.lora_export}: the start model {base} is an adapter folder, and an adapter needs a "
            f"merged base: jaxrlhf convert --input {base} --to hf makes one; or set lora_export to merged"
        )


def export_model(
    model: Model, folder: Path, tokenizer: Tokenizer, export: str, base: str | None, **save_options: Any
) -> None:
    """Writes the trained model into `folder`.

    Args:
        export: "merged", "adapter" or "both", of a model with adapters.
        base: the model that an adapter names as its base.
        save_options: arguments of `save_pretrained`.
    """
    adapter = model.module.lora is not None and export != "merged"
    if adapter:
        save_adapter(model, folder / "adapter", base, tokenizer)
    if not adapter or export == "both":
        save_pretrained(model, folder, tokenizer, **save_options)


def _describe_lora(lora: LoRAConfig) -> dict[str, object]:
    values: dict[str, object] = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(lora).items()}
    if not lora.trained_tokens:
        del values["trained_tokens"]
    return values


def describe_model(model: Model, **more: object) -> dict[str, object]:
    """Describes parameters in a checkpoint for `jaxrlhf convert`, as JSON values."""
    head, lora = model.module.head, model.module.lora
    adapters = {} if lora is None else {"lora": _describe_lora(lora)}
    described = {"head": head, "config": config_to_dict(model.config, head)}
    described |= {"score": {name: getattr(model.config, name) for name in SCORE_FIELDS}}
    return described | {"generation_config": model.config.generation_config} | adapters | more
