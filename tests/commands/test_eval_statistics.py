"""Standard errors, pass@k, win rates and calibration against plain float64 computations and simulation."""

import itertools
import math

import numpy as np
import pytest

from jaxrlhf import objectives
from jaxrlhf.commands.evaluation.statistics import (
    Estimate,
    bootstrap_error,
    calibration,
    calibration_error,
    mean_and_error,
    mean_of_estimates,
    pass_at_k,
    plain,
    sigmoid,
    wins,
)

RNG = np.random.default_rng(0)


def test_the_error_of_independent_values_is_the_standard_error_of_the_mean():
    values = RNG.normal(size=57)
    found = mean_and_error(values)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(57), rel=1e-12)
    assert mean_and_error(np.append(values, np.nan)) == found


def test_the_error_of_a_share_is_that_of_bernoulli_trials():
    right = np.array([True] * 30 + [False] * 10)
    assert mean_and_error(right).error == pytest.approx(math.sqrt(0.75 * 0.25 / 39), rel=1e-12)


def test_values_of_equal_groups_count_as_one_piece_of_evidence():
    values = RNG.normal(size=20)
    found = mean_and_error(np.repeat(values, 3), np.repeat(np.arange(20), 3))
    assert found.error == pytest.approx(mean_and_error(values).error, rel=1e-12)
    grouped = mean_and_error(np.array([1.0, 0, 1, 1, 0]), np.array([4, 4, 9, 9, 9]))
    sums = [1 + 0 - 2 * 0.6, 1 + 1 + 0 - 3 * 0.6]
    assert grouped.error == pytest.approx(math.sqrt(2 * (sums[0] ** 2 + sums[1] ** 2)) / 5, rel=1e-12)


def test_too_few_values_have_no_error():
    assert mean_and_error(np.array([])) == Estimate(None, None, 0) and str(mean_and_error(np.array([]))) == "–"
    assert mean_and_error(np.array([2.0])) == Estimate(2.0, None, 1)
    assert mean_and_error(np.array([2.0, 4.0]), np.array([1, 1])) == Estimate(3.0, None, 2)


def test_the_mean_of_subsets_weighs_each_subset_alike():
    found = mean_of_estimates([Estimate(0.5, 0.1, 100), Estimate(1.0, 0.2, 3), Estimate(None, None, 0)])
    assert found == Estimate(0.75, pytest.approx(math.sqrt(0.05) / 2), 2)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_of_k_samples_that_hold_a_correct_one(n):
    passed = np.array([[i < c for i in range(n)] for c in range(n + 1)])
    for k in range(1, n + 1):
        expected = [np.mean([any(row[list(s)]) for s in itertools.combinations(range(n), k)]) for row in passed]
        np.testing.assert_allclose(pass_at_k(passed, k), expected, rtol=1e-12, atol=1e-15)
    best = np.asarray(objectives.expected_best(passed.astype(np.float32)))
    np.testing.assert_allclose([pass_at_k(passed, k).mean() for k in range(1, n + 1)], best, rtol=1e-5)


def test_pass_at_k_of_many_samples_is_exact_and_unbiased():
    passed = np.arange(200)[None] < 13
    exact = 1 - math.comb(187, 100) / math.comb(200, 100)
    assert pass_at_k(passed, 100)[0] == pytest.approx(exact, rel=1e-12)
    draws = RNG.random((20000, 6)) < 0.3
    assert pass_at_k(draws, 4).mean() == pytest.approx(1 - 0.7**4, abs=0.006)
    with pytest.raises(ValueError, match="between 1 and the 6 samples"):
        pass_at_k(draws, 7)


def test_a_win_rate_counts_every_pair_of_samples_and_halves_ties():
    a, b = RNG.integers(0, 3, (7, 4)).astype(float), RNG.integers(0, 3, (7, 2)).astype(float)
    expected = [
        np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in row for y in other])
        for row, other in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(wins(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(wins(a, b) + wins(b, a), 1.0, rtol=1e-12)
    one = wins(a[:, :1], b[:, :1])
    assert one.mean() == pytest.approx(float(objectives.win_rate(a[:, 0], b[:, 0])), rel=1e-6)
    a[2, 1] = np.nan
    assert np.isnan(wins(a, b)).tolist() == [i == 2 for i in range(7)]


def test_calibration_against_bins_counted_one_by_one():
    margins = np.append(RNG.normal(0.4, 1.5, 400), [0.0, 800.0, -800.0])
    found = calibration(margins, np.arange(len(margins)))
    total, pairs = 0.0, 0
    for b in range(10):
        confidence, correct = [], []
        for margin in margins:
            p = 1 / (1 + math.exp(-abs(margin)))
            if 0.5 + b / 20 <= p < 0.5 + (b + 1) / 20 or (b == 9 and p == 1.0):
                confidence.append(p)
                correct.append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
        total += abs(sum(correct) - sum(confidence))
        pairs += len(correct)
    assert pairs == len(margins) == sum(b["pairs"] for b in found["bins"])
    assert found["ece"].value == pytest.approx(total / len(margins), rel=1e-9)
    assert found["brier"].value == pytest.approx(np.mean((1 - sigmoid(margins)) ** 2), rel=1e-12)
    assert found["log_loss"].value == pytest.approx(np.mean(np.logaddexp(0, -margins)), rel=1e-12)
    assert 0 < found["ece"].error < 0.1


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large_one():
    margins = RNG.normal(0, 2, 20000)
    signs = np.where(RNG.random(20000) < sigmoid(np.abs(margins)), 1, -1) * np.abs(margins)
    groups = np.arange(20000)
    assert calibration(signs, groups)["ece"].value < 0.015
    assert calibration(4 * signs, groups)["ece"].value > 0.1


def test_the_bootstrap_of_a_mean_is_near_its_standard_error():
    values = RNG.normal(size=400)
    error = bootstrap_error(lambda w: float((w * values).sum() / w.sum()), np.arange(400))
    assert error == pytest.approx(mean_and_error(values).error, rel=0.2)
    assert bootstrap_error(lambda w: 0.0, np.zeros(5)) is None
    assert calibration_error(np.array([0.9, 0.9]), np.array([1.0, 0.0]), np.array([9.0, 1.0])) == pytest.approx(0.0)


def test_estimates_become_json_without_nan():
    assert plain({1: Estimate(0.5, None, 2), "a": np.array([1.0, np.nan])}) == {
        "1": {"value": 0.5, "error": None, "count": 2},
        "a": [1.0, None],
    }
