"""What `jaxrlhf plan` says: tables on the console, all figures as JSON, a picture of memory over an iteration."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxrlhf.config import to_dict
from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.plan.compile import Compiled
from jaxrlhf.plan.cost import RunCost
from jaxrlhf.plan.devices import GIB
from jaxrlhf.plan.memory import ProgramMemory
from jaxrlhf.plan.programs import PROGRAMS, System
from jaxrlhf.plan.search import Nearest
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.runs.console import Console

PHASES = {"generate": ("flip", "prefill", "decode"), "score": ("score",), "train": ("train",)}
# Items of one kind share a colour, whichever program has them.
KINDS = {
    "models": ("actor", "critic", "reference", "reward", "ema"),
    "optimizer": ("actor_optimizer", "critic_optimizer"),
    "weight copies": (
        "generation weights",
        "weights on the move",
        "merged adapters",
        "working copies",
        "gathered layer weights",
    ),
    "gradients": ("gradients", "gradient layout copies"),
    "KV cache": ("KV cache", "KV cache of the prompt"),
}
REST = "activations and scratch"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that was found out about the asked setting."""

    config: PlanConfig
    system: System
    programs: dict[str, ProgramMemory]
    cost: RunCost
    capacity: int
    host_bytes: int
    """Of host memory, per device."""
    nearest: Nearest | None = None
    """A setting that fits these devices, when the asked one does not."""
    larger: Nearest | None = None
    """One that fits more devices, when on these nothing fits that trains the same."""
    compiled: dict[str, Compiled] | None = None

    @property
    def peak(self) -> int:
        return max(program.bytes_per_device for program in self.programs.values())

    @property
    def problems(self) -> list[str]:
        """What the compiler found wrong, and programs that it shows to be too large."""
        found = []
        for name, compiled in (self.compiled or {}).items():
            found += [f"{name}: {problem}" for problem in compiled.problems]
            beside = sum(self.programs[name].resident.values())
            needed = compiled.bytes - self.programs[name].shared
            if not compiled.problems and needed + beside > self.capacity:
                found.append(
                    f"{name}: the compiled program needs {gib(needed)} GiB beside {gib(beside)} GiB of other "
                    f"arrays, more than the {gib(self.capacity)} GiB that a device offers"
                )
        return found

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and not self.problems


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _items(program: ProgramMemory) -> dict[str, int]:
    return program.arguments | program.temporaries | {"outputs": program.outputs} | program.resident


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; sizes are bytes on one device, times are seconds by the roofline."""
    shape = plan.system.mesh.shape
    result: dict[str, Any] = {
        "fits": plan.fits,
        "capacity_bytes": plan.capacity,
        "peak_bytes_per_device": plan.peak,
        "host_bytes_per_device": plan.host_bytes,
        "mesh": dict(shape),
        "generate_tensor_parallel": plan.system.generate_tensor,
        "rollout_rows": plan.system.rows,
    }
    for name in PROGRAMS:
        program, phases = plan.programs[name], PHASES[name]
        result[name] = {
            "bytes_per_device": program.bytes_per_device,
            "program_bytes": program.program_bytes,
            "compiler_bytes": program.compiler_bytes,
            "arguments": program.arguments,
            "temporaries": program.temporaries,
            "outputs": program.outputs,
            "resident": program.resident,
            "seconds": sum(plan.cost.seconds[phase] for phase in phases),
            "phases": {
                phase: {
                    "flops": plan.cost.phases[phase].flops,
                    "memory_bytes": plan.cost.phases[phase].bytes,
                    "link_bytes": plan.cost.phases[phase].links,
                    "host_bytes": plan.cost.phases[phase].host,
                    "seconds": plan.cost.seconds[phase],
                }
                for phase in phases
            },
        }
        if plan.compiled is not None:
            compiled = plan.compiled[name]
            result[name]["compiler"] = dataclasses.asdict(compiled) | {"bytes": compiled.bytes}
    cost = plan.cost
    result |= {
        "seconds_per_iteration": cost.seconds_per_iteration,
        "tokens_per_second": cost.tokens_per_second,
        "sequences_per_second": cost.sequences_per_second,
        "iterations": cost.iterations,
        "hours": cost.hours,
        "cost": cost.cost,
        "nearest": _nearest(plan.nearest),
        "nearest_with_more_devices": _nearest(plan.larger),
        "problems": plan.problems,
        "device": dataclasses.asdict(plan.config.accelerator),
        "settings": to_dict(plan.config),
    }
    return result


def _nearest(found: Nearest | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"flags": found.flags, "changes": list(found.reasons), "bytes_per_device": found.bytes_per_device}


def write_json(plan: Plan, path: str) -> None:
    write_text_atomic(path, json.dumps(as_dict(plan), indent=2) + "\n")


def show(plan: Plan, console: Console) -> None:
    """Print the tables and the verdict."""
    config, device = plan.config, plan.config.accelerator
    mesh = " × ".join(f"{name} {size}" for name, size in plan.system.mesh.shape.items())
    slices = f" ({plan.config.shape})" if plan.config.shape else ""
    console.print(
        f"{config.actor} + {config.reward} on {config.devices} × {device.name}{slices}: mesh {mesh}, generation split "
        f"over {plan.system.generate_tensor}, {plan.system.rows} rows of {plan.system.length} tokens per iteration"
    )
    items: dict[str, dict[str, int]] = {}
    for name in PROGRAMS:
        for item, size in _items(plan.programs[name]).items():
            items.setdefault(item, {})[name] = size
    ordered = sorted(items.items(), key=lambda entry: -max(entry[1].values()))
    rows = [[item, *(gib(sizes[n]) if sizes.get(n) else "-" for n in PROGRAMS)] for item, sizes in ordered]
    rows = [row for row in rows if any(cell not in ("-", "0.00") for cell in row[1:])]
    rows.append(["sum", *(gib(plan.programs[n].bytes_per_device) for n in PROGRAMS)])
    if plan.compiled is not None:
        rows.append(["program, estimated", *(gib(plan.programs[n].compiler_bytes) for n in PROGRAMS)])
        rows.append(["program, compiled", *(gib(plan.compiled[n].bytes) for n in PROGRAMS)])
    console.table(f"GiB per device while it runs (of {gib(plan.capacity)} usable)", ["item", *PROGRAMS], rows)
    phases = [phase for name in PROGRAMS for phase in PHASES[name]]
    work = plan.cost.phases
    console.table(
        "one iteration, per device",
        ["phase", "TFLOP", "GB memory", "GB links", "GB host", "seconds"],
        [
            [
                phase,
                work[phase].flops / 1e12,
                work[phase].bytes / 1e9,
                work[phase].links / 1e9,
                work[phase].host / 1e9,
                plan.cost.seconds[phase],
            ]
            for phase in phases
        ],
    )
    cost = plan.cost
    price = f", cost {cost.cost:,.2f}" if config.price_per_device_hour else ""
    console.print(
        f"{cost.seconds_per_iteration:.3g} s per iteration at {config.roofline_share:.0%} of the roofline, "
        f"{cost.tokens_per_second:,.0f} tokens/s; {cost.iterations} iterations in {cost.hours:.2f} h{price}"
    )
    if plan.host_bytes:
        console.print(f"host memory: {gib(plan.host_bytes * device.devices_per_host)} GiB per host")
    for line in verdict(plan):
        console.print(line)


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, and what would."""
    if plan.fits:
        return [f"fits: {gib(plan.peak)} of {gib(plan.capacity)} GiB per device"]
    lines = [f"does not fit: {gib(plan.peak)} of {gib(plan.capacity)} GiB per device"]
    if plan.nearest is not None:
        lines.append(f"nearest setting that fits ({gib(plan.nearest.bytes_per_device)} GiB): {plan.nearest.flags}")
        lines += [f"  {reason}" for reason in plan.nearest.reasons]
    elif plan.peak > plan.capacity:
        lines.append(f"no setting fits {plan.config.devices} × {plan.config.accelerator.name}")
    if plan.larger is not None:
        lines.append(f"with more devices ({gib(plan.larger.bytes_per_device)} GiB): {plan.larger.flags}")
    return lines


