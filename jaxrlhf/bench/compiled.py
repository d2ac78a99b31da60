"""Programs that were compiled for absent devices (benchmarks/compiled_programs.py), as tables and in the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrlhf.bench.record import Record
from jaxrlhf.plan.settings import PROGRAMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPILED = "compiled"
"""Name of the result, without its ending."""
BEFORE, NOW = "before", "now"
DEFAULT = "default"
"""The variant with the settings that a run has by default."""
COLUMNS = ("device, settings", "program", "GB read", "GB written", "kernels", "launches", "copies", "peak GiB", "s")
COLOURS = {"generate": "#3366aa", "score": "#66aa88", "train": "#cc7722"}


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def table_rows(result: Record, workload: str) -> list[list[str]]:
    """Rows of COLUMNS for the models of a workload, those of before above those of now."""
    order = {BEFORE: 0, NOW: 2}
    rows = sorted(
        (row for row in result["rows"] if row["workload"] == workload),
        key=lambda row: (row["device"], row["variant"], PROGRAMS.index(row["program"]), order.get(row["label"], 1)),
    )
    cells = []
    for row in rows:
        sizes = (row[name] / 1e9 for name in ("read", "written"))
        counts = (row[name] for name in ("kernels", "launched", "copies"))
        cells.append(
            [
                f"{row['device']}, {row['variant']}, {row['label']}",
                row["program"],
                *map(_thousands, (*sizes, *counts)),
                f"{row['peak_bytes'] / 2**30:.1f}",
                f"{row['seconds']:.3f}",
            ]
        )
    return cells


def seconds(result: Record, workload: str, device: str, label: str) -> Mapping[str, float] | None:
    """Estimated seconds of each program with default settings; None where a program has no row."""
    found = {
        row["program"]: row["seconds"]
        for row in result["rows"]
        if (row["workload"], row["device"], row["label"], row["variant"]) == (workload, device, label, DEFAULT)
    }
    return found if set(found) == set(PROGRAMS) else None


def decode_rows(result: Record) -> list[list[str]]:
    """Gigabytes of an average step of decoding: workload, device and variant, before and now."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in result["rows"]:
        if row["program"] == "generate":
            key = row["workload"], row["device"], row["variant"]
            cells.setdefault(key, {})[row["label"]] = f"{row['decoded'] / row['steps'] / 1e9:.2f}"
    return [[", ".join(key), found.get(BEFORE, ""), found.get(NOW, "")] for key, found in sorted(cells.items())]


def bars(result: Record) -> dict[str, list[tuple[str, Mapping[str, float]]]]:
    """By device: the limit, and the estimates of now and before, of the workload with all programs."""
    found: dict[str, list[tuple[str, Mapping[str, float]]]] = {}
    for workload, devices in result["limits"].items():
        for device, limit in devices.items():
            estimates = [(label, seconds(result, workload, device, label)) for label in (NOW, BEFORE)]
            if set(limit) == set(PROGRAMS):
                known = [(label, values) for label, values in estimates if values is not None]
                found[device] = [("limit", limit), *known]
    return found


def draw_bars(axes: "Axes", groups: Sequence[tuple[str, Mapping[str, float]]], title: str, unit: str) -> None:
    """One bar for each group, its phases side by side, with its sum."""
    for i, (_, phases) in enumerate(groups):
        start = 0.0
        for phase, length in phases.items():
            axes.barh(i, length, left=start, color=COLOURS[phase], label=phase)
            start += length
        axes.text(start, i, f" {start:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)


def measured_bars(result: Record) -> list[tuple[str, Mapping[str, float]]]:
    """The limit, our fastest run and those of the peers, of the largest batch of a measured iteration."""
    record = result["ppo"]
    groups: list[tuple[str, Mapping[str, float]]] = [
        ("limit", {name: x["roofline_seconds"] for name, x in record["phases"].items()})
    ]
    groups.append(("ours", {name: x["seconds"]["min"] for name, x in record["phases"].items()}))
    names = {"hf": "PyTorch"}
    for peer, found in record["peers"].items():
        if "phases" in found:
            phases = {name: x["seconds"]["min"] for name, x in found["phases"].items()}
            groups.append((names.get(str(peer), str(peer)), phases))
    return groups


def draw_overview(compiled: Record, measured: Record | None, path: Path) -> None:
    """The picture of the document's head: estimates from compiled programs, and beside them what was measured."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from jaxrlhf.bench.render import save_svg

    groups = bars(compiled)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}):
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        count = len(groups) + (measured is not None)
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        for place, (device, found) in zip(axes, groups.items(), strict=False):
            draw_bars(place, found, f"{device}: compiled, estimated", "seconds of an iteration")
        if measured is not None:
            draw_bars(axes[-1], measured_bars(measured), f"{measured['device']}: measured", "seconds of an iteration")
        handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside lower center", ncols=3, fontsize=8)
        save_svg(figure, path)
