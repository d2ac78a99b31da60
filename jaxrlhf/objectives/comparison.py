"""Comparing scores of samples: win rates, and what the best of several samples is worth."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.objectives.masked import masked_mean


def win_rate(scores: jax.Array, baseline_scores: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The share of prompts `[B]` on which `scores` beat `baseline_scores` (of the same prompts); a tie counts half.

    A prompt where either score is NaN has no winner and is left out, as those are that `mask` excludes. NaN where no
    prompt is left.
    """
    scores, baseline_scores = jnp.asarray(scores), jnp.asarray(baseline_scores)
    counted = ~(jnp.isnan(scores) | jnp.isnan(baseline_scores))
    counted = counted if mask is None else counted & (jnp.asarray(mask) != 0)
    wins = jnp.where(scores > baseline_scores, 1.0, jnp.where(scores == baseline_scores, 0.5, 0.0))
    return jnp.where(jnp.any(counted), masked_mean(wins, counted), jnp.nan)


def expected_best(scores: jax.Array) -> jax.Array:
    """`[n]`: the expected highest score of k = 1 … n samples drawn without replacement from each row of `[P, n]`.

    The mean over rows of Σ_i s_(i) C(i-1, k-1) / C(n, k), s_(i) being the i-th smallest: an unbiased estimate of the
    expected best of k independent samples (the estimator of pass@k in Chen et al. 2021, arXiv 2107.03374, for any
    score).
    """
    n = jnp.shape(scores)[-1]
    weights = [[math.comb(i, k - 1) / math.comb(n, k) for i in range(n)] for k in range(1, n + 1)]
    ordered = jnp.sort(jnp.asarray(scores), axis=-1)
    return jnp.mean(ordered @ jnp.asarray(np.array(weights).T, ordered.dtype), axis=0)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n-1)/n nats: at most so far is the best of n from the model that was sampled, in KL per response.

    Equal for continuous scores over infinitely many responses (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n
