"""Step 2: the reward model, from pairs of a chosen and a rejected response."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf import objectives
from jaxrlhf.config import NonNegative, deepspeed_chat, trl
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder
from jaxrlhf.runs.working_folder import works_locally
from jaxrlhf.trainers.pairs import Sides, pair_count, pair_mask, read_pairs
from jaxrlhf.trainers.settings import PairOptions
from jaxrlhf.trainers.supervised import Batch, Objective, PyTree, Recipe, SupervisedConfig, TrainState, train_supervised

SIMILAR = 0.1  # share of the longer response: smaller differences in length say little


@dataclass(frozen=True)
class RewardOptions(PairOptions):
    """Reward modelling."""

    reward_loss: Literal["pairwise", "tokenwise"] = "pairwise"
    """pairwise: Bradley-Terry on the score at the last real token; tokenwise: DeepSpeed-Chat's, on every token from the
    first that differs."""
    center_rewards_coefficient: NonNegative = 0.0
    """Weight of the squared sum of a pair's scores, which centres scores at 0; for reward_loss pairwise. 0.01 is
    usual."""

    @property
    def loss(self) -> "RewardLoss":
        return RewardLoss(self.reward_loss, self.label_smoothing, self.center_rewards_coefficient)


@dataclass(frozen=True)
class RewardConfig(RewardOptions, SupervisedConfig):
    """Step 2 alone."""

    HIDDEN = frozenset({"train_on", "group_by_length"})
    OTHER_FLAGS = deepspeed_chat.REWARD
    TRL_KEYS = trl.REWARD

    def check(self) -> None:
        super().check()
        for name in ("label_smoothing", "center_rewards_coefficient"):
            if self.reward_loss == "tokenwise" and (value := getattr(self, name)):
                raise InputError(
                    f"{name}={value} does not go with reward_loss=tokenwise, which has no such term: set it to 0, or "
                    "take reward_loss=pairwise"
                )
        if self.reward_loss == "tokenwise" and self.data.packing:
            raise InputError(
                "packing=True does not go with reward_loss=tokenwise, which compares the two responses column by "
                "column: set packing to false, or take reward_loss=pairwise"
            )


class RewardLoss(NamedTuple):
    """The loss of pairs and its settings, static arguments of a jitted step."""

    kind: str = "pairwise"
    label_smoothing: float = 0.0
    center: float = 0.0


def compare(
    settings: RewardLoss, module: Decoder, params: PyTree, rows: Batch, count: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, Sides]:
    """Computes the mean loss of the pairs, and the scores at the last token of both sides, in one forward pass."""
    pairs = read_pairs(rows)
    rngs = None if key is None else {"dropout": key}
    values: Any = module.apply(
        {"params": params},
        pairs.input_ids,
        pairs.attention_mask,
        segment_ids=pairs.segment_ids,
        contiguous=True,
        rngs=rngs,
    )
    scores, margin = pairs.last(values), rows.get("margin", 0.0)
    if settings.kind == "tokenwise":
        names = ("chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "row_mask")
        arrays = (rows[name] for name in names)
        loss = objectives.tokenwise_pairwise_loss(*jnp.split(values, 2), *arrays, denominator=count, margin=margin)
    else:
        loss = objectives.pairwise_loss(
            scores["chosen"],
            scores["rejected"],
            pairs.mask,
            count,
            margin=margin,
            label_smoothing=settings.label_smoothing,
            center=settings.center,
        )
    return loss, scores


def reward_loss(
    settings: RewardLoss, module: Decoder, params: PyTree, rows: Batch, count: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of the pairs, with the accuracy and margin of the scores at the last token."""
    loss, scores = compare(settings, module, params, rows, count, key)
    chosen, rejected = scores["chosen"], scores["rejected"]
    mean = partial(objectives.masked_mean, mask=pair_mask(rows), denominator=count)
    return loss, {"accuracy": mean(chosen > rejected), "margin": mean(chosen - rejected)}


def reward_sums(settings: RewardLoss, module: Decoder, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    count = pair_count(batch)
    loss, scores = compare(settings, module, params, batch, count, None)
    chosen, rejected = scores["chosen"], scores["rejected"]
    lengths = read_pairs(batch).lengths()
    long, short = lengths["chosen"], lengths["rejected"]
    similar = jnp.abs(long - short) < SIMILAR * jnp.maximum(long, short)
    total = partial(objectives.masked_sum, mask=pair_mask(batch))
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


@cache
def objective(settings: RewardLoss) -> tuple[Objective, Callable]:
    """The objective and its evaluation sums; made once per setting, so that a jitted step compiles once."""
    return Objective(pair_count, partial(reward_loss, settings)), partial(reward_sums, settings)


@works_locally
def train_reward(config: RewardConfig) -> TrainState:
    """Run step 2; the reward model lies in `config.output_dir` afterwards."""
    loss, measure = objective(config.loss)
    recipe = Recipe(
        name="reward",
        title="Reward model",
        head="scalar",
        headline=("loss", "accuracy", "grad_norm", "learning_rate"),
        objective=loss,
        measure=measure,
        summarise=reward_metrics,
        best=("accuracy", 1),
        packable=config.reward_loss == "pairwise",
    )
    return train_supervised(config, recipe)
