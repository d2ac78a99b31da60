"""Per-token rewards of reinforcement learning: KL estimates, penalties and scores."""

import jax.numpy as jnp
from jax import Array

from jaxrlhf.objectives.masked import is_last, keep_where, real


def kl_estimate(logprobs, ref_logprobs, kind: str = "k1", mask=None) -> Array:
    """Per-token estimate of KL(policy || reference) in nats, from tokens sampled by the policy; shape of the inputs.

    With d = logprobs - ref_logprobs: "k1" is d, "k2" is d²/2, "k3" is exp(-d) - 1 + d, none of them clamped. Entries
    where `mask` is given and not set are 0. Source: J. Schulman, "Approximating KL Divergence", 2020.

    Raises ValueError for another `kind`.
    """
    if mask is None:
        difference = real(logprobs) - real(ref_logprobs)
    else:
        keep = jnp.asarray(mask) != 0
        difference = keep_where(logprobs, keep) - keep_where(ref_logprobs, keep)
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        return jnp.expm1(-difference) + difference
    raise ValueError(f"kind={kind!r} is not a KL estimate; use 'k1', 'k2' or 'k3'")


def kl_penalty_rewards(logprobs, ref_logprobs, scores, response_mask, kl_coef, clip_reward=None) -> Array:
    """PPO's per-token rewards: `-kl_coef · (logp - ref)` on the response, plus the clipped score at its last token.

    `scores` [B] are the reward model's, clipped to ±`clip_reward` (None: not clipped). The other arrays and the result
    are [B, T]. A row without a response gets no reward at all.
    """
    keep = jnp.asarray(response_mask) != 0
    scores = real(scores)
    if clip_reward is not None:
        scores = jnp.clip(scores, -clip_reward, clip_reward)
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, "k1", keep)
    return jnp.where(is_last(keep), scores[:, None], 0) - penalty
