"""Rewards of reinforcement learning: scores and their penalties, KL estimates, and the adaptive KL coefficient."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf.objectives.masked import divide, is_last, keep_where, masked_mean, real

KL_ESTIMATES = ("k1", "k2", "k3")


def kl_estimate(logprobs: ArrayLike, ref_logprobs: ArrayLike, kind: str = "k1", mask: ArrayLike | None = None) -> Array:
    """Estimates KL(policy || reference) per token in nats, from tokens sampled by the policy.

    With d = logprobs - ref_logprobs: "k1" is d, "k2" is d²/2, "k3" is exp(-d) - 1 + d. None of them is clamped.
    Source: J. Schulman, "Approximating KL Divergence", 2020.

    Args:
        logprobs: `[B, T]`.
        ref_logprobs: `[B, T]`.
        kind: One of KL_ESTIMATES.
        mask: `[B, T]`: entries that are not set are 0; None: all are set.

    Raises:
        ValueError: Another `kind`.
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
    logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    scores: ArrayLike,
    response_mask: ArrayLike,
    kl_coef: ArrayLike,
    clip_reward: float | None = None,
    kind: str = "k1",
    placed: ArrayLike | None = None,
) -> Array:
    """Computes PPO's rewards per token: `-kl_coef · kl_estimate(kind)` on the response, plus the score at its end.

    Parts of the score may have places of their own (rewards of single turns). They are paid there, and the rest of the
    score at the end, so that a row's sum is its clipped score and its penalty wherever the parts stand.

    Args:
        logprobs: `[B, T]`.
        ref_logprobs: `[B, T]`.
        scores: Of the reward model, `[B]`.
        response_mask: `[B, T]`.
        kl_coef: β.
        clip_reward: Scores are clipped to ± this; None: not clipped.
        kind: One of KL_ESTIMATES.
        placed: `[B, T]`: parts of the score at response tokens; None: none.

    Returns:
        `[B, T]`; a row without a response has no reward at all.
    """
    keep = jnp.asarray(response_mask) != 0
    scores = real(scores)
    if clip_reward is not None:
        scores = jnp.clip(scores, -clip_reward, clip_reward)
    penalty = kl_coef * kl_estimate(logprobs, ref_logprobs, kind, keep)
    if placed is None:
        return jnp.where(is_last(keep), scores[:, None], 0) - penalty
    parts = keep_where(placed, keep)
    rest = scores - jnp.sum(parts, axis=1)
    return jnp.where(is_last(keep), rest[:, None], 0) + parts - penalty


def penalised_scores(
    scores: ArrayLike,
    lengths: ArrayLike,
    ended: ArrayLike,
    missing_eos_penalty: float = 0.0,
    length_penalty: float = 0.0,
    length_penalty_start: int = 0,
) -> Array:
    """Subtracts the penalties of a response from its score.

    Args:
        scores: `[B]`.
        lengths: Tokens of the responses, `[B]`.
        ended: `[B]`, set for responses that ended with EOS or a stop sequence.
        missing_eos_penalty: Penalty of a response that did not end.
        length_penalty: Penalty of each token beyond `length_penalty_start`.
        length_penalty_start: Tokens without a penalty.
    """
    beyond = jnp.maximum(real(lengths) - length_penalty_start, 0)
    return real(scores) - missing_eos_penalty * (jnp.asarray(ended) == 0) - length_penalty * beyond


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of all numbers so far, each a float32 scalar."""

    count: Array
    mean: Array
    deviation: Array

    @classmethod
    def empty(cls) -> "Moments":
        """The moments of no numbers."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))

    @property
    def std(self) -> Array:
        """The unbiased standard deviation; 0 for fewer than two numbers."""
        return jnp.sqrt(divide(self.deviation, jnp.maximum(self.count - 1, 1)))


def add_moments(moments: Moments, x: ArrayLike, mask: ArrayLike) -> Moments:
    """Adds the entries of `x` where `mask` is set to the moments. Source: Chan, Golub & LeVeque 1979."""
    keep = jnp.asarray(mask) != 0
    count = jnp.sum(keep).astype(jnp.float32)
    kept = keep_where(x, keep)
    first = kept.reshape(-1)[jnp.argmax(keep)]
    mean = first + masked_mean(kept - first, keep)  # exact for equal numbers
    deviation = jnp.sum(jnp.square(jnp.where(keep, kept - mean, 0)))
    total = moments.count + count
    shift = mean - moments.mean
    return Moments(
        count=total,
        mean=moments.mean + shift * divide(count, total),
        deviation=moments.deviation + deviation + divide(jnp.square(shift) * moments.count * count, total),
    )


def standardised(x: ArrayLike, moments: Moments, epsilon: float = 1e-8) -> Array:
    """Computes `(x - mean) / (std + epsilon)` with the mean and the unbiased standard deviation of `moments`."""
    return (real(x) - moments.mean) / (moments.std + epsilon)


def adaptive_kl_coef(coef: Array, kl: ArrayLike, target: float, horizon: float, samples: ArrayLike) -> Array:
    """Adapts the KL coefficient: multiplies it by `1 + clip(kl / target - 1, ±0.2) · samples / horizon`.

    Source: Ziegler et al. 2019, section 2.2.

    Args:
        coef: The coefficient before.
        kl: Mean KL of a batch, in nats per response.
        target: Its target.
        horizon: Responses over which the coefficient adapts.
        samples: Responses in the batch.
    """
    error = jnp.clip(real(kl) / target - 1, -0.2, 0.2)
    return coef * (1 + error * samples / horizon)
