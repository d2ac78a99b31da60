"""The losses, rewards and advantages of SFT, reward models, PPO and DPO, as pure `jnp` functions.

These conventions hold for every function:

- Index `t` of a `[B, T]` array refers to token `s_t`: `logprobs[t]` is log π(s_t | s_<t) and `values[t]` is the value
  estimate before `s_t` is chosen. The caller shifts by one.
- Masks are explicit, of any integer, float or boolean dtype; a non-zero entry counts fully. Values where the mask is
  zero, infinities and NaN included, reach neither the result nor a gradient.
- A packed row holds several sequences. `segment_ids` `[B, T]` number them 1, 2, … in each row and are 0 on padding.
- Arithmetic and reductions are float32, or float64 for float64 input. No argument is detached: differentiate with
  respect to the new log-probs or values only.
- A loss is a masked sum over a denominator. The default denominator is the mask's own count. With the count of the
  global batch, the losses of micro-batches and shards add up to the loss of the whole batch. With a denominator of 0
  the loss is 0.
"""

from jaxrlhf.objectives.advantages import gae, group_advantages, pair_advantages, reward_to_go, rloo_advantages
from jaxrlhf.objectives.comparison import best_of_n_kl_bound, expected_best, win_rate
from jaxrlhf.objectives.distillation import divergence
from jaxrlhf.objectives.masked import (
    last_token_index,
    masked_mean,
    masked_sum,
    masked_variance,
    masked_whiten,
    score_at_last_token,
    score_at_segment_ends,
    segment_sums,
)
from jaxrlhf.objectives.policy import (
    AGGREGATIONS,
    IMPORTANCE_WEIGHTS,
    POLICY_LOSSES,
    importance_weights,
    loss_weights,
    policy_loss,
    ratio_variance,
    value_loss,
)
from jaxrlhf.objectives.preference import (
    PREFERENCE_LOSSES,
    PreferenceLoss,
    kto_kl,
    kto_loss,
    preference_loss,
    sequence_logprobs,
)
from jaxrlhf.objectives.rewards import (
    KL_ESTIMATES,
    Moments,
    adaptive_kl_coef,
    add_moments,
    kl_estimate,
    kl_penalty_rewards,
    penalised_scores,
    standardised,
)
from jaxrlhf.objectives.routers import load_balancing_loss, router_z_loss
from jaxrlhf.objectives.supervised import pairwise_loss, sft_loss, tokenwise_pairwise_loss

__all__ = [
    "AGGREGATIONS",
    "IMPORTANCE_WEIGHTS",
    "KL_ESTIMATES",
    "POLICY_LOSSES",
    "PREFERENCE_LOSSES",
    "Moments",
    "PreferenceLoss",
    "adaptive_kl_coef",
    "add_moments",
    "best_of_n_kl_bound",
    "divergence",
    "expected_best",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "kl_penalty_rewards",
    "kto_kl",
    "kto_loss",
    "last_token_index",
    "load_balancing_loss",
    "loss_weights",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "masked_whiten",
    "pair_advantages",
    "pairwise_loss",
    "penalised_scores",
    "policy_loss",
    "preference_loss",
    "ratio_variance",
    "reward_to_go",
    "rloo_advantages",
    "router_z_loss",
    "score_at_last_token",
    "score_at_segment_ends",
    "segment_sums",
    "sequence_logprobs",
    "sft_loss",
    "standardised",
    "tokenwise_pairwise_loss",
    "value_loss",
    "win_rate",
]
