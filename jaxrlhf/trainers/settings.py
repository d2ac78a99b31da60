"""Settings that every trainer shares: which model, on which mesh, in what precision, and how the run goes."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.config import (
    CountOrAuto,
    Derived,
    Ge,
    Lasting,
    Lt,
    MayChange,
    NonNegative,
    NonNegativeInt,
    PathName,
    Positive,
    PositiveInt,
    Settings,
    TrueWord,
    alias,
    check_needs,
)
from jaxrlhf.config.compilation import CompilationConfig
from jaxrlhf.config.remote import is_url
from jaxrlhf.config.settings import canonical, places_of, sections
from jaxrlhf.data import DataConfig, TemplateConfig, Tokenizer
from jaxrlhf.distributed import ProcessConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    DecoderConfig,
    default_dtype,
)
from jaxrlhf.runs import Run, TrackingConfig
from jaxrlhf.runs.exchange import Exchange
from jaxrlhf.sharding import make_mesh
from jaxrlhf.sharding.mesh import Device
from jaxrlhf.trainers.guards import GuardConfig
from jaxrlhf.trainers.lora import LoRAOptions
from jaxrlhf.trainers.optimizer import OptimizerConfig
from jaxrlhf.trainers.resuming import CheckpointOptions
from jaxrlhf.trainers.routers import RouterOptions
from jaxrlhf.trainers.tokenizers import TokenizerConfig

logger = logging.getLogger(__name__)

DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclass(frozen=True)
class MeshConfig(Settings, may_change=True):
    """The device mesh and the precision of the arithmetic."""

    mesh_data: CountOrAuto = 1
    """Devices that hold replicas; -1: all remaining devices."""
    mesh_fsdp: CountOrAuto = -1
    """Devices that parameters and optimizer state are sharded over; -1: all remaining devices."""
    mesh_tensor: CountOrAuto = 1
    """Devices that heads and MLP are split over."""
    mesh_expert: CountOrAuto = 1
    """Devices that the experts of a sparse model are split over; they split the batch too."""
    mesh_context: CountOrAuto = 1
    """Devices that long sequences are split over in training and scoring; generation splits the batch over them."""
    dtype: Lasting[Literal["auto", "float32", "bfloat16"]] = "auto"
    """Compute precision; auto: bfloat16 on accelerators, float32 on CPU. Master weights are always float32."""

    @property
    def compute_dtype(self) -> jnp.dtype:
        return default_dtype() if self.dtype == "auto" else DTYPES[self.dtype]

    def make_mesh(self, devices: Sequence[Device] | None = None) -> Mesh:
        sizes = self.mesh_data, self.mesh_fsdp, self.mesh_tensor, self.mesh_expert, self.mesh_context
        return make_mesh(*sizes, devices=devices)


@dataclass(frozen=True)
class ComputeConfig(Settings):
    """The use of the devices in training: ZeRO stage and kernels."""

    zero_stage: MayChange[Literal[0, 1, 2, 3]] = 3
    """State that mesh_fsdp shards besides the batch. 3: parameters (gathered layer by layer), gradients, optimizer
    state; 2: the same, but parameters are gathered once per step; 1: gradients are whole too; 0: nothing."""
    attention_implementation: Literal["auto", "xla", "pallas", "cudnn", "tokamax"] = "auto"
    """Attention kernels: xla; pallas, our own (NVIDIA, TPU; interpreted on CPU, so very slow); cudnn and tokamax, for
    training and scoring alone, without packing (NVIDIA); auto: the one that evidence says is fastest."""
    logprob_implementation: Literal["auto", "xla", "pallas"] = "auto"
    """Kernels of token log-probs: xla; pallas, our own, which keeps logits on the chip (NVIDIA, TPU; interpreted on
    CPU); auto: the one that evidence says is fastest."""
    expert_implementation: Literal["auto", "ragged", "dense"] = "auto"
    """Experts of sparse models: ragged, on tokens sorted by expert; dense, every expert on every token; auto: ragged
    where XLA or JAX has an efficient form of it."""

    @property
    def kernels(self) -> dict[str, str]:
        """Arguments of `jaxrlhf.models.with_kernels`."""
        names = ("attention_implementation", "logprob_implementation", "expert_implementation")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class StartConfig(Settings):
    """Random weights instead of a trained model, added tokens, dropout."""

    model_type: str | None = None
    """Start from random weights: a family such as gpt2, opt or llama."""
    config_overrides: dict[str, int | float | bool | str] = dataclasses.field(default_factory=dict)
    """With model_type: the family's config options, such as hidden_size=256,num_hidden_layers=4."""
    resize_vocabulary: bool = False
    """Add rows to the model for tokens that only the tokenizer has; each starts as the mean of the others."""
    disable_dropout: bool = False
    """Set every dropout rate of the model to 0 (ppo and dpo never drop out)."""


