"""The losses of the routers of sparse models, from sums over the tokens of a batch."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf.objectives.masked import divide


def load_balancing_loss(counts: ArrayLike, probabilities: ArrayLike, tokens: ArrayLike) -> Array:
    """Computes E · Σ_e f_e · P_e, which is smallest where all experts get the same share of the tokens.

    f_e is the share of tokens that chose expert e (all shares add up to the experts per token), P_e the mean of the
    router's probability for e. Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6, in the form of
    `load_balancing_loss_func` in transformers.

    Args:
        counts: `[E]`, choices of each expert, summed over layers and tokens.
        probabilities: `[E]`, sums of the probabilities; only these have a gradient.
        tokens: Number of tokens, each counted once per layer.
    """
    counts, probabilities = jnp.asarray(counts), jnp.asarray(probabilities)
    return probabilities.shape[0] * jnp.sum(divide(counts, tokens) * divide(probabilities, tokens))


def router_z_loss(squared_log_z: ArrayLike, tokens: ArrayLike) -> Array:
    """Computes the mean square of the logarithm of the softmax's denominator, which keeps router logits small.

    Source: Zoph et al. 2022 (arXiv 2202.08906), equation 5.

    Args:
        squared_log_z: Sum of the squares over layers and tokens.
        tokens: Number of tokens, each counted once per layer.
    """
    return divide(jnp.asarray(squared_log_z), tokens)
