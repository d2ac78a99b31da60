"""The clipped losses of policy and critic, and their statistics."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf.objectives.masked import divide, keep_where, masked_mean, masked_sum

AGGREGATIONS = ("token-mean", "sequence-mean", "fixed-length")


def truncated_importance_weights(
    logprobs: ArrayLike, sampler_logprobs: ArrayLike, mask: ArrayLike, cap: float
) -> Array:
    """Computes `min(exp(logp - sampler), cap)` per response token, 1 elsewhere; float32 `[B, T]`.

    The train program computes other probabilities than the generate program that sampled (other kernels, another
    precision); these weights correct for the ratio. Source: Ionides 2008, Truncated Importance Sampling; Yao et al.
    2025 for this use.

    Args:
        logprobs: Of the train program, `[B, T]`.
        sampler_logprobs: Of the generate program, `[B, T]`.
        mask: Response tokens, `[B, T]`.
        cap: Largest weight.
    """
    keep = jnp.asarray(mask) != 0
    return jnp.minimum(
        jnp.exp(keep_where(logprobs, keep) - keep_where(sampler_logprobs, keep)), jnp.where(keep, cap, 1.0)
    )


def loss_weights(mask: ArrayLike, kind: str, length: int | None = None) -> Array:
    """Computes weights under which a sum over tokens is the aggregated loss of the batch.

    Args:
        mask: Response tokens of the whole (mini)batch, `[B, T]`; the weights of its parts then add up.
        kind: "token-mean": every token counts alike. "sequence-mean": every row with a token counts alike, and so do
            the tokens within a row. "fixed-length": tokens are summed per row and divided by the same `length`, then
            rows are averaged (Dr. GRPO, Liu et al. 2025).
        length: Tokens to divide by with "fixed-length".

    Returns:
        `[B, T]`, 0 where `mask` is not set.

    Raises:
        ValueError: Another `kind`, or "fixed-length" without `length`.
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
    logprobs: ArrayLike,
    old_logprobs: ArrayLike,
    advantages: ArrayLike,
    mask: ArrayLike,
    clip_range: float,
    denominator: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    token_weights: ArrayLike | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Computes PPO's clipped surrogate `mean(w·max(-A·r, -A·clip(r, 1 - ε, 1 + ε_high)))`, with r = exp(logp - old).

    Source: Schulman et al. 2017, equation 7.

    Args:
        logprobs: `[B, T]`.
        old_logprobs: `[B, T]`.
        advantages: A, `[B, T]`.
        mask: Response tokens, `[B, T]`.
        clip_range: ε.
        denominator: Response tokens of the global (mini)batch; None: those of `mask`.
        weights: w, `[B, T]` (`truncated_importance_weights`); None: 1.
        clip_range_high: ε_high, which bounds the ratio above; None: ε.
        dual_clip: c > 1: no token of negative advantage adds more than `-A·c` (Ye et al. 2020, equation 5).
        token_weights: `[B, T]` (`loss_weights`): the loss is the sum under these weights instead of a mean.

    Returns:
        The loss, and statistics. Each is a masked sum over the denominator, so those of micro-batches add up:
        `ratio_shift` (mean of r - 1: shares of a mean of 1 would not add up to exactly 1), `ratio_spread` (mean of
        (r - 1)², see `ratio_variance`), `clipfrac` (share of tokens where the clipped term is the larger one) and
        `approx_kl` (mean of (logp - old)²/2).
    """
    keep = jnp.asarray(mask) != 0
    log_ratio = keep_where(logprobs, keep) - keep_where(old_logprobs, keep)
    ratio = jnp.exp(log_ratio)
    advantages = keep_where(advantages, keep)
    plain = -advantages * ratio
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = -advantages * jnp.clip(ratio, 1 - clip_range, 1 + high)

    def mean(x: Array) -> Array:
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
    """Computes the ratio's variance over tokens from `policy_loss` statistics summed over all micro-batches."""
    return jnp.maximum(stats["ratio_spread"] - jnp.square(stats["ratio_shift"]), 0)


def value_loss(
    values: ArrayLike,
    old_values: ArrayLike,
    returns: ArrayLike,
    mask: ArrayLike,
    clip_range: float,
    denominator: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Computes the clipped value loss `0.5 · mean(max((v - R)², (clip(v, old ± ε) - R)²))`.

    Args:
        values: v, `[B, T]`.
        old_values: `[B, T]`.
        returns: R, `[B, T]`.
        mask: Response tokens, `[B, T]`.
        clip_range: ε.
        denominator: Response tokens of the global (mini)batch; None: those of `mask`.

    Returns:
        The loss, and the share of tokens where the clipped term is the larger one.
    """
    keep = jnp.asarray(mask) != 0
    values, old_values, returns = keep_where(values, keep), keep_where(old_values, keep), keep_where(returns, keep)
    plain = jnp.square(values - returns)
    clipped = jnp.square(jnp.clip(values, old_values - clip_range, old_values + clip_range) - returns)
    loss = 0.5 * masked_mean(jnp.maximum(plain, clipped), keep, denominator)
    return loss, masked_mean(clipped > plain, keep, denominator)
