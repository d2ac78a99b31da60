"""A reward model on preference pairs: accuracy, margins and calibration; or its scores of given texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np

from jaxrlhf.commands.evaluation.rows import groups_of, holds_pairs, load_rows, subsets_of
from jaxrlhf.commands.evaluation.scoring import RewardModel
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.commands.evaluation.statistics import (
    Estimate,
    calibration,
    mean_and_error,
    mean_of_estimates,
    plain,
)
from jaxrlhf.data import Data
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.reward import SIMILAR
from jaxrlhf.trainers.settings import check_context

BARS = 24  # intervals of a histogram
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Measures(TypedDict):
    """Measures of a reward model's ranking of pairs."""

    pairs: int
    accuracy: Estimate
    length_baseline: Estimate
    margin: Estimate


class Distribution(TypedDict):
    """Mean, deviation and quartiles of scores."""

    mean: float
    std: float | None
    quartiles: np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Scored pairs; every array has one entry per pair.

    Attributes:
        chosen: scores of the chosen responses, float64.
        rejected: scores of the rejected responses, float64.
        lengths: int `[2, N]`: tokens of the chosen and of the rejected response.
        groups: the number of each pair's prompt.
        sources: the source of each pair.
        subsets: its subset; empty without subset_field.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    lengths: np.ndarray
    groups: np.ndarray
    sources: np.ndarray
    subsets: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def margins(self) -> np.ndarray:
        """Score of the chosen minus score of the rejected response."""
        return self.chosen - self.rejected

    @property
    def similar(self) -> np.ndarray:
        """Pairs whose lengths differ by less than a tenth of the longer one."""
        longer, shorter = self.lengths.max(axis=0), self.lengths.min(axis=0)
        return longer - shorter < SIMILAR * longer

    def where(self, kept: np.ndarray) -> Pairs:
        """Only these pairs."""
        one = (self.groups[kept], self.sources[kept], self.subsets[kept])
        return Pairs(self.chosen[kept], self.rejected[kept], self.lengths[:, kept], *one)

    def measures(self) -> Measures:
        """Accuracy, length baseline and margin. Equal scores count as wrong; equal lengths count half."""
        long, short = self.lengths
        return {
            "pairs": len(self),
            "accuracy": mean_and_error(self.margins > 0, self.groups),
            "length_baseline": mean_and_error((long > short) + 0.5 * (long == short), self.groups),
            "margin": mean_and_error(self.margins, self.groups),
        }


