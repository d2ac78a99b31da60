"""Divergences of a student's next-token distributions from a teacher's."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

SMALLEST = 1e-6  # probability of all tokens beyond the given ones, at least: float32 sums are no closer to 1


def divergence(teacher: ArrayLike, student: ArrayLike, beta: float) -> Array:
    """Computes the generalised Jensen-Shannon divergence of two distributions, in nats.

    With teacher p, student q and their mixture m = β·p + (1 - β)·q, it is `β·KL(p‖m) + (1 - β)·KL(q‖m)`. β = 0 stands
    for the forward `KL(p‖q)` and β = 1 for the reverse `KL(q‖p)`, as in TRL. Source: Agarwal et al. 2024 (GKD, arXiv
    2306.13649), equation 1. Both distributions are given for the same K outcomes; the rest of the vocabulary counts as
    one more. So the result is that of the whole vocabulary or below it, and equal where K is all of it.

    Args:
        teacher: Log-probs `[…, K]`.
        student: Log-probs `[…, K]` of the same tokens.
        beta: β, from 0 to 1.

    Returns:
        `[…]`.
    """
    p, q = _completed(teacher), _completed(student)
    if beta == 0:
        return _kl(p, q)
    if beta == 1:
        return _kl(q, p)
    mixture = jnp.logaddexp(p + jnp.log(beta), q + jnp.log(1 - beta))
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _completed(logprobs: ArrayLike) -> Array:
    """The log-probs with that of all other outcomes behind them."""
    logprobs = jnp.asarray(logprobs)
    rest = 1 - jnp.sum(jnp.exp(logprobs), axis=-1, keepdims=True)
    return jnp.concatenate([logprobs, jnp.log(jnp.maximum(rest, SMALLEST))], axis=-1)


def _kl(p: Array, q: Array) -> Array:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
