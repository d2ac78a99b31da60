"""Best-of-n and rejection sampling: which samples of each prompt are kept, and what the best of k is worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf import objectives
from jaxrlhf.rewards import finite_mean


@dataclass(frozen=True)
class Samples:
    """n scored responses to each of P prompts."""

    scores: np.ndarray
    """float32 `[P, n]`; NaN where a reward function failed."""
    texts: Sequence[Sequence[str]]
    """`[P][n]`, as a row of SFT data holds them."""
    ended: np.ndarray
    """bool `[P, n]`: ended by themselves, rather than at the longest length."""


def select_samples(
    samples: Samples, *, best: bool, min_score: float | None, top_fraction: float, keep_unfinished: bool
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """The (prompt, sample) pairs to keep, in order, and how many are left out, by the reason.

    Never kept: samples without a score, empty ones, repetitions of an earlier response to the prompt and, unless
    `keep_unfinished`, those cut at the longest length. Of the others the highest-scoring of each prompt (`best`; the
    first of equals) or all, as far as they reach `min_score`; and of these the `top_fraction` with the highest scores.
    """
    reasons = ("failed", "empty", "unfinished", "repeated", "below_min_score", "not_best", "below_top_fraction")
    left_out = dict.fromkeys(reasons, 0)
    kept: list[tuple[int, int]] = []
    for p, texts in enumerate(samples.texts):
        usable, seen = [], set()
        for j, text in enumerate(texts):
            score = float(samples.scores[p, j])
            reason = None
            if not math.isfinite(score):
                reason = "failed"
            elif not text.strip():
                reason = "empty"
            elif not (samples.ended[p, j] or keep_unfinished):
                reason = "unfinished"
            elif text in seen:
                reason = "repeated"
            elif min_score is not None and score < min_score:
                reason = "below_min_score"
            if reason is not None:
                left_out[reason] += 1
                continue
            seen.add(text)
            usable.append((p, j))
        if best and usable:
            left_out["not_best"] += len(usable) - 1
            usable = [max(usable, key=lambda pair: samples.scores[pair])]
        kept += usable
    number = math.ceil(top_fraction * len(kept) - 1e-9)
    highest = sorted(kept, key=lambda pair: -samples.scores[pair])[:number]
    left_out["below_top_fraction"] = len(kept) - number
    return sorted(highest), left_out


def figures(samples: Samples, kept: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Scores of all and of the kept samples, and for k = 1 … n the expected best of k and the bound on its KL.

    The curve is that of the prompts none of whose samples failed.
    """
    n = samples.scores.shape[1]
    scores = samples.scores.astype(np.float64)
    finite = scores[np.isfinite(scores)]
    whole = samples.scores[np.isfinite(scores).all(axis=1)]
    curve = np.asarray(objectives.expected_best(whole)).tolist() if len(whole) else [None] * n
    return {
        "prompts": len(scores),
        "samples_per_prompt": n,
        "score_mean": finite_mean(scores),
        "score_std": float(finite.std()) if len(finite) else None,
        "score_max": float(finite.max()) if len(finite) else None,
        "ended": float(samples.ended.mean()),
        "expected_best_of_k": [
            {"k": k, "score": s, "kl_bound": objectives.best_of_n_kl_bound(k)} for k, s in enumerate(curve, start=1)
        ],
        "expected_best_prompts": len(whole),
        "kept": len(kept),
        "kept_prompts": len({p for p, _ in kept}),
        "kept_score_mean": finite_mean(np.array([scores[pair] for pair in kept])),
    }
