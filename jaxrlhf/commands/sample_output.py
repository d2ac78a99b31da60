"""The output of `jaxrlhf sample`: rows for the SFT step, transcripts of episodes, and the summary."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrlhf.commands.evaluation.episodes import ENVIRONMENT
from jaxrlhf.commands.evaluation.report import episode_table
from jaxrlhf.commands.selection import Samples
from jaxrlhf.commands.transcripts import transcript_text
from jaxrlhf.data import PromptData
from jaxrlhf.environments import Tool
from jaxrlhf.errors import InputError
from jaxrlhf.rl.outcomes import Outcome, to_last_turn
from jaxrlhf.runs.console import Console

if TYPE_CHECKING:
    from jaxrlhf.commands.sample import SampleConfig


def check_output(path: Path, summary_path: Path, overwrite: bool) -> None:
    """Refuses a file that exists, that cannot be written, or that sft could not read."""
    if path.suffix != ".jsonl":
        raise InputError(f"output_file {path}: must end in .jsonl, as the data that sft reads")
    there = next((p for p in (path, summary_path) if p.exists()), None)
    if there is not None and (not overwrite or there.is_dir()):
        raise InputError(f"output_file: {there} exists; name another file, or replace it with --overwrite")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"output_file {path}: {folder} is no folder that can be written to; name another place")


def nothing_kept(left_out: dict[str, int], highest: float | None, config: "SampleConfig") -> str:
    """The message for samples of which none is selected."""
    reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in left_out.items() if count)
    limits = "max_new_tokens or max_turns" if config.environments.used else "max_new_tokens"
    hints = [f"raise {limits}, or --keep_unfinished"] if left_out["unfinished"] else []
    if left_out["failed"] and config.environments.used:
        hints.append("correct the environment, as the messages above say")
    if left_out["below_min_score"]:
        hints.append(f"lower min_score={config.selection.min_score} (the highest score was {highest:.4g})")
    return f"no sample is left to write ({reasons}): {'; '.join(hints) or 'change the model or the rewards'}"


def lines(
    data: PromptData,
    samples: Samples,
    parts: dict[str, np.ndarray],
    kept: list[tuple[int, int]],
    tools: Sequence[Tool] = (),
) -> Iterator[str]:
    """Yields the rows of the file: prompt as in the data, chosen, score, its parts if there are several, columns.

    Of an episode, the prompt is what it began with, and `chosen` its further messages up to the model's last turn.
    """
    for p, j in kept:
        row: dict[str, Any] = {"prompt": data.prompts([p])[0], "chosen": samples.texts[p][j]}
        if samples.episodes is not None:
            row |= episode_row(samples.episodes[p][j], tools)
        row["score"] = _short(samples.scores[p, j])
        if len(parts) > 1:
            row["scores"] = {name: _short(part[p, j]) for name, part in parts.items()}
        row |= {name: values[0] for name, values in data.columns([p]).items()}
        yield json.dumps(row, ensure_ascii=False) + "\n"


def episode_row(outcome: Outcome, tools: Sequence[Tool]) -> dict[str, Any]:
    """An episode as a row that SFT trains on."""
    row = {"prompt": outcome.messages[: outcome.begun], "chosen": to_last_turn(outcome.messages)[outcome.begun :]}
    return row | ({"tools": [tool.schema for tool in tools]} if tools else {})


def _short(value: np.float32) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def show_episodes(
    console: Console, samples: Samples, parts: dict[str, np.ndarray], kept: list[tuple[int, int]]
) -> None:
    """Prints the transcripts of selected samples."""
    for p, j in kept:
        assert samples.episodes is not None
        scores = {name: float(part[p, j]) for name, part in parts.items() if name != ENVIRONMENT}
        console.print(transcript_text(f"prompt {p + 1}, sample {j + 1}", samples.episodes[p][j], scores))


def show(console: Console, summary: dict[str, Any], path: Path) -> None:
    """Prints the summary."""
    curve = summary["expected_best_of_k"]
    shown = [point for point in curve if point["k"] & (point["k"] - 1) == 0 or point["k"] == len(curve)]
    table = [[point["k"], point["score"], point["kl_bound"]] for point in shown]
    if summary["expected_best_prompts"]:
        console.table("expected best of k", ("k", "mean score", "KL at most"), table)
    if "episodes" in summary:
        console.table(*episode_table([summary["episodes"]], ["all samples"]))
    left = ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in summary["left_out"].items() if v)
    console.print(
        f"sample: {summary['prompts']:,} prompts × {summary['samples_per_prompt']}, mean score "
        f"{summary['score_mean']:.4g}; kept {summary['kept']:,} of mean score {summary['kept_score_mean']:.4g}"
        f"{f' (left out: {left})' if left else ''} in {summary['seconds']}s → {path}"
    )
