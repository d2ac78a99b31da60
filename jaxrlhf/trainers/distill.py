"""Distillation: a student learns a teacher's next-token distributions on responses of the data or on sampled ones.

The teacher's most likely tokens and their log-probs come from a program of its own before each step, so its logits are
never in memory beside the student's, and it needs no gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf import objectives
from jaxrlhf.config import Fraction, MayChange, NonNegativeInt, PathName, Positive, Settings, check_needs, settings, trl
from jaxrlhf.data import Data
from jaxrlhf.engine import GenerationConfig, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder, DecoderConfig, Model, frozen_copy, frozen_stage, param_shardings, read_config
from jaxrlhf.runs import Run
from jaxrlhf.runs.working_folder import works_locally
from jaxrlhf.trainers.on_policy import OwnResponses
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.references import chunks, load_frozen, score_batch
from jaxrlhf.trainers.rollouts import PiecesConfig
from jaxrlhf.trainers.settings import StepOptions, batch_devices, check_context
from jaxrlhf.trainers.sft import token_count
from jaxrlhf.trainers.supervised import Batch, Extend, Objective, Recipe, SupervisedConfig, TrainState, train_supervised
from jaxrlhf.trainers.teachers import attach_teacher
from jaxrlhf.trainers.tokenizers import check_reads_tokens

PyTree = Any


@dataclass(frozen=True)
class TeachingOptions(Settings):
    """The responses on which the student learns from its teacher, and how closely."""

    lmbda: Fraction = 0.0
    """Share of the batches whose responses the student samples itself; the others have the data's, or with seq_kd the
    teacher's."""
    seq_kd: bool = False
    """Let the teacher sample the responses of the batches that the student does not sample, in place of the data's."""
    teacher_top_k: NonNegativeInt = 64
    """Number of the teacher's most likely tokens that the loss distinguishes; all others count as one outcome. 0: the
    whole vocabulary."""
    teacher_log_probs: MayChange[PathName[str]] = ""
    """Folder with the teacher's most likely tokens of all rows. The run that finds none writes it with its teacher
    before training; others then need no teacher."""

    def check(self) -> None:
        if self.teacher_log_probs and self.sampled:
            raise InputError(
                f"{self.sampled} with teacher_log_probs={self.teacher_log_probs}: the folder knows the data's "
                "responses only; leave one of them out"
            )
        if self.teacher_log_probs and not self.teacher_top_k:
            raise InputError(
                f"teacher_top_k=0 with teacher_log_probs={self.teacher_log_probs} would store the whole vocabulary for "
                "every token; give the number of tokens to keep"
            )

    @property
    def sampled(self) -> str:
        """The setting by which responses are sampled; empty where all are the data's."""
        return f"lmbda={self.lmbda}" if self.lmbda else "seq_kd=true" if self.seq_kd else ""


@dataclass(frozen=True)
class DistillOptions(StepOptions):
    """Distillation."""

    teacher_model_name_or_path: PathName[str | None] = None
    """Model folder or hub name of the teacher, with the student's vocabulary."""
    beta: Fraction = 0.5
    """0: forward KL, from the teacher to the student; 1: reverse KL; between: generalised Jensen-Shannon divergence
    with the teacher's weight beta."""
    kd_temperature: Positive = 1.0
    """Divides the logits of both models in the loss."""
    teaching: TeachingOptions = TeachingOptions()
    sampling: SamplingConfig = SamplingConfig()
    generation: GenerationConfig = GenerationConfig()
    pieces: PiecesConfig = PiecesConfig()

    def check(self) -> None:
        super().check()
        if not self.teaching.seq_kd:
            of_samples = settings(SamplingConfig) | settings(GenerationConfig) | settings(PiecesConfig)
            check_needs(self, dict.fromkeys(of_samples, "lmbda"))

    @property
    def divergence(self) -> "Divergence":
        """The settings of the loss: the train program's static argument."""
        return Divergence(self.beta, self.kd_temperature)


