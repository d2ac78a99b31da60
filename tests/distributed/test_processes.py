"""Several processes: the results of one, and stops and failures that reach all."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import processes
import pytest
from together import free_port, run_all

from jaxrlhf import cli, distributed
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.distributed import lifeline
from jaxrlhf.distributed.processes import _broke_a_collective, _sources


def launch(role, number, demo, folder):
    address, script = f"127.0.0.1:{free_port()}", str(Path(processes.__file__))
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // number}")
    common = [sys.executable, script, role, address, str(number)]
    return run_all([[*common, str(i), json.dumps(demo), str(folder)] for i in range(number)], {"XLA_FLAGS": flags})


@pytest.fixture(scope="module")
def places(demo):
    return {name: getattr(demo, name) for name in ("train", "eval", "cache", "lm", "reward")}


@pytest.fixture(scope="module")
def one(places, tmp_path_factory):
    """The runs of one process with eight devices."""
    from jaxrlhf.rl.run import train_ppo
    from jaxrlhf.trainers.sft import train_sft

    folder = tmp_path_factory.mktemp("one")
    train_sft(processes.sft_config(places, folder / "sft"))
    train_ppo(processes.ppo_config(places, folder / "ppo"))
    return folder


@pytest.fixture(scope="module")
def two(places, one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for process, rows in enumerate(Path(places["train"]).read_text().splitlines()[i : i + 300] for i in (0, 1)):
        (folder / f"rows-{process}").mkdir()
        (folder / f"rows-{process}" / "rows.jsonl").write_text("\n".join(rows))
        shutil.copytree(places["lm"], folder / f"rows-{process}" / "lm")
    weights = folder / "rows-1" / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0" * 4)
    statuses, outputs = launch("two", 2, places, folder)
    facts = [folder / f"process-{i}.json" for i in range(2)]
    assert all(path.exists() for path in facts), "\n".join(outputs)
    facts = [json.loads(path.read_text()) for path in facts]
    return SimpleNamespace(folder=folder, statuses=statuses, outputs=outputs, facts=facts)


def tensors(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def metrics(folder):
    clock = ("time", "timing/", "perf/peak", "perf/tokens", "perf/sequences")
    records = read_jsonl(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if not name.startswith(clock)} for record in records]


def assert_same_run(folder, reference):
    ours, theirs = metrics(folder), metrics(reference)
    assert [list(record) for record in ours] == [list(record) for record in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-6), (a["step"], name)
    ours, theirs = tensors(folder), tensors(reference)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.long
def test_ppo_on_two_processes_gives_the_tokens_metrics_and_weights_of_one(one, two):
    assert_same_run(two.folder / "ppo", one / "ppo")
    texts = [
        [[row[:2] for row in r["rows"]] for r in read_jsonl(f / "ppo" / "samples.jsonl")] for f in (one, two.folder)
    ]
    assert len(texts[0]) == 3 and texts[0] == texts[1]
    adapters = [(f / "ppo" / "adapter" / "adapter_config.json").read_bytes() for f in (one, two.folder)]
    assert adapters[0] == adapters[1]
    assert (two.folder / "ppo" / "report.html").exists() and (two.folder / "ppo" / "critic").is_dir()


@pytest.mark.long
def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_process_goes_on_from_there(one, two, places):
    from jaxrlhf.trainers.sft import train_sft

    assert [facts["stopped"] for facts in two.facts] == [["stopped after step 1; continue with --resume", 75]] * 2
    train_sft(processes.sft_config(places, two.folder / "sft", resume=True))
    assert_same_run(two.folder / "sft", one / "sft")


@pytest.mark.long
def test_settings_models_and_data_that_differ_are_named_with_who_has_which_on_every_process(two):
    for name in ("settings", "model", "data", "stopped"):
        assert two.facts[0][name] == two.facts[1][name]
    assert "learning_rate: 0.01 on process 0, 0.5 on process 1" in two.facts[0]["settings"]
    assert "lm/model.safetensors: " in two.facts[0]["model"] and "config.json" not in two.facts[0]["model"]
    assert "rows.jsonl (train)" in two.facts[0]["data"] and "the tokenizer" not in two.facts[0]["data"]


@pytest.mark.long
def test_reward_functions_are_called_by_process_0_and_both_have_their_scores_failures_and_errors(two):
    for facts in two.facts:
        assert facts["rewards"]["scores"] == [None, float(np.float32(8.2)), 16.5]
        assert facts["rewards"]["failures"] == [["size", 0, "returned nan"]]
        assert "it returned a text" in facts["rewards"]["refused"]
    done = [json.loads((two.folder / f"rewards-{i}.json").read_text()) for i in range(2)]
    assert done == [["called with 3", "reward function size gave sample 0 no score: returned nan"], []]


@pytest.mark.long
def test_a_save_in_the_background_fails_or_completes_on_both_processes_together(two):
    first, second = (facts["saves"] for facts in two.facts)
    for facts in (first, second):
        assert "checkpoint-1: no space left on the disk; training goes on" in facts["said"][0]
        assert facts["said"][1].startswith("checkpoint-2: saved in the background") and facts["same"]
        assert facts["looks"] >= 3, "each barrier of orbax is opened at a look of its own"
        assert f"checkpoint-2 is damaged: not as they were written: state/{facts['file']}" in facts["damage"]
    assert first["damage"] == second["damage"]


@pytest.mark.long
def test_when_the_coordinator_is_killed_the_other_process_says_so_and_ends(two):
    assert two.statuses == [-9, lifeline.LOST]
    assert "process 0 of 2" in two.outputs[1] and "the coordinator, is gone" in two.outputs[1]
    assert two.outputs[1].rstrip().endswith("Continue with --resume from the newest checkpoint")
    assert "Fatal Python error" not in two.outputs[1]


@pytest.mark.long
def test_four_processes_go_on_from_the_checkpoint_of_one_and_end_together_when_one_fails(one, places, tmp_path):
    shutil.copytree(one / "sft", tmp_path / "sft", ignore=shutil.ignore_patterns("checkpoint-2", "*.safetensors"))
    statuses, outputs = launch("four", 4, places, tmp_path)
    assert statuses == [75, 75, 1, 75], "\n".join(outputs)
    assert_same_run(tmp_path / "sft", one / "sft")
    assert "ArithmeticError: bad luck" in outputs[2] and "in four" in outputs[2]
    for i in (0, 1, 3):
        assert "process 2 of 4" in outputs[i] and "failed: ArithmeticError: bad luck;" in outputs[i]


@pytest.mark.long
def test_a_finished_step_of_a_three_step_run_is_kept_on_another_mesh_but_not_with_other_settings(one, places):
    from jaxrlhf.commands.rlhf import finished

    assert finished(processes.sft_config(places, one / "sft", mesh_fsdp=2, mesh_data=4, resume=True))["steps"] == 2
    assert finished(processes.sft_config(places, one / "sft", learning_rate=0.5)) is None


def test_how_processes_connect_is_not_kept_with_the_settings(places, tmp_path):
    flags = {"num_processes": 1, "process_id": 0, "coordinator_address": "h:1", "heartbeat_timeout": 7}
    config = distributed.joined(processes.sft_config(places, tmp_path, **flags))
    assert config == processes.sft_config(places, tmp_path)


def test_the_source_of_the_package_is_hashed_with_each_file_once():
    sources = _sources(Path(cli.__file__).parent)
    names, paths = zip(*sources, strict=True)
    assert {"cli.py", "models/__init__.py", "sharding/__init__.py", "kernels/__init__.py"} < set(names)
    assert len({path.resolve() for path in paths}) == len(paths)


def test_the_errors_of_a_broken_collective_wait_for_the_news_of_who_is_gone():
    broken = [
        jax.errors.JaxRuntimeError("UNAVAILABLE"),
        ValueError("UNKNOWN: Gloo AllGather failed: Connection closed"),
    ]
    assert all(_broke_a_collective(error) for error in broken)
    assert not _broke_a_collective(ValueError("row 7")) and not _broke_a_collective(KeyError("Gloo"))


def test_one_process_shares_values_with_itself():
    assert distributed.gather("numbers", 3) == [3]
    assert distributed.from_primary("a name", lambda: "x") == "x"
    assert distributed.by_turns("work", lambda: 5) == 5
    host = distributed.to_host({"x": jax.numpy.arange(3)})
    assert isinstance(host["x"], np.ndarray) and host["x"].tolist() == [0, 1, 2]
