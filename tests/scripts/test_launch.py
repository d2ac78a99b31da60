"""The launch files: local processes that are started, signalled and ended together, and only flags that exist."""

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxrlhf.cli import commands
from jaxrlhf.config import parse

FOLDER = Path(__file__).resolve().parents[2] / "scripts" / "launch"


@pytest.fixture
def local():
    spec = importlib.util.spec_from_file_location("local_launcher", FOLDER / "local.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in before.items():
        signal.signal(number, handler)


def python(program):
    return ["--", sys.executable, "-c", program]


def test_each_process_learns_who_it_is_and_its_lines_get_a_prefix(local, capsys):
    show = "import os; print(*(os.environ[n] for n in ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES', 'XLA_FLAGS')))"
    assert local.main(["--processes", "2", "--cpu_devices=3", *python(show)]) == 0
    lines = sorted(capsys.readouterr().out.splitlines())
    assert [line[:7] for line in lines] == ["[0] 0 2", "[1] 1 2"]
    assert all(line.endswith("--xla_force_host_platform_device_count=3") for line in lines)


def test_without_cpu_devices_each_process_gets_one_gpu(local, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    environment = local.environment(3, 8, 1234, None)
    assert (environment["JAX_LOCAL_DEVICE_IDS"], environment["JAX_PLATFORMS"]) == ("3", "cuda")
    assert environment["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:1234"


def test_when_one_process_fails_the_others_are_ended_and_its_status_is_the_answer(local, capsys, monkeypatch):
    monkeypatch.setattr(local, "PATIENCE", 0.2)
    program = "import os, signal, sys, time; os.environ['JAX_PROCESS_ID'] == '1' and sys.exit(3); time.sleep(600)"
    assert local.main(["--processes", "3", *python(program)]) == 3
    lost = "import os, sys; sys.exit(75 if os.environ['JAX_PROCESS_ID'] == '0' else 4)"
    assert local.main(["--processes", "2", *python(lost)]) == 4, "not the status of one that ended for another's sake"


def test_a_signal_reaches_all_processes():
    program = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('told'))\nprint('up')\nsignal.pause()"
    )
    command = [sys.executable, str(FOLDER / "local.py"), "--processes", "2", "--cpu_devices", "1", *python(program)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    up = sorted(launcher.stdout.readline() for _ in range(2))
    launcher.send_signal(signal.SIGTERM)
    rest = launcher.communicate(timeout=60)[0]
    assert up == ["[0] up\n", "[1] up\n"] and sorted(rest.splitlines()) == ["[0] told", "[1] told"]
    assert launcher.returncode == 1


@pytest.mark.parametrize(
    "argv", [[], ["--processes", "2"], ["--processes", "x", "--", "ls"], ["--gpus", "2", "--", "ls"]]
)
def test_wrong_usage_is_refused(local, argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        local.main(argv)
    assert "usage: local.py" in capsys.readouterr().err


def command_in(path):
    """The `jaxrlhf` command line of a launch file, as a list."""
    if path.suffix == ".yaml":
        job = next(d for d in yaml.safe_load_all(path.read_text()) if d["kind"] == "Job")
        return job["spec"]["template"]["spec"]["containers"][0]["command"][1:]
    text = path.read_text().replace("\\\n", " ")
    line = re.search(r"^[^#\n]*\bjaxrlhf (ppo .*)$", text, re.M)[1]
    return [word.strip('"') for word in line.split()]


@pytest.mark.parametrize("name", ["slurm.sbatch", "gke-gpu.yaml", "tpu-pod.sh"])
def test_the_command_of_a_launch_file_is_one_that_jaxrlhf_takes(name):
    command, *flags = command_in(FOLDER / name)
    assert len(flags) > 5
    config = parse(commands()[command].config, flags, "", "")
    folder = config.folder
    assert (folder.resume and config.run.save_steps == 50 and folder.output_dir.endswith("runs/ppo")) or (
        "RUN" in folder.output_dir
    )


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu-pod.sh"])
def test_a_launch_script_is_valid_shell(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
