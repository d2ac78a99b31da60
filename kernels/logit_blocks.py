"""The arithmetic of one block of logits: the update of a token's statistics, and the gradient of the logits.

A token's statistics, each `[t, 1]` float32, are its largest logit so far, Σ e^(z - largest), the same sum weighted by
z - largest, and its label's logit. Kernels and plain XLA share these functions.
"""

import jax
import jax.numpy as jnp

from jaxrlhf.kernels.attention import NEGATIVE, soft_capped

Statistics = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def empty_statistics(tokens: int) -> Statistics:
    zeros = jnp.zeros((tokens, 1), jnp.float32)
    return zeros + NEGATIVE, zeros, zeros, zeros


def scaled(
    products: jax.Array,
    bias: jax.Array | None,
    columns: jax.Array,
    temperature: float,
    softcap: float | None = None,
) -> jax.Array:
    """Logits `[t, v]` over temperature of products with the head; `columns` `[1, v]` are its vocabulary entries, dead
    where negative: NEGATIVE there, whatever the head holds. `softcap` turns logits z into softcap · tanh(z / softcap)
    before the temperature."""
    logits = soft_capped(products if bias is None else products + bias, softcap)
    return jnp.where(columns >= 0, logits / temperature, NEGATIVE)


def merge(statistics: Statistics, logits: jax.Array, columns: jax.Array, labels: jax.Array) -> Statistics:
    """Statistics after one more block of `scaled` logits; `labels` `[t, 1]`."""
    top, total, spread, picked = statistics
    new_top = jnp.maximum(top, logits.max(1, keepdims=True))
    shifted = logits - new_top
    weights = jnp.exp(shifted)
    shrink = jnp.exp(top - new_top)
    spread = (spread + (top - new_top) * total) * shrink + (weights * shifted).sum(1, keepdims=True)
    picked += jnp.where(columns == labels, logits, 0.0).sum(1, keepdims=True)
    return new_top, total * shrink + weights.sum(1, keepdims=True), spread, picked


def rescaled(statistics: Statistics, top: jax.Array) -> Statistics:
    """The statistics with respect to another largest logit, so that all but the first can be added up."""
    old, total, spread, picked = statistics
    shrink = jnp.exp(old - top)
    return top, total * shrink, (spread + (old - top) * total) * shrink, picked


def logit_gradient(
    logits: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    per_token: tuple[jax.Array, ...],
    temperature: float,
    softcap: float | None = None,
) -> jax.Array:
    """Gradient `[t, v]` of the products behind `scaled` logits.

    `per_token`, each `[t, 1]`: largest logit, logarithm of the sum relative to it, entropy, and the gradients of
    log-prob and entropy.
    """
    top, log_total, entropy, d_logprob, d_entropy = per_token
    logprobs = (logits - top) - log_total
    gradient = -(d_logprob + d_entropy * (logprobs + entropy)) * jnp.exp(logprobs)
    gradient = (gradient + jnp.where(columns == labels, d_logprob, 0.0)) / temperature
    if softcap is not None:
        # The derivative of the cap from its value; the bound keeps dead columns finite.
        gradient *= 1 - jnp.square(jnp.maximum(logits * (temperature / softcap), -1.0))
    return gradient
