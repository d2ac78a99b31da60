"""Results as tables and plots: on the console after a run, and all of them in one document."""

import json
from pathlib import Path
from typing import Any

from jaxrlhf.bench.settings import SECTIONS
from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.errors import InputError

COLUMNS = (
    "section",
    "batch",
    "median s",
    "min s",
    "tokens/s",
    "seq/s",
    "TFLOP/s",
    "GB/s",
    "roofline",
    "GiB",
    "compile s",
)
OURS, PEER = "#3366aa", "#cc7722"
BEGIN, END = "<!-- results: written by `jaxrlhf bench --render` -->", "<!-- end of results -->"
COMPILED = "kernels_aot"  # what benchmarks/kernels_aot.py writes
ONE_OFF = {
    "continuous_batching": "continuous batching: tokens/s over those of fixed batches",
    "decode": "generation: seconds over those of a hand-written loop",
}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _row(name: str, record: dict[str, Any]) -> list[str]:
    memory = record.get("peak_memory")
    values = (record["seconds"]["median"], record["seconds"]["min"], record["tokens_per_second"])
    values += (record["sequences_per_second"], record["tflops"], record["gb_per_second"])
    return [
        name,
        str(record["batch"]),
        *map(_number, values),
        f"{100 * record['roofline_fraction']:.1f} %",
        _number(memory["bytes"] / 2**30 if memory else None),
        _number(record.get("compile_seconds")),
    ]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """A line per section and batch; parts of a section below its own line."""
    rows = []
    for name in SECTIONS:
        for record in result.get(name, {}).get("sweep", []):
            parts = record.get("parts", {})
            if parts:
                memory = {"peak_memory": record["peak_memory"]}
                rows += [_row(f"{name} {part}", figures | memory) for part, figures in parts.items()]
                continue
            rows.append(_row(name, record))
            rows += [_row(f"- {phase}", figures) for phase, figures in record.get("phases", {}).items()]
    return rows


def peer_rows(result: dict[str, Any]) -> list[list[str]]:
    """section, batch, peer, its fastest run, ratio by minima, by medians."""
    rows = []
    for name in SECTIONS:
        for record in result.get(name, {}).get("sweep", []):
            for peer, found in record.get("peers", {}).items():
                for part, figures in {name: found, **{f"- {p}": f for p, f in found.get("phases", {}).items()}}.items():
                    rows.append([part, str(record["batch"]), peer, *_peer_cells(figures)])
    return rows


def _peer_cells(found: dict[str, Any]) -> list[str]:
    if "skipped" in found:
        return [found["skipped"], "", ""]
    return [_number(found["seconds"]["min"]), f"{found['ratio']:.2f}", f"{found['ratio_median']:.2f}"]


PEER_COLUMNS = ("section", "batch", "peer", "its min s", "ratio", "by medians")


def _aligned(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]

    def line(cells: tuple[str, ...] | list[str]) -> str:
        first, *others = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        return "  ".join([first, *others])

    return "\n".join(map(line, [columns, *rows]))


def table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    text = _aligned(COLUMNS, rows_of(result))
    peers = peer_rows(result)
    if peers:
        text += "\n\npeer seconds / ours (above 1: ours is faster)\n" + _aligned(PEER_COLUMNS, peers)
    for name in SECTIONS:
        if stopped := result.get(name, {}).get("stopped"):
            text += f"\n{name}: batch {stopped['batch']} does not fit the memory"
    return text


def _markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(columns), rule, *rows])


def render(results: Path, document: Path) -> int:
    """Write every result in `results` into `document` (between its two markers); returns how many there are.

    Raises InputError when there is none, one is no JSON object, or the document lacks the markers.
    """
    found = {path: _read(path) for path in sorted(results.glob("*.json"))}
    runs = {path: result for path, result in found.items() if "format" in result}
    ratios = {path: result for path, result in found.items() if path.stem in ONE_OFF}
    if not runs:
        raise InputError(f"results: {results} holds no result of `jaxrlhf bench`; measure first")
    text = document.read_text(encoding="utf-8") if document.is_file() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise InputError(f"document: {document} lacks the lines {BEGIN!r} and {END!r} that results go between")
    parts = [section(path, result, document) for path, result in runs.items()]
    if ratios:
        rows = [
            [ONE_OFF[path.stem], f"{r['ratio']:.2f}", r["device"], _origin(r), f"`{r['command']}`"]
            for path, r in ratios.items()
        ]
        columns = ("what", "ratio", "device", "measured at", "command")
        parts.append("### Single comparisons\n\n" + _markdown(columns, rows))
    parts += [kernel_section(result) for path, result in found.items() if path.stem == COMPILED]
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_text_atomic(document, head + "\n\n" + "\n\n".join(parts) + "\n\n" + tail)
    return len(parts) - bool(ratios) + len(ratios)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"results: {path} is not valid JSON ({error}); measure it again, or delete it") from error
    if not isinstance(result, dict):
        raise InputError(f"results: {path} holds no JSON object, so no result; move it elsewhere")
    return result


