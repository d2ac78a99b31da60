"""The hyperparameters that the PPO program is compiled for."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxrlhf.config import (
    Derived,
    Fraction,
    Gt,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Settings,
    alias,
    default_of,
)
from jaxrlhf.errors import InputError
from jaxrlhf.rl.algorithms import Algorithm, find_algorithm


@dataclass(frozen=True)
class PPOHyperparameters(Settings):
    """The algorithm. Hashable: each distinct value compiles its own program."""

    advantage_estimator: str = "gae"
    """How rewards become advantages: gae (PPO, with a critic), or without a critic grpo and rloo (responses to one
    prompt compared) or reinforce++; or file.py:function of your own."""
    ppo_epochs: Annotated[PositiveInt, alias("num_ppo_epochs")] = 1
    """Passes over each rollout batch."""
    num_mini_batches: PositiveInt = 1
    """Optimizer steps per pass."""
    kl_coef: Annotated[NonNegative, alias("init_kl_coef")] = field(default=0.1, compare=False)
    """Weight of the KL penalty; with kl_target its start value."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of the KL per token: k1 = log-ratio d, k2 = d²/2, k3 = exp(-d) - 1 + d."""
    kl_in_loss: bool = False
    """Add the KL penalty to the policy loss instead of the reward."""
    kl_target: Positive | None = None
    """Nats per response that the weight of the KL penalty is steered towards after each step; none: it stays."""
    kl_horizon: Positive = 10000.0
    """Responses over which the steered weight may change by about 20 %."""
    early_stop_kl: Positive | None = None
    """Skip a step's remaining updates once the mean KL between the policy and itself at the step's start exceeds this,
    in nats per token; none: never."""
    cliprange: Positive = 0.2
    """Clips a token's ratio of new to old probability to 1 ± this in the policy loss."""
    cliprange_high: Positive | None = None
    """Separate upper clip bound (DAPO's clip-higher); default: cliprange."""
    dual_clip: Annotated[float, Gt(1)] | None = None
    """Bounds the ratio of tokens with negative advantage; none: unbounded."""
    policy_loss: Literal["clip", "cispo"] = "clip"
    """clip: PPO's clipped surrogate. cispo: each token's log-prob, weighed by the ratio, at most
    1 + cliprange_high."""
    ratio_level: Annotated[Literal["token", "sequence"], alias("importance_sampling_level")] = "token"
    """Policy ratio of each token, or of a whole response (GSPO): the geometric mean of its tokens' ratios."""
    cliprange_value: Positive = 0.2
    """Clips the critic's values to those before the update ± this in its loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the policy's entropy per token as a bonus in its loss."""
    loss_aggregation: Literal["token-mean", "sequence-mean", "fixed-length"] = "token-mean"
    """Policy loss over tokens: the mean of all tokens (DAPO); the mean over responses of their means (GRPO); or the sum
    per response over the longest response's length (RLOO, Dr. GRPO)."""
    gamma: Fraction = 1.0
    """Discount of later rewards, per token; 1: none."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation: 1 counts on the rewards alone, 0 on the critic's next value."""
    scale_by_std: bool = True
    """grpo: divide advantages by the standard deviation of their group; false: Dr. GRPO."""
    clip_reward: Positive | None = 5.0
    """Bound on the score of a response; none: unbounded."""
    score_normalization: Literal["none", "batch", "running"] = "none"
    """Scores before clipping, less their mean and over their standard deviation: of the batch, or of all so far."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response that does not end by itself."""
    length_penalty: NonNegative = 0.0
    """Subtracted from the score for each token beyond length_penalty_start."""
    length_penalty_start: NonNegativeInt = 0
    """Tokens of a response without a length penalty."""
    overlong_buffer: NonNegativeInt = 0
    """Last tokens of the longest response over which 1 is subtracted from the score, linearly (DAPO's soft overlong
    punishment); 0: none."""
    whiten_rewards: bool = False
    """Scale rewards per token to unit variance over the batch, leaving their mean."""
    whiten_advantages: bool = True
    """Scale advantages to zero mean and unit variance over the batch."""
    critic_only_steps: Annotated[NonNegativeInt, alias("critic_warmup")] = 0
    """Steps at the start that train the critic alone."""
    ptx_coef: Annotated[NonNegative, alias("unsup_coef")] = 0.0
    """Weight of the loss on pretraining text, in nats per token, in the policy's update (InstructGPT: 27.8)."""
    enable_ema: bool = field(default=False, compare=False)
    """Keep a moving average of the actor and export it to output_dir/ema."""
    ema_decay: Fraction = 0.992
    """Decay of the average of enable_ema per optimizer step."""
    ema_start_step: NonNegativeInt = 0
    """Until this step, the average of enable_ema is a copy of the actor."""
    importance_sampling_correction: bool = False
    """Weigh each token's policy loss by train over sampler probability, for the gap between both programs."""
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """Ratio of the token or of the whole response; one beyond the bounds becomes the bound (truncate), or its tokens
    count nothing (mask)."""
    importance_sampling_floor: NonNegative = 0.0
    """Smallest weight of importance_sampling_correction."""
    importance_sampling_cap: Positive = 2.0
    """Largest weight of importance_sampling_correction."""

    micro_batches: Derived[PositiveInt] = 1
    """Chunks that a minibatch is worked through in (gradient accumulation); changes memory, not results."""
    score_batches: Derived[PositiveInt | None] = None
    """Chunks that a rollout batch is scored in; None: as many as it is trained in."""
    samples_per_prompt: Derived[PositiveInt] = 1
    """Responses to one prompt, beside each other in the batch: the groups of grpo and rloo."""
    temperature: Derived[Positive] = 1.0
    """Temperature of the distribution that was sampled from; log-probs are taken at the same one."""
    response_length: Derived[PositiveInt | None] = None
    """The length that loss_aggregation=fixed-length divides by."""

    @property
    def algorithm(self) -> Algorithm:
        return find_algorithm(self.advantage_estimator)

    @property
    def has_critic(self) -> bool:
        return self.algorithm.needs_critic

    @property
    def updates(self) -> int:
        """Optimizer steps on each rollout batch."""
        return self.ppo_epochs * self.num_mini_batches

    @property
    def needs_old_logprobs(self) -> bool:
        """True if the policy's log-probs must be known before its update.

        A single update starts from the policy that has sampled, so its own forward pass computes them. They are needed
        before only for a KL penalty in the reward, and for estimators that read them.
        """
        in_reward = self.kl_coef > 0 and not self.kl_in_loss
        return self.updates > 1 or in_reward or self.algorithm.reads_logprobs

    @property
    def importance_cap(self) -> float | None:
        """Bound on importance weights; None: no weights."""
        return self.importance_sampling_cap if self.importance_sampling_correction else None

    @property
    def length_costs(self) -> tuple[float, int]:
        """Penalty per token, and tokens without one."""
        if self.overlong_buffer and self.response_length is not None:
            return 1 / self.overlong_buffer, self.response_length - self.overlong_buffer
        return self.length_penalty, self.length_penalty_start

    def check(self) -> None:
        if self.overlong_buffer and self.length_penalty:
            raise InputError(
                f"overlong_buffer={self.overlong_buffer} and length_penalty={self.length_penalty} exclude each other: "
                "leave one of them out"
            )
        given = self.cliprange != default_of(type(self), "cliprange")
        if self.policy_loss == "cispo" and self.cliprange_high is not None and given:
            raise InputError(
                f"cliprange={self.cliprange}: policy_loss=cispo has no lower bound, and "
                f"cliprange_high={self.cliprange_high} is the upper one; leave cliprange out"
            )
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            raise InputError(f"dual_clip={self.dual_clip}: policy_loss=cispo bounds every ratio; leave it out")
        if self.importance_sampling_floor >= self.importance_sampling_cap:
            raise InputError(
                f"importance_sampling_floor={self.importance_sampling_floor} must be below "
                f"importance_sampling_cap={self.importance_sampling_cap}"
            )
        if not self.has_critic and self.critic_only_steps:
            raise InputError(
                f"critic_only_steps={self.critic_only_steps} with advantage_estimator={self.advantage_estimator}, "
                "which has no critic; leave one of them out"
            )
        if self.kl_in_loss and self.kl_estimator == "k1":
            raise InputError(
                "kl_estimator=k1 with kl_in_loss: the gradient of k1 is zero on average and penalises nothing; take k2 "
                "or k3, or leave the penalty in the reward"
            )

    def check_groups(self) -> None:
        """Refuses settings without what a step needs of sampling: groups to compare, a length to divide by."""
        if self.algorithm.grouped and self.samples_per_prompt < 2:
            raise InputError(
                f"samples_per_prompt={self.samples_per_prompt} with advantage_estimator={self.advantage_estimator}: it "
                "compares the responses to one prompt, so it needs at least 2 of them"
            )
        if self.overlong_buffer and self.response_length is not None and self.overlong_buffer > self.response_length:
            raise InputError(
                f"overlong_buffer={self.overlong_buffer} must be at most max_answer_seq_len={self.response_length}"
            )
        if self.loss_aggregation == "fixed-length" and self.response_length is None:
            raise InputError("loss_aggregation=fixed-length needs response_length, the length to divide by")

    def check_rows(self, rows: int) -> None:
        """Refuses a rollout batch of `rows` rows that minibatches, micro-batches or groups do not divide."""
        self.check_groups()
        if rows % (self.num_mini_batches * self.micro_batches):
            raise InputError(
                f"num_mini_batches={self.num_mini_batches} × micro-batches={self.micro_batches} must divide the "
                f"rollout batch of {rows} rows"
            )
        if rows % self.samples_per_prompt:
            raise InputError(
                f"samples_per_prompt={self.samples_per_prompt} must divide the rollout batch of {rows} rows"
            )
