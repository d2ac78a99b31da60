"""`report.html` of a run folder: settings, final metrics, curves and samples in one page that needs no network.

This module prepares plain data; `report.html.jinja` beside it is the page.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from flax.traverse_util import flatten_dict
from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup

from jaxrlhf.config.files import read_json, write_text_atomic
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import format_duration, format_number
from jaxrlhf.runs.metrics import Metric, describe
from jaxrlhf.runs.plots import SERIES, VARIABLES, Curve, draw
from jaxrlhf.runs.records import read_records

Data: TypeAlias = dict[str, Any]
"""JSON values, or what a macro of the template takes."""
Item = TypeVar("Item")

STEPS = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Direct preference optimisation",
    "distill": "Distillation",
    "kto": "Kahneman-Tversky optimisation",
    "ppo": "PPO",
}
"""Subfolders of a run of all steps, in order, and the titles of their sections."""

_SOURCE = re.compile(r"(eval|data)/(.*?/)??(?=[^/]+$|(rewards|logps)/[^/]+$)")
"""The prefix of an evaluation's metric, or of a metric of one data source, before the quantity."""

GROUPS = {
    "Rewards and scores": (
        r"objective/(scores|rlhf_reward|non_score_reward)|accuracy.*|length_baseline|.*_score|margin|.*reward.*"
    ),
    "Losses": r"loss(/.*)?|perplexity|.*_loss",
    "KL and policy": r"objective/(kl|entropy)|policy/.*|logps/.*|val/ratio.*|sampling/.*|.*kl(_.*)?",
    "Response length": r".*length.*|.*eos.*",
    "Learning rate and gradients": r".*learning_rate.*|(.*/)?lr(_.*)?|.*grad_norm.*",
    "Data sources": r"share",
    "Throughput and timing": r"(perf|timing)/.*|.*(per_second|seconds).*",
    "Everything else": r".*",
}
"""Groups of plots and the quantities in each; a metric belongs to the first group that matches, whatever its source."""
*_, TIMING, OTHER = GROUPS
FOLDED = (TIMING, OTHER)  # metrics of less interest
TOGETHER = (("eval/mean_chosen_score", "eval/mean_rejected_score"), ("mean_chosen_score", "mean_rejected_score"))
HELD_OUT = "held-out samples"
"""Title of an evaluation's table, which has the same prompts each time."""
MAX_COLUMNS = 6  # evaluations shown side by side; of more, evenly spaced ones
MAX_TABLES = 40  # sample tables of a section; of more, evenly spaced ones


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` from metrics.jsonl, samples.jsonl, config.yaml and summary.json.

    Args:
        run_dir: Folder of a run, or a folder with runs in subfolders, which become the sections of one page: `sft`,
            `reward`, `dpo`, `ppo`, then the others.

    Returns:
        The path of the page.

    Raises:
        InputError: There is no run in the folder, or a record file is malformed.
    """
    folder = Path(run_dir)
    parts = [path for path in (folder, *_subfolders(folder)) if (path / "metrics.jsonl").exists()]
    if not parts:
        raise InputError(f"{folder} holds no run: there is no metrics.jsonl in it or in its subfolders")
    numbers = count()
    page = page_template(Path(__file__).parent / "report.html.jinja").render(
        name=folder.resolve().name,
        path=folder.resolve(),
        tiles=[(name, value) for name, value in flatten_dict(_summary(folder), sep=".").items() if _is_numeric(value)],
        settings=_settings(folder) if folder not in parts else None,
        sections=[_section(part, numbers) for part in parts],
    )
    write_text_atomic(folder / "report.html", page)
    return folder / "report.html"


def read_curves(path: str | Path) -> dict[str, Curve]:
    """Reads the curve of every metric in a metrics.jsonl, by name in order of appearance; null becomes NaN."""
    steps: dict[str, dict[int, float]] = {}
    for record in read_records(path):
        for name, value in record.items():
            if name not in ("step", "time"):
                if value is not None and not _is_numeric(value):
                    raise InputError(f"{path}: step {record['step']}: {name}={value!r:.80} must be a number or null")
                steps.setdefault(name, {})[record["step"]] = math.nan if value is None else value
    return {
        name: Curve(name, sorted(points), [points[step] for step in sorted(points)], name.startswith("eval/"))
        for name, points in steps.items()
    }


def group_of(name: str) -> str:
    """Returns the group of plots that a metric belongs to."""
    prefix = _SOURCE.match(name)
    quantity = name[prefix.end() :] if prefix else name
    return next(title for title, pattern in GROUPS.items() if re.fullmatch(pattern, quantity))


def page_template(path: Path) -> Template:
    """The template of a page: it escapes what it prints, and has the filter `number` and the test `numeric`."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_controls,
    )
    environment.filters["number"] = _number
    environment.tests["numeric"] = _is_numeric
    return environment.get_template(path.name)


def _without_controls(value: object) -> object:
    """A value of the template without the control characters that XML forbids."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value))


def _subfolders(folder: Path) -> list[Path]:
    """Subfolders in the order of their sections."""
    names = list(STEPS)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(found, key=lambda path: (names.index(path.name) if path.name in names else len(names), path.name))


def _section(folder: Path, numbers: Iterator[int]) -> Data:
    """The data of one run; `numbers` makes the ids of its drawings unique on the page."""
    curves = read_curves(folder / "metrics.jsonl")
    grouped = {title: [name for name in curves if group_of(name) == title] for title in GROUPS}
    metrics: dict[bool, list[tuple[str, list[str]]]] = {True: [], False: []}
    for title, names in grouped.items():
        metrics[title not in FOLDED] += [(name, _numbers_of(curves[name])) for name in names]
    return {
        "anchor": "run-" + re.sub(r"\W+", "-", folder.resolve().name),
        "title": _title(folder),
        "facts": _facts(folder),
        "settings": _settings(folder),
        "metrics": metrics[True] or metrics[False],
        "other_metrics": metrics[False] if metrics[True] else [],
        "meanings": _meanings(curves),
        "groups": [
            (title, title == OTHER, [_plot(together, next(numbers)) for together in _overlay(names, curves)])
            for title, names in grouped.items()
            if names
        ],
        "samples": _samples(folder),
    }


def _title(folder: Path) -> str:
    """The title in the summary, preceded by the folder's name where that says more."""
    name, summary = folder.resolve().name, _summary(folder)
    trainer, title = (str(summary.get(key) or "") for key in ("trainer", "title"))
    title = title or STEPS.get(trainer) or trainer.upper() or STEPS.get(name)
    return f"{name}: {title}" if title and name not in (*STEPS, trainer) else title or name


def _facts(folder: Path) -> str:
    """Number of steps and the time that they took."""
    records = read_records(folder / "metrics.jsonl")
    if not records:
        return "no step was recorded"
    text = f"{max(record['step'] for record in records):,} steps"
    times = [record["time"] for record in records if _is_numeric(record.get("time"))]
    # A resumed run may begin at an earlier time, where a clock was set back.
    seconds = sum(max(0.0, after - before) for before, after in pairwise(times))
    return f"{text}, {format_duration(seconds)} from the first record to the last" if seconds >= 1 else text


def _overlay(names: Sequence[str], curves: Mapping[str, Curve]) -> list[list[Curve]]:
    """Curves that share a plot: a metric with its evaluation, chosen with rejected scores; the others alone."""
    partner = {f"eval/{name}": name for name in names if f"eval/{name}" in names}
    partner |= {second: first for first, second in TOGETHER if first in names and second in names}
    plots = {name: [curves[name]] for name in names if name not in partner}
    for name, first in partner.items():
        plots[partner.get(first, first)].append(curves[name])
    return list(plots.values())


def _plot(curves: Sequence[Curve], number: int) -> Data:
    coloured = zip(curves, map(VARIABLES.get, SERIES), strict=False)
    return {
        "legend": [(curve.name, _number(curve.values[-1]), colour) for curve, colour in coloured],
        "svg": Markup(draw(curves, number)),
        "lost": sum(math.isnan(value) for curve in curves for value in curve.values),
    }


def _numbers_of(curve: Curve) -> list[str]:
    """Last, first, lowest and highest value of a metric, and its last step."""
    finite = [value for value in curve.values if not math.isnan(value)]
    cells = [finite[0], min(finite), max(finite)] if finite else []
    return [_number(curve.values[-1]), *(map(_number, cells) if cells else "–––"), f"{curve.steps[-1]:,}"]


def _meanings(names: Iterable[str]) -> list[tuple[list[str], str, str]]:
    """(names, meaning, healthy values) of the metrics that the run has, those with one description together."""
    found: dict[Metric, list[str]] = {}
    for name in names:
        if metric := describe(name):
            found.setdefault(metric, []).append(name)
    return [(own, metric.meaning.replace("`", ""), metric.healthy.replace("`", "")) for metric, own in found.items()]


def _samples(folder: Path) -> Data | None:
    """The tables of samples; the first and the last one are open, to compare before with after."""
    path = folder / "samples.jsonl"
    records = read_records(path) if path.exists() else []
    if not records:
        return None
    for record in records:
        _check_table(path, record)
    tables = [
        record | {"numeric": [all(map(_is_numeric, cells)) for cells in zip(*record["rows"], strict=True)]}
        for record in _evenly_spaced(records, MAX_TABLES)
    ]
    return {"total": len(records), "tables": tables, "timeline": _timeline(records)}


def _check_table(path: Path, record: Data) -> None:
    """Raises InputError for a record of samples.jsonl that is no table."""
    columns, rows = record.get("columns"), record.get("rows")
    whole = (
        isinstance(columns, list)
        and isinstance(rows, list)
        and isinstance(record.get("title"), str)
        and all(isinstance(row, list) and len(row) == len(columns) for row in rows)
    )
    if not whole:
        raise InputError(f"{path}: step {record['step']}: the record must have a title, columns, and rows of cells")


def _timeline(records: Sequence[Data]) -> Data | None:
    """Responses to the same held-out prompts side by side: a row per prompt, a column per evaluation."""
    wanted = ("prompt", "response", "score")
    known = [r for r in records if r["title"] == HELD_OUT and set(wanted) <= set(r["columns"])]
    if len(known) < 2:
        return None
    shown = _evenly_spaced(known, MAX_COLUMNS)
    rows: dict[str, list[tuple[str, float | None]]] = {}
    for place, record in enumerate(shown):
        columns = [record["columns"].index(name) for name in wanted]
        for row in record["rows"]:
            prompt, response, score = (row[i] for i in columns)
            rows.setdefault(str(prompt), [("–", None)] * len(shown))[place] = (response, score)
    return {"steps": [record["step"] for record in shown], "rows": list(rows.items())}


def _evenly_spaced(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` of the items, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _summary(folder: Path) -> Data:
    path = folder / "summary.json"
    return read_json(path, "delete it or write it anew") if path.exists() else {}


def _settings(folder: Path) -> str | None:
    path = folder / "config.yaml"
    return path.read_text(encoding="utf-8") if path.exists() else None


def _is_numeric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float) -> str:
    if math.isnan(value):
        return "not finite"
    if float(value).is_integer():
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,.1f}" if 1e4 <= abs(value) < 1e9 else format_number(value)
