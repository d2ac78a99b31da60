"""Results as tables and plots: on the console after a run, and all of them in one document."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrlhf.bench import compiled
from jaxrlhf.bench.record import Record
from jaxrlhf.bench.settings import SECTIONS
from jaxrlhf.config.files import read_json, write_text_atomic
from jaxrlhf.config.settings import errors_in
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import Console

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("section", "batch", "median s", "min s", "tokens/s", "seq/s", "TFLOP/s", "GB/s")
COLUMNS += ("roofline", "GiB", "compile s")
PEER_COLUMNS = ("section", "batch", "peer", "its min s", "ratio", "by medians")
COLOURS = compiled.COLOURS | {"iteration": "#888888"}
BEGIN, END = "<!-- results: written by `jaxrlhf bench --render` -->", "<!-- end of results -->"
KERNELS = "kernels_aot"  # what benchmarks/kernels_aot.py writes
PICTURED = "ppo_cpu"  # the measured iteration of the document's first picture
ONE_OFF = {
    "continuous_batching": "continuous batching: tokens/s over those of fixed batches",
    "decode": "generation: seconds over those of a hand-written loop",
}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _swept(result: Record) -> Iterator[tuple[str, list[Record]]]:
    """Sections with the records of all their batches."""
    for name in SECTIONS:
        if records := result.get(name, {}).get("sweep"):
            yield name, records


def _row(name: str, record: Record) -> list[str]:
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


def rows_of(result: Record) -> list[list[str]]:
    """A line per section and batch; parts of a section below its own line."""
    rows = []
    for name, records in _swept(result):
        for record in records:
            if "parts" in record:
                memory = {"peak_memory": record["peak_memory"]}
                rows += [_row(f"{name} {part}", found | memory) for part, found in record["parts"].items()]
                continue
            rows.append(_row(name, record))
            rows += [_row(f"- {phase}", found) for phase, found in record.get("phases", {}).items()]
    return rows


def peer_rows(result: Record) -> list[list[str]]:
    """Rows of PEER_COLUMNS; phases of an iteration below its own line."""
    rows = []
    for name, records in _swept(result):
        for record in records:
            for peer, found in record.get("peers", {}).items():
                phases = {f"- {phase}": of_phase for phase, of_phase in found.get("phases", {}).items()}
                for part, of_part in ({name: found} | phases).items():
                    rows.append([part, str(record["batch"]), peer, *_peer_cells(of_part)])
    return rows


def _peer_cells(found: Record) -> list[str]:
    if "skipped" in found:
        return [found["skipped"], "", ""]
    return [_number(found["seconds"]["min"]), f"{found['ratio']:.2f}", f"{found['ratio_median']:.2f}"]


def show(result: Record) -> None:
    """Print the tables of a result."""
    console = Console(stream=sys.stdout)
    console.table("measured", COLUMNS, rows_of(result))
    if peers := peer_rows(result):
        console.table("peer seconds / ours (above 1: ours is faster)", PEER_COLUMNS, peers)
    for name in SECTIONS:
        if stopped := result.get(name, {}).get("stopped"):
            console.print(f"{name}: batch {stopped['batch']} does not fit the memory")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(columns), rule, *rows])


def render(results: Path, document: Path) -> int:
    """Write every result in `results` into `document` (between its two markers); returns how many there are.

    Raises InputError when there is none, one is no JSON object, or the document lacks the markers.
    """
    with errors_in("results"):
        remedy = "measure it again, or move it elsewhere"
        found = {path: read_json(path, remedy) for path in sorted(results.glob("*.json"))}
    runs = {path: result for path, result in found.items() if "format" in result}
    ratios = {path: result for path, result in found.items() if path.stem in ONE_OFF}
    if not runs:
        raise InputError(f"results: {results} holds no result of `jaxrlhf bench`; measure first")
    text = document.read_text(encoding="utf-8") if document.is_file() else f"# Benchmarks\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise InputError(f"document: {document} lacks the lines {BEGIN!r} and {END!r} that results go between")
    parts = [_rendered(path, result, document) for path, result in runs.items()]
    if ratios:
        rows = [
            [ONE_OFF[path.stem], f"{r['ratio']:.2f}", r["device"], _origin(r), f"`{r['command']}`"]
            for path, r in ratios.items()
        ]
        columns = ("what", "ratio", "device", "measured at", "command")
        parts.append("### Single comparisons\n\n" + _markdown(columns, rows))
    programs = next((result for path, result in found.items() if path.stem == compiled.COMPILED), None)
    if programs is not None:
        parts.insert(0, program_section(programs))
        measured = next((result for path, result in runs.items() if path.stem == PICTURED), None)
        compiled.draw_overview(programs, measured, document.parent / document.stem / "overview.svg")
    parts += [kernel_section(result) for path, result in found.items() if path.stem == KERNELS]
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_text_atomic(document, head + "\n\n" + "\n\n".join(parts) + "\n\n" + tail)
    return len(parts) - bool(ratios) + len(ratios)  # a section of ratios has a line for each


def _rendered(path: Path, result: Record, document: Path) -> str:
    """The section of a result. Raises InputError for a file that `jaxrlhf bench` has not written so."""
    try:
        return section(path, result, document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(
            f"results: {path} is not as `jaxrlhf bench` writes it ({what:.200}); measure it again"
        ) from error


def _origin(result: Record) -> str:
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


def program_section(result: Record) -> str:
    """Bytes, kernels and estimated time of the programs that were compiled for absent devices."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "### Compiled programs",
        "",
        "No device was present: these are counts in the compiler's output, and estimates from them, no timings. 64 "
        "rows of 256 + 256 tokens, bfloat16, micro-batches of 8. *before* is commit "
        f"`{_commit(result, compiled.BEFORE)}`, *now* `{_commit(result, compiled.NOW)}`. {versions}; "
        f"{_origin(result)}.",
        "",
        f"`{result['command']}`",
        "",
        "GB that an average step of decoding reads and writes:",
        "",
        _markdown(("models, device, settings", compiled.BEFORE, compiled.NOW), compiled.decode_rows(result)),
    ]
    for workload in dict.fromkeys(row["workload"] for row in result["rows"]):
        lines += ["", f"{workload}:", "", _markdown(compiled.COLUMNS, compiled.table_rows(result, workload))]
    return "\n".join(lines)


