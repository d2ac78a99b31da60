"""The clipped losses of policy and critic, and their statistics."""

import jax.numpy as jnp
from jax import Array

from jaxrlhf.objectives.masked import keep_where, masked_mean


def truncated_importance_weights(logprobs, sampler_logprobs, mask, cap: float) -> Array:
    """`min(exp(logp - sampler), cap)` per response token, 1 elsewhere; [B, T] float32.

    What was drawn by one program and is trained by another (other kernels, another precision) is weighed by the ratio
    of their probabilities. Source: Ionides 2008, Truncated Importance Sampling; Yao et al. 2025 for this use.
    """
    keep = jnp.asarray(mask) != 0
    return jnp.minimum(
        jnp.exp(keep_where(logprobs, keep) - keep_where(sampler_logprobs, keep)), jnp.where(keep, cap, 1.0)
    )


def policy_loss(
    logprobs, old_logprobs, advantages, mask, clip_range: float, denominator=None, weights=None
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped surrogate `mean(w·max(-A·r, -A·clip(r, 1 - ε, 1 + ε)))`, r = exp(logp - old), and its statistics.

    All arrays are [B, T]; `weights` w are 1 unless given (`truncated_importance_weights`); `denominator` is the number
    of response tokens of the global (mini)batch. Statistics, each a masked sum over that same denominator, so that
    those of micro-batches add up: `ratio_shift` (mean of r - 1: shares of a mean of 1 would not add up to exactly 1),
    `ratio_spread` (mean of (r - 1)², see `ratio_variance`), `clipfrac` (share of tokens where the clipped term is the
    larger) and `approx_kl` (mean of (logp - old)²/2).
    Source: Schulman et al. 2017, equation 7.
    """
    keep = jnp.asarray(mask) != 0
    log_ratio = keep_where(logprobs, keep) - keep_where(old_logprobs, keep)
    ratio = jnp.exp(log_ratio)
    advantages = keep_where(advantages, keep)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1 - clip_range, 1 + clip_range)

    def mean(x):
        return masked_mean(x, keep, denominator)

    stats = {
        "ratio_shift": mean(ratio - 1),
        "ratio_spread": mean(jnp.square(ratio - 1)),
        "clipfrac": mean(clipped > plain),
        "approx_kl": mean(0.5 * jnp.square(log_ratio)),
    }
    loss = jnp.maximum(plain, clipped)
    return mean(loss if weights is None else loss * keep_where(weights, keep)), stats


def ratio_variance(stats: dict[str, Array]) -> Array:
    """Variance over tokens of the ratio, from `policy_loss` statistics that were added up over all micro-batches."""
    return jnp.maximum(stats["ratio_spread"] - jnp.square(stats["ratio_shift"]), 0)


def value_loss(values, old_values, returns, mask, clip_range: float, denominator=None) -> tuple[Array, Array]:
    """Clipped value loss `0.5 · mean(max((v - R)², (clip(v, old ± ε) - R)²))`, and the share of tokens it clips.

    All arrays are [B, T]; `denominator` is the number of response tokens of the global (mini)batch.
    """
    keep = jnp.asarray(mask) != 0
    values, old_values, returns = keep_where(values, keep), keep_where(old_values, keep), keep_where(returns, keep)
    plain = jnp.square(values - returns)
    clipped = jnp.square(jnp.clip(values, old_values - clip_range, old_values + clip_range) - returns)
    loss = 0.5 * masked_mean(jnp.maximum(plain, clipped), keep, denominator)
    return loss, masked_mean(clipped > plain, keep, denominator)
