"""The clipped losses of policy and critic, and their statistics."""

import jax.numpy as jnp
from jax import Array

from jaxrlhf.objectives.masked import divide, keep_where, masked_mean, masked_sum

AGGREGATIONS = ("token-mean", "sequence-mean", "fixed-length")


def truncated_importance_weights(logprobs, sampler_logprobs, mask, cap: float) -> Array:
    """`min(exp(logp - sampler), cap)` per response token, 1 elsewhere; [B, T] float32.

    What was drawn by one program and is trained by another (other kernels, another precision) is weighed by the ratio
    of their probabilities. Source: Ionides 2008, Truncated Importance Sampling; Yao et al. 2025 for this use.
    """
    keep = jnp.asarray(mask) != 0
    return jnp.minimum(
        jnp.exp(keep_where(logprobs, keep) - keep_where(sampler_logprobs, keep)), jnp.where(keep, cap, 1.0)
    )


def loss_weights(mask, kind: str, length: int | None = None) -> Array:
    """Weights `[B, T]` under which a sum over tokens is the aggregated loss of the batch; 0 where `mask` is not set.

    "token-mean": every token counts alike. "sequence-mean": every row with a token counts alike, and its tokens among
    themselves. "fixed-length": tokens are summed per row and divided by the same `length`, then rows are averaged
    (Dr. GRPO, Liu et al. 2025). Give the whole (mini)batch: weights of its parts then add up. Raises ValueError for
    another `kind`, or for "fixed-length" without `length`.
    """
    keep = jnp.asarray(mask) != 0
    tokens = jnp.sum(keep, axis=1, keepdims=True, dtype=jnp.int32)
    rows = jnp.sum(tokens > 0, dtype=jnp.int32)
    if kind == "token-mean":
        return divide(keep.astype(float), jnp.sum(tokens))
    if kind == "sequence-mean":
        return divide(keep.astype(float), jnp.broadcast_to(tokens * rows, keep.shape))
    if kind == "fixed-length":
        if length is None:
            raise ValueError('kind="fixed-length" of loss weights needs length, the number of tokens to divide by')
        return divide(keep.astype(float), rows * length)
    raise ValueError(f"kind={kind!r} of loss weights is not one of {', '.join(map(repr, AGGREGATIONS))}")


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    clip_range: float,
    denominator=None,
    weights=None,
    *,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    token_weights=None,
) -> tuple[Array, dict[str, Array]]:
    """PPO's clipped surrogate `mean(w·max(-A·r, -A·clip(r, 1 - ε, 1 + ε_high)))`, r = exp(logp - old), and statistics.

    All arrays are [B, T]; `weights` w are 1 unless given (`truncated_importance_weights`); `clip_range_high` ε_high
    (default ε) bounds the ratio above; with `dual_clip` c > 1 no token of negative advantage adds more than `-A·c`
    (Ye et al. 2020, equation 5). `denominator` is the number of response tokens of the global (mini)batch; with
    `token_weights` (`loss_weights`) the loss is the sum under those instead. Statistics, each a masked sum over that
    same denominator, so that those of micro-batches add up: `ratio_shift` (mean of r - 1: shares of a mean of 1 would
    not add up to exactly 1), `ratio_spread` (mean of (r - 1)², see `ratio_variance`), `clipfrac` (share of tokens where
    the clipped term is the larger) and `approx_kl` (mean of (logp - old)²/2).
    Source: Schulman et al. 2017, equation 7.
    """
    keep = jnp.asarray(mask) != 0
    log_ratio = keep_where(logprobs, keep) - keep_where(old_logprobs, keep)
    ratio = jnp.exp(log_ratio)
    advantages = keep_where(advantages, keep)
    plain = -advantages * ratio
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = -advantages * jnp.clip(ratio, 1 - clip_range, 1 + high)

    def mean(x):
        return masked_mean(x, keep, denominator)

    stats = {
        "ratio_shift": mean(ratio - 1),
        "ratio_spread": mean(jnp.square(ratio - 1)),
        "clipfrac": mean(clipped > plain),
        "approx_kl": mean(0.5 * jnp.square(log_ratio)),
    }
    loss = jnp.maximum(plain, clipped)
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)
    if weights is not None:
        loss = loss * keep_where(weights, keep)
    return (mean(loss) if token_weights is None else masked_sum(loss * keep_where(token_weights, keep), keep)), stats


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
