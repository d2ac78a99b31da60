"""Step 1: supervised fine-tuning on prompt + chosen response."""

import math
from dataclasses import dataclass

import jax

from jaxrlhf import objectives
from jaxrlhf.config import deepspeed_chat, trl
from jaxrlhf.models import Decoder
from jaxrlhf.runs.working_folder import works_locally
from jaxrlhf.trainers.settings import StepOptions
from jaxrlhf.trainers.supervised import Batch, Objective, PyTree, Recipe, SupervisedConfig, TrainState, train_supervised


@dataclass(frozen=True)
class SFTOptions(StepOptions):
    """Supervised fine-tuning."""


@dataclass(frozen=True)
class SFTConfig(SFTOptions, SupervisedConfig):
    """Step 1 alone."""

    HIDDEN = frozenset({"group_by_length", "pair_rule", "pair_margin"})
    OTHER_FLAGS = deepspeed_chat.SFT
    TRL_KEYS = trl.SFT


def token_count(batch: Batch) -> jax.Array:
    return batch["loss_mask"].sum()


def sft_loss(
    module: Decoder, params: PyTree, rows: Batch, count: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-prob of the target tokens, in nats. Rows with `segment_ids` are packed."""
    logprobs, _ = module.apply(
        {"params": params},
        rows["input_ids"],
        rows["attention_mask"],
        segment_ids=rows.get("segment_ids"),
        contiguous=True,
        method="logprobs",
        rngs=None if key is None else {"dropout": key},
    )
    return objectives.sft_loss(logprobs, rows["loss_mask"], count), {}


def sft_sums(module: Decoder, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    count = token_count(batch)
    loss, _ = sft_loss(module, params, batch, count, None)
    return {"nll": loss * count, "tokens": count}


def sft_metrics(totals: dict[str, float]) -> dict[str, float]:
    loss = totals["nll"] / max(totals["tokens"], 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


OBJECTIVE = Objective(token_count, sft_loss)


@works_locally
def train_sft(config: SFTConfig) -> TrainState:
    """Run step 1; the trained model lies in `config.output_dir` afterwards."""
    recipe = Recipe(
        name="sft",
        title="Supervised fine-tuning",
        head="lm",
        headline=("loss", "grad_norm", "learning_rate", "perf/tokens_per_second"),
        objective=OBJECTIVE,
        measure=sft_sums,
        summarise=sft_metrics,
        best=("loss", -1),
    )
    return train_supervised(config, recipe)
