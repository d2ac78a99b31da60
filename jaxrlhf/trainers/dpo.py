"""Direct preference optimisation (DPO) and its relatives, from pairs, without a reward model and without rollouts.

By default the reference's log-probs come from a program of its own before each step: nothing is kept per row, and an
epoch costs the same. The price is a frozen copy in the compute dtype (in bfloat16 an eighth of masters, gradients and
Adam); with LoRA the frozen base serves, uncopied. `precompute_ref_log_probs` scores all rows before training instead
(`jaxrlhf.trainers.references`), and losses without a reference need neither.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf import objectives
from jaxrlhf.config import NonNegative, Positive, deepspeed_chat, default_of, trl
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder
from jaxrlhf.runs.working_folder import works_locally
from jaxrlhf.trainers.optimizer import OptimizerConfig
from jaxrlhf.trainers.pairs import SIDES, Sides, pair_count, pair_mask, read_pairs
from jaxrlhf.trainers.references import ReferencedConfig, ReferenceOptions, add_reference, check_reference
from jaxrlhf.trainers.settings import PairOptions
from jaxrlhf.trainers.supervised import Batch, Extend, Objective, Recipe, TrainState, train_supervised

PyTree = Any


@dataclass(frozen=True)
class DPOOptions(PairOptions):
    """Direct preference optimisation and its relatives."""

    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    loss_type: tuple[str, ...] = ("sigmoid",)
    """Losses of pairs, added up under loss_weights. Against a reference: sigmoid (DPO; conservative DPO with
    label_smoothing), robust (unbiased when a share of label_smoothing of the labels is wrong), ipo, hinge, apo_zero,
    apo_down. Without one: simpo, cpo, orpo. And sft: negative log-prob of the chosen responses per token."""
    loss_weights: tuple[NonNegative, ...] = ()
    """Weight of each loss_type; default: 1."""
    beta: Positive | None = None
    """Weight of the KL constraint to the reference; ipo: its regularisation τ; orpo: weight of the odds ratio. Default:
    0.1, simpo 2."""
    simpo_gamma: NonNegative = 1.0
    """Margin by which simpo wants the chosen response to win."""
    cpo_alpha: NonNegative | None = None
    """Weight of the negative log-prob of chosen responses per token in cpo (default: 1) and simpo (default: 0)."""
    reference_free: bool = False
    """Leave the reference out: prefer by the policy's log-probs alone."""
    reference: ReferenceOptions = ReferenceOptions()

    def check(self) -> None:
        super().check()
        self._check_losses()
        if self.lora.lora_dropout:
            raise InputError(f"lora_dropout={self.lora.lora_dropout}: dpo never drops out; leave it at 0")

    def _check_losses(self) -> None:
        if isinstance(self.loss_type, str):
            object.__setattr__(self, "loss_type", (self.loss_type,))
        known, kinds = (*objectives.PREFERENCE_LOSSES, "sft"), self.loss_type
        if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(known):
            raise InputError(f"loss_type={' '.join(kinds) or 'none'} must be one or several of {', '.join(known)}")
        if kinds == ("sft",):
            raise InputError("loss_type=sft alone learns nothing of pairs: add a loss of pairs, or run `jaxrlhf sft`")
        if self.loss_weights and len(self.loss_weights) != len(kinds):
            raise InputError(
                f"loss_weights={' '.join(map(str, self.loss_weights))}: must have a weight for each of the "
                f"{len(kinds)} losses of loss_type={' '.join(kinds)}"
            )
        losses = self.losses
        if not any(losses.weights):
            raise InputError(
                f"loss_weights={' '.join(map(str, self.loss_weights))}: nothing is learned of pairs; give a loss of "
                "pairs a weight above 0"
            )
        smooths = [kind for kind in losses.pairs if objectives.PREFERENCE_LOSSES[kind].smooths]
        for name, needed in (
            ("label_smoothing", smooths),
            ("simpo_gamma", {"simpo"} & set(kinds)),
            ("cpo_alpha", {"simpo", "cpo"} & set(kinds)),
        ):
            if getattr(self, name) != default_of(DPOOptions, name) and not needed:
                raise InputError(
                    f"{name}={getattr(self, name)} does not go with loss_type={' '.join(kinds)}, which does not use it"
                )
        why = "reference_free leaves it out" if self.reference_free else f"loss_type={' '.join(kinds)} reads none"
        for name, value in self.reference.items():
            if value and not self.has_reference:
                raise InputError(f"{name}={value}: there is no reference, {why}; leave one of them out")

    @property
    def has_reference(self) -> bool:
        return self.losses.needs_reference and not self.reference_free

    @property
    def losses(self) -> "Losses":
        """The losses with their settings: the train program's static argument."""
        kinds, alpha = self.loss_type, self.cpo_alpha
        weights = dict(zip(kinds, self.loss_weights or (1.0,) * len(kinds), strict=True))
        shares = {"sft": 1.0, "orpo": 1.0, "cpo": 1.0 if alpha is None else alpha, "simpo": alpha or 0.0}
        default = 2.0 if "simpo" in kinds else 0.1
        return Losses(
            pairs=tuple(kind for kind in kinds if kind != "sft"),
            weights=tuple(weight for kind, weight in weights.items() if kind != "sft"),
            sft_weight=sum(weight * shares.get(kind, 0.0) for kind, weight in weights.items()),
            beta=default if self.beta is None else self.beta,
            label_smoothing=self.label_smoothing,
            margin=self.simpo_gamma,
        )


