"""What the PPO program is compiled for: every choice of the algorithm, checked."""

import math
from dataclasses import dataclass

from jaxrlhf.errors import InputError
from jaxrlhf.objectives import AGGREGATIONS, KL_ESTIMATES

ESTIMATORS = ("gae", "grpo", "rloo", "reinforce++")
"""Where advantages come from; all but "gae" do without a critic."""
GROUP_ESTIMATORS = ("grpo", "rloo")
"""These compare the responses to one prompt with each other."""
SCORE_NORMALIZATIONS = ("none", "batch", "running")


@dataclass(frozen=True)
class PPOHyperparameters:
    """What the PPO program is compiled for. Hashable: each distinct value compiles its own program."""

    advantage_estimator: str = "gae"
    samples_per_prompt: int = 1
    """Responses to one prompt, beside each other in the batch: the groups of "grpo" and "rloo"."""
    ppo_epochs: int = 1
    num_mini_batches: int = 1
    micro_batches: int = 1
    """Chunks a minibatch is worked through in (gradient accumulation); changes memory, not results."""
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_high: float | None = None
    """Clipping of the ratio above 1; None: as below."""
    dual_clip: float | None = None
    """Bound c > 1 on the ratio of tokens with negative advantage; None: unbounded."""
    cliprange_value: float = 0.2
    clip_reward: float | None = 5.0
    score_normalization: str = "none"
    """"batch" or "running": scores in units of the standard deviation, of this batch or of all so far."""
    missing_eos_penalty: float = 0.0
    length_penalty: float = 0.0
    """Taken off the score for each response token beyond `length_penalty_start`."""
    length_penalty_start: int = 0
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance over the batch, leaving their mean."""
    whiten_advantages: bool = True
    scale_by_std: bool = True
    """"grpo": divide by the group's standard deviation."""
    kl_estimator: str = "k1"
    kl_in_loss: bool = False
    """The KL penalty is a term of the policy loss instead of one of the reward."""
    kl_target: float | None = None
    """Nats per response that the KL weight is steered towards; None: it stays."""
    kl_horizon: float = 10000.0
    """Responses over which the weight may change by about 20 %."""
    early_stop_kl: float | None = None
    """Leave out this iteration's remaining updates once approx_kl of a minibatch exceeds it."""
    entropy_coef: float = 0.0
    loss_aggregation: str = "token-mean"
    response_length: int | None = None
    """The length that "fixed-length" divides by."""
    critic_only_steps: int = 0
    """Iterations at the start that train the critic alone."""
    ptx_coef: float = 0.0
    """Weight of the pretraining loss, in nats per token, beside the policy loss."""
    temperature: float = 1.0
    """Of the distribution that was sampled from; log-probs are taken at the same one."""
    importance_cap: float | None = None
    """Weigh each token's policy loss by train over sampler probability, at most this; None: no weights."""
    ema_decay: float = 0.992
    ema_start_step: int = 0
    """Iterations before which the average is a copy of the actor."""
    seed: int = 0
    """Keys the order of rows in minibatches, with the step and the epoch."""

    def __post_init__(self) -> None:
        choices = {
            "advantage_estimator": ESTIMATORS,
            "score_normalization": SCORE_NORMALIZATIONS,
            "kl_estimator": KL_ESTIMATES,
            "loss_aggregation": AGGREGATIONS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        for name in ("samples_per_prompt", "ppo_epochs", "num_mini_batches", "micro_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("gamma", "lam", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        positive = ("cliprange", "cliprange_high", "cliprange_value", "clip_reward", "temperature", "importance_cap")
        for name in (*positive, "kl_target", "kl_horizon", "early_stop_kl", "response_length"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value} must be positive")
        for name in ("missing_eos_penalty", "length_penalty", "length_penalty_start", "ptx_coef", "entropy_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        for name in ("critic_only_steps", "ema_start_step"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise InputError(f"dual_clip={self.dual_clip} must be above 1: it bounds the ratio of worse tokens")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """Refuse options that contradict each other, naming both."""
        grouped = self.advantage_estimator in GROUP_ESTIMATORS
        for wrong, text in (
            (
                grouped and self.samples_per_prompt < 2,
                f"samples_per_prompt={self.samples_per_prompt} with advantage_estimator={self.advantage_estimator}: it "
                "compares the responses to one prompt, so it needs at least 2 of them",
            ),
            (
                not self.has_critic and self.critic_only_steps,
                f"critic_only_steps={self.critic_only_steps} with advantage_estimator={self.advantage_estimator}, "
                "which has no critic; leave one of them out",
            ),
            (
                self.kl_in_loss and self.kl_estimator == "k1",
                "kl_estimator=k1 with kl_in_loss: the gradient of k1 is zero on average and penalises nothing; take k2 "
                "or k3, or leave the penalty in the reward",
            ),
            (
                self.loss_aggregation == "fixed-length" and self.response_length is None,
                "loss_aggregation=fixed-length needs response_length, the length to divide by",
            ),
        ):
            if wrong:
                raise InputError(text)

    @property
    def has_critic(self) -> bool:
        return self.advantage_estimator == "gae"

    def check_rows(self, rows: int) -> None:
        """Refuse a rollout batch that minibatches and micro-batches, or groups, do not divide."""
        if rows % (self.num_mini_batches * self.micro_batches):
            raise InputError(
                f"num_mini_batches={self.num_mini_batches} × micro-batches={self.micro_batches} must divide the "
                f"rollout batch of {rows} rows"
            )
        if rows % self.samples_per_prompt:
            raise InputError(
                f"samples_per_prompt={self.samples_per_prompt} must divide the rollout batch of {rows} rows"
            )
