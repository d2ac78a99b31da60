"""Prints the results of `jaxrlhf eval` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from jaxrlhf.commands.evaluation.comparison import Comparison
from jaxrlhf.commands.evaluation.episodes import ENVIRONMENT
from jaxrlhf.commands.evaluation.reward_models import Distribution, PairReport, TextReport
from jaxrlhf.commands.evaluation.settings import is_server
from jaxrlhf.commands.transcripts import conversation_text, transcript_text
from jaxrlhf.data.messages import Prompt
from jaxrlhf.runs.console import Console

MEASURES = {"accuracy": "accuracy", "length_baseline": "longer is better", "margin": "margin"}
FOLLOWING = {
    "prompt_level_strict_acc": "prompts, strict",
    "inst_level_strict_acc": "instructions, strict",
    "prompt_level_loose_acc": "prompts, loose",
    "inst_level_loose_acc": "instructions, loose",
}
BLOCKS = " ▁▂▃▄▅▆▇█"

Table = tuple[str, list[str], list[list[Any]]]
"""A title, the columns' names and the rows, for the terminal and for the page."""


def short(name: str) -> str:
    """The last part of a path; the model's name or the host of a server."""
    if is_server(name):
        address, _, model = name.partition("#")
        return model or urlsplit(address).netloc
    return name.rstrip("/").rpartition("/")[2] or name


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each name, or the whole names where these are not distinct."""
    found = [short(name) for name in names]
    return found if len(set(found)) == len(found) else list(names)


def comparison_tables(found: Comparison) -> list[Table]:
    """Scores and pass@k of each model, and the win rates."""
    summary, names = found.summary, short_names(found.models)
    rows = []
    for name, model in zip(names, summary["models"], strict=True):
        scores = [str(value) for value in model["scores"].values()]
        passes = [str(value) for ks in model["pass_at_k"].values() for value in ks.values()]
        rows.append([name, *scores, *passes, str(model["tokens"]), str(model["ended"])])
    columns = ["model", *(name.replace("_", " ") for name in found.scores)]
    several = len(found.pass_scores) > 1
    first = summary["models"][0]["pass_at_k"]
    columns += [f"pass@{k}{f' {name}' if several else ''}" for name, ks in first.items() for k in ks]
    tables: list[Table] = [("models", [*columns, "tokens", "ended"], rows)]
    if summary["pairs"]:
        by_name = dict(zip(found.models, names, strict=True))
        pairs = []
        for p in summary["pairs"]:
            who = [by_name[p["model"]], by_name[p["other"]], p["scorer"].replace("_", " ")]
            pairs.append([*who, str(p["win_rate"]), str(p["score_difference"])])
        tables.append(("paired by prompt", ["model", "against", "by", "win rate", "score difference"], pairs))
    if "episodes" in summary["models"][0]:
        tables.append(episode_table([model["episodes"] for model in summary["models"]], names))
    return tables + (following_tables(found, names) if found.following else [])


def episode_table(measured: list[dict[str, Any]], names: list[str]) -> Table:
    """Turns, tool calls, ends and info of each model's episodes."""
    flat = [{k: v for k, v in one.items() if k != "info"} | one["info"] for one in measured]
    columns = list(dict.fromkeys(name for one in flat for name in one))
    rows = [[name, *(str(one.get(column, "–")) for column in columns)] for name, one in zip(names, flat, strict=True)]
    return "episodes", ["model", *(column.replace("_", " ") for column in columns)], rows


def following_tables(found: Comparison, names: list[str]) -> list[Table]:
    """Accuracy of instruction following of each model, and of each kind of instruction."""
    measured = [model["instructions"] for model in found.summary["models"]]
    rows = [[name, *(str(measures[key]) for key in FOLLOWING)] for name, measures in zip(names, measured, strict=True)]
    kinds = [
        [kind, value.count, *(str(measures["by_kind"].get(kind, "–")) for measures in measured)]
        for kind, value in measured[0]["by_kind"].items()
    ]
    return [
        ("instructions followed", ["model", *FOLLOWING.values()], rows),
        ("instructions by kind, strict", ["kind", "checked", *names], kinds),
    ]


def cell(found: Comparison, m: int, i: int) -> str:
    """The responses of model `m` to prompt `i` with their scores."""
    texts = []
    for j, text in enumerate(found.responses[m].texts[i]):
        scores = [f"{scores[m, i, j]:.3g}" for scores in found.scores.values()]
        texts.append(f"[{', '.join(scores)}] {text}" if scores else text)
    return "\n".join(texts)


