"""Best-of-n and rejection sampling: selects samples, and computes the expected best of k."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf import objectives
from jaxrlhf.rewards import finite_mean
from jaxrlhf.rl.outcomes import Outcome


@dataclass(frozen=True)
class Samples:
    """n scored responses to each of P prompts."""

    scores: np.ndarray
    """float32 `[P, n]`; NaN where a reward function failed."""
    texts: Sequence[Sequence[str]]
    """`[P][n]`: the responses, as SFT data has them."""
    ended: np.ndarray
    """bool `[P, n]`: whether a response ended by itself, before the longest length; an episode: at no limit."""
    episodes: list[list[Outcome]] | None = None
    """`[P][n]` with an environment or tools, whose last turns are `texts`."""

    def identity(self, p: int, j: int) -> object:
        """Returns the text of a sample, or all turns of its episode. Equal samples have equal values."""
        return self.texts[p][j] if self.episodes is None else json.dumps(self.episodes[p][j].messages, default=str)


def select_samples(
    samples: Samples, *, best: bool, min_score: float | None, top_fraction: float, keep_unfinished: bool
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Selects samples.

    Samples without a score, empty ones and repetitions of an earlier response to the prompt are never kept.

    Args:
        samples: n responses to each of P prompts.
        best: keep the highest-scoring response of each prompt (the first of equals) instead of all.
        min_score: leave out responses that score less.
        top_fraction: keep this share of the selected responses, those with the highest scores.
        keep_unfinished: keep responses that were cut at the longest length too.

    Returns:
        The (prompt, sample) pairs to keep, in order, and the number of samples left out for each reason.
    """
    reasons = ("failed", "empty", "unfinished", "repeated", "below_min_score", "not_best", "below_top_fraction")
    left_out: dict[str, int] = dict.fromkeys(reasons, 0)
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
            elif samples.identity(p, j) in seen:
                reason = "repeated"
            elif min_score is not None and score < min_score:
                reason = "below_min_score"
            if reason is not None:
                left_out[reason] += 1
                continue
            seen.add(samples.identity(p, j))
            usable.append((p, j))
        if best and usable:
            left_out["not_best"] += len(usable) - 1
            usable = [max(usable, key=lambda pair: samples.scores[pair])]
        kept += usable
    number = math.ceil(top_fraction * len(kept) - 1e-9)
    highest = sorted(kept, key=lambda pair: -samples.scores[pair])[:number]
    left_out["below_top_fraction"] = len(kept) - number
    return sorted(highest), left_out


def summarise_samples(samples: Samples, kept: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Summarises scores of all and of the kept samples, with the expected best of k = 1 … n and the bound on its KL.

    The curve uses the prompts none of whose samples failed.
    """
    n = samples.scores.shape[1]
    scores = samples.scores.astype(np.float64)
    finite = scores[np.isfinite(scores)]
    whole = samples.scores[np.isfinite(scores).all(axis=1)]
    curve = np.asarray(objectives.expected_best(jnp.asarray(whole))).tolist() if len(whole) else [None] * n
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
