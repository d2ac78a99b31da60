"""Settings every trainer shares: which model, on which mesh, in what precision, and how the run goes."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.config import field
from jaxrlhf.data import DataConfig
from jaxrlhf.distributed import ProcessConfig, is_primary
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    KERNEL_OPTIONS,
    REMAT_POLICIES,
    Model,
    config_from_dict,
    create_model,
    default_dtype,
    load_pretrained,
    resize_vocabulary,
    with_kernels,
)
from jaxrlhf.runs import Run
from jaxrlhf.sharding import make_mesh
from jaxrlhf.trainers.optimizer import OptimizerConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh and the precision of the arithmetic."""

    mesh_data: int = field(1, "devices that hold replicas; -1: all remaining devices")
    mesh_fsdp: int = field(-1, "devices that parameters and optimizer state are sharded over; -1: all remaining")
    mesh_tensor: int = field(1, "devices that heads and MLP are split over")
    dtype: str = field(
        "auto",
        "compute precision; auto: bfloat16 on accelerators, float32 on CPU. Master weights are float32 in any case",
        choices=("auto", "float32", "bfloat16"),
    )

    @property
    def compute_dtype(self) -> Any:
        return default_dtype() if self.dtype == "auto" else DTYPES[self.dtype]

    def make_mesh(self) -> Mesh:
        return make_mesh(self.mesh_data, self.mesh_fsdp, self.mesh_tensor)


@dataclass(frozen=True)
class TrainingMeshConfig(MeshConfig, ProcessConfig):
    """The device mesh, the precision, and how training uses them."""

    zero_stage: int = field(
        3,
        "what mesh_fsdp splits besides the batch. 3: parameters, gradients and optimizer state, the parameters being "
        "gathered layer by layer; 2: likewise, but gathered once per step; 1: gradients are whole too; 0: nothing",
        choices=(0, 1, 2, 3),
    )
    attention_implementation: str = field(
        "auto",
        "kernels of attention: xla; pallas, our own (NVIDIA, TPU; on CPU interpreted, so very slow); cudnn "
        "and tokamax, libraries, for training and scoring alone (NVIDIA); auto: what measurements here favour",
        choices=KERNEL_OPTIONS["attention_implementation"],
    )
    logprob_implementation: str = field(
        "auto",
        "kernels of token log-probs: xla; pallas, our own, which keeps logits on the chip (NVIDIA, TPU; on CPU "
        "interpreted, so very slow); auto: what measurements on this device favour",
        choices=KERNEL_OPTIONS["logprob_implementation"],
    )


def kernel_options(config: TrainingMeshConfig) -> dict[str, str]:
    """What `jaxrlhf.models.with_kernels` takes, of those that these settings have."""
    return {name: getattr(config, name) for name in KERNEL_OPTIONS if hasattr(config, name)}


@dataclass(frozen=True)
class StartConfig:
    """Random weights instead of a trained model, the tokenizer, and dropout."""

    model_type: str | None = field(None, "start from random weights: a family such as gpt2, opt or llama")
    config_overrides: dict[str, str | int | float | bool] = field(
        {}, "with model_type: the family's config options, such as hidden_size=256,num_hidden_layers=4"
    )
    tokenizer_name_or_path: str | None = field(
        None, "tokenizer folder or hub name, or 'demo'; default: that of the model"
    )
    resize_vocabulary: bool = field(
        False, "give the model rows for tokens that the tokenizer has and the model lacks: the mean of the others"
    )
    disable_dropout: bool = field(False, "set every dropout rate of the model to 0 (ppo and dpo never drop out)")


@dataclass(frozen=True)
class ModelConfig(TrainingMeshConfig, StartConfig):
    """The model to start from."""

    model_name_or_path: str | None = field(None, "model folder or hub name to start from")

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer is; InputError when the flags do not say which model to start from."""
        if (self.model_name_or_path is None) == (self.model_type is None):
            raise InputError("give exactly one of model_name_or_path (a trained model) and model_type (random weights)")
        if self.config_overrides and self.model_type is None:
            raise InputError("config_overrides goes with model_type: a trained model brings its own config")
        if self.model_type is not None and self.tokenizer_name_or_path is None:
            raise InputError("model_type starts from random weights, so tokenizer_name_or_path must name a tokenizer")
        return self.tokenizer_name_or_path or self.model_name_or_path


def next_post_init(self: Any, cls: type) -> None:
    following = getattr(super(cls, self), "__post_init__", None)
    if following is not None:
        following()


def check_needs(config: Any, needs: Mapping[str, str]) -> None:
    """InputError for an option that was changed though the one that it needs is off; `needs` by option."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name, other in needs.items():
        value = getattr(config, name)
        if value != defaults[name] and not getattr(config, other):
            raise InputError(f"{name}={value} means nothing without {other}; give both, or neither")