@dataclass(frozen=True)
class DistillConfig(DistillOptions, SupervisedConfig):
    """Distillation alone."""

    HIDDEN = frozenset({"group_by_length", "pair_rule", "pair_margin", "samples_per_prompt"})
    TRL_KEYS = trl.GKD

    def check(self) -> None:
        super().check()
        sampled, packing = self.teaching.sampled, self.data.packing
        if sampled and packing:
            raise InputError(f"{sampled} with packing: a sampled response needs a row of its own; leave packing out")
        if sampled and packing is None:
            object.__setattr__(self, "data", dataclasses.replace(self.data, packing=False))
        if self.data.streaming and self.teaching.teacher_log_probs:
            raise InputError(
                "teacher_log_probs and streaming exclude each other: the rows of a stream are not known before "
                "training; leave one of them out"
            )

    def check_contexts(self, student: DecoderConfig, teacher: DecoderConfig) -> None:
        """Refuses prompts with sampled responses that a model has no positions for."""
        if self.teaching.sampled:
            longest = self.data.max_length + self.sampling.max_new_tokens
            for config, name in ((student, "the student"), (teacher, "the teacher")):
                check_context(config, longest, f"max_length + max_new_tokens for {name}")


@dataclass(frozen=True)
class Divergence:
    """The divergence that is minimised."""

    beta: float
    temperature: float


def teacher_logprobs(
    temperature: float, top_k: int, vocab_size: int, module: Decoder, params: PyTree, rows: Batch
) -> dict[str, jax.Array]:
    """The teacher's most likely next tokens among the student's `vocab_size`: `ids` and `logps` `[B, T, K]`."""
    count = min(top_k or vocab_size, vocab_size, module.config.vocab_size)

    def read(logprobs: jax.Array) -> dict[str, jax.Array]:
        logps, ids = jax.lax.top_k(logprobs[..., :vocab_size], count)
        return {"ids": ids, "logps": logps}

    return _read(module, params, rows, read, temperature=temperature)


