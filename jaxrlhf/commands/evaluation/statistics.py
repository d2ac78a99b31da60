"""Estimates with standard errors: means over prompts, win rates, pass@k, and the calibration of a reward model.

Everything is float64 numpy. Values that belong to one prompt are not independent, so standard errors are clustered by
prompt (Miller 2024, arXiv 2411.00640, section 3.2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import numpy as np

BINS = 10
RESAMPLES = 200


class Estimate(NamedTuple):
    """A mean with its standard error; None where there are too few values."""

    value: float | None
    error: float | None
    count: int
    """Values that it is a mean of."""

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        return f"{self.value:.4g}" if self.error is None else f"{self.value:.4g} ± {self.error:.2g}"

    def as_dict(self) -> dict[str, float | None]:
        """The values for JSON."""
        return self._asdict()


def clusters(groups: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers the distinct groups from 0: int `[N]`, and how many there are."""
    names, members = np.unique(groups, return_inverse=True)
    return members, len(names)


def mean_and_error(values: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
    """Computes the mean and its standard error.

    Args:
        values: `[N]`; NaN entries do not count.
        groups: `[N]`: values of equal groups are not independent. None: all are, and the error is the sample standard
            deviation divided by √N.

    Returns:
        The mean, and √(G/(G-1) · Σ_g (Σ_{i in g} (x_i - mean))²) / N with G groups.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    counted = ~np.isnan(values)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups).reshape(-1)
    values, groups = values[counted], groups[counted]
    if not len(values):
        return Estimate(None, None, 0)
    mean = float(values.mean())
    members, count = clusters(groups)
    if count < 2:
        return Estimate(mean, None, len(values))
    sums = np.bincount(members, values - mean, count)
    error = np.sqrt(count / (count - 1) * np.square(sums).sum()) / len(values)
    return Estimate(mean, float(error), len(values))


def mean_of_estimates(estimates: list[Estimate]) -> Estimate:
    """The plain mean of independent estimates, such as those of the subsets of a benchmark."""
    known = [(e.value, e.error or 0.0) for e in estimates if e.value is not None]
    if not known:
        return Estimate(None, None, 0)
    error = float(np.sqrt(sum(e * e for _, e in known))) / len(known)
    return Estimate(float(np.mean([value for value, _ in known])), error, len(known))


def pass_at_k(passed: np.ndarray, k: int) -> np.ndarray:
    """Computes the unbiased estimate of pass@k of each prompt, float64 `[P]`.

    With c of n samples correct it is 1 - C(n - c, k) / C(n, k), here as a product of ratios. Source: Chen et al. 2021
    (arXiv 2107.03374), equation 1.

    Args:
        passed: bool `[P, n]`.
        k: 1 … n.
    """
    n = passed.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of pass@k must be between 1 and the {n} samples")
    wrong = n - np.asarray(passed, bool).sum(axis=1)
    ratios = (wrong[:, None] - np.arange(k)) / (n - np.arange(k))
    return 1.0 - np.prod(np.maximum(ratios, 0.0), axis=1)


def wins(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Computes the share of pairs of samples that `scores` win on each prompt, float64 `[P]`; a tie counts half.

    Every sample is compared with every sample of the other model.

    Args:
        scores: `[P, n]`.
        others: `[P, m]`, of the same prompts.

    Returns:
        NaN where a score is NaN.
    """
    a, b = np.asarray(scores, np.float64)[:, :, None], np.asarray(others, np.float64)[:, None, :]
    shares = ((a > b) + 0.5 * (a == b)).mean(axis=(1, 2))
    return np.where(np.isnan(a).any(axis=(1, 2)) | np.isnan(b).any(axis=(1, 2)), np.nan, shares)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


def bin_numbers(confidence: np.ndarray) -> np.ndarray:
    """The interval of [0.5, 1], of BINS equal ones, that each confidence lies in."""
    return np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Computes the expected calibration error: Σ_b (n_b / N) · |accuracy_b - confidence_b| over BINS bins of [0.5, 1].

    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3.

    Args:
        confidence: `[N]`, from 0.5 to 1.
        correct: `[N]`: 1 or 0; a half for a tie.
        weights: `[N]`: how often each value counts; None: once.
    """
    weights = np.ones(len(confidence)) if weights is None else weights
    gaps = np.bincount(bin_numbers(confidence), weights * (correct - confidence), BINS)
    return float(np.abs(gaps).sum() / weights.sum())


def bootstrap_error(statistic: Callable[[np.ndarray], float], groups: np.ndarray, seed: int = 0) -> float | None:
    """The standard deviation of a statistic over RESAMPLES bootstrap samples of whole groups; None for one group.

    Args:
        statistic: gets how often each value counts, `[N]`.
        groups: `[N]`.
        seed: of the resampling.
    """
    members, count = clusters(groups)
    if count < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = [np.bincount(rng.integers(0, count, count), minlength=count)[members] for _ in range(RESAMPLES)]
    return float(np.std([statistic(draw.astype(np.float64)) for draw in draws], ddof=1))


class Calibration(TypedDict):
    """The fit of the confidence of pairs to their accuracy; see `calibration`."""

    ece: Estimate
    brier: Estimate
    log_loss: Estimate
    bins: list[dict[str, Any]]


def calibration(margins: np.ndarray, groups: np.ndarray) -> Calibration:
    """Describes how well σ(margin) is the probability that the chosen response is better.

    The confidence of a pair is max(σ(m), 1 - σ(m)); it is correct when m > 0, and half correct when m = 0. So the
    results do not depend on which side of a pair stands first.

    Args:
        margins: score of the chosen minus score of the rejected response, `[N]`.
        groups: `[N]`: pairs of one prompt.

    Returns:
        `ece` (with a bootstrap error), `brier` (mean of (1 - σ(m))²), `log_loss` (mean of -log σ(m)), and `bins`: the
        pairs, mean confidence and accuracy of each interval that holds some.
    """
    margins = np.asarray(margins, np.float64)
    probability = sigmoid(margins)
    confidence = sigmoid(np.abs(margins))
    correct = (margins > 0) + 0.5 * (margins == 0)
    numbers, bins = bin_numbers(confidence), []
    for b in range(BINS):
        held = numbers == b
        if held.any():
            accuracy = mean_and_error(correct[held], groups[held])
            bounds = (0.5 + b / (2 * BINS), 0.5 + (b + 1) / (2 * BINS))
            bins.append({"from": bounds[0], "to": bounds[1], "confidence": float(confidence[held].mean())})
            bins[-1] |= {"pairs": int(held.sum()), "accuracy": accuracy}
    ece = calibration_error(confidence, correct)
    error = bootstrap_error(lambda weights: calibration_error(confidence, correct, weights), groups)
    return {
        "ece": Estimate(ece, error, len(margins)),
        "brier": mean_and_error(np.square(1 - probability), groups),
        "log_loss": mean_and_error(np.logaddexp(0.0, -margins), groups),
        "bins": bins,
    }


def plain(value: object) -> Any:
    """Values for JSON: estimates as dicts, arrays as lists, NaN as None."""
    if isinstance(value, Estimate):
        return value.as_dict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    return None if isinstance(value, float) and not np.isfinite(value) else value
