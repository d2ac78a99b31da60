"""The campaigns of kills and of faults, in a short form."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")), reason="needs moto and s3fs"
    ),
]


def run(name, folder, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--out", str(folder / "result.json"), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads((folder / "result.json").read_text())


def test_killed_runs_resume_with_the_same_bits_and_leave_nothing_behind(tmp_path):
    result = run("crash_campaign", tmp_path, "--kills", "4", "--cases", "sft zero_stage 3", "sft S3")
    assert result["kills"] >= 4 and not result["failed"]
    assert {row["case"] for row in result["table"]} == {"sft zero_stage 3", "sft S3"}


def test_a_run_with_faults_loses_no_step(tmp_path):
    result = run("soak", tmp_path, "--steps", "60", "--every", "15", "--faults", "reward raises", "S3")
    assert result["steps missing"] == [] and result["steps twice"] == 0
    assert sum(result["faults"].values()) >= 3 and result["requests refused"] > 0
