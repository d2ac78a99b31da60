"""The launch files: local processes that are started, signalled and ended together, and only flags that exist."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from jaxrlhf.cli import commands
from jaxrlhf.config import parse

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "scripts" / "launch"


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


LAUNCH_FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".yaml", ".sh", ".sbatch"))


def command_in(path):
    """The `jaxrlhf` command line of a launch file, as a list."""
    text = path.read_text()
    if path.name.startswith("gke"):
        job = next(d for d in yaml.safe_load_all(text) if d["kind"] in ("Job", "JobSet"))
        job = job["spec"]["replicatedJobs"][0]["template"] if job["kind"] == "JobSet" else job
        assert job["spec"]["completions"] == job["spec"]["parallelism"]
        return job["spec"]["template"]["spec"]["containers"][0]["command"][1:]
    if path.suffix == ".yaml":
        text = yaml.safe_load(text)["run"]
    line = re.search(r"^[^#\n]*\bjaxrlhf (ppo .*)$", text.replace("\\\n", " "), re.M)[1]
    return [word.strip('"') for word in line.split()]


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_the_command_of_a_launch_file_is_one_that_jaxrlhf_takes(name):
    command, *flags = command_in(FOLDER / name)
    assert len(flags) > 5
    config = parse(commands()[command].config_class(), flags, "", "")
    folder = config.folder
    assert folder.resume and config.run.save_steps == 50
    assert folder.output_dir.endswith("runs/ppo") or folder.output_dir == "$RUN"


@pytest.mark.parametrize("name", LAUNCH_FILES)
def test_the_shell_of_a_launch_file_is_valid(name):
    text = (FOLDER / name).read_text()
    if name.endswith(".yaml"):
        task = yaml.safe_load(text) if name == "skypilot.yaml" else {}
        text = "\n".join(task.get(key, "") for key in ("setup", "run"))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (137, True), (143, True), (130, False), (2, False)])
def test_a_preempted_slurm_job_is_requeued_and_resumes(tmp_path, status, requeued):
    """The batch script with stand-ins for Slurm's commands and for the virtual environment."""
    stand_ins = {
        "srun": f'echo "$@" > {tmp_path}/started; exit {status}',
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "jaxrlhf" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "jaxrlhf" / ".venv" / "bin" / "activate").touch()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "SCRATCH": "/scratch"}
    environment |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17"}
    done = subprocess.run(["bash", str(FOLDER / "slurm.sbatch")], env=environment)
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text().split() == ["requeue", "17"]
    assert done.returncode == (0 if requeued else status)
    assert "--resume" in (tmp_path / "started").read_text()
    settings = re.findall(r"^#SBATCH --(\S+)", (FOLDER / "slurm.sbatch").read_text(), re.M)
    assert {"requeue", "signal=TERM@180", "open-mode=append"} <= set(settings)


@pytest.mark.parametrize("name", ["cuda", "tpu"])
def test_a_dockerfile_installs_an_extra_that_exists_from_files_that_exist(name):
    """Checks beyond a linter's; the build itself needs a network and a builder."""
    text = (ROOT / "scripts" / "docker" / f"{name}.Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    default = re.search(r"^ARG EXTRA=(\w+)", text, re.M)
    words = re.search(r"whl\)\[(.*?)\]", text)[1].replace("${EXTRA}", default[1] if default else "").split(",")
    assert set(words) <= set(extras) and name in words
    sources = [word for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.M) for word in line.split()]
    assert len(sources) == 7 and all((ROOT / source).exists() for source in sources)
    assert re.search(r'^ENTRYPOINT \["jaxrlhf"\]$', text, re.M)
