"""Rewards of reinforcement learning: scores and their penalties, KL estimates, and the controller of the KL weight."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxrlhf.objectives.masked import divide, is_last, keep_where, masked_mean, real

KL_ESTIMATES = ("k1", "k2", "k3")


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


def kl_penalty_rewards(
    logprobs, ref_logprobs, scores, response_mask, kl_coef, clip_reward=None, kind: str = "k1"
) -> Array:
    """PPO's per-token rewards: `-kl_coef · kl_estimate(kind)` on the response, plus the clipped score at its end.

    `scores` [B] are the reward model's, clipped to ±`clip_reward` (None: not clipped). The other arrays and the result
    are [B, T]. A row without a response gets no reward at all.
    """
    keep = jnp.asarray(response_mask) != 0
    scores = real(scores)
    if clip_reward is not None:
        scores = jnp.clip(scores, -clip_reward, clip_reward)
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, kind, keep)
    return jnp.where(is_last(keep), scores[:, None], 0) - penalty


def penalised_scores(
    scores, lengths, ended, missing_eos_penalty: float = 0.0, length_penalty: float = 0.0, length_penalty_start: int = 0
) -> Array:
    """Scores `[B]` less `missing_eos_penalty` where the response has not `ended`, and less `length_penalty` for each of
    its `lengths` tokens beyond `length_penalty_start`."""
    beyond = jnp.maximum(real(lengths) - length_penalty_start, 0)
    return real(scores) - missing_eos_penalty * (jnp.asarray(ended) == 0) - length_penalty * beyond


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of all numbers seen, each a float32 scalar."""

    count: Array
    mean: Array
    deviation: Array

    @classmethod
    def empty(cls) -> "Moments":
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    @property
    def std(self) -> Array:
        """The unbiased standard deviation; 0 for fewer than two numbers."""
        return jnp.sqrt(divide(self.deviation, jnp.maximum(self.count - 1, 1)))


def add_moments(moments: Moments, x, mask) -> Moments:
    """The moments with the entries of `x` where `mask` is set added. Source: Chan, Golub & LeVeque 1979."""
    keep = jnp.asarray(mask) != 0
    count = jnp.sum(keep).astype(jnp.float32)
    kept = keep_where(x, keep)
    first = kept.reshape(-1)[jnp.argmax(keep)]
    mean = first + masked_mean(kept - first, keep)  # of equal numbers exactly that number
    deviation = jnp.sum(jnp.square(jnp.where(keep, kept - mean, 0)))
    total = moments.count + count
    shift = mean - moments.mean
    return Moments(
        count=total,
        mean=moments.mean + shift * divide(count, total),
        deviation=moments.deviation + deviation + divide(jnp.square(shift) * moments.count * count, total),
    )


def standardised(x, moments: Moments, epsilon: float = 1e-8) -> Array:
    """`(x - mean) / (std + epsilon)` with the mean and the unbiased standard deviation of `moments`."""
    return (real(x) - moments.mean) / (moments.std + epsilon)


def adaptive_kl_coef(coef, kl, target: float, horizon: float, samples) -> Array:
    """The KL weight after a batch of `samples` responses whose mean KL (nats per response) was `kl`.

    Multiplied by `1 + clip(kl / target - 1, ±0.2) · samples / horizon`. Source: Ziegler et al. 2019, section 2.2.
    """
    error = jnp.clip(real(kl) / target - 1, -0.2, 0.2)
    return coef * (1 + error * samples / horizon)
