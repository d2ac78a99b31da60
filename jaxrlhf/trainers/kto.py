"""Kahneman-Tversky optimisation (KTO): from single responses that are labelled good or bad, without pairs.

The policy's KL from the reference is estimated on mismatched prompts and responses, by a program of its own before each
step: so it is the mean over the whole batch, whatever the mesh and the micro-batches, and has no gradient.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf import objectives
from jaxrlhf.config import NonNegative, Positive, trl
from jaxrlhf.data import Data
from jaxrlhf.data.steps import UnpairedData
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder, Model
from jaxrlhf.runs import Run
from jaxrlhf.runs.working_folder import works_locally
from jaxrlhf.trainers.optimizer import OptimizerConfig
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.references import (
    ReferencedConfig,
    ReferenceOptions,
    add_reference,
    check_reference,
    chunks,
    score_batch,
)
from jaxrlhf.trainers.settings import StepOptions
from jaxrlhf.trainers.supervised import Batch, Extend, Objective, Recipe, TrainState, train_supervised

PyTree = Any
COLUMNS = {
    "completion": ("input_ids", "attention_mask", "loss_mask"),
    "kl": ("kl_ids", "kl_mask", "kl_loss_mask"),
}
"""Arrays of a batch: its rows, and the mismatched pairs."""


@dataclass(frozen=True)
class KTOOptions(StepOptions):
    """Kahneman-Tversky optimisation."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    beta: Positive = 0.1
    """Weight of the KL constraint to the reference."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto: a response gains by what it is above the policy's KL from the reference; apo_zero_unpaired: above 0, so
    that good responses become more likely and bad ones less."""
    desirable_weight: NonNegative = 1.0
    """Weight of good responses; weight × number should be 1 to 4/3 of that of bad ones."""
    undesirable_weight: NonNegative = 1.0
    """Weight of bad responses."""
    reference: ReferenceOptions = ReferenceOptions()

    def check(self) -> None:
        super().check()
        if self.lora.lora_dropout:
            raise InputError(f"lora_dropout={self.lora.lora_dropout}: kto never drops out; leave it at 0")
        if not self.desirable_weight or not self.undesirable_weight:
            raise InputError(
                f"desirable_weight={self.desirable_weight} and undesirable_weight={self.undesirable_weight} must both "
                "be above 0: kto learns from the difference of good and bad responses"
            )


@dataclass(frozen=True)
class KTOConfig(KTOOptions, ReferencedConfig):
    """Kahneman-Tversky optimisation alone."""

    HIDDEN = frozenset({"train_on", "group_by_length", "pair_rule", "pair_margin", "packing", "streaming"})
    TRL_KEYS = trl.KTO


class Loss(NamedTuple):
    """The loss as the train program is compiled for it."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


class Counts(NamedTuple):
    """Denominators: real rows, and those with each label."""

    rows: jax.Array
    good: jax.Array
    bad: jax.Array


def counts(batch: Batch) -> Counts:
    rows, good = batch["row_mask"].sum(), (batch["row_mask"] * batch["label"]).sum()
    return Counts(rows, good, rows - good)


def logprobs(names: tuple[str, ...], module: Decoder, params: PyTree, rows: Batch) -> dict[str, jax.Array]:
    """Computes log π(response | prompt) `[B]` of these entries of COLUMNS."""
    found = {}
    for name in names:
        ids, mask, loss_mask = (rows[column] for column in COLUMNS[name])
        per_token, _ = module.apply({"params": params}, ids, mask, contiguous=True, method="logprobs")
        found[name] = objectives.sequence_logprobs(per_token, loss_mask)
    return found


def kto_loss(
    loss: Loss, module: Decoder, params: PyTree, rows: Batch, count: Counts, _key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of the rows, and TRL's metrics: rewards β·log(π / π_ref) and log-probs of good and of bad responses."""
    logps = logprobs(("completion",), module, params, rows)["completion"]
    ratios = logps - rows["ref_completion_logps"]
    value = objectives.kto_loss(ratios, rows["label"], rows["kl"], rows["row_mask"], *loss, denominator=count.rows)
    stats = {"kl": objectives.masked_mean(rows["kl"], rows["row_mask"], count.rows)}
    for side, label, number in (("chosen", 1, count.good), ("rejected", 0, count.bad)):
        mask = (rows["row_mask"] != 0) & (rows["label"] == label)
        stats[f"rewards/{side}"] = objectives.masked_mean(loss.beta * ratios, mask, number)
        stats[f"logps/{side}"] = objectives.masked_mean(logps, mask, number)
    stats["rewards/margins"] = stats["rewards/chosen"] - stats["rewards/rejected"]
    return value, stats


