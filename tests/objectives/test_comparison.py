"""Win rates and the worth of the best of several samples, against counting and against every subset."""

import itertools
import math

import jax
import numpy as np
import pytest

from jaxrlhf import objectives


def test_a_win_rate_counts_ties_half_and_leaves_out_masked_rows_and_rows_without_a_score():
    scores, baseline = np.array([1.0, 2, 3, 4, np.nan, 9]), np.array([0.0, 2, 5, 1, 0, np.nan])
    assert float(objectives.win_rate(scores, baseline)) == (1 + 0.5 + 0 + 1) / 4
    assert float(objectives.win_rate(scores, baseline, [1, 1, 1, 0, 1, 1])) == 0.5
    assert float(objectives.win_rate(baseline, scores)) == 1 - 2.5 / 4
    assert math.isnan(objectives.win_rate([math.nan], [1.0])) and math.isnan(objectives.win_rate([1.0], [0.0], [0]))
    assert float(objectives.win_rate([math.inf, -math.inf], [1.0, 1.0])) == 0.5


def test_the_expected_best_is_the_mean_over_all_subsets():
    scores = np.random.default_rng(0).normal(size=(3, 6)).round(1)  # some ties
    expected = [
        np.mean([max(row[list(subset)]) for row in scores for subset in itertools.combinations(range(6), k)])
        for k in range(1, 7)
    ]
    with jax.enable_x64(True):
        np.testing.assert_allclose(objectives.expected_best(scores), expected, rtol=1e-12)
    np.testing.assert_allclose(objectives.expected_best(scores.astype("f4")), expected, rtol=1e-5, atol=1e-6)


def test_the_expected_best_estimates_the_best_of_k_independent_samples_without_bias():
    rng = np.random.default_rng(1)
    curve = np.asarray(objectives.expected_best(rng.uniform(size=(40_000, 5)).astype("f4")))
    np.testing.assert_allclose(curve, [k / (k + 1) for k in range(1, 6)], atol=4e-3)  # uniform: k / (k + 1)


def test_the_kl_bound_holds_for_the_best_of_n_of_a_small_distribution():
    assert objectives.best_of_n_kl_bound(1) == 0
    p = np.array([0.5, 0.3, 0.15, 0.05])  # by ascending score
    for n in (2, 4, 16):
        best = np.diff(np.concatenate([[0], np.cumsum(p) ** n]))
        assert np.sum(best * np.log(best / p)) <= objectives.best_of_n_kl_bound(n)
    fine = np.full(10_000, 1e-4)
    best = np.diff(np.concatenate([[0], np.cumsum(fine) ** 8]))
    assert np.sum(best * np.log(best / fine)) == pytest.approx(objectives.best_of_n_kl_bound(8), abs=1e-3)