@contextlib.contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Within it, messages of InputErrors call fields by other names, those of the flags that they were made from."""
    try:
        yield
    except InputError as error:
        pattern = rf"\b({'|'.join(names)})\b"
        raise InputError(re.sub(pattern, lambda found: names[found[0]], str(error))) from error


@dataclass(frozen=True)
class FolderConfig:
    """The folder of the run, and what to do with what is in it."""

    output_dir: str = field("", "folder of the run: records, checkpoints, report and, at the end, the exported model")
    resume: bool = field(
        False, "continue from the newest checkpoint in output_dir", aliases=("resume_from_checkpoint",)
    )
    overwrite_output_dir: bool = field(False, "delete an earlier run in output_dir and start over")

    def __post_init__(self) -> None:
        if self.resume and self.overwrite_output_dir:
            raise InputError("resume and overwrite_output_dir exclude each other: keep the old run, or delete it")
        next_post_init(self, FolderConfig)


@dataclass(frozen=True)
class RunConfig:
    """How the run goes: length, batches, logging, evaluation, checkpoints, export."""

    num_train_epochs: float = field(1.0, "passes over the training rows, when max_steps is not given")
    max_steps: int = field(-1, "optimizer steps (ppo: rollout batches); -1: num_train_epochs decides")
    per_device_train_batch_size: int = field(8, "rows per device of one micro-batch")
    per_device_eval_batch_size: int = field(8, "rows per device of an evaluation batch")
    gradient_accumulation_steps: int = field(1, "micro-batches per optimizer step, accumulated inside the jitted step")
    gradient_checkpointing: bool = field(False, "recompute each layer in the backward pass: remat_policy full")
    remat_policy: str = field(
        "none",
        "what the backward pass recomputes of a layer. none: nothing; full: everything; dots: all but matrix products",
        choices=tuple(REMAT_POLICIES),
    )
    offload_optimizer: bool = field(
        False, "keep Adam's moments in host memory, and bring them to the devices for the update", aliases=("offload",)
    )
    logging_steps: int = field(10, "steps between console lines; metrics.jsonl gets every step")
    eval_steps: int = field(0, "steps between evaluations; 0: only before the first and after the last step")
    save_steps: int = field(0, "steps between checkpoints; 0: only after the last step")
    save_total_limit: int = field(2, "checkpoints to keep; 0: all")
    export_best: bool = field(
        False,
        "export the model of the best evaluation (its checkpoint is kept in any case) instead of the last one",
        aliases=("load_best_model_at_end",),
    )
    max_skipped_steps: int = field(
        3,
        "steps in a row whose loss or gradient is not finite, and which change nothing, after which the run ends",
    )
    save_dtype: str = field("float32", "precision of the exported weights", choices=tuple(DTYPES))

    def __post_init__(self) -> None:
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "max_skipped_steps",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("eval_steps", "save_steps", "save_total_limit"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.max_steps < 1 and self.max_steps != -1:
            raise InputError(f"max_steps={self.max_steps} must be at least 1, or -1 for num_train_epochs")
        if self.max_steps == -1 and self.num_train_epochs <= 0:
            raise InputError(f"num_train_epochs={self.num_train_epochs} must be above 0 when max_steps is not given")
        next_post_init(self, RunConfig)

    @property
    def remat(self) -> str:
        return "full" if self.remat_policy == "none" and self.gradient_checkpointing else self.remat_policy


@dataclass(frozen=True)
class TrainingConfig(RunConfig, OptimizerConfig):
    """What the steps of a run share: their number, batches and optimizer."""


# What a resumed run may change: where and how often it writes, how it is laid out on devices, and what the checkpoint
# identifies by its outcome (number of steps, rows of a batch, tokenised data, model).
_WRITING = ("output_dir", "resume", "overwrite_output_dir", "logging_steps", "eval_steps", "save_steps")
_WRITING += (
    "export_best",
    "max_skipped_steps",
    "save_total_limit",
    "save_dtype",
    "lora_export",
    "sample_steps",
    "num_sample_rows",
)
_LAYOUT = ("mesh_data", "mesh_fsdp", "mesh_tensor", "gradient_checkpointing", "per_device_eval_batch_size")
_LAYOUT += ("zero_stage", "critic_zero_stage", "reference_zero_stage", "reward_zero_stage", "generate_tensor_parallel")
_LAYOUT += ("remat_policy", "offload_optimizer", "offload_reference_model", "offload_reward_model")
_LAYOUT += ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps")
_LAYOUT += ("generation_batches", "generation_slots")
_NAMES = ("model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path", "reward_model_name_or_path")
_NAMES += ("tokenizer_name_or_path",)
_OTHERS = tuple(f.name for kind in (DataConfig, ProcessConfig) for f in dataclasses.fields(kind))
MAY_CHANGE = {*_WRITING, *_LAYOUT, *_NAMES, *_OTHERS} - {"seed"}


def lasting_settings(config: Any) -> dict[str, Any]:
    """The settings that a resumed run must have as the run it goes on with had them, as JSON values."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in MAY_CHANGE}
    return json.loads(json.dumps(values))


