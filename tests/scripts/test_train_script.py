"""The launcher of all three steps: which flags it takes itself, which devices it leaves, what it hands on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrlhf.commands.rlhf import RLHFConfig
from jaxrlhf.config import parse
from jaxrlhf.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_num_gpus_is_taken_out_in_both_spellings(script):
    assert script.take_num_gpus(["--actor-model", "a", "--num-gpus", "8", "--seed", "1"]) == (
        8,
        ["--actor-model", "a", "--seed", "1"],
    )
    assert script.take_num_gpus(["--num_gpus=2"]) == (2, [])
    assert script.take_num_gpus(["--seed", "1"]) == (None, ["--seed", "1"])
    for value in ("0", "-1", "two", ""):
        with pytest.raises(InputError, match="--num-gpus takes a whole number"):
            script.take_num_gpus(["--num-gpus", value])


def test_the_deployment_type_and_the_actors_size_choose_a_recipe(script, capsys):
    sizes = {
        "single_gpu": "1.3b 6.7b 13b",
        "single_node": "1.3b 6.7b 13b 30b 66b",
        "multi_node": "1.3b 6.7b 13b 30b 66b",
    }
    for kind, known in sizes.items():
        for size in known.split():
            argv = script.with_recipe(["--step", "1", "--deployment-type", kind, f"--actor-model=facebook/opt-{size}"])
            devices, rest = script.take_num_gpus(argv)
            config = parse(RLHFConfig, rest, "", "")
            assert config.models.actor_model_name_or_path == f"facebook/opt-{size}" and config.steps == (1,)
            assert devices == (1 if kind == "single_gpu" else None)
    assert "recipe: " in capsys.readouterr().err
    assert script.with_recipe(["--deployment_type=single_node"])[1].endswith("opt-1.3b-node.yaml")
    assert script.with_recipe(["--deployment_type", "single_gpu", "--num-gpus", "2"])[2:] == ["--num-gpus", "2"]
    assert script.with_recipe(["--actor-model", "1.3b"]) == ["--actor-model", "1.3b"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--deployment-type", "cluster"], "cluster: must be one of single_gpu, single_node, multi_node"),
        (["--deployment-type", "single_gpu", "--actor-model", "66b"], "has recipes for 1.3b, 6.7b, 13b. Name another"),
        (
            ["--deployment-type", "single_gpu", "--config", "x.yaml"],
            "--deployment-type and --config exclude each other",
        ),
    ],
)
def test_a_deployment_without_a_recipe_is_refused_with_those_that_have_one(script, argv, message):
    with pytest.raises(InputError, match=message):
        script.with_recipe(argv)


def test_the_default_data_and_folder_give_way_to_flags_and_to_a_config_file(script):
    assert script.with_defaults(["--actor-model", "a"])[2:] == [
        "--output_dir",
        "output",
        "--data_path",
        "Dahoas/rm-static",
        "--prompt_template",
        "raw",
    ]
    given = ["--output-dir=x", "--data-path", "rows.jsonl"]
    assert script.with_defaults(given) == given
    assert script.with_defaults(["--config", "run.yaml"]) == ["--config", "run.yaml"]


def test_the_first_devices_stay_visible(script):
    count = "--xla_force_host_platform_device_count=2"
    assert script.restrict_devices(2, {}) == {"XLA_FLAGS": count, "CUDA_VISIBLE_DEVICES": "0,1"}
    chosen = script.restrict_devices(2, {"CUDA_VISIBLE_DEVICES": "3,5,7", "XLA_FLAGS": "--a=1"})
    assert chosen == {"XLA_FLAGS": f"--a=1 {count}", "CUDA_VISIBLE_DEVICES": "3,5"}
    assert script.restrict_devices(2, {"CUDA_VISIBLE_DEVICES": "-1"}) == {"XLA_FLAGS": count}
    assert script.restrict_devices(1, {"CUDA_VISIBLE_DEVICES": "1"})["CUDA_VISIBLE_DEVICES"] == "1"
    with pytest.raises(InputError, match="--num-gpus 2: CUDA_VISIBLE_DEVICES=4 leaves only 1"):
        script.restrict_devices(2, {"CUDA_VISIBLE_DEVICES": "4"})


def test_another_number_of_devices_than_asked_for_is_refused(script):
    with pytest.raises(InputError, match="--num-gpus 9: JAX sees 8 cpu device"):
        script.check_devices(9)
    with pytest.raises(InputError, match=r"--num-gpus 3: JAX sees 8 cpu device.*leave --num-gpus out"):
        script.check_devices(3)


def test_a_run_on_two_simulated_devices_hands_its_flags_to_the_three_steps(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    flags = ["--actor-model", str(tmp_path / "nowhere"), "--num-gpus", "2", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, "--data_path", "demo", "--data_cache_dir", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "2 devices are simulated on the CPU" in done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_one_of_several_processes_leaves_the_count_of_devices_to_each(script, monkeypatch):
    assert not script.has_peers(["--actor-model", "a"])
    assert script.has_peers(["--actor-model", "a", "--process-id=1"])
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert not script.has_peers([])
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert script.has_peers([])