def kto_sums(loss: Loss, module: Decoder, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    count = counts(batch)
    value, stats = kto_loss(loss, module, params, batch, count, None)
    of_side = {"chosen": count.good, "rejected": count.bad}
    sums = {name: x * of_side[name.split("/")[1]] for name, x in stats.items() if name.split("/")[-1] in of_side}
    return {"loss": value * count.rows, "kl": stats["kl"] * count.rows, **sums, **count._asdict()}


def kto_metrics(totals: dict[str, float]) -> dict[str, float]:
    number = {"chosen": totals["good"], "rejected": totals["bad"]}
    sums = {name: total for name, total in totals.items() if name not in Counts._fields}
    means = {name: total / max(number.get(name.split("/")[-1], totals["rows"]), 1) for name, total in sums.items()}
    return means | {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


@functools.cache
def objective(loss: Loss) -> tuple[Objective, Callable]:
    """The objective and its evaluation sums; made once per setting, so that a jitted step compiles once."""
    return Objective(counts, partial(kto_loss, loss)), partial(kto_sums, loss)


BOTH = partial(logprobs, tuple(COLUMNS))
MISMATCHED = partial(logprobs, ("kl",))


def add_kl(config: KTOConfig, run: Run, model: Model, mesh: Mesh, data: tuple[Data, Data]) -> Extend:
    """Returns the function that adds the reference's log-probs and `kl` `[B]`, the batch's KL in every row."""
    check_labels(data[0])
    add = add_reference(config, BOTH, run, model, mesh, data)
    score = Announce(run, "kto KL", partial(score_batch, logprobs=MISMATCHED, module=model.module, mesh=mesh))

    def extend(params: PyTree, batch: Batch) -> Batch:
        batch = add(params, batch)
        kl = jnp.zeros_like(batch["ref_kl_logps"])
        if config.loss_type == "kto":
            logps = score(params, batch, micro_batches=chunks(config, batch))["kl"]
            kl += objectives.kto_kl(logps - batch["ref_kl_logps"], batch["row_mask"])
        return {name: x for name, x in batch.items() if name not in (*COLUMNS["kl"], "ref_kl_logps")} | {"kl": kl}

    return extend


def check_labels(data: Data) -> None:
    """Raises InputError when all rows have one label."""
    labels = data.labels() if isinstance(data, UnpairedData) else np.zeros(0, bool)
    if labels.all() or not labels.any():
        raise InputError(
            f"label: all {len(labels)} training rows are {bool(labels.all())}; kto needs good and bad responses. Check "
            "label_field, or train on good responses alone with `jaxrlhf sft`"
        )


@works_locally
def train_kto(config: KTOConfig) -> TrainState:
    """Runs KTO; the trained model lies in the run's folder afterwards."""
    check_reference(config)  # fails early when the model cannot be used
    loss, measure = objective(Loss(config.beta, config.desirable_weight, config.undesirable_weight))
    recipe = Recipe(
        name="kto",
        title="Kahneman-Tversky optimisation",
        head="lm",
        headline=("loss", "kl", "rewards/margins", "grad_norm"),
        objective=loss,
        measure=measure,
        summarise=kto_metrics,
        best=("loss", -1),
        extend=partial(add_kl, config),
        packable=False,
    )
    return train_supervised(config, recipe)