@dataclass(frozen=True)
class PairReport:
    """A reward model's scores of preference pairs.

    Attributes:
        model: its name.
        pairs: the scored pairs.
        data: their rows.
    """

    model: str
    pairs: Pairs
    data: Data

    def row(self, i: int) -> dict[str, Any]:
        """Texts, scores and place of a pair."""
        pairs, place = self.pairs, {"source": str(self.pairs.sources[i]), "place": self.data.where(i)}
        place |= {"subset": str(pairs.subsets[i])} if pairs.subsets[i] else {}
        scores = {"chosen_score": pairs.chosen[i], "rejected_score": pairs.rejected[i], "margin": pairs.margins[i]}
        return self.data.text(i) | scores | place

    def groups(self) -> dict[str, Pairs]:
        """All pairs, and those of each subset, source and relation of lengths, by name."""
        pairs = self.pairs
        chosen, rejected = pairs.lengths
        parts = {"all": pairs, "similar lengths": pairs.where(pairs.similar)}
        parts |= {"chosen longer": pairs.where(chosen > rejected), "chosen shorter": pairs.where(chosen < rejected)}
        for kind, names in (("source", pairs.sources), ("subset", pairs.subsets)):
            distinct = [name for name in dict.fromkeys(names.tolist()) if name]
            if kind == "subset" or len(distinct) > 1:
                parts |= {f"{kind} {name}": pairs.where(names == name) for name in distinct}
        return {name: part for name, part in parts.items() if len(part)}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Every estimate, and the histogram of the margins."""
        margins = self.pairs.margins
        counts, edges = np.histogram(margins, BARS)
        measures = {name: part.measures() for name, part in self.groups().items()}
        subsets = [measured["accuracy"] for name, measured in measures.items() if name.startswith("subset ")]
        return {
            "model": self.model,
            "measures": measures,
            "mean_of_subsets": mean_of_estimates(subsets) if subsets else None,
            "ties": mean_and_error(margins == 0, self.pairs.groups),
            "scores": {side: describe(getattr(self.pairs, side)) for side in ("chosen", "rejected")},
            "margins": describe(margins) | {"counts": counts, "edges": edges},
            "calibration": calibration(margins, self.pairs.groups),
        }

    def lines(self) -> Iterator[str]:
        """A JSON line for each pair."""
        return (json.dumps(plain(self.row(i)), ensure_ascii=False) + "\n" for i in range(len(self.pairs)))


@dataclass(frozen=True)
class TextReport:
    """A reward model's scores of texts.

    Attributes:
        model: its name.
        scores: float64 `[N]`.
        lengths: tokens of each response, or of a text without a prompt, int `[N]`.
        groups: the number of each text's prompt.
        sources: the source of each text.
        data: their rows.
    """

    model: str
    scores: np.ndarray
    lengths: np.ndarray
    groups: np.ndarray
    sources: np.ndarray
    data: Data

    def row(self, i: int) -> dict[str, Any]:
        """Text, score and place of a row."""
        text = self.data.text(i)
        row = {"prompt": text["prompt"], "response": text["chosen"], "score": self.scores[i]}
        return row | {"source": str(self.sources[i]), "place": self.data.where(i)}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The mean by source, the distribution, and the correlation with the length."""
        names = {"all": np.ones(len(self.scores), bool)}
        if len(set(self.sources.tolist())) > 1:
            names |= {f"source {name}": self.sources == name for name in dict.fromkeys(self.sources.tolist())}
        varied = len(self.scores) > 2 and np.ptp(self.scores) > 0 and np.ptp(self.lengths) > 0
        return {
            "model": self.model,
            "texts": len(self.scores),
            "mean_score": {name: mean_and_error(self.scores[kept], self.groups[kept]) for name, kept in names.items()},
            "scores": describe(self.scores),
            "length_correlation": float(np.corrcoef(self.scores, self.lengths)[0, 1]) if varied else None,
        }

    def lines(self) -> Iterator[str]:
        """A JSON line for each text."""
        return (json.dumps(plain(self.row(i)), ensure_ascii=False) + "\n" for i in range(len(self.scores)))


def describe(values: np.ndarray) -> Distribution:
    """Mean, standard deviation and quartiles."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std": spread, "quartiles": np.quantile(values, QUANTILES)}


def measure(config: EvalConfig, console: Console) -> PairReport | TextReport:
    """Scores the pairs, or the texts, of the data.

    Raises:
        InputError: the model or the data cannot be used.
    """
    model, pairs = RewardModel(config), holds_pairs(config.data)
    check_context(model.shape, config.data.max_length, "max_length")
    if config.subset_field and not pairs:
        raise InputError(
            f"subset_field={config.subset_field} names subsets of pairs, and the data holds texts to score"
        )
    data = load_rows(config.data, model.tokenizer, "reward" if pairs else "sft", config.limit)
    sequences, lengths = sequences_of(data)
    groups = np.concatenate([groups_of(part) for part in data.parts])
    sources = np.repeat(data.sources, [len(part) for part in data.parts])
    subsets = [
        subsets_of(part, config.subset_field) if config.subset_field else [""] * len(part) for part in data.parts
    ]
    scores = model.score(sequences, console).reshape(len(data.sequence_names), -1)
    if not pairs:
        return TextReport(model.name, scores[0], lengths[0], groups, sources, data)
    scored = Pairs(scores[0], scores[1], lengths, groups, sources, np.array([s for part in subsets for s in part]))
    return PairReport(model.name, scored, data)


def sequences_of(data: Data) -> tuple[list[np.ndarray], np.ndarray]:
    """The tokens of every first sequence, then of every second one; and the tokens of each response, int `[S, N]`."""
    names = range(len(data.sequence_names))
    columns = [f"ids_{j}" for j in names]
    found: list[list[np.ndarray]] = [[] for _ in names]
    lengths: list[np.ndarray] = []
    for part in data.parts:
        rows = part.fetch(np.arange(len(part)), [*columns, "prompt_length"])
        for j in names:
            found[j] += [np.asarray(ids, np.int32) for ids in rows[columns[j]]]
        lengths.append(part.lengths - np.asarray(rows["prompt_length"])[None])
    return [ids for sequences in found for ids in sequences], np.concatenate(lengths, axis=1)
