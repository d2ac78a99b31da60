"""Compile the programs of an iteration for an A100 and an H200, neither present, and count what their kernels do.

    python benchmarks/compiled_programs.py [--device a100-80g h200] [--variant default xla] [--label now]
    python benchmarks/compiled_programs.py --label before --tree ../other-checkout --variant default

Needs the extra `plan-cuda`. Rows of other labels in the file stay, so that a change shows beside what was before it:
`--tree` compiles the programs of another checkout, and this one counts them. `jaxrlhf bench --render` puts the file
into docs/benchmarks.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "results" / "compiled.json"
PACKAGES = ("jax", "jax-cuda12-plugin")
DEVICES = ("a100-80g", "h200")
NAMES = {"generate": "jit_generate", "score": "jit_score_rollout", "train": "jit_ppo_step"}
"""Names of the compiled modules by program."""
_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}
_LENGTHS = {"max_prompt_seq_len": 256, "max_new_tokens": 256}
WORKLOADS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "opt-1.3b + opt-350m": ({"actor": "opt-1.3b", "reward": "opt-350m"}, ("generate", "score", "train")),
    "llama-3.2-1b": ({"actor": "llama-3.2-1b", "reward": None, "trainer": "grpo"}, ("generate",)),
}
"""Settings of the planned run, and its programs that are compiled: 64 rows of 256 + 256 tokens."""
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "xla": {"attention_implementation": "xla"},
    "remat none": {"remat_policy": "none"},
    "remat full": {"remat_policy": "full"},
    "micro-batch 16": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4},
    "top-p": {"top_p": 0.9},
}
"""Settings that differ from the defaults."""
ONLY = {
    "remat none": ("train",),
    "remat full": ("train",),
    "micro-batch 16": ("score", "train"),
    "top-p": ("generate",),
}
"""Programs that a variant changes, where it is not all of them."""


def compile_in(tree: Path, settings: dict[str, Any], program: str) -> dict[str, Any]:
    """Compiles a program of the checkout `tree` in a process of its own; its sizes, and its kernels' cost as a dict."""
    from jaxrlhf.config import to_dict
    from jaxrlhf.plan.compile import environment, read_outcome
    from jaxrlhf.plan.settings import PlanConfig

    config = PlanConfig.create(**settings)
    with tempfile.TemporaryDirectory() as folder:
        found = environment("cuda")
        found["PYTHONPATH"] = os.pathsep.join([str(tree), found.get("PYTHONPATH", "")])
        found["XLA_FLAGS"] += f" --xla_dump_to={folder}"
        values = json.dumps(settings if tree != ROOT else to_dict(config))
        command = [sys.executable, "-m", "jaxrlhf.plan.compile", program]
        begin = time.monotonic()
        done = subprocess.run(command, input=values, capture_output=True, text=True, cwd=tree, env=found)
        outcome = read_outcome(program, done.returncode, done.stdout, done.stderr, time.monotonic() - begin)
        cost = outcome.traffic or _counted(Path(folder), program, config)
    sizes = {"peak_bytes": outcome.peak, "temporary_bytes": outcome.temporaries, "compile_seconds": outcome.seconds}
    return sizes | asdict(cost) | {"steps": config.ppo.sampling.max_new_tokens - 1}


def _counted(folder: Path, program: str, config: Any) -> Any:
    """The cost of a program that another checkout compiled, from XLA's dump."""
    from jaxrlhf.plan.compile import count

    name = NAMES[program]
    (text,) = folder.glob(f"*.{name}.*gpu_after_optimizations.txt")
    thunks = list(folder.glob(f"*.{name}.thunk_sequence_after_thunk_passes.txt"))
    return count(text.read_text(), thunks[0].read_text() if thunks else None, config.ppo, config.accelerator)


def cases(options: argparse.Namespace) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """The fields that tell a row from others, and the settings of its plan."""
    for workload, device, variant in product(options.workload, options.device, options.variant):
        models, programs = WORKLOADS[workload]
        settings = {"device": device, **models, **_BATCH, **_LENGTHS, **VARIANTS[variant]}
        for program in programs:
            if program in options.program and program in ONLY.get(variant, programs):
                key = {"label": options.label, "workload": workload, "device": device}
                yield key | {"variant": variant, "program": program}, settings


def limit(key: dict[str, str]) -> float:
    """Seconds that a program needs at least, at the rates of the estimates: what every implementation must do."""
    from jaxrlhf.plan import roofline
    from jaxrlhf.plan.settings import PlanConfig
    from jaxrlhf.plan.system import build_system

    models, _ = WORKLOADS[key["workload"]]
    config = PlanConfig.create(device=key["device"], **models, **_BATCH, **_LENGTHS)
    system = build_system(config)
    actor, critic = (system.modules.get(name, system.modules["actor"]) for name in ("actor", "critic"))
    lengths = system.rows, *_LENGTHS.values()
    if key["program"] == "generate":
        stages = roofline.generate(actor, *lengths)
    else:
        stages = {"score": roofline.score, "train": roofline.train}[key["program"]](actor, critic, *lengths)
    rates = config.accelerator.rates
    return roofline.roofline_seconds(stages, roofline.Peaks(rates.flops, rates.bandwidth))


def add_row(path: Path, key: dict[str, str], row: dict[str, Any]) -> None:
    """Writes a row into the file, in place of the one with the same key."""
    from jaxrlhf.bench.record import installed_version, provenance, write

    held = json.loads(path.read_text()) if path.is_file() else {"rows": [], "limits": {}}
    kept = [other for other in held["rows"] if any(other[name] != value for name, value in key.items())]
    limits = held["limits"]
    limits.setdefault(key["workload"], {}).setdefault(key["device"], {})[key["program"]] = limit(key)
    origin = provenance()
    origin = {name: origin[name] for name in ("command", "commit", "time", "python")}
    versions = {name: found for name in PACKAGES if (found := installed_version(name))}
    write(path, origin | {"versions": versions, "limits": limits, "rows": [*kept, key | row]})


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxrlhf.config.files import check_output
    from jaxrlhf.errors import InputError

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", default=str(OUTPUT), help="file for the result")
    parser.add_argument("--label", default="now", help="name of these rows; those of other names stay in the file")
    parser.add_argument("--tree", default=str(ROOT), help="checkout whose programs are compiled")
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES), help="what to compile for")
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="models")
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="settings")
    parser.add_argument("--program", nargs="+", choices=list(NAMES), default=list(NAMES), help="programs to compile")
    options = parser.parse_args()
    check_output(options.json, "json")
    tree = Path(options.tree).resolve()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True).stdout.strip()
    for key, settings in cases(options):
        try:
            row = compile_in(tree, settings, key["program"])
        except InputError as error:
            sys.exit(f"{key}: {error}")
        add_row(Path(options.json), key, {"commit": commit} | row)
        gigabytes = (row["read"] + row["written"]) / 1e9
        print(
            f"{', '.join(key.values())}: {gigabytes:.0f} GB, {row['kernels']:.0f} kernels, "
            f"peak {row['peak_bytes'] / 2**30:.1f} GiB, {row['seconds']:.3f} s",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