def print_episodes(console: Console, found: Comparison, show: int) -> None:
    """Prints the transcripts of the first prompts, of every model and sample."""
    for i in range(min(show, len(found.prompts))):
        for m, name in enumerate(short_names(found.models)):
            for j, outcome in enumerate((found.responses[m].episodes or [])[i]):
                sample = f", sample {j + 1}" if found.samples > 1 else ""
                title = f"{found.prompts.places[i]}, {name}{sample}"
                parts = {scorer: scores[m, i, j] for scorer, scores in found.scores.items() if scorer != ENVIRONMENT}
                console.print(transcript_text(title, outcome, parts))


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people: a conversation as a line for each message."""
    return prompt if isinstance(prompt, str) else conversation_text(prompt)


def pair_tables(found: PairReport) -> list[Table]:
    """Measures by subset, calibration, and scores."""
    summary = found.summary
    rows = [
        [name, measures["pairs"], *(str(measures[key]) for key in MEASURES)]
        for name, measures in summary["measures"].items()
    ]
    tables: list[Table] = [("pairs", ["rows", "pairs", *MEASURES.values()], rows)]
    calibration = summary["calibration"]
    bins = [
        [f"{b['from']:.2f}–{b['to']:.2f}", b["pairs"], b["confidence"], str(b["accuracy"])] for b in calibration["bins"]
    ]
    title = f"calibration of σ(margin): ECE {calibration['ece']}, Brier {calibration['brier']}, "
    title += f"log loss {calibration['log_loss']}"
    tables.append((title, ["confidence", "pairs", "mean confidence", "accuracy"], bins))
    scores = summary["scores"] | {"margin": summary["margins"]}
    tables.append(distribution(scores))
    return tables


def distribution(scores: Mapping[str, Distribution]) -> Table:
    """Mean, deviation and quartiles of several sets of scores."""
    rows = [[name, values["mean"], values["std"], *map(float, values["quartiles"])] for name, values in scores.items()]
    return "distribution", ["scores", "mean", "deviation", "least", "25 %", "median", "75 %", "largest"], rows


def pair_lines(found: PairReport) -> list[str]:
    """The mean of the subsets, the share of ties, and the histogram of the margins."""
    summary = found.summary
    lines = [f"mean of the subsets: {summary['mean_of_subsets']}"] if summary["mean_of_subsets"] else []
    counts, edges = summary["margins"]["counts"], summary["margins"]["edges"]
    bars = "".join(BLOCKS[round(8 * int(count) / max(int(counts.max()), 1))] for count in counts)
    if summary["ties"].value:
        lines.append(f"equal scores: {summary['ties']} of the pairs, which count as wrong")
    return [*lines, f"margins: {edges[0]:.3g} {bars} {edges[-1]:.3g}"]


def text_tables(found: TextReport) -> list[Table]:
    """The mean score by source, and the distribution."""
    summary = found.summary
    rows = [[name, value.count, str(value)] for name, value in summary["mean_score"].items()]
    return [("texts", ["rows", "texts", "mean score"], rows), distribution({"score": summary["scores"]})]


def text_lines(found: TextReport) -> list[str]:
    """The correlation with the length."""
    value = found.summary["length_correlation"]
    return [] if value is None else [f"correlation of score and length: {value:.3g}"]


def print_comparison(console: Console, found: Comparison, show: int) -> None:
    """Prints responses side by side, and the tables."""
    names = short_names(found.models)
    rows = [
        [prompt_text(found.prompts.prompts[i]), *(cell(found, m, i) for m in range(len(names)))]
        for i in range(min(show, len(found.prompts)))
    ]
    if found.responses[0].episodes is not None:
        print_episodes(console, found, show)
    elif rows:
        console.table("responses", ["prompt", *names], rows)
    for table in comparison_tables(found):
        console.table(*table)
    for what, count in found.left_out.items():
        console.print(f"left out: {count} rows, {what}")


def print_scores(console: Console, found: PairReport | TextReport, show: int) -> None:
    """Prints the first rows with their scores, and the tables."""
    if isinstance(found, PairReport):
        columns = ["prompt", "chosen", "rejected", "chosen_score", "rejected_score", "margin"]
        tables, lines = pair_tables(found), pair_lines(found)
    else:
        columns, tables, lines = ["prompt", "response", "score"], text_tables(found), text_lines(found)
    shown = [found.row(i) for i in range(min(show, len(found.data)))]
    if shown:
        console.table("rows", [c.replace("_", " ") for c in columns], [[row[c] for c in columns] for row in shown])
    for table in tables:
        console.table(*table)
    for line in lines:
        console.print(line)


def print_tasks(console: Console, found: dict[str, dict[str, object]]) -> None:
    """Prints lm-eval's own tables."""
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    for model, results in found.items():
        console.print(model)
        console.print(make_table(results))
        if results.get("groups"):
            console.print(make_table(results, "groups"))
