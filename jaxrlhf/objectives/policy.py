"""The clipped losses of policy and critic, and their statistics."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf.objectives.masked import divide, keep_where, masked_mean, masked_sum

AGGREGATIONS = ("token-mean", "sequence-mean", "fixed-length")
IMPORTANCE_WEIGHTS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
POLICY_LOSSES = ("clip", "cispo")


def importance_weights(
    logprobs: ArrayLike,
    sampler_logprobs: ArrayLike,
    mask: ArrayLike,
    kind: str = "token_truncate",
    low: ArrayLike = 0.0,
    high: ArrayLike = 2.0,
) -> Array:
    """Computes weights of the response tokens for the ratio of two programs, `exp(logp - sampler)`; float32 `[B, T]`.

    The train program computes other probabilities than the generate program that sampled (other kernels, another
    precision). Source: Ionides 2008, Truncated Importance Sampling; Yao et al. 2025 for this use.

    Args:
        logprobs: Of the train program, `[B, T]`.
        sampler_logprobs: Of the generate program, `[B, T]`.
        mask: Response tokens, `[B, T]`.
        kind: One of IMPORTANCE_WEIGHTS. "token": the ratio of the token; "sequence": of the whole response, on each of
            its tokens. "truncate" bounds the ratio to `[low, high]`. "mask" makes it 0 outside (IcePop, Ling team
            2025, with tokens).
        low: Lower bound.
        high: Upper bound.

    Returns:
        The weights, 1 where `mask` is not set.

    Raises:
        ValueError: Another `kind`.
    """
    if kind not in IMPORTANCE_WEIGHTS:
        raise ValueError(f"kind={kind!r} of importance weights is not one of {', '.join(IMPORTANCE_WEIGHTS)}")
    keep = jnp.asarray(mask) != 0
    difference = keep_where(logprobs, keep) - keep_where(sampler_logprobs, keep)
    if kind.startswith("sequence"):
        difference = jnp.broadcast_to(jnp.sum(difference, axis=1, keepdims=True), keep.shape)
    ratio = jnp.exp(difference)
    if kind.endswith("truncate"):
        weights = jnp.clip(ratio, low, high)
    else:
        weights = jnp.where((ratio >= low) & (ratio <= high), ratio, 0)
    return jnp.where(keep, weights, 1)


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
    kind: str = "clip",
    sequence_ratio: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Computes PPO's clipped surrogate `mean(w·max(-A·r, -A·clip(r, 1 - ε, 1 + ε_high)))`, with r = exp(logp - old).

    Source: Schulman et al. 2017, equation 7. With `kind="cispo"` it is `mean(-w·min(r, 1 + ε_high)·A·logp)`, where the
    bounded ratio is a constant, so that no token loses its gradient (MiniMax 2025, arXiv 2506.13585, equation 4,
    without a lower bound as in its experiments).

    Args:
        logprobs: `[B, T]`.
        old_logprobs: `[B, T]`.
        advantages: A, `[B, T]`.
        mask: Response tokens, `[B, T]`.
        clip_range: ε.
        denominator: Response tokens of the global (mini)batch; None: those of `mask`.
        weights: w, `[B, T]` (`importance_weights`); None: 1.
        clip_range_high: ε_high, which bounds the ratio above; None: ε.
        dual_clip: c > 1: no token of negative advantage adds more than `-A·c` (Ye et al. 2020, equation 5).
        token_weights: `[B, T]` (`loss_weights`): the loss is the sum under these weights instead of a mean.
        kind: "clip" or "cispo".
        sequence_ratio: r is one ratio per response, the geometric mean of its tokens' (GSPO, Zheng et al. 2025, arXiv
            2507.18071, equations 5 to 7).

    Returns:
        The loss, and statistics. Each is a masked sum over the denominator, so those of micro-batches add up:
        `ratio_shift` (mean of r - 1: shares of a mean of 1 would not add up to exactly 1), `ratio_spread` (mean of
        (r - 1)², see `ratio_variance`), `clipfrac` (share of tokens where the clipped term is the larger one; cispo:
        where the ratio is bounded) and `approx_kl` (mean of (logp - old)²/2 of the tokens).

    Raises:
        ValueError: Another `kind`, or "cispo" with `dual_clip`.
    """
    if kind not in POLICY_LOSSES or (kind == "cispo" and dual_clip is not None):
        raise ValueError(f"kind={kind!r}, dual_clip={dual_clip}: must be 'clip', or 'cispo' without dual_clip")
    keep = jnp.asarray(mask) != 0
    logprobs, advantages = keep_where(logprobs, keep), keep_where(advantages, keep)
    log_ratio = logprobs - keep_where(old_logprobs, keep)
    ratio = jnp.exp(_of_the_sequence(log_ratio, keep) if sequence_ratio else log_ratio)
    high = clip_range if clip_range_high is None else clip_range_high
    if kind == "cispo":
        loss, bounded = -jax.lax.stop_gradient(jnp.minimum(ratio, 1 + high)) * advantages * logprobs, ratio > 1 + high
    else:
        plain, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip_range, 1 + high)
        loss, bounded = jnp.maximum(plain, clipped), clipped > plain
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)
    if weights is not None:
        loss = loss * keep_where(weights, keep)
    terms = {
        "ratio_shift": ratio - 1,
        "ratio_spread": jnp.square(ratio - 1),
        "clipfrac": bounded,
        "approx_kl": 0.5 * jnp.square(log_ratio),
    }
    mean = partial(masked_mean, mask=keep, denominator=denominator)
    total = mean(loss) if token_weights is None else masked_sum(loss * keep_where(token_weights, keep), keep)
    return total, {name: mean(term) for name, term in terms.items()}


def _of_the_sequence(log_ratio: Array, keep: Array) -> Array:
    """The mean of each row's tokens, at each of them; `[B, T]`."""
    tokens = jnp.sum(keep, axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.where(keep, divide(jnp.sum(log_ratio, axis=1, keepdims=True), tokens), 0)


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