def distill_loss(
    settings: Divergence, module: Decoder, params: PyTree, rows: Batch, count: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean divergence from the teacher at the target tokens, in nats."""

    def read(logprobs: jax.Array, ids: jax.Array, teacher: jax.Array) -> jax.Array:
        student = jnp.take_along_axis(logprobs, ids, axis=-1)
        return objectives.divergence(teacher, student, settings.beta)

    given = rows["teacher_ids"], rows["teacher_logps"]
    values = _read(module, params, rows, read, *given, temperature=settings.temperature, key=key)
    return objectives.masked_mean(values, rows["loss_mask"], count), {}


def _read(
    module: Decoder,
    params: PyTree,
    rows: Batch,
    read: Callable,
    *given: jax.Array,
    temperature: float,
    key: jax.Array | None = None,
) -> Any:
    return module.apply(
        {"params": params},
        rows["input_ids"],
        rows["attention_mask"],
        read,
        *given,
        temperature=temperature,
        segment_ids=rows.get("segment_ids"),
        contiguous=True,
        method="read_distributions",
        rngs=None if key is None else {"dropout": key},
    )


def distill_sums(settings: Divergence, module: Decoder, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    count = token_count(batch)
    loss, _ = distill_loss(settings, module, params, batch, count, None)
    return {"divergence": loss * count, "tokens": count}


def distill_metrics(totals: dict[str, float]) -> dict[str, float]:
    return {"loss": totals["divergence"] / max(totals["tokens"], 1)}


def add_teacher(
    config: DistillConfig,
    teacher: Callable[[Mesh], Model],
    run: Run,
    model: Model,
    mesh: Mesh,
    data: tuple[Data, Data],
) -> Extend:
    """Returns the function that adds the teacher's most likely tokens to a placed batch; `teacher` loads it.

    With `teacher_log_probs` the data has them already, and no teacher stays.
    """
    if config.teaching.teacher_log_probs:
        load = functools.cache(lambda: scorer(config, teacher(mesh), run, model, mesh))
        about = {"kd_temperature": config.kd_temperature, "teacher_top_k": config.teaching.teacher_top_k}
        about |= {"vocab_size": model.config.vocab_size}
        rows = config.run.per_device_eval_batch_size * batch_devices(mesh)
        for part, name in zip(data, ("train", "eval"), strict=True):
            folder = Path(config.teaching.teacher_log_probs) / name
            attach_teacher(part, folder, about, lambda batch: load()(batch, 1), rows, mesh)
        return lambda params, batch: batch
    score = scorer(config, teacher(mesh), run, model, mesh)

    def extend(params: PyTree, batch: Batch) -> Batch:
        found = score(batch, chunks(config, batch))
        return batch | {f"teacher_{name}": values for name, values in found.items()}

    return extend


def load_teacher(config: DistillConfig, mesh: Mesh) -> Model:
    """Loads the teacher, to be read only."""
    teacher = load_frozen(config, teacher_of(config), mesh, "the teacher")
    module = teacher.module.clone(zero_stage=frozen_stage(teacher.module, config.compute.zero_stage))
    frozen = frozen_copy(teacher.params, param_shardings(module, mesh), config.mesh.compute_dtype)
    return teacher.replace(module=module, params=frozen)


def scorer(
    config: DistillConfig, teacher: Model, run: Run, model: Model, mesh: Mesh
) -> Callable[[Batch, int], dict[str, jax.Array]]:
    """Returns the function that finds `ids` and `logps` of a batch in so many chunks."""
    config.check_contexts(model.config, teacher.config)
    logprobs = reader(config.kd_temperature, config.teaching.teacher_top_k, model.config.vocab_size)
    program = partial(score_batch, logprobs=logprobs, module=teacher.module, mesh=mesh)
    score = Announce(run, "teacher program", program)
    return lambda batch, parts: score(teacher.params, batch, micro_batches=parts)


@functools.cache
def reader(temperature: float, top_k: int, vocab_size: int) -> Callable:
    """The teacher's function; made once per setting, so that its program compiles once."""
    return partial(teacher_logprobs, temperature, top_k, vocab_size)


@functools.cache
def objective(settings: Divergence) -> tuple[Objective, Callable]:
    """The objective and its evaluation sums; made once per setting, so that a jitted step compiles once."""
    return Objective(token_count, partial(distill_loss, settings)), partial(distill_sums, settings)


def teacher_of(config: DistillConfig) -> str:
    """Returns the teacher's name. Raises InputError when there is none."""
    if config.teacher_model_name_or_path is None:
        folder = config.teaching.teacher_log_probs
        why = f", because teacher_log_probs={folder} does not hold its log-probs" if folder else ""
        raise InputError(f"teacher_model_name_or_path: name the teacher, a model folder or hub name{why}")
    return config.teacher_model_name_or_path


def check_teacher(config: DistillConfig) -> None:
    """Raises InputError without a teacher, and for one that reads other tokens than the student."""
    if config.teacher_model_name_or_path is None and config.teaching.teacher_log_probs:
        return  # its log-probs may suffice
    teacher, model = teacher_of(config), config.model.model_name_or_path
    tokenizer = config.model.load_tokenizer(config.data.template)
    shape = read_config(teacher if model is None else model)
    check_reads_tokens(tokenizer, shape, teacher, ("the student", f"teacher_model_name_or_path={teacher}"))


@works_locally
def train_distill(config: DistillConfig) -> TrainState:
    """Runs distillation; the student lies in the run's folder afterwards."""
    check_teacher(config)  # fails early when the model cannot be used
    loss, measure = objective(config.divergence)
    teaching, teacher, own = config.teaching, functools.cache(partial(load_teacher, config)), None
    if teaching.sampled:
        samplers = config.sampling, config.generation, config.pieces
        own = OwnResponses(teaching.lmbda, *samplers, teacher if teaching.seq_kd else None, teaching.sampled)
    recipe = Recipe(
        name="distill",
        title="Distillation",
        head="lm",
        headline=("loss", "grad_norm", "learning_rate", "perf/tokens_per_second"),
        objective=loss,
        measure=measure,
        summarise=distill_metrics,
        best=("loss", -1),
        extend=partial(add_teacher, config, teacher),
        rows="sft",
        on_policy=own,
    )
    return train_supervised(config, recipe)
