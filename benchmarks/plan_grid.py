"""Compile the planner's grid with the devices' own compilers, as evidence for its estimates.

    python benchmarks/plan_grid.py [--output benchmarks/results/plan_compile_grid.json] [--only opt-13b] [--again]

Needs the extras `plan-cuda` and `plan-tpu`, and no device. Points that the output holds are kept, so an interrupted run
goes on where it stopped; `--again` compiles them anew, as is due when the programs have changed.
`tests/jaxrlhf/test_plan_compile.py` checks the estimates against the file.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.plan.compile import compile_programs
from jaxrlhf.plan.memory import estimate
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system
from jaxrlhf.runs.console import Console

OUTPUT = Path(__file__).parent / "results" / "plan_compile_grid.json"
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt")
ROWS = {"opt-1.3b": 8, "opt-13b": 4, "opt-66b": 4, "opt-175b": 2}
CLUSTERS = (("a100-80g", 64), ("v5p", 64), ("a100-80g", 16), ("a100-80g", 8), ("a100-80g", 1))
# On 64 devices the largest model fits when layers are split in training too, and generation over 32.
SPLIT = {
    "a100-80g": {"mesh_tensor": 8, "generate_tensor_parallel": 32},
    "v5p": {"mesh_tensor": 4, "generate_tensor_parallel": 16},
}
SMALL = {"actor": "opt-1.3b", "device": "a100-80g", "devices": 8, "per_device_train_batch_size": 4}


def points() -> list[dict[str, Any]]:
    """Settings of `jaxrlhf plan`: the published models on the published clusters, then one variation at a time."""
    grid = []
    for device, devices in CLUSTERS:
        for actor, rows in ROWS.items():
            point = {"actor": actor, "device": device, "devices": devices, "per_device_train_batch_size": rows}
            split = SPLIT[device] if (actor, devices) == ("opt-175b", 64) else {}
            grid.append(point | {"remat_policy": "full"} | split)
    return [
        *grid,
        SMALL,
        SMALL | {"remat_policy": "dots"},
        SMALL | {"remat_policy": "full", "gradient_accumulation_steps": 4},
        SMALL | {"remat_policy": "full", "mesh_tensor": 4},
        SMALL | {"remat_policy": "full", "zero_stage": 2},
        SMALL | {"remat_policy": "full", "zero_stage": 0},
        SMALL | {"remat_policy": "full", "offload_optimizer": True, "offload_reference_model": True},
        SMALL | {"actor": "llama-3-8b", "reward": "llama-3-8b", "remat_policy": "full"},
        {"actor": "opt-13b", "device": "a100-80g", "devices": 1, "per_device_train_batch_size": 1, "lora_r": 64}
        | {"remat_policy": "full"},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--only", help="points whose actor or device has this name")
    parser.add_argument("--again", action="store_true", help="also points that the output holds")
    options = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    commit = git.stdout.strip()
    held = json.loads(options.output.read_text())["points"] if options.output.exists() else []
    console = Console()
    for settings in points():
        if options.only not in (None, settings["actor"], settings["device"]):
            continue
        if not options.again and any(point["settings"] == settings for point in held):
            continue
        config = PlanConfig.create(**settings)
        console.print(" ".join(f"{name}={value}" for name, value in settings.items()))
        compiled = compile_programs(config, console)
        estimated = estimate(build_system(config), config.accelerator.platform)
        for name, found in compiled.items():
            ratio = f"{estimated[name].compiler_bytes / found.bytes - 1:+.1%}" if found.bytes else "no size"
            console.print(f"  {name}: compiler {found.bytes / 2**30:.2f} GiB, estimate {ratio} {found.problems}")
        programs = {name: dataclasses.asdict(found) for name, found in compiled.items()}
        held = [point for point in held if point["settings"] != settings]
        held.append({"settings": settings, "commit": commit, "programs": programs})
        versions = {name: version(name) for name in PACKAGES}
        result = {
            "command": "python benchmarks/plan_grid.py",
            "versions": versions | {"python": platform.python_version()},
            "points": held,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
