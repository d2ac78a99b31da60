"""From rewards to advantages and returns."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.objectives.masked import divide, keep_where, real


def gae(rewards, values, response_mask, gamma: float, lam: float) -> tuple[Array, Array]:
    """Generalised advantage estimates over the responses, and the returns `advantages + values`; both [B, T].

    All inputs are [B, T]; each row's response is one contiguous span, at any column. Nothing is bootstrapped after its
    end, and both results are zero outside it. Advantages are not whitened. Source: Schulman et al. 2016, equation 16.
    """
    keep = jnp.asarray(response_mask) != 0
    rewards, values = keep_where(rewards, keep), keep_where(values, keep)

    def step(following, now):
        following_advantage, following_value = following
        reward, value, inside = now
        advantage = reward + gamma * following_value - value + gamma * lam * following_advantage
        advantage = jnp.where(inside, advantage, 0)
        return (advantage, value), advantage

    dtype = jnp.promote_types(rewards.dtype, values.dtype)
    columns = (rewards.T.astype(dtype), values.T.astype(dtype), keep.T)
    after_the_end = jnp.zeros(keep.shape[:1], dtype)
    _, advantages = jax.lax.scan(step, (after_the_end, after_the_end), columns, reverse=True)
    return advantages.T, advantages.T + values


def _groups(x, group_size: int) -> Array:
    x = jnp.asarray(x)
    if x.shape[0] % group_size:
        raise ValueError(f"group_size={group_size} does not divide {x.shape[0]} rows")
    return x.reshape(-1, group_size)


def group_advantages(scores, group_size: int, scale_by_std: bool = True, row_mask=None, epsilon: float = 1e-6) -> Array:
    """GRPO: each score less the mean of its group, over the group's standard deviation; `[B]`, 0 for masked rows.

    The `group_size` responses to one prompt lie beside each other. The deviation is the unbiased one, as in verl and
    TRL, with `epsilon` added to it; without `scale_by_std` the difference stays as it is (Dr. GRPO, Liu et al. 2025).
    Rows where `row_mask` is not set do not count in their group, and a row alone in its group gets 0.
    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1.
    """
    keep = jnp.ones(jnp.shape(scores), bool) if row_mask is None else jnp.asarray(row_mask) != 0
    kept = _groups(keep, group_size)
    grouped = _groups(keep_where(scores, keep), group_size)
    count = jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32)
    # Of scores less the first one that counts, so that equal ones differ from their mean by nothing, not by rounding.
    first = jnp.take_along_axis(grouped, jnp.argmax(kept, axis=1)[:, None], axis=1)
    grouped = jnp.where(kept, grouped - first, 0)
    deviation = jnp.where(kept, grouped - divide(jnp.sum(grouped, axis=1, keepdims=True), count), 0)
    if scale_by_std:
        variance = divide(jnp.sum(jnp.square(deviation), axis=1, keepdims=True), jnp.maximum(count - 1, 1))
        deviation = deviation / (jnp.sqrt(variance) + epsilon)
    return deviation.reshape(-1)


def rloo_advantages(scores, group_size: int, row_mask=None) -> Array:
    """RLOO: each score less the mean of the other scores of its group; `[B]`, 0 for masked rows and for a row alone.

    Rows lie and count as in `group_advantages`. Source: Ahmadian et al. 2024 (arXiv 2402.14740), equation 8.
    """
    keep = jnp.ones(jnp.shape(scores), bool) if row_mask is None else jnp.asarray(row_mask) != 0
    kept = _groups(keep, group_size)
    grouped = _groups(keep_where(scores, keep), group_size)
    others = jnp.sum(kept, axis=1, keepdims=True, dtype=jnp.int32) - 1
    baseline = divide(jnp.sum(grouped, axis=1, keepdims=True) - grouped, jnp.broadcast_to(others, grouped.shape))
    return jnp.where(kept & (others > 0), grouped - baseline, 0).reshape(-1)


def reward_to_go(rewards, response_mask, gamma: float) -> Array:
    """The discounted sum of the rewards from each response token on; `[B, T]`, 0 outside the response.

    REINFORCE++ (Hu 2025, arXiv 2501.03262) whitens it over the batch. Each row's response is one contiguous span.
    """
    return gae(rewards, jnp.zeros_like(real(rewards)), response_mask, gamma, 1.0)[0]
