"""Warns when reward, KL, ratio or value loss look as in runs that fail, and names the usual cause."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean, median

from jaxrlhf.trainers.guards import FIRST, History

WINDOW = 10  # steps that are averaged
SILENCE = 50  # steps before the same alarm is printed again


def kl_bound(kl_target: float | None, length: float) -> float:
    """The KL in nats per response above which a policy is far from its start; `length` is that of responses."""
    return 3 * kl_target if kl_target else 0.5 * length


def kl_limit(history: History, kl_target: float | None) -> float:
    """The KL of a rollout above which the policy has exploded: that of `kl_bound`, and three times the running median.

    Infinite before there are `FIRST` steps.
    """
    kl, lengths = history.get("objective/kl", ()), history.get("val/response_length", ())
    if len(kl) < FIRST:
        return math.inf
    return max(kl_bound(kl_target, median(lengths)), 3 * median(kl))


class Alarms:
    """Watches the metrics of every step; `say` gets a line when one of them leaves the range of healthy runs."""

    def __init__(self, say: Callable[[str], None], kl_target: float | None, has_reference: bool = True) -> None:
        self.say, self.kl_target, self.has_reference = say, kl_target, has_reference
        self.history: dict[str, deque[float]] = {}
        self.best_score: float | None = None
        self.first_spread: float | None = None
        self.first_value_losses: list[float] = []
        self.said: dict[str, int] = {}

    def check(self, metrics: Mapping[str, float], step: int) -> None:
        """Reads the metrics of a step. Non-finite ones belong to the guard."""
        for name, value in metrics.items():
            if value == value:
                self.history.setdefault(name, deque(maxlen=WINDOW)).append(value)
        for name, text in (
            ("reward", self._reward()),
            ("kl", self._kl()),
            ("ratio", self._ratio()),
            ("value", self._value(metrics)),
        ):
            if text and step - self.said.get(name, -SILENCE) >= SILENCE:
                self.said[name] = step
                self.say(f"step {step}: {text}")

    def _mean(self, name: str) -> float | None:
        values = self.history.get(name, ())
        return fmean(values) if len(values) == WINDOW else None

    def _reward(self) -> str | None:
        """Scores lost more than the spread they began with, from the best they had."""
        now = self._mean("objective/scores")
        if now is None:
            return None
        if self.best_score is None or now > self.best_score:
            self.best_score = now
        if self.first_spread is None:
            self.first_spread = self._mean("objective/scores_std")
        if self.first_spread is None or self.best_score - now <= self.first_spread:
            return None
        return (
            f"scores fell from {self.best_score:.3g} to {now:.3g} on average. Usually the policy has left what the "
            "reward model knows (look at objective/kl and at the samples): raise kl_coef or set kl_target, lower the "
            "learning rate, and go back to the best checkpoint"
        )

    def _kl(self) -> str | None:
        kl, length = self._mean("objective/kl"), self._mean("val/response_length")
        if kl is None or length is None or not self.has_reference:
            return None
        if kl < -max(1.0, 0.02 * length):
            return (
                f"KL to the reference is negative, {kl:.3g} nats per response, which samples of the policy itself do "
                "not give. Usually top_k, top_p or a repetition penalty cut the distribution that is sampled, or the "
                "sampler computes otherwise than training (sampling/logp_difference/mean)"
            )
        bound = kl_bound(self.kl_target, length)
        if kl > bound:
            return (
                f"KL to the reference is {kl:.3g} nats per response, above {bound:.3g}: the policy is far from its "
                "start. Usually kl_coef is too small for the scale of the scores, or the learning rate too high; set "
                "kl_target to have it steered"
            )
        return None

    def _ratio(self) -> str | None:
        clipped, spread = self._mean("policy/clipfrac_avg"), self._mean("val/ratio_var")
        if clipped is None or spread is None or (clipped <= 0.4 and spread <= 0.5):
            return None
        return (
            f"the policy moves too far within a step: {clipped:.0%} of the tokens are clipped, the ratio's variance is "
            f"{spread:.2g}. Usually the learning rate is too high or there are too many ppo_epochs; early_stop_kl ends "
            "such a step early"
        )

    def _value(self, metrics: Mapping[str, float]) -> str | None:
        loss = metrics.get("loss/value_avg")
        if loss is None or loss != loss:
            return None
        if len(self.first_value_losses) < WINDOW:
            self.first_value_losses.append(loss)
            return None
        now, first = self._mean("loss/value_avg"), median(self.first_value_losses)
        if now is not None and now > 10 * max(first, 1e-8):
            return (
                f"the value loss grew from {first:.3g} to {now:.3g}. Usually the critic's learning rate is too high, "
                "cliprange_value is too tight for the scale of the scores (or they should be normalised: "
                "score_normalization), or rewards jump; critic_only_steps lets the critic settle first"
            )
        explained = self._mean("val/explained_variance")
        if explained is not None and explained < -1:
            return (
                f"the critic explains none of the returns (explained variance {explained:.2g}, 1 is perfect). Usually "
                "it has a new head or follows too slowly: raise critic_learning_rate, or set critic_only_steps"
            )
        return None