def _origin(result: dict[str, Any]) -> str:
    """Commit, day and how busy the machine was, as far as the result says."""
    commit, _, changes = result["commit"].partition(" ")
    words = [f"commit `{commit[:10]}`{f' {changes}' if changes else ''}"]
    if "time" in result:
        words.append(result["time"][:10])
    load = result.get("load_average")
    if isinstance(load, dict):
        words.append("load average " + ", ".join(f"{value:.1f} {when}" for when, value in load.items()))
    elif load is not None:
        words.append(f"load average {load:.1f} at the end")
    return ", ".join(words)


def kernel_section(result: dict[str, Any]) -> str:
    """Registers and spills of every kernel on every device that it was compiled for."""
    devices = list(dict.fromkeys(row["device"] for row in result["kernels"]))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["kernels"]:
        figures = "compiles" if row["registers"] is None else f"{row['registers']} / {row['spilled']}"
        cells.setdefault((row["kernel"], row["shape"]), {})[row["device"]] = figures
    rows = [[f"`{kernel}`", shape, *(found.get(d, "") for d in devices)] for (kernel, shape), found in cells.items()]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            "### Kernels compiled ahead of time",
            "",
            "bfloat16 where no other dtype is named; registers per thread / bytes spilled, as ptxas reports them; for "
            "a TPU, that Mosaic compiles the kernel. No device was present; these are no timings. "
            f"{versions}; {_origin(result)}.",
            "",
            f"`{result['command']}`",
            "",
            _markdown(("kernel", "shape", *devices), sorted(rows)),
        ]
    )


def section(path: Path, result: dict[str, Any], document: Path) -> str:
    """One run: where and how it was measured, its tables and its plot."""
    s, peaks = result["settings"], result["peaks"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "jaxlib")
    lines = [
        f"### {result['device']}: {', '.join(n for n in SECTIONS if n in result)} ({s['actor']}, {s['critic']})",
        "",
        f"Prompt {s['prompt']} + answer {s['answer']} tokens, {peaks['matmul'].split()[-1]}; {s['repeats']} runs each. "
        f"Measured peaks: {_number(peaks['tflops'])} TFLOP/s ({peaks['matmul']}), "
        f"{_number(peaks['gb_per_second'])} GB/s ({peaks['copy']} copied). {versions}; {_origin(result)}.",
        "",
        *([f"The run ended early: {result['ended_by']}.", ""] if "ended_by" in result else []),
        f"`{result['command']}`",
        "",
        _markdown(COLUMNS, rows_of(result)),
    ]
    peers = peer_rows(result)
    if peers:
        lines += ["", "Peer seconds / ours; above 1, ours is faster.", "", _markdown(PEER_COLUMNS, peers)]
        for check in peer_checks(result):
            lines += _check_lines(check)
    figure = document.parent / document.stem / f"{path.stem}.svg"
    draw(result, figure)
    return "\n".join([*lines, "", f"![]({figure.relative_to(document.parent).as_posix()})"])


def peer_checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """How ours and the peers' results compare, as the sections say; the same is said once."""
    records = [record for name in SECTIONS for record in result.get(name, {}).get("sweep", [])]
    found = [peer["check"] for record in records for peer in record.get("peers", {}).values() if "check" in peer]
    return [check for i, check in enumerate(found) if check not in found[:i]]


def _check_lines(check: dict[str, Any]) -> list[str]:
    first = ", ".join(f"{name} {gap:.1e}" for name, gap in check["first"].items())
    after = ", ".join(f"{name} {gap:.1e}" for name, gap in check["after_a_step"].items())
    return ["", f"Gaps between both on the same rollout: {first}; after one optimizer step: {after}."]


def save_svg(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as an SVG that is the same each time, without blanks at the ends of its lines."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def draw(result: dict[str, Any], path: Path) -> None:
    """A plot as SVG: share of the roofline by section, and seconds beside those of the peers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}):
        figure = Figure(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_roofline(left, result)
        _draw_peers(right, result)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        save_svg(figure, path)


def _draw_roofline(axes: Any, result: dict[str, Any]) -> None:
    for name in SECTIONS:
        records = result.get(name, {}).get("sweep", [])
        if records:
            shares = [100 * record["roofline_fraction"] for record in records]
            axes.plot([record["batch"] for record in records], shares, "o-", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_ylabel("% of the roofline")
    axes.legend(frameon=False)


def _draw_peers(axes: Any, result: dict[str, Any]) -> None:
    """Seconds of the phases of an iteration at its best batch, or sequences/s where there is none."""
    record = result.get("ppo")
    if record is None:
        for name in SECTIONS:
            records = result.get(name, {}).get("sweep", [])
            if records:
                axes.plot(
                    [r["batch"] for r in records], [r["sequences_per_second"] for r in records], "o-", markersize=4
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("batch")
        axes.set_ylabel("sequences/s")
        return
    bars = {"ours": {phase: figures["seconds"]["min"] for phase, figures in record["phases"].items()}}
    for peer, found in record["peers"].items():
        if "phases" in found:
            bars[peer] = {phase: figures["seconds"]["min"] for phase, figures in found["phases"].items()}
        elif "seconds" in found:
            bars[peer] = {"iteration": found["seconds"]["min"]}
    colours = {"generate": "#3366aa", "score": "#66aa88", "train": "#cc7722", "iteration": "#888888"}
    for name, phases in bars.items():
        start = 0.0
        for phase, seconds in phases.items():
            axes.barh(name, seconds, left=start, color=colours[phase], label=phase)
            start += seconds
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds of an iteration, batch {record['batch']}")
