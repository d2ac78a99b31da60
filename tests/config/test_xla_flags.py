"""Compiler flags: the platform is found without JAX, the user's own flags win, and JAX knows every flag."""

import os
import subprocess
import sys

import pytest

from jaxrlhf.cli import main
from jaxrlhf.config.xla_flags import CUDA_FLAGS, NVIDIA_FILES, RECOMMENDED, TPU_FILES, find_platform, set_xla_flags

DRIVER, PLUGIN = {NVIDIA_FILES[0]}, {"jax_cuda12_plugin"}


@pytest.mark.parametrize(
    ("environment", "files", "packages", "platform"),
    [
        ({}, DRIVER, PLUGIN, "cuda"),
        ({}, {NVIDIA_FILES[1]}, {"jax_cuda13_plugin"}, "cuda"),
        ({}, DRIVER, set(), "cpu"),
        ({}, set(), PLUGIN, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": ""}, DRIVER, PLUGIN, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, DRIVER, PLUGIN, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, DRIVER, PLUGIN, "cuda"),
        ({"JAX_PLATFORMS": "cpu"}, DRIVER, PLUGIN, "cpu"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, set(), set(), "cuda"),
        ({"JAX_PLATFORMS": "gpu"}, DRIVER, PLUGIN, "cuda"),
        ({"JAX_PLATFORMS": "rocm"}, set(), set(), "rocm"),
        ({"JAX_PLATFORMS": "tpu"}, DRIVER, PLUGIN, "tpu"),
        ({}, {TPU_FILES[0]}, {"libtpu"}, "tpu"),
        ({}, {TPU_FILES[0]}, set(), "cpu"),
        ({}, set(), set(), "cpu"),
    ],
)
def test_the_platform_is_found_from_files_packages_and_environment(environment, files, packages, platform):
    assert find_platform(environment, files.__contains__, packages.__contains__) == platform


def test_flags_of_the_user_win_and_the_others_are_added():
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=somewhere"
    environment = {"XLA_FLAGS": own}
    set_xla_flags(environment, "cuda")
    words = environment["XLA_FLAGS"].split()
    assert environment["XLA_FLAGS"].endswith(own)
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" not in words
    assert "--xla_gpu_enable_command_buffer=+WHILE" in words
    assert len(words) == len(CUDA_FLAGS) + 1
    set_xla_flags(environment, "cuda")
    assert environment["XLA_FLAGS"].split() == words


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_other_platforms_are_left_alone(platform):
    environment = {}
    set_xla_flags(environment, platform)
    assert environment == {}


def test_verbose_prints_each_flag_with_its_reason(capsys):
    set_xla_flags({"XLA_FLAGS": f"{CUDA_FLAGS[1].name}=false"}, "cuda", verbose=True)
    told = capsys.readouterr().err
    for flag in CUDA_FLAGS:
        assert flag.name in told and flag.reason in told
    assert f"{CUDA_FLAGS[1].name}=false   (as XLA_FLAGS has it, instead of true)" in told
    set_xla_flags({}, "cpu", verbose=True)
    assert capsys.readouterr().err == "XLA flags for cpu: none\n"


def test_the_command_line_sets_them_before_a_training_command(monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    assert main(["--verbose", "sft", "--no_such_flag", "1"]) == 2
    assert os.environ["XLA_FLAGS"].split()[0] == "--xla_gpu_enable_command_buffer=+WHILE"
    assert "XLA flags for cuda" in capsys.readouterr().err


def test_the_installed_jax_knows_every_flag():
    """A flag that it does not know ends the process."""
    flags = " ".join(f"{flag.name}={flag.value}" for some in RECOMMENDED.values() for flag in some)
    program = "import jax; print(jax.jit(lambda x: x + 1)(1.0))"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.0"