def by_kind(program: ProgramMemory) -> dict[str, int]:
    """Bytes by the kinds of the picture."""
    totals = dict.fromkeys((*KINDS, REST), 0)
    kind_of = {item: kind for kind, items in KINDS.items() for item in items}
    for item, size in _items(program).items():
        base = item.removesuffix(" on the device")
        totals[kind_of.get(base, REST)] += size
    return totals


def draw(plan: Plan, path: str) -> None:
    """Memory per device over one iteration: a column per program, as wide as the time that it takes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    canvas = FigureCanvasSVG(figure) if path.endswith(".svg") else FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kinds = {name: by_kind(plan.programs[name]) for name in PROGRAMS}
    left = 0.0
    starts, widths = [], []
    for name in PROGRAMS:
        width = sum(plan.cost.seconds[phase] for phase in PHASES[name])
        starts.append(left)
        widths.append(width)
        left += width
    floor = [0.0] * len(PROGRAMS)
    for kind in (*KINDS, REST):
        heights = [kinds[name][kind] / GIB for name in PROGRAMS]
        if any(heights):
            axes.bar(starts, heights, widths, floor, align="edge", label=kind, edgecolor="white", linewidth=0.6)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    axes.axhline(plan.capacity / GIB, color="black", linestyle="--", linewidth=1)
    axes.annotate("usable", (left, plan.capacity / GIB), ha="right", va="bottom", fontsize=8)
    for name, start, width, top in zip(PROGRAMS, starts, widths, floor, strict=True):
        axes.annotate(name, (start + width / 2, top), ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("seconds of one iteration")
    axes.set_ylabel("GiB per device")
    axes.set_xlim(0, left)
    axes.set_ylim(0, 1.15 * max(*floor, plan.capacity / GIB))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{plan.config.actor} + {plan.config.reward}, {plan.config.devices} × {plan.config.device}", fontsize=9
    )
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.print_figure(path, dpi=150)