def _commit(result: Record, label: str) -> str:
    return next((row["commit"][:10] for row in result["rows"] if row["label"] == label), "-")


def kernel_section(result: Record) -> str:
    """Registers and spills of every kernel on every device that it was compiled for."""
    devices = list(dict.fromkeys(row["device"] for row in result["kernels"]))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in result["kernels"]:
        cell = "compiles" if row["registers"] is None else f"{row['registers']} / {row['spilled']}"
        cells.setdefault((row["kernel"], row["shape"]), {})[row["device"]] = cell
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


def section(path: Path, result: Record, document: Path) -> str:
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


def peer_checks(result: Record) -> list[Record]:
    """Comparisons of our results with the peers', each once."""
    peers = (peer for _, records in _swept(result) for r in records for peer in r.get("peers", {}).values())
    found = [peer["check"] for peer in peers if "check" in peer]
    return [check for i, check in enumerate(found) if check not in found[:i]]


def _check_lines(check: Record) -> list[str]:
    first = ", ".join(f"{name} {gap:.1e}" for name, gap in check["first"].items())
    after = ", ".join(f"{name} {gap:.1e}" for name, gap in check["after_a_step"].items())
    return ["", f"Gaps between both on the same rollout: {first}; after one optimizer step: {after}."]


def save_svg(figure: "Figure", path: Path) -> None:
    """Write a matplotlib figure as an SVG that is the same each time, without blanks at the ends of its lines."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
    text = path.read_text(encoding="utf-8")
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n", encoding="utf-8")


def draw(result: Record, path: Path) -> None:
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


def _draw_roofline(axes: "Axes", result: Record) -> None:
    for name, records in _swept(result):
        shares = [100 * record["roofline_fraction"] for record in records]
        axes.plot([record["batch"] for record in records], shares, "o-", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch")
    axes.set_ylabel("% of the roofline")
    axes.legend(frameon=False)


def _draw_peers(axes: "Axes", result: Record) -> None:
    """Seconds of the phases of an iteration at its best batch, or sequences/s without iterations."""
    record = result.get("ppo")
    if record is None:
        for _, records in _swept(result):
            rates = [r["sequences_per_second"] for r in records]
            axes.plot([r["batch"] for r in records], rates, "o-", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("batch")
        axes.set_ylabel("sequences/s")
        return
    bars = {"ours": record["phases"]}
    for peer, found in record["peers"].items():
        if "seconds" in found:
            bars[peer] = found.get("phases", {"iteration": found})
    for name, phases in bars.items():
        start = 0.0
        for phase, found in phases.items():
            seconds = found["seconds"]["min"]
            axes.barh(name, seconds, left=start, color=COLOURS[phase], label=phase)
            start += seconds
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds of an iteration, batch {record['batch']}")
