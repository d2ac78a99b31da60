"""`report.html` of a run folder: settings, final figures, curves and samples in one page that needs no network."""

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from jaxrlhf.config.files import read_jsonl, write_text_atomic
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import format_number
from jaxrlhf.runs.plots import SERIES, VARIABLES, Curve, draw

STEPS = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Direct preference optimisation",
    "ppo": "PPO",
}
"""Subfolders of a run of all steps, in order, and what their sections are called."""
TITLES = STEPS | {"grpo": "GRPO", "rloo": "RLOO", "reinforce++": "REINFORCE++"}
"""What training by each of the trainers is called."""

GROUPS = (
    (
        "Rewards and scores",
        r"objective/(scores|rlhf_reward|non_score_reward)|(eval/)?(accuracy.*|length_baseline|.*_score|margin|.*reward.*)",
    ),
    ("Losses", r"(eval/)?loss(/.*)?|(eval/)?perplexity|(eval/)?.*_loss"),
    ("KL and policy", r"objective/(kl|entropy)|policy/.*|(eval/)?logps/.*|val/ratio.*|sampling/.*|.*kl(_.*)?"),
    ("Response length", r".*length.*|.*eos.*"),
    ("Learning rate and gradients", r".*learning_rate.*|(.*/)?lr(_.*)?|.*grad_norm.*"),
    ("Throughput and timing", r"(perf|timing)/.*|.*(per_second|seconds).*"),
)
OTHER = "Everything else"
FOLDED_FIGURES = ("Throughput and timing", OTHER)
TOGETHER = (("eval/mean_chosen_score", "eval/mean_rejected_score"), ("mean_chosen_score", "mean_rejected_score"))
HELD_OUT = "held-out samples"
"""The title of an evaluation's table, which is about the same prompts each time."""
MAX_COLUMNS = 6  # evaluations shown side by side; of more, evenly spaced ones
MAX_TABLES = 40  # sample tables of a section; of more, evenly spaced ones


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir/report.html` from metrics.jsonl, samples.jsonl, config.yaml and summary.json; return its path.

    A folder with runs in subfolders (`sft/`, `reward/`, `dpo/`, `ppo/` first, then others) gets one page with a section
    each. Raises InputError when there is no run in the folder, or a record file is malformed.
    """
    folder = Path(run_dir)
    parts = [folder] if (folder / "metrics.jsonl").exists() else []
    if folder.is_dir():
        parts += sorted(
            (path for path in folder.iterdir() if (path / "metrics.jsonl").exists()),
            key=lambda path: (list(STEPS).index(path.name) if path.name in STEPS else len(STEPS), path.name),
        )
    if not parts:
        raise InputError(f"{folder} holds no run: there is no metrics.jsonl in it or in its subfolders")
    name = folder.resolve().name
    numbers = iter(range(10**6))
    sections = [_section(part, numbers) for part in parts]
    links = "".join(f'<a href="#{_anchor(part)}">{_text(_section_title(part))}</a>' for part in parts)
    body = [
        f"<header><h1>{_text(name)}</h1><p class='path'>{_text(folder.resolve())}</p>",
        f"<nav>{links}</nav>" if len(parts) > 1 else "",
        "</header>",
        _summary(folder),
        _settings(folder) if folder not in parts else "",
        *sections,
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{_text(name)} – training report</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    write_text_atomic(folder / "report.html", page)
    return folder / "report.html"


def read_curves(path: str | Path) -> dict[str, Curve]:
    """The curve of every metric in a metrics.jsonl, by name in order of appearance; null becomes NaN."""
    steps: dict[str, dict[int, float]] = {}
    for record in read_jsonl(path):
        for name, value in record.items():
            if name not in ("step", "time"):
                steps.setdefault(name, {})[record["step"]] = math.nan if value is None else value
    return {
        name: Curve(name, sorted(points), [points[step] for step in sorted(points)], name.startswith("eval/"))
        for name, points in steps.items()
    }


def group_of(name: str) -> str:
    """The group of plots that a metric belongs to."""
    return next((title for title, pattern in GROUPS if re.fullmatch(pattern, name)), OTHER)


def _section(folder: Path, numbers) -> str:
    curves = read_curves(folder / "metrics.jsonl")
    grouped = {title: [n for n in curves if group_of(n) == title] for title in [*(g for g, _ in GROUPS), OTHER]}
    parts = [f"<h2>{_text(_section_title(folder))}</h2>", f"<p class='facts'>{_text(_facts(folder))}</p>"]
    parts += [_settings(folder), _figures(curves, grouped)]
    for title, names in grouped.items():
        plots = "".join(_plot_card(group, next(numbers)) for group in _overlay(names, curves))
        if plots:
            content = f"<div class='plots'>{plots}</div>"
            parts.append(_fold(title, content) if title == OTHER else f"<h3>{title}</h3>{content}")
    parts.append(_samples(folder))
    return f"<section id='{_anchor(folder)}'>{''.join(parts)}</section>\n"


def _section_title(folder: Path) -> str:
    """By what trained there, as the summary has it, and by the folder where that says more."""
    name = folder.resolve().name
    summary = folder / "summary.json"
    trainer = _read_json(summary).get("trainer") if summary.exists() else None
    title = TITLES.get(trainer) or STEPS.get(name)
    return title if title and name in (*STEPS, trainer) else f"{name}: {title}" if title else name


def _anchor(folder: Path) -> str:
    return "run-" + re.sub(r"\W+", "-", folder.resolve().name)


def _facts(folder: Path) -> str:
    records = read_jsonl(folder / "metrics.jsonl")
    if not records:
        return "no step was recorded"
    times = [record["time"] for record in records if "time" in record]
    text = f"{max(record['step'] for record in records):,} steps"
    seconds = times[-1] - times[0] if times else 0
    if seconds >= 1:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        text += " in " + (
            f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
        )
        text += " between the first record and the last"
    return text


def _overlay(names: Sequence[str], curves: dict[str, Curve]) -> list[list[Curve]]:
    """Curves that share a plot: a metric with its evaluation, chosen with rejected scores; the others alone."""
    partner = {f"eval/{name}": name for name in names if f"eval/{name}" in names}
    partner |= {second: first for first, second in TOGETHER if first in names and second in names}
    plots = {name: [curves[name]] for name in names if name not in partner}
    for name, first in partner.items():
        plots[partner.get(first, first)].append(curves[name])
    return list(plots.values())


def _plot_card(curves: list[Curve], number: int) -> str:
    colours = [VARIABLES[colour] for colour in SERIES]
    legend = "".join(
        f"<span class='key'><i style='background:var({colour})'></i>{_text(curve.name)}"
        f"<b>{_text(_last(curve))}</b></span>"
        for curve, colour in zip(curves, colours, strict=False)
    )
    lost = sum(math.isnan(value) for curve in curves for value in curve.values)
    note = f"<p class='warning'>{lost} value{'s' * (lost > 1)} not finite</p>" if lost else ""
    label = " and ".join(curve.name for curve in curves)
    svg = draw(curves, number).replace("<svg", f'<svg role="img" aria-label="{_text(label)} by step"', 1)
    return f"<figure><figcaption>{legend}</figcaption>{svg}{note}</figure>"


def _figures(curves: dict[str, Curve], grouped: dict[str, list[str]]) -> str:
    """The table of final figures: main groups in sight, the others folded."""

    def table(names: list[str]) -> str:
        rows = []
        for name in names:
            finite = [value for value in curves[name].values if not math.isnan(value)]
            cells = [_number(finite[0]), _number(min(finite)), _number(max(finite))] if finite else ["–"] * 3
            cells = [_last(curves[name]), *cells, f"{curves[name].steps[-1]:,}"]
            rows.append(f"<tr><th>{_text(name)}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
        head = "".join(f"<td>{title}</td>" for title in ("last", "first", "lowest", "highest", "at step"))
        return (
            "<div class='scroll'><table class='figures'>"
            f"<thead><tr><th>metric</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )

    main = [name for title, names in grouped.items() if title not in FOLDED_FIGURES for name in names]
    rest = [name for title in FOLDED_FIGURES for name in grouped[title]]
    if not main:
        main, rest = rest, []
    if not main:
        return ""
    return "<h3>Final figures</h3>" + table(main) + (_fold("Figures of the other metrics", table(rest)) if rest else "")


def _samples(folder: Path) -> str:
    path = folder / "samples.jsonl"
    records = read_jsonl(path) if path.exists() else []
    if not records:
        return ""
    shown, note = records, ""
    if len(records) > MAX_TABLES:
        picked = {round(i * (len(records) - 1) / (MAX_TABLES - 1)) for i in range(MAX_TABLES)}
        shown = [records[i] for i in sorted(picked)]
        note = f"<p class='facts'>{len(shown)} of {len(records)} tables, evenly spaced; all are in samples.jsonl</p>"
    tables = []
    for place, record in enumerate(shown):
        numeric = [all(_is_number(row[i]) for row in record["rows"]) for i in range(len(record["columns"]))]
        head = "".join(
            f"<th class='{'number' if right else 'words'}'>{_text(column)}</th>"
            for column, right in zip(record["columns"], numeric, strict=True)
        )
        rows = "".join(f"<tr>{''.join(_sample_cell(cell) for cell in row)}</tr>" for row in record["rows"])
        table = f"<table class='samples'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        is_edge = place in (0, len(shown) - 1)  # before and after are what one compares
        tables.append(
            _fold(f"{record['title']} · step {record['step']:,}", f"<div class='scroll'>{table}</div>", is_open=is_edge)
        )
    return f"<h3>Samples</h3>{_over_time(records)}{note}{''.join(tables)}"


def _over_time(records: list[dict]) -> str:
    """Answers to the same held-out prompts side by side: a row per prompt, a column per evaluation, with its score."""
    wanted = {"prompt", "response", "score"}
    known = [r for r in records if r["title"] == HELD_OUT and wanted <= set(r["columns"])]
    if len(known) < 2:
        return ""
    picked = sorted({round(i * (len(known) - 1) / (MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)})
    shown = [known[i] for i in picked]
    rows: dict[str, list[str]] = {}
    for place, record in enumerate(shown):
        at = {name: record["columns"].index(name) for name in wanted}
        for row in record["rows"]:
            cells = rows.setdefault(str(row[at["prompt"]]), ["–"] * len(shown))
            score = row[at["score"]]
            score = "" if score is None else f"<span class='facts'> ({_text(_number(score))})</span>"
            cells[place] = f"{_text(row[at['response']])}{score}"
    head = "".join(f"<th class='words'>step {r['step']:,}</th>" for r in shown)
    body = "".join(
        f"<tr><td><div class='text'>{_text(prompt)}</div></td>"
        + "".join(f"<td><div class='text'>{cell}</div></td>" for cell in cells)
        + "</tr>"
        for prompt, cells in rows.items()
    )
    table = f"<table class='samples'><thead><tr><th>prompt</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _fold("answers across time (score)", f"<div class='scroll'>{table}</div>", is_open=True)


def _sample_cell(cell) -> str:
    if _is_number(cell):
        return f"<td class='number'>{_text(_number(cell))}</td>"
    return f"<td><div class='text'>{'–' if cell is None else _text(cell)}</div></td>"


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _summary(folder: Path) -> str:
    path = folder / "summary.json"
    if not path.exists():
        return ""
    flat = _flatten(_read_json(path))
    tiles = "".join(
        f"<div class='tile'><span>{_text(name)}</span><b>{_text(_number(value))}</b></div>"
        for name, value in flat.items()
        if _is_number(value)
    )
    return f"<div class='tiles'>{tiles}</div>" if tiles else ""


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON; delete it or write it anew") from error


def _flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _settings(folder: Path) -> str:
    path = folder / "config.yaml"
    return _fold("Settings", f"<pre>{_text(path.read_text(encoding='utf-8'))}</pre>") if path.exists() else ""


def _fold(title: str, content: str, is_open: bool = False) -> str:
    state = ' open="open"' if is_open else ""
    return f"<details{state}><summary>{_text(title)}</summary>{content}</details>"


def _last(curve: Curve) -> str:
    return _number(curve.values[-1])


def _number(value: float) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "not finite"
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,.1f}" if 1e4 <= abs(value) < 1e9 else format_number(float(value))


def _text(value: object) -> str:
    """Escaped for HTML, without the control characters that XML forbids."""
    return html.escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", str(value)))


CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --muted: #667080; --line: #e3e6eb;
  --first: #2563c9; --second: #d9730d; --third: #2a8f5b; --alert: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1d2026; --ink: #e7e9ee; --muted: #98a1b0;
  --line: #31363f; --first: #6ea0f5; --second: #f0a35b; --third: #62c794; --alert: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 40px 0 0; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 26px 0 10px; }
.path, .facts { color: var(--muted); margin: 2px 0 12px; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0; }
nav a { color: var(--first); text-decoration: none; padding: 3px 12px; border: 1px solid var(--line);
  border-radius: 99px; background: var(--card); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 10px; margin: 16px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
.tile span { display: block; color: var(--muted); font-size: 12.5px; overflow-wrap: anywhere; }
.tile b { font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 12px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 12px 6px; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin-bottom: 4px; }
.key { display: inline-flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.key i { width: 10px; height: 10px; border-radius: 3px; flex: none; }
.key b { font-weight: 600; font-variant-numeric: tabular-nums; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit; }
.warning { color: var(--alert); font-size: 12.5px; margin: 2px 0 4px; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 10px 0;
  padding: 0 14px; }
summary { cursor: pointer; padding: 9px 0; font-weight: 600; font-size: 14px; }
details > :last-child:not(summary) { margin-bottom: 14px; }
details figure { background: var(--page); }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
thead th, thead td { color: var(--muted); font-weight: 500; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
.figures { background: var(--card); }
section > .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.figures td, .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures th { font-weight: 500; }
.samples .text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 70px; max-height: 240px; overflow-y: auto; }
"""
