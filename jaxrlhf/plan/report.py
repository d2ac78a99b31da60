"""Output of `jaxrlhf plan`: tables on the console, all numbers as JSON, a plot of memory over an iteration."""

import dataclasses
from itertools import accumulate
from pathlib import Path

from jaxrlhf.config import to_dict
from jaxrlhf.models import count_params, param_shapes
from jaxrlhf.plan.compile import Compiled
from jaxrlhf.plan.cost import RunCost
from jaxrlhf.plan.devices import GIB
from jaxrlhf.plan.memory import ProgramMemory
from jaxrlhf.plan.roofline import active_params
from jaxrlhf.plan.search import Nearest
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import System
from jaxrlhf.runs.console import Console

PHASES = {"generate": ("reshard", "prefill", "decode"), "score": ("score",), "train": ("train",)}
# Items of one kind share a colour, whichever program has them.
COPIES = ("generation weights", "weights on the move", "merged adapters", "working copies", "gathered layer weights")
KINDS = {
    "models": ("actor", "critic", "reference", "reward", "ema"),
    "optimizer": ("actor_optimizer", "critic_optimizer"),
    "weight copies": COPIES,
    "gradients": ("gradients", "gradient layout copies"),
    "KV cache": ("KV cache", "KV cache of the prompt"),
    "rollouts of other steps": ("waiting rollouts", "replayed rollouts"),
}
REST = "activations and scratch"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, cost and proof of the setting that was asked for."""

    config: PlanConfig
    system: System
    programs: dict[str, ProgramMemory]
    cost: RunCost
    capacity: int
    host_bytes: int
    """Bytes of host memory per device."""
    nearest: Nearest | None = None
    """Setting that fits these devices, when the asked one does not."""
    micro_batches: str = ""
    """Flags of the largest micro-batches that fit; empty where those asked for are."""
    larger: Nearest | None = None
    """Setting with the same training that fits more devices, when none fits these."""
    compiled: dict[str, Compiled] | None = None

    @property
    def peak(self) -> int:
        """Most bytes on a device over an iteration."""
        return max(program.bytes_per_device for program in self.programs.values())

    @property
    def compiled_seconds(self) -> float | None:
        """Estimated time of an iteration by the compiled kernels; None without them, and where devices communicate."""
        found = self.compiled or {}
        if self.config.devices > 1 or not found or any(x.traffic is None for x in found.values()):
            return None
        return sum(self.calls(name) * x.traffic.seconds for name, x in found.items() if x.traffic is not None)

    def calls(self, program: str) -> float:
        """Mean calls of a program in an iteration."""
        system = self.system
        return sum(system.samplers.values()) * system.config.rollout.generation_batches if program == "generate" else 1

    @property
    def problems(self) -> list[str]:
        """Problems that the compiler found, and compiled programs that are too large."""
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
        """True for a plan within the capacity and without problems."""
        return self.peak <= self.capacity and not self.problems


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f}"


def _models(plan: Plan) -> str:
    """The models by name."""
    config = plan.config
    other = config.teacher if plan.system.supervised else config.reward
    return f"{config.trainer}: {config.actor}{'' if other is None else f' + {other}'}"


def _items(program: ProgramMemory) -> dict[str, int]:
    """Everything on the device while a program runs, by name."""
    return program.arguments | program.temporaries | {"outputs": program.outputs} | program.resident


def _seconds(plan: Plan, program: str) -> float:
    return sum(plan.cost.seconds[phase] for phase in PHASES[program])


def _program_values(plan: Plan, name: str) -> dict[str, object]:
    """JSON values of one program."""
    program, cost = plan.programs[name], plan.cost
    values: dict[str, object] = {
        "bytes_per_device": program.bytes_per_device,
        "program_bytes": program.program_bytes,
        "compiler_bytes": program.compiler_bytes,
        "arguments": program.arguments,
        "temporaries": program.temporaries,
        "outputs": program.outputs,
        "resident": program.resident,
        "seconds": _seconds(plan, name),
        "phases": {
            phase: {
                "flops": cost.phases[phase].flops,
                "memory_bytes": cost.phases[phase].bytes,
                "link_bytes": cost.phases[phase].links,
                "host_bytes": cost.phases[phase].host,
                "seconds": cost.seconds[phase],
            }
            for phase in PHASES[name]
        },
    }
    if plan.compiled is not None:
        compiled = plan.compiled[name]
        values["compiler"] = dataclasses.asdict(compiled) | {"bytes": compiled.bytes}
    return values


def as_dict(plan: Plan) -> dict[str, object]:
    """The plan as JSON values; sizes are bytes on one device, times are seconds by the roofline."""
    cost = dataclasses.asdict(plan.cost)
    return {
        "fits": plan.fits,
        "capacity_bytes": plan.capacity,
        "peak_bytes_per_device": plan.peak,
        "host_bytes_per_device": plan.host_bytes,
        "mesh": dict(plan.system.mesh.shape),
        "parameters": {name: _parameters(plan, name) for name in plan.system.trained},
        "generate_tensor_parallel": plan.system.generate_tensor,
        "rollout_rows": plan.system.rows,
        **{name: _program_values(plan, name) for name in plan.programs},
        **{name: value for name, value in cost.items() if name not in ("phases", "seconds")},
        "nearest": _nearest(plan.nearest),
        "largest_micro_batches": plan.micro_batches,
        "nearest_with_more_devices": _nearest(plan.larger),
        "problems": plan.problems,
        "compiled_seconds_per_iteration": plan.compiled_seconds,
        "device": dataclasses.asdict(plan.config.accelerator),
        "settings": to_dict(plan.config),
    }


def _parameters(plan: Plan, name: str) -> dict[str, int]:
    """Parameters of a model, and those that compute one token; adapters are not counted."""
    module = plan.system.modules[name].clone(lora=None)
    return {"total": count_params(param_shapes(module)), "active": active_params(module)}


def _nearest(found: Nearest | None) -> dict[str, object] | None:
    if found is None:
        return None
    return {"flags": found.flags, "changes": list(found.reasons), "bytes_per_device": found.bytes_per_device}


def _memory_rows(plan: Plan) -> list[list[str]]:
    """Items by size with their GiB in each program, then the sums."""
    sizes = {name: _items(plan.programs[name]) for name in plan.programs}
    items = dict.fromkeys(item for name in plan.programs for item in sizes[name])
    ordered = sorted(items, key=lambda item: -max(sizes[name].get(item, 0) for name in plan.programs))
    rows = [[item, *(gib(sizes[n][item]) if sizes[n].get(item) else "-" for n in plan.programs)] for item in ordered]
    rows = [row for row in rows if set(row[1:]) - {"-", "0.00"}]
    rows.append(["sum", *(gib(plan.programs[n].bytes_per_device) for n in plan.programs)])
    if plan.compiled is not None:
        rows.append(["program, estimated", *(gib(plan.programs[n].compiler_bytes) for n in plan.programs)])
        rows.append(["program, compiled", *(gib(plan.compiled[n].bytes) for n in plan.programs)])
    return rows


def show(plan: Plan, console: Console) -> None:
    """Print the tables and the verdict."""
    config, cost = plan.config, plan.cost
    mesh = " × ".join(f"{name} {size}" for name, size in plan.system.mesh.shape.items())
    split = f"generation split over {plan.system.generate_tensor}, " if "generate" in plan.programs else ""
    what = "rows" if plan.system.sequences == 1 else "pairs, each side"
    slices = f" ({config.shape})" if config.shape else ""
    console.print(
        f"{_models(plan)} on {config.devices} × {config.accelerator.name}{slices}: mesh {mesh}, "
        f"{split}{plan.system.rows} {what} of {plan.system.length} tokens per iteration"
    )
    title = f"GiB per device while it runs (of {gib(plan.capacity)} usable)"
    console.table(title, ["item", *plan.programs], _memory_rows(plan))
    console.table(
        "one iteration, per device",
        ["phase", "TFLOP", "GB memory", "GB links", "GB host", "seconds"],
        [
            [name, p.flops / 1e12, p.bytes / 1e9, p.links / 1e9, p.host / 1e9, cost.seconds[name]]
            for name, p in cost.phases.items()
        ],
    )
    price = f", cost {cost.cost:,.2f}" if config.price_per_device_hour else ""
    console.print(
        f"{cost.seconds_per_iteration:.3g} s per iteration at {config.roofline_share:.0%} of the roofline, "
        f"{cost.tokens_per_second:,.0f} tokens/s; {cost.iterations} iterations in {cost.hours:.2f} h{price}"
    )
    _show_compiled(plan, console)
    for name in plan.system.trained:
        if plan.system.modules[name].config.num_experts:
            counts = _parameters(plan, name)
            console.print(f"{name}: {counts['total']:,} parameters, of which {counts['active']:,} compute each token")
    if plan.host_bytes:
        console.print(f"host memory: {gib(plan.host_bytes * config.accelerator.devices_per_host)} GiB per host")
    for line in verdict(plan):
        console.print(line)


def _show_compiled(plan: Plan, console: Console) -> None:
    """Print the cost of the compiled programs, where it is known."""
    costs = {name: x.traffic for name, x in (plan.compiled or {}).items()}
    rows = [
        [name, x.flops / 1e12, x.read / 1e9, x.written / 1e9, f"{x.kernels:.0f}", f"{x.launched:.0f}", x.seconds]
        for name, x in costs.items()
        if x is not None
    ]
    if not rows:
        return
    header = ["program", "TFLOP", "GB read", "GB written", "kernels", "launches", "seconds"]
    console.table("one call of each program, as compiled", header, rows)
    if plan.compiled_seconds is not None:
        console.print(
            f"{plan.compiled_seconds:.3g} s per iteration by the compiled kernels: bytes at 85 % of the bandwidth, "
            "matrix products at 80 % of the peak, 2 µs for each launch"
        )


def verdict(plan: Plan) -> list[str]:
    """Lines that say whether the plan fits, and the settings that would."""
    if plan.fits:
        lines = [f"fits: {gib(plan.peak)} of {gib(plan.capacity)} GiB per device"]
        if plan.micro_batches:
            lines.append(f"the largest micro-batches that fit move the fewest bytes: {plan.micro_batches}")
        return lines
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
        totals[kind_of.get(item.removesuffix(" on the device"), REST)] += size
    return totals


def draw(plan: Plan, path: str) -> None:
    """Plot memory per device over one iteration: a column per program, as wide as its time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    kinds = [by_kind(plan.programs[name]) for name in plan.programs]
    widths = [_seconds(plan, name) for name in plan.programs]
    *starts, end = accumulate(widths, initial=0.0)
    floor = [0.0] * len(plan.programs)
    for kind in (*KINDS, REST):
        heights = [sizes[kind] / GIB for sizes in kinds]
        if any(heights):
            axes.bar(starts, heights, widths, floor, align="edge", label=kind, edgecolor="white", linewidth=0.6)
        floor = [a + b for a, b in zip(floor, heights, strict=True)]
    usable = plan.capacity / GIB
    axes.axhline(usable, color="black", linestyle="--", linewidth=1)
    axes.annotate("usable", (end, usable), ha="right", va="bottom", fontsize=8)
    for name, start, width, top in zip(plan.programs, starts, widths, floor, strict=True):
        axes.annotate(name, (start + width / 2, top), ha="center", va="bottom", fontsize=8)
    axes.set_xlabel("seconds of one iteration")
    axes.set_ylabel("GiB per device")
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.15 * max(*floor, usable))
    axes.spines[["top", "right"]].set_visible(False)
    config = plan.config
    axes.set_title(f"{_models(plan)}, {config.devices} × {config.device}", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
