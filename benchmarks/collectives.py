"""Compile programs for 8 and 64 absent devices, and count the collectives of one step: bytes, and what hides them.

    python benchmarks/collectives.py [--case a100-8 …] [--json benchmarks/results/collectives.json]

Needs the extras `plan-cuda` and `plan-tpu`. Bytes are those that a device sends. A collective is hidden if it starts
before and ends after kernels that compute. The least that ZeRO stage 3 sends in training is, for each micro-batch, two
gathers of the parameters and one reduction of the gradients in the compute dtype (Rajbhandari et al. 2020, arXiv
1910.02054, section 7.2).
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.plan.hlo import Computation, Instruction, Program, parse, walk
from jaxrlhf.plan.traffic import COLLECTIVES

OUTPUT = Path(__file__).parent / "results" / "collectives.json"
PACKAGES = ("jax", "jax-cuda12-plugin", "libtpu")
_PPO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
_LONG = {"trainer": "sft", "actor": "qwen3-8b", "max_length": 32768, "mesh_fsdp": 1, "mesh_context": 8}
_LONG |= {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "remat_policy": "full"}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a100-8": ({"device": "a100-80g", "devices": 8, "actor": "opt-13b", **_PPO}, ("generate", "train")),
    "a100-64": ({"device": "a100-80g", "devices": 64, "actor": "opt-66b", **_PPO}, ("generate", "train")),
    "v5p-8": ({"device": "v5p", "devices": 8, "actor": "opt-13b", **_PPO}, ("generate", "train")),
    "v5p-64": ({"device": "v5p", "devices": 64, "actor": "opt-66b", **_PPO}, ("generate", "train")),
    "a100-8-32k": ({"device": "a100-80g", "devices": 8, **_LONG}, ("train",)),
    "v5p-8-32k": ({"device": "v5p", "devices": 8, **_LONG}, ("train",)),
}
"""Settings of `jaxrlhf plan` (the rewards of ppo come from opt-350m), and the programs that are compiled."""
FORCED = {name: "pallas" for name in CASES if name.endswith("32k")}
"""Cases whose attention is forced: scores of 32k × 32k tokens fit nowhere."""


class Collective(NamedTuple):
    """A collective operation of a program."""

    kind: str
    sent: float
    """Bytes that a device sends each time."""
    times: float
    """Runs in one step."""
    hidden: bool


def group_size(x: Instruction, devices: int) -> int:
    """Devices that exchange data in a collective."""
    axes = x.attribute(r"replica_groups=mesh\[([^\]]*)\]")
    if axes is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
        named = x.attribute(r"replica_groups=mesh\[[^\]]*\] \{([^}]*)\}") or ""
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", named))
    if pair := x.attribute(r"replica_groups=\[(\d+,\d+)\]"):
        return int(pair.split(",")[1])
    if first := x.attribute(r"replica_groups=\{\{([\d,]*)\}"):
        return len(first.split(","))
    return devices


def sent(x: Instruction, within: Computation, kind: str, devices: int) -> float:
    """Bytes that a device sends in one run of a collective, by the ring algorithms."""
    given = sum(array.bytes for name in x.operands for array in within.arrays(name))
    if kind == "collective-permute":
        return given
    others = group_size(x, devices) - 1
    share = others / (others + 1)
    return {"all-gather": given * others, "all-reduce": 2 * given * share}.get(kind, given * share)


def computes(x: Instruction, program: Program) -> bool:
    """True for a kernel with matrix products, or of attention."""
    if x.operation in ("custom-call", "dot", "convolution"):
        return True
    if x.operation not in ("fusion", "call") or not x.called:
        return False
    inner = program.computations[x.called].instructions.values()
    return any(y.operation in ("dot", "convolution") or computes(y, program) for y in inner)


def collectives(program: Program, devices: int, decode_steps: float) -> list[Collective]:
    """The collectives of a program; `decode_steps` is the count of loops that have no known one."""
    found = []
    for visit in walk(program, decode_steps, into=("call", "fusion", "async-start")):
        x, within = visit.instruction, visit.within
        kind = x.operation.removesuffix("-start")
        if kind in COLLECTIVES:
            around = [*visit.callers, (within, x)] if x.operation.endswith("-start") else visit.callers
            hidden = any(hides(program, *y) for y in around)
            found.append(Collective(kind, sent(x, within, kind, devices), visit.times, hidden))
    return found


def hides(program: Program, within: Computation, start: Instruction) -> bool:
    """True for a fusion that computes, and for a start with kernels that compute before its result is awaited."""
    if start.operation == "fusion" and computes(start, program):
        return True
    order = list(within.instructions.values())
    begun = {start.name}
    for x in order[order.index(start) + 1 :]:
        if begun & set(x.operands):
            if not x.operation.endswith("-done") and x.operation not in ("async-update", "get-tuple-element"):
                return False
            if x.operation.endswith("-done"):
                return False
            begun.add(x.name)
        elif computes(x, program):
            return True
    return False


def zero3_least(system: Any) -> float:
    """Bytes that a device sends in training by ZeRO stage 3 at least: 2 gathers and a reduction per micro-batch."""
    from jaxrlhf.models import count_params, param_shapes

    devices = math.prod(system.mesh.shape[axis] for axis in ("fsdp", "expert", "context"))
    run = system.config.run
    parts = run.gradient_accumulation_steps
    if not system.supervised:
        parts *= system.config.algorithm.num_mini_batches * system.config.algorithm.ppo_epochs
    elements = sum(count_params(param_shapes(system.modules[name])) for name in system.trained)
    return 3 * 2 * elements / system.mesh.shape["tensor"] * (devices - 1) / devices * parts


def compile_case(name: str, program: str) -> dict[str, Any]:
    """Compiles one program of a case in this process, and sums its collectives."""
    from dataclasses import replace

    from jaxrlhf.plan.programs import lower, topology_devices
    from jaxrlhf.plan.settings import PlanConfig
    from jaxrlhf.plan.system import build_system

    config = PlanConfig.create(**CASES[name][0])
    system = build_system(config, topology_devices(config.accelerator, config.shape, config.devices))
    if name in FORCED:
        actor = system.state.actor.clone(attention_implementation=FORCED[name])
        system = replace(system, state=system.state.replace(actor=actor))
    begin = time.monotonic()
    compiled = lower(system, program).compile()
    seconds = time.monotonic() - begin
    found = collectives(parse(compiled.as_text()), config.devices, system.config.sampling.max_new_tokens - 1)
    kinds: dict[str, dict[str, float]] = {}
    for x in found:
        sums = kinds.setdefault(x.kind, {"count": 0.0, "sent_bytes": 0.0, "hidden_bytes": 0.0})
        sums["count"] += x.times
        sums["sent_bytes"] += x.sent * x.times
        sums["hidden_bytes"] += x.sent * x.times * x.hidden
    row: dict[str, Any] = {"case": name, "program": program, "mesh": dict(system.mesh.shape), "collectives": kinds}
    if program == "generate":
        row["mesh"] = dict(system.generate_mesh.shape)
    else:
        row["zero3_least_bytes"] = zero3_least(system)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return row | {"settings": CASES[name][0], "peak_bytes": peak, "compile_seconds": seconds}


def in_a_process(name: str, program: str) -> dict[str, Any]:
    """`compile_case` in a process of its own, with the flags of a real run."""
    from jaxrlhf.config.xla_flags import set_xla_flags
    from jaxrlhf.plan.compile import ENVIRONMENT

    environment = os.environ | ENVIRONMENT
    if CASES[name][0]["device"] == "a100-80g":
        set_xla_flags(environment, "cuda")
        # Without a device there is no autotuning, and untuned Triton products would replace those of cuBLAS.
        environment["XLA_FLAGS"] += " --xla_gpu_enable_triton_gemm=false"
    command = [sys.executable, __file__, "--one", name, program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} {program}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="what to compile")
    parser.add_argument("--json", default=str(OUTPUT), help="file for the result; rows of other cases stay")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "PROGRAM"), help="compile in this process, print its row")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_case(*options.one)))
        return
    from jaxrlhf.bench.record import installed_version, provenance, write
    from jaxrlhf.config.files import check_output

    check_output(options.json, "json")
    path = Path(options.json)
    held = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in held if row["case"] not in options.case]
    for name in options.case:
        for program in CASES[name][1]:
            row = in_a_process(name, program)
            rows.append(row)
            kinds = row["collectives"].values()
            total, hidden = (sum(x[f"{what}_bytes"] for x in kinds) for what in ("sent", "hidden"))
            least = f", ZeRO-3 at least {row['zero3_least_bytes'] / 1e9:.1f}" if "zero3_least_bytes" in row else ""
            share = f"{hidden / total:.0%}" if total else "nothing"
            print(f"{name} {program}: {total / 1e9:.1f} GB sent{least}; {share} hidden", flush=True)
    origin = provenance()
    origin = {key: origin[key] for key in ("command", "commit", "time", "python")}
    versions = {key: found for key in PACKAGES if (found := installed_version(key))}
    write(options.json, origin | {"versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