@dataclass(frozen=True)
class Losses:
    """A weighted sum of losses of pairs."""

    pairs: tuple[str, ...] = ("sigmoid",)
    """Names of `objectives.PREFERENCE_LOSSES`."""
    weights: tuple[float, ...] = (1.0,)
    """Weight of each of `pairs`."""
    sft_weight: float = 0.0
    """Weight of the mean negative log-prob of chosen responses."""
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return any(objectives.PREFERENCE_LOSSES[kind].reference for kind in self.pairs)


@dataclass(frozen=True)
class DPOConfig(DPOOptions, ReferencedConfig):
    """Direct preference optimisation alone."""

    HIDDEN = frozenset({"train_on", "group_by_length"})
    OTHER_FLAGS = deepspeed_chat.DPO
    TRL_KEYS = trl.DPO


def response_logprobs(module: Decoder, params: PyTree, rows: Batch) -> Sides:
    """Computes log π(response | prompt) of both responses, in one forward pass without dropout.

    Returns:
        `[B]` each, of packed rows `[B, P]`.
    """
    pairs = read_pairs(rows)
    logprobs, _ = module.apply(
        {"params": params},
        pairs.input_ids,
        pairs.attention_mask,
        segment_ids=pairs.segment_ids,
        contiguous=True,
        method="logprobs",
    )
    return pairs.sums(logprobs)


class Counts(NamedTuple):
    """The denominators of a batch: real pairs, and tokens of their chosen responses."""

    pairs: jax.Array
    tokens: jax.Array


def counts(batch: Batch) -> Counts:
    return Counts(pair_count(batch), read_pairs(batch).lengths()["chosen"].sum())


class Terms(NamedTuple):
    """The losses of a batch, each over its own denominator."""

    pairs: jax.Array
    """Weighted sum of the losses of pairs."""
    nll: jax.Array
    """Negative log-prob of the chosen responses per token."""
    stats: dict[str, jax.Array]
    """Means over pairs under TRL's names."""


