"""Accuracy of instruction following: the measures of lm-eval's task `ifeval`, and the share followed of each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.commands.evaluation.generators import Responses
from jaxrlhf.commands.evaluation.rows import Prompts
from jaxrlhf.commands.evaluation.statistics import Estimate, mean_and_error
from jaxrlhf.rewards.instructions import followed, read_instructions


@dataclass(frozen=True)
class Following:
    """Verdicts on K instructions, each of one response.

    Attributes:
        kinds: the kind of each, `[K]`.
        prompts: the number of its prompt, int `[K]`.
        responses: the number of its response, int `[K]`.
        strict: bool `[K]`.
        loose: bool `[K]`: after IFEval's changes of the response, which forgive an introduction.
    """

    kinds: np.ndarray
    prompts: np.ndarray
    responses: np.ndarray
    strict: np.ndarray
    loose: np.ndarray

    def summary(self) -> dict[str, Estimate | dict[str, Estimate]]:
        """The measures under lm-eval's names, and `by_kind`; errors are clustered by prompt."""
        found: dict[str, Any] = {}
        _, first = np.unique(self.responses, return_index=True)
        for name, verdicts in (("strict", self.strict), ("loose", self.loose)):
            whole = np.minimum.reduceat(verdicts, first) if len(first) else verdicts
            found[f"prompt_level_{name}_acc"] = mean_and_error(whole, self.prompts[first])
            found[f"inst_level_{name}_acc"] = mean_and_error(verdicts, self.prompts)
        kinds, counts = np.unique(self.kinds, return_counts=True)
        of_kind = {kind: self.kinds == kind for kind in kinds[np.argsort(-counts, kind="stable")].tolist()}
        found["by_kind"] = {k: mean_and_error(self.strict[held], self.prompts[held]) for k, held in of_kind.items()}
        return found


def check_instructions(prompts: Prompts, responses: Responses, scored: np.ndarray) -> Following:
    """Checks every instruction of the scored responses, bool `[P, n]`.

    The reward function ran on these within its limits of time, so no keyword of theirs is a pattern that takes forever.
    """
    rows: list[tuple[str, int, int, bool, bool]] = []
    size = scored.shape[1]
    for i, (ids, kwargs) in enumerate(
        zip(prompts.values["instruction_id_list"], prompts.values["kwargs"], strict=True)
    ):
        given = read_instructions(ids, kwargs)
        for j in np.flatnonzero(scored[i]).tolist():
            text = responses.texts[i][j]
            verdicts = zip(given, followed(text, given), followed(text, given, loose=True), strict=True)
            rows += [(kind, i, i * size + j, strict, loose) for (kind, _), strict, loose in verdicts]
    kinds, places, numbers, strict, loose = zip(*rows, strict=True) if rows else ((),) * 5
    return Following(
        np.array(kinds, str),
        np.array(places, int),
        np.array(numbers, int),
        np.array(strict, bool),
        np.array(loose, bool),
    )
