"""Parts that benchmarks share: timing in turns, memory, and the origin of a result."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.runs.folder import peak_memory_bytes

T = TypeVar("T")
SOURCE = Path(__file__).resolve().parent
Record = dict[str, Any]
"""JSON values of one measurement."""
Records = dict[str, Record]
"""Records by section."""
Times = dict[str, list[float]]
"""Seconds of every round, by what was run."""
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "trl")


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """(seconds, result) of one run, its arrays computed."""
    begin = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - begin, result


def in_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> tuple[Times, dict[str, float]]:
    """(seconds of each run in each of `repeats` rounds, seconds of its first call, which compiles)."""
    first = {name: timed(run)[0] for name, run in runs.items()}
    times: Times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run)[0])
    return times, first


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of `repeats` calls of each run, in turns after one uncounted round."""
    times, _ = in_turns(runs, repeats)
    return {name: min(seconds) for name, seconds in times.items()}


def summary(seconds: list[float]) -> Record:
    """Median and minimum beside the runs themselves."""
    return {"median": statistics.median(seconds), "min": min(seconds), "runs": seconds}


def peak_memory() -> Record:
    """The most bytes that a device held since the process began; on a CPU the process, since `reset_peak_memory`."""
    peaks = peak_memory_bytes()
    if peaks["device"] is not None:
        return {"bytes": peaks["device"], "of": "device, since the start"}
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return {"bytes": int(found[1]) * 1024, "of": "process"}
    return {"bytes": peaks["host"], "of": "process, since the start"}


def reset_peak_memory() -> None:
    """Let the peak of the process begin anew, where Linux offers it; a device's cannot be reset."""
    switch = Path("/proc/self/clear_refs")
    if switch.is_file() and os.access(switch, os.W_OK):
        switch.write_text("5")


def provenance() -> Record:
    """Device and how busy the machine was at the end, versions, command and commit."""
    device = jax.devices()[0]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": f"{processor()}, {usable} cores" if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "versions": {name: found for name in PACKAGES if (found := installed_version(name))},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "command": command(),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def installed_version(package: str) -> str | None:
    """Version of a package, None when it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command() -> str:
    """The command line, a script below the working directory by its relative path."""
    script = Path(sys.argv[0]).resolve()
    inside = script.is_relative_to(Path.cwd())
    name = f"python {script.relative_to(Path.cwd())}" if inside and script.suffix == ".py" else script.name
    return " ".join([name, *sys.argv[1:]])


def commit() -> str:
    """Commit of the working copy, with a note of uncommitted changes; "unknown" outside of a repository."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(SOURCE), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None:
        return "unknown"
    changes = git("-C", top, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{git('rev-parse', 'HEAD')}{' with changes' if changes else ''}"


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def write(path: str | Path | None, result: Record) -> None:
    """The result with its provenance as JSON, where a file is named; atomically."""
    if path:
        write_text_atomic(path, json.dumps(provenance() | result, indent=2) + "\n")
