"""Compile the planner's grid with the devices' own compilers and write what they report, as evidence for its bounds.

    python benchmarks/plan_grid.py --output benchmarks/results/plan_compile_grid.json [--only opt-13b] [--again]

Needs the extras `plan-cuda` and `plan-tpu`; no device. Each point is a call of `jaxrlhf plan --compile`; points that
the file already holds are kept, so an interrupted run goes on where it stopped.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

# Rows per device and what else makes the size plausible; the largest models use remat as every run of them would.
SETTINGS = {
    "opt-1.3b": {"per_device_train_batch_size": 8, "remat_policy": "full"},
    "opt-13b": {"per_device_train_batch_size": 4, "remat_policy": "full"},
    "opt-66b": {"per_device_train_batch_size": 4, "remat_policy": "full"},
    "opt-175b": {"per_device_train_batch_size": 2, "remat_policy": "full"},
}
CLUSTERS = (("a100-80g", 1), ("a100-80g", 8), ("a100-80g", 16), ("a100-80g", 64), ("v5p", 64))


def points() -> list[dict[str, object]]:
    return [
        {"actor": model, "reward": "opt-350m", "device": device, "devices": count} | settings
        for model, settings in SETTINGS.items()
        for device, count in CLUSTERS
    ]
