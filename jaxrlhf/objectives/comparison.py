"""Comparisons of the scores of samples: win rates, and the gain and cost of the best of several samples."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.objectives.masked import masked_mean


def win_rate(scores: jax.Array, baseline_scores: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Computes the share of prompts on which `scores` beat `baseline_scores`; a tie counts half.

    Args:
        scores: `[B]`, one per prompt.
        baseline_scores: `[B]`, of the same prompts.
        mask: `[B]`: prompts that are not set are left out; so are those where either score is NaN.

    Returns:
        A scalar; NaN if no prompt is left.
    """
    scores, baseline_scores = jnp.asarray(scores), jnp.asarray(baseline_scores)
    counted = ~(jnp.isnan(scores) | jnp.isnan(baseline_scores))
    counted = counted if mask is None else counted & (jnp.asarray(mask) != 0)
    wins = jnp.where(scores > baseline_scores, 1.0, jnp.where(scores == baseline_scores, 0.5, 0.0))
    return jnp.where(jnp.any(counted), masked_mean(wins, counted), jnp.nan)


def expected_best(scores: jax.Array) -> jax.Array:
    """Estimates the highest score of k = 1 … n samples, `[n]`, from the scores of n samples per prompt, `[P, n]`.

    This is the mean over rows of Σ_i s_(i) C(i-1, k-1) / C(n, k), where s_(i) is the i-th smallest: the expected best
    of k scores taken without replacement, an unbiased estimate of the expected best of k independent samples. Source:
    the estimator of pass@k in Chen et al. 2021 (arXiv 2107.03374), for any score.
    """
    n = jnp.shape(scores)[-1]
    weights = [[math.comb(i, k - 1) / math.comb(n, k) for i in range(n)] for k in range(1, n + 1)]
    ordered = jnp.sort(jnp.asarray(scores), axis=-1)
    return jnp.mean(ordered @ jnp.asarray(np.array(weights).T, ordered.dtype), axis=0)


def best_of_n_kl_bound(n: int) -> float:
    """Computes log n - (n-1)/n nats, an upper bound on the KL per response between best of n and the sampled model.

    It is exact for continuous scores over infinitely many responses (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n