@dataclass(frozen=True)
class ModelName(Settings):
    """The model."""

    model_name_or_path: PathName[MayChange[str | None]] = None
    """Model folder or hub name to start from."""


@dataclass(frozen=True)
class ModelConfig(ModelName):
    """The model to start from."""

    start: StartConfig = StartConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()

    @property
    def tokenizer_source(self) -> str:
        """Folder or name of the tokenizer. Raises InputError when the flags do not say which model to start from."""
        model, tokenizer, start = self.model_name_or_path, self.tokenizer.tokenizer_name_or_path, self.start
        if (model is None) == (start.model_type is None):
            raise InputError("give exactly one of model_name_or_path (a trained model) and model_type (random weights)")
        if start.config_overrides and start.model_type is None:
            raise InputError("config_overrides requires model_type: a trained model brings its own config")
        if model is None and tokenizer is None:
            raise InputError("model_type starts from random weights, so tokenizer_name_or_path must name a tokenizer")
        return str(tokenizer or model)

    def load_tokenizer(self, template: TemplateConfig) -> Tokenizer:
        """Loads the tokenizer, as `TokenizerConfig.load` does. Raises InputError as `tokenizer_source` does too."""
        self.tokenizer_source  # noqa: B018 - refuses contradictory flags
        return self.tokenizer.load(self.model_name_or_path, template)


@dataclass(frozen=True)
class FolderConfig(Settings, may_change=True):
    """The folder of the run."""

    output_dir: PathName[str] = ""
    """Folder of the run: records, checkpoints, report and, at the end, the exported model. It may be a URL, such as
    s3://bucket/run; the run then works in working_dir, and its files are copied to the URL all the time."""
    working_dir: PathName[str] = ""
    """With a URL as output_dir: the local folder, empty or of an earlier run, which machines need not share; default:
    one in $JAXRLHF_CACHE, else ~/.cache/jaxrlhf."""
    remote_save_steps: NonNegativeInt = 0
    """With a URL as output_dir: steps between the checkpoints that are copied to it, beside the newest at the end; 0:
    all of them."""
    url: Derived[str] = ""
    """The output_dir that was given, when it is a URL."""
    leaders: Derived[tuple[int, ...]] = ()
    """For each process, the lowest number of those that see the same local folder; empty: all see one."""
    resume: Annotated[bool, TrueWord("auto")] = False
    """Continue from the newest checkpoint in output_dir; start where there is none. auto means true."""
    resume_from_checkpoint: str = ""
    """Continue from this checkpoint of output_dir, such as checkpoint-8, and set later ones aside; true or auto: as
    resume."""
    overwrite_output_dir: bool = False
    """Delete an earlier run in output_dir and start over."""

    def check(self) -> None:
        named = self.resume_from_checkpoint.lower()
        object.__setattr__(self, "resume", self.resume or named not in ("", "false"))
        if named in ("true", "false", "auto"):
            object.__setattr__(self, "resume_from_checkpoint", "")
        if self.resume and self.overwrite_output_dir:
            raise InputError("resume and overwrite_output_dir exclude each other: keep the old run, or delete it")
        if not is_url(self.output_dir) and not self.url and (self.working_dir or self.remote_save_steps):
            raise InputError(
                "working_dir and remote_save_steps are for an output_dir at a URL, such as s3://bucket/run; leave them "
                f"out with output_dir={self.output_dir}"
            )


