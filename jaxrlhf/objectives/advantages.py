"""From rewards to advantages and returns."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf.objectives.masked import divide, keep_where, real


def gae(
    rewards: ArrayLike, values: ArrayLike, response_mask: ArrayLike, gamma: float, lam: float
) -> tuple[Array, Array]:
    """Computes generalised advantage estimates over the responses, and the returns `advantages + values`.

    Nothing is bootstrapped after the end of a response. Columns between the tokens of a response (those of an
    environment) are no steps: a token is followed by the response's next one. Advantages are not whitened. Source:
    Schulman et al. 2016, equation 16.

    Args:
        rewards: `[B, T]`.
        values: `[B, T]`.
        response_mask: `[B, T]`: the response's tokens, at any columns.
        gamma: Discount.
        lam: λ.

    Returns:
        Advantages and returns, `[B, T]` each, 0 outside the response.
    """
    keep = jnp.asarray(response_mask) != 0
    rewards, values = keep_where(rewards, keep), keep_where(values, keep)

    # A_t = d_t + c_t A_{t+1}, with d_t = 0 and c_t = 1 outside of the response: maps that compose in any order, so that
    # a scan of log T steps takes the place of one of T.
    columns = jnp.arange(keep.shape[1])
    first = jax.lax.cummin(jnp.where(keep, columns, keep.shape[1]), axis=1, reverse=True)
    following = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=keep.shape[1])
    following = jnp.take_along_axis(jnp.pad(values, ((0, 0), (0, 1))), following, axis=1)
    deltas = keep_where(rewards + gamma * following - values, keep)
    factors = jnp.where(keep, gamma * lam, 1).astype(deltas.dtype)

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    _, advantages = jax.lax.associative_scan(compose, (factors, deltas), reverse=True, axis=1)
    advantages = jnp.where(keep, advantages, 0)
    return advantages, advantages + values


def _groups(x: ArrayLike, group_size: int) -> Array:
    """`[B]` as `[B / group_size, group_size]`."""
    x = jnp.asarray(x)
    if x.shape[0] % group_size:
        raise ValueError(f"group_size={group_size} does not divide {x.shape[0]} rows")
    return x.reshape(-1, group_size)


def group_advantages(
    scores: ArrayLike,
    group_size: int,
    scale_by_std: bool = True,
    row_mask: ArrayLike | None = None,
    epsilon: float = 1e-6,
) -> Array:
    """GRPO: computes each score less the mean of its group, over the group's standard deviation.

    The deviation is the unbiased one, as in verl and TRL. Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1.

    Args:
        scores: `[B]`, the scores of the responses to one prompt side by side.
        group_size: Responses per prompt.
        scale_by_std: False leaves the difference as it is (Dr. GRPO, Liu et al. 2025).
        row_mask: `[B]`: rows that are not set do not count in their group; None: all are set.
        epsilon: Added to the deviation.

    Returns:
        `[B]`, 0 for masked rows and for a row alone in its group.
    """
    keep = jnp.ones(jnp.shape(scores), bool) if row_mask is None else jnp.asarray(row_mask) != 0
    kept = _groups(keep, group_size)
    grouped = _groups(keep_where(scores, keep), group_size)
    count = jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)
    # Subtracting the first score that counts makes the difference of equal scores exactly 0, without rounding.
    first = jnp.take_along_axis(grouped, jnp.argmax(kept, axis=1)[:, None], axis=1)
    grouped = jnp.where(kept, grouped - first, 0)
    deviation = jnp.where(kept, grouped - divide(jnp.sum(grouped, axis=1, keepdims=True), count), 0)
    if scale_by_std:
        variance = divide(jnp.sum(jnp.square(deviation), axis=1, keepdims=True), jnp.maximum(count - 1, 1))
        deviation = deviation / (jnp.sqrt(variance) + epsilon)
    return deviation.reshape(-1)


def rloo_advantages(scores: ArrayLike, group_size: int, row_mask: ArrayLike | None = None) -> Array:
    """RLOO: computes each score less the mean of the other scores of its group.

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), equation 8.

    Args:
        scores: `[B]`, the scores of the responses to one prompt side by side.
        group_size: Responses per prompt.
        row_mask: `[B]`: rows that are not set do not count in their group; None: all are set.

    Returns:
        `[B]`, 0 for masked rows and for a row alone in its group.
    """
    keep = jnp.ones(jnp.shape(scores), bool) if row_mask is None else jnp.asarray(row_mask) != 0
    kept = _groups(keep, group_size)
    grouped = _groups(keep_where(scores, keep), group_size)
    others = jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32) - 1
    baseline = divide(jnp.sum(grouped, axis=1, keepdims=True) - grouped, jnp.broadcast_to(others, grouped.shape))
    return jnp.where(kept & (others > 0), grouped - baseline, 0).reshape(-1)


def pair_advantages(
    scores: ArrayLike, log_ratios: ArrayLike, group_size: int, beta: float, row_mask: ArrayLike | None = None
) -> Array:
    """Online DPO: computes how much DPO's loss would raise the best and lower the worst response of each group.

    With d = log-ratio of the best - log-ratio of the worst, the gradient of `-log σ(β·d)` is `-β·σ(-β·d)` times the
    difference of the gradients of both log-probs. So `β·σ(-β·d)` is the advantage of the best, and its negative that of
    the worst; other responses have 0, and so has a group of equal scores. Source: Guo et al. 2024 (arXiv 2402.04792),
    algorithm 1, with the loss of Rafailov et al. 2023 (arXiv 2305.18290), equation 7.

    Args:
        scores: `[B]`, the scores of the responses to one prompt side by side.
        log_ratios: `[B]`: log π(response | prompt) - log π_ref(response | prompt).
        group_size: Responses per prompt.
        beta: β.
        row_mask: `[B]`: rows that are not set are no part of a pair; None: all are set.

    Returns:
        `[B]`.
    """
    keep = jnp.ones(jnp.shape(scores), bool) if row_mask is None else jnp.asarray(row_mask) != 0
    kept = _groups(keep, group_size)
    grouped, ratios = _groups(keep_where(scores, keep), group_size), _groups(keep_where(log_ratios, keep), group_size)
    high, low = jnp.where(kept, grouped, -jnp.inf), jnp.where(kept, grouped, jnp.inf)
    best, worst = (jax.nn.one_hot(place, group_size) for place in (jnp.argmax(high, axis=1), jnp.argmin(low, axis=1)))
    differ = jnp.max(high, axis=1) > jnp.min(low, axis=1)
    weight = jnp.where(differ, beta * jax.nn.sigmoid(-beta * jnp.sum((best - worst) * ratios, axis=1)), 0)
    return (weight[:, None] * (best - worst)).reshape(-1)


def reward_to_go(rewards: ArrayLike, response_mask: ArrayLike, gamma: float) -> Array:
    """Computes the discounted sum of the rewards from each response token on, `[B, T]`, 0 outside the response.

    REINFORCE++ (Hu 2025, arXiv 2501.03262) whitens it over the batch.

    Args:
        rewards: `[B, T]`.
        response_mask: `[B, T]`: the response's tokens, at any columns.
        gamma: Discount.
    """
    return gae(rewards, jnp.zeros_like(real(rewards)), response_mask, gamma, 1.0)[0]
