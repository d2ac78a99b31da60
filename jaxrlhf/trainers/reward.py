"""Step 2: the reward model, from pairs of a chosen and a rejected response."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrlhf import objectives
from jaxrlhf.models import Decoder
from jaxrlhf.trainers.settings import StepOptions
from jaxrlhf.trainers.supervised import Batch, Objective, Recipe, SupervisedConfig, TrainState, train_supervised

SIMILAR = 0.1  # share of the longer response: smaller differences in length say little


@dataclass(frozen=True)
class RewardOptions(StepOptions):
    """Reward modelling."""

    reward_loss: Literal["pairwise", "tokenwise"] = "pairwise"
    """pairwise: Bradley-Terry on the score at the last real token; tokenwise: DeepSpeed-Chat's, on every token from the
    first that differs."""


@dataclass(frozen=True)
class RewardConfig(RewardOptions, SupervisedConfig):
    """Step 2 alone."""


def pair_count(batch: Batch) -> jax.Array:
    return batch["row_mask"].sum()


def pair_values(module: Decoder, params: Any, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Per-token scores `[B, T]` of chosen and rejected, in one forward pass."""
    both = [jnp.concatenate([rows[f"chosen_{k}"], rows[f"rejected_{k}"]]) for k in ("ids", "mask")]
    values: Any = module.apply({"params": params}, *both, rngs=None if key is None else {"dropout": key})
    chosen, rejected = jnp.split(values, 2)
    return chosen, rejected


def last_scores(rows: Batch, chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (
        objectives.score_at_last_token(chosen, rows["chosen_mask"]),
        objectives.score_at_last_token(rejected, rows["rejected_mask"]),
    )


def reward_loss(
    kind: str, module: Decoder, params: Any, rows: Batch, count: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean pairwise loss, with the accuracy and margin of the scores at the last token."""
    chosen, rejected = pair_values(module, params, rows, key)
    scores = last_scores(rows, chosen, rejected)
    if kind == "tokenwise":
        names = ("chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "row_mask")
        loss = objectives.tokenwise_pairwise_loss(chosen, rejected, *(rows[n] for n in names), denominator=count)
    else:
        loss = objectives.pairwise_loss(*scores, rows["row_mask"], count)
    mean = partial(objectives.masked_mean, mask=rows["row_mask"], denominator=count)
    return loss, {"accuracy": mean(scores[0] > scores[1]), "margin": mean(scores[0] - scores[1])}


def response_start(rows: Batch) -> jax.Array:
    """Column `[B]` of the responses' first token; at least 1, because the first token of a row has no log-prob."""
    return jnp.maximum(rows["prompt_length"], 1)


def response_lengths(rows: Batch) -> tuple[jax.Array, jax.Array]:
    """Lengths `[B]` in tokens of the chosen and the rejected response; 0 in filler rows."""
    return tuple(rows[f"{side}_mask"].sum(axis=1) - response_start(rows) for side in ("chosen", "rejected"))


def reward_sums(kind: str, module: Decoder, params: Any, batch: Batch) -> dict[str, jax.Array]:
    chosen, rejected = last_scores(batch, *pair_values(module, params, batch, None))
    long, short = response_lengths(batch)
    similar = jnp.abs(long - short) < SIMILAR * jnp.maximum(long, short)
    total = partial(objectives.masked_sum, mask=batch["row_mask"])
    count = pair_count(batch)
    loss, _ = reward_loss(kind, module, params, batch, count, None)
    return {
        "loss": loss * count,
        "correct": total(chosen > rejected),
        "chosen": total(chosen),
        "rejected": total(rejected),
        "pairs": count,
        "longer": total((long > short) + 0.5 * (long == short)),
        "similar": total(similar),
        "similar_correct": total(similar & (chosen > rejected)),
    }


def reward_metrics(totals: dict[str, float]) -> dict[str, float]:
    """Accuracy beside what the answers' lengths alone give: `length_baseline` prefers the longer answer, a tie counting
    half; `accuracy_similar_length` is over the pairs whose lengths differ by less than a tenth of the longer (left out
    where there is none).
    """
    pairs = max(totals["pairs"], 1)
    similar = totals["similar"]
    return {
        "loss": totals["loss"] / pairs,
        "accuracy": totals["correct"] / pairs,
        "length_baseline": totals["longer"] / pairs,
        "similar_length_pairs": similar,
        **({"accuracy_similar_length": totals["similar_correct"] / similar} if similar else {}),
        "mean_chosen_score": totals["chosen"] / pairs,
        "mean_rejected_score": totals["rejected"] / pairs,
    }


# Made once per kind, so that a jitted step sees the same static argument in every run of a process.
OBJECTIVES = {kind: Objective(pair_count, partial(reward_loss, kind)) for kind in ("pairwise", "tokenwise")}
MEASURES = {kind: partial(reward_sums, kind) for kind in OBJECTIVES}


def train_reward(config: RewardConfig) -> TrainState:
    """Run step 2; the reward model lies in `config.output_dir` afterwards."""
    recipe = Recipe(
        name="reward",
        title="Reward model",
        head="scalar",
        headline=("loss", "accuracy", "grad_norm", "learning_rate"),
        objective=OBJECTIVES[config.reward_loss],
        measure=MEASURES[config.reward_loss],
        summarise=reward_metrics,
        best=("accuracy", 1),
    )
    return train_supervised(config, recipe)