@dataclass(frozen=True)
class RunConfig(Settings, may_change=True):
    """Length, batches, logging, evaluation, checkpoints, export."""

    num_train_epochs: NonNegative = 1.0
    """Passes over the training rows, when max_steps is not given."""
    max_steps: CountOrAuto = -1
    """Optimizer steps (ppo: rollout batches); -1: num_train_epochs decides."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows per device of one micro-batch."""
    per_device_eval_batch_size: PositiveInt = 8
    """Rows per device of an evaluation batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step, accumulated inside the jitted step."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: the same as remat_policy full."""
    remat_policy: Literal["auto", "none", "full", "dots"] = "auto"
    """The part of a layer that the backward pass recomputes. none: nothing; full: everything; dots: all but matrix
    products; auto: dots, or full with gradient_checkpointing."""
    offload_optimizer: Annotated[bool, alias("offload")] = False
    """Keep Adam's moments in host memory, and bring them to the devices for the update."""
    logging_steps: PositiveInt = 10
    """Steps between console lines; metrics.jsonl has every step."""
    eval_steps: NonNegativeInt = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    save_steps: NonNegativeInt = 0
    """Steps between checkpoints; 0: only after the last step."""
    save_total_limit: NonNegativeInt = 2
    """Newest checkpoints to keep; 0: all. The best one is kept too."""
    keep_period: NonNegativeInt = 0
    """Keep every checkpoint whose step is a multiple of this, besides the newest ones; 0: none."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy in host memory. --no_async_save: training waits, and copies
    little at a time."""
    max_failed_saves: PositiveInt = 3
    """End the run after this many checkpoints in a row that could not be written. The last one must be written."""
    export_best: Annotated[bool, alias("load_best_model_at_end")] = False
    """Export the model of the best evaluation instead of the last one. Its checkpoint is kept in any case."""
    watchdog: NonNegative = 20.0
    """End the run with status 75, after printing all stacks, when a step, an evaluation batch, a save or the export
    takes this many times its usual time; compilation does not count; 0: never."""
    watchdog_floor: Positive = 300.0
    """Seconds within which no work counts as hung; the first of its kind gets twelve times as many."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the exported weights."""
    profile_steps: str = ""
    """Steps to trace, as in 3:5 (both included), counted from 1; the trace lies in output_dir/profile, for XProf and
    TensorBoard. Empty: none."""
    guard: GuardConfig = GuardConfig()

    def check(self) -> None:
        if self.max_steps == 0:
            raise InputError(f"max_steps={self.max_steps} must be at least 1, or -1 for num_train_epochs")
        if self.max_steps == -1 and not self.num_train_epochs:
            raise InputError(f"num_train_epochs={self.num_train_epochs} must be above 0 when max_steps is not given")
        self.profiled  # noqa: B018 - refuses text that is no range

    @property
    def profiled(self) -> range:
        """The steps to trace, counted from 1; empty for none. Raises InputError for text that is no range."""
        first, colon, last = self.profile_steps.partition(":")
        if not self.profile_steps:
            return range(0)
        if not (first.isdecimal() and (last if colon else first).isdecimal()):
            raise InputError(f"profile_steps={self.profile_steps!r} must be FIRST:LAST, such as 3:5, or one step")
        steps = range(int(first), int(last if colon else first) + 1)
        if not steps or steps[0] < 1:
            raise InputError(
                f"profile_steps={self.profile_steps!r} must begin at 1 or later, and end where it begins or later"
            )
        return steps

    @property
    def remat(self) -> str:
        """The policy of the run."""
        if self.gradient_checkpointing and self.remat_policy in ("auto", "none"):
            return "full"
        # Keeping an activation, and reading it again, takes longer than computing it anew, on CPUs too.
        return "dots" if self.remat_policy == "auto" else self.remat_policy

    def total_steps(self, rows: Callable[[], int], batch: int) -> int:
        """Steps of the run: `max_steps`, or as many as cover `num_train_epochs` (the last may reach into the next).

        `rows` counts the rows of an epoch; it is called only where `num_train_epochs` decides.
        """
        return self.max_steps if self.max_steps > 0 else max(1, -int(-self.num_train_epochs * rows() // batch))


@dataclass(frozen=True)
class FitConfig(Settings, may_change=True):
    """The choice of the flags that decide memory."""

    fit: Literal["none", "auto"] = "none"
    """auto: choose micro-batches, remat, ZeRO stage, offload and how generation is split, so that the run fits the
    devices at hand; flags that you give stay, and so does what is trained. none: every flag as it is."""
    given: Derived[tuple[str, ...]] = dataclasses.field(default=(), compare=False)
    """Settings that the user gave, by flat name, those of sections as section.name."""


@dataclass(frozen=True)
class SharedConfig(Settings):
    """The parts that all trainers share, whatever their models: data, folder, mesh, kernels, processes."""

    fitting: FitConfig = FitConfig()
    data: DataConfig = DataConfig()
    folder: FolderConfig = FolderConfig()
    tracking: TrackingConfig = TrackingConfig()
    mesh: MeshConfig = MeshConfig()
    compute: ComputeConfig = ComputeConfig()
    compilation: CompilationConfig = CompilationConfig()
    process: ProcessConfig = ProcessConfig()

    @classmethod
    def create(cls, **values: object) -> Self:
        """As `Settings.create`; remembers which settings were given."""
        config = super().create(**values)
        given = [canonical(cls, name) for name in values if places_of(cls, name)]
        for name, kind in sections(cls).items():
            inner = values.get(name, {})
            given += [f"{name}.{canonical(kind, key)}" for key in inner] if isinstance(inner, dict) else []
        return dataclasses.replace(config, fitting=dataclasses.replace(config.fitting, given=tuple(given)))


Shared = TypeVar("Shared", bound=SharedConfig)


@dataclass(frozen=True)
class StepConfig(SharedConfig):
    """The parts that SFT, reward models and DPO share."""

    model: ModelConfig = ModelConfig()


@dataclass(frozen=True)
class StepOptions(Settings):
    """The parts of a step's own section in a run of all steps."""

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoRAOptions = LoRAOptions()
    routers: RouterOptions = RouterOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()

    def check(self) -> None:
        check_needs(self, dict.fromkeys(("lora_alpha", "lora_dropout", "lora_export"), "lora_r"))


@dataclass(frozen=True)
class PairOptions(StepOptions):
    """Losses of pairs."""

    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Share of pairs whose label is taken to be wrong; for reward_loss pairwise, and for loss_type sigmoid, robust,
    simpo and cpo."""


def batch_devices(mesh: Mesh) -> int:
    """Devices that the rows of a batch are split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]


def check_context(config: DecoderConfig, length: int, what: str) -> None:
    """Refuses sequences that the model has no positions for. Raises InputError naming `what` and both lengths."""
    if config.position != "alibi" and length > config.max_positions:
        raise InputError(f"{what} of {length} tokens exceeds the model's context of {config.max_positions}; lower it")


def as_given(config: Shared) -> Shared:
    """The config as the user gave it, for `config.yaml`: with the URL instead of the working folder."""
    folder = dataclasses.replace(
        config.folder, output_dir=config.folder.url or config.folder.output_dir, url="", leaders=()
    )
    return dataclasses.replace(config, folder=folder)


def open_run(config: SharedConfig, logging_steps: int, headline: tuple[str, ...]) -> Run:
    """Opens the run's folder, a context manager. Raises InputError when none is named or it already holds a run."""
    folder = config.folder
    if config.fitting.fit != "none":
        raise InputError(f"fit={config.fitting.fit}: pass the config through jaxrlhf.fitted first, as the commands do")
    if not folder.output_dir:
        raise InputError("output_dir: name the folder that the run should write to")
    run = Run(
        folder.output_dir,
        as_given(config),
        resume=folder.resume,
        overwrite=folder.overwrite_output_dir,
        logging_steps=logging_steps,
        headline=headline,
        tracking=config.tracking,
    )
    run.exchange = exchange_of(folder)
    return run


def exchange_of(folder: FolderConfig) -> Exchange | None:
    """Passes the files of a run between machines that share no folder; None where they share one. All call it."""
    return Exchange(folder.url, Path(folder.output_dir), folder.leaders) if folder.leaders else None
