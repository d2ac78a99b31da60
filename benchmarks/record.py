"""What the benchmarks share: timing by minima, and where and with what a result was measured."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each run: the fastest of `repeats`, taken in turns after one uncounted round (compilation)."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def provenance() -> dict[str, Any]:
    """Device and how busy it was at the end, versions, command and commit."""
    device = jax.devices()[0]
    return {
        "device": f"{processor()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "command": " ".join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "commit": commit(),
    }


def commit() -> str:
    """What the working copy is at, and whether it differs from that; "unknown" outside of a repository."""

    def git(*command: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return (
        "unknown"
        if head is None
        else head + (" with changes" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")
    )


def processor() -> str:
    """The CPU's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def write(path: str | None, result: dict[str, Any]) -> None:
    """The result with its provenance as JSON, where `--json` named a file."""
    if path:
        Path(path).write_text(json.dumps(provenance() | result, indent=2) + "\n")