def batch_devices(mesh: Mesh) -> int:
    """Devices that the rows of a batch are split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def total_steps(config: RunConfig, rows: int, batch: int) -> int:
    """Steps of the run: `max_steps`, or as many as cover `num_train_epochs` (the last may reach into the next)."""
    return config.max_steps if config.max_steps > 0 else max(1, -int(-config.num_train_epochs * rows // batch))


def load_model(config: ModelConfig, head: str, mesh: Mesh, vocab_size: int, *, remat: str = "none") -> Model:
    """The model to train, from a folder or from random weights, with float32 masters in place on `mesh`.

    `vocab_size` is the tokenizer's: InputError when the model has fewer rows.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    if config.model_type is not None:
        options = {"vocab_size": vocab_size} | dict(config.config_overrides)
        shape = config_from_dict(
            {"model_type": config.model_type} | options, f"config_overrides of {config.model_type}"
        )
        layout = {"mesh": mesh, "dtype": config.compute_dtype, "remat": remat, "zero_stage": config.zero_stage}
        model = create_model(shape, head=head, key=key, **layout)
    else:
        model = load_pretrained(
            config.model_name_or_path,
            head=head,
            mesh=mesh,
            dtype=config.compute_dtype,
            key=key,
            remat=remat,
            zero_stage=config.zero_stage,
            progress=is_primary(),
        )
    model = with_kernels(model, **kernel_options(config))
    if model.config.vocab_size < vocab_size and not config.resize_vocabulary:
        raise InputError(
            f"the tokenizer of {config.tokenizer_source} has {vocab_size} tokens, the model only "
            f"{model.config.vocab_size}; use the model's own tokenizer, or add rows with --resize_vocabulary"
        )
    if model.config.vocab_size < vocab_size:
        model = resize_vocabulary(model, vocab_size)
    return without_dropout(model) if config.disable_dropout else model


def without_dropout(model: Model) -> Model:
    """The same model with every dropout rate 0."""
    config = model.config.replace(embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0)
    return dataclasses.replace(model, module=model.module.clone(config=config), config=config)


def with_special_tokens(model: Model, tokenizer: Any) -> Model:
    """The model with the tokenizer's special ids in its config, so that the export generates and scores alike."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = model.config.replace(**{name: value for name, value in ids.items() if value is not None})
    return dataclasses.replace(model, module=model.module.clone(config=config), config=config)


def check_context(config: Any, length: int, what: str) -> None:
    """Refuse sequences that the model has no positions for."""
    if config.position != "alibi" and length > config.max_positions:
        raise InputError(f"{what} of {length} tokens exceeds the model's context of {config.max_positions}; lower it")


def open_run(config: Any, headline: tuple[str, ...]) -> Run:
    """The run's folder, as a context manager; InputError when none is named or it already holds a run."""
    if not config.output_dir:
        raise InputError("output_dir: name the folder that the run should write to")
    return Run(
        config.output_dir,
        config,
        resume=config.resume,
        overwrite=config.overwrite_output_dir,
        logging_steps=config.logging_steps,
        headline=headline,
    )