def dpo_terms(losses: Losses, module: Decoder, params: PyTree, rows: Batch, count: Counts) -> Terms:
    """Computes the losses of pairs, and their statistics.

    Rewards are β times what the first loss compares: log-ratios to the reference, or without one log-probs, per token
    where the loss is.
    """
    logps = response_logprobs(module, params, rows)
    ratios = {side: logps[side] - rows[f"ref_{side}_logps"] for side in SIDES}
    lengths = read_pairs(rows).lengths()
    mask = pair_mask(rows)
    total = jnp.zeros((), jnp.float32)
    for kind, weight in zip(losses.pairs, losses.weights, strict=True):
        declared = objectives.PREFERENCE_LOSSES[kind]
        compared = ratios if declared.reference else logps
        total += weight * objectives.preference_loss(
            compared["chosen"],
            compared["rejected"],
            mask,
            losses.beta,
            kind,
            losses.label_smoothing if declared.smooths else 0.0,
            lengths["chosen"],
            lengths["rejected"],
            denominator=count.pairs,
            margin=losses.margin,
        )
    mean = partial(objectives.masked_mean, mask=mask, denominator=count.pairs)
    first = objectives.PREFERENCE_LOSSES[losses.pairs[0]]
    compared = ratios
    if not first.reference:
        compared = {
            side: logps[side] / jnp.maximum(lengths[side], 1) if first.per_token else logps[side] for side in SIDES
        }
    stats = {f"rewards/{side}": mean(losses.beta * compared[side]) for side in SIDES}
    stats["rewards/accuracies"] = mean(compared["chosen"] > compared["rejected"])
    stats["rewards/margins"] = mean(losses.beta * (compared["chosen"] - compared["rejected"]))
    stats |= {f"logps/{side}": mean(logps[side]) for side in SIDES}
    return Terms(total, -objectives.masked_mean(logps["chosen"], mask, count.tokens), stats)


def dpo_loss(
    losses: Losses, module: Decoder, params: PyTree, rows: Batch, count: Counts, _key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of all losses, and statistics."""
    terms = dpo_terms(losses, module, params, rows, count)
    if not losses.sft_weight:
        return terms.pairs, terms.stats
    return terms.pairs + losses.sft_weight * terms.nll, terms.stats | {"nll_loss": terms.nll}


def dpo_sums(losses: Losses, module: Decoder, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    count = counts(batch)
    terms = dpo_terms(losses, module, params, batch, count)
    sums = jax.tree.map(lambda mean: mean * count.pairs, {"loss": terms.pairs, **terms.stats})
    return sums | {"nll_loss": terms.nll * count.tokens, **count._asdict()}


def dpo_metrics(losses: Losses, totals: dict[str, float]) -> dict[str, float]:
    pairs, nll = max(totals["pairs"], 1), totals["nll_loss"] / max(totals["tokens"], 1)
    means = {name: total / pairs for name, total in totals.items() if name not in ("pairs", "tokens", "nll_loss")}
    if not losses.sft_weight:
        return means
    return means | {"loss": means["loss"] + losses.sft_weight * nll, "nll_loss": nll}


def without_reference(*_: object) -> Extend:
    """Log-ratios are log-probs."""
    return lambda params, batch: batch | {f"ref_{side}_logps": 0.0 * pair_mask(batch) for side in SIDES}


@functools.cache
def objective(losses: Losses) -> tuple[Objective, Callable]:
    """The objective and its evaluation sums; made once per setting, so that a jitted step compiles once."""
    return Objective(counts, partial(dpo_loss, losses)), partial(dpo_sums, losses)


@works_locally
def train_dpo(config: DPOConfig) -> TrainState:
    """Runs DPO; the trained model lies in the run's folder afterwards."""
    check_reference(config)  # fails early when the model cannot be used
    loss, measure = objective(config.losses)
    recipe = Recipe(
        name="dpo",
        title="Direct preference optimisation",
        head="lm",
        headline=("loss", "rewards/accuracies", "rewards/margins", "grad_norm"),
        objective=loss,
        measure=measure,
        summarise=partial(dpo_metrics, config.losses),
        best=("loss", -1),
        extend=partial(add_reference, config, response_logprobs) if config.has_reference else without_reference,
    )
    return train_supervised(config, recipe)
