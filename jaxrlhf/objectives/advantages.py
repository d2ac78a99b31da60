"""From rewards to advantages and returns."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.objectives.masked import keep_where


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
