"""Several processes: the results of one, stops and failures that reach all, strangers, and mistakes at the start."""

import hmac
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import processes
import pytest

from jaxrlhf import cli, distributed
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.distributed import lifeline, meeting
from jaxrlhf.distributed.processes import _broke_a_collective, _differences, _sources, detect
from jaxrlhf.errors import InputError

DEADLINE = 240  # seconds after which a test gives up on its processes


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_all(commands, environment=None):
    """(statuses, outputs) of commands started together; none outlives the call."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    workers = [subprocess.Popen(c, env=os.environ | (environment or {}), **options) for c in commands]
    outputs = [""] * len(workers)

    def read(i):
        outputs[i] = workers[i].communicate()[0]

    readers = [threading.Thread(target=read, args=(i,)) for i in range(len(workers))]
    try:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(DEADLINE)
    finally:
        for worker in workers:
            worker.kill()
    return [worker.wait() for worker in workers], outputs


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


def test_ppo_on_two_processes_gives_the_tokens_metrics_and_weights_of_one(one, two):
    assert_same_run(two.folder / "ppo", one / "ppo")
    texts = [
        [[row[:2] for row in r["rows"]] for r in read_jsonl(f / "ppo" / "samples.jsonl")] for f in (one, two.folder)
    ]
    assert len(texts[0]) == 3 and texts[0] == texts[1]
    adapters = [(f / "ppo" / "adapter" / "adapter_config.json").read_bytes() for f in (one, two.folder)]
    assert adapters[0] == adapters[1]
    assert (two.folder / "ppo" / "report.html").exists() and (two.folder / "ppo" / "critic").is_dir()


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_process_goes_on_from_there(one, two, places):
    from jaxrlhf.trainers.sft import train_sft

    assert [facts["stopped"] for facts in two.facts] == [["stopped after step 1; continue with --resume", 75]] * 2
    train_sft(processes.sft_config(places, two.folder / "sft", resume=True))
    assert_same_run(two.folder / "sft", one / "sft")


def test_settings_models_and_data_that_differ_are_named_with_who_has_which_on_every_process(two):
    for name in ("settings", "model", "data", "stopped"):
        assert two.facts[0][name] == two.facts[1][name]
    assert "learning_rate: 0.01 on process 0, 0.5 on process 1" in two.facts[0]["settings"]
    assert "lm/model.safetensors: " in two.facts[0]["model"] and "config.json" not in two.facts[0]["model"]
    assert "rows.jsonl (train)" in two.facts[0]["data"] and "the tokenizer" not in two.facts[0]["data"]


def test_reward_functions_are_called_by_process_0_and_both_have_their_scores_failures_and_errors(two):
    for facts in two.facts:
        assert facts["rewards"]["scores"] == [None, float(np.float32(8.2)), 16.5]
        assert facts["rewards"]["failures"] == [["size", 0, "returned None"]]
        assert "it returned a text" in facts["rewards"]["refused"]
    done = [json.loads((two.folder / f"rewards-{i}.json").read_text()) for i in range(2)]
    assert done == [["called with 3", "reward function size gave sample 0 no score: returned None"], []]


def test_a_save_in_the_background_fails_or_completes_on_both_processes_together(two):
    first, second = (facts["saves"] for facts in two.facts)
    for facts in (first, second):
        assert "checkpoint-1: no space left on the disk; training goes on" in facts["said"][0]
        assert facts["said"][1].startswith("checkpoint-2: saved in the background") and facts["same"]
        assert facts["looks"] >= 3, "each barrier of orbax is opened at a look of its own"
        assert f"checkpoint-2 is damaged: not as they were written: state/{facts['file']}" in facts["damage"]
    assert first["damage"] == second["damage"]


def test_when_the_coordinator_is_killed_the_other_process_says_so_and_ends(two):
    assert two.statuses == [-9, lifeline.LOST]
    assert "process 0 of 2" in two.outputs[1] and "the coordinator, is gone" in two.outputs[1]
    assert two.outputs[1].rstrip().endswith("Continue with --resume from the newest checkpoint")
    assert "Fatal Python error" not in two.outputs[1]


def test_four_processes_go_on_from_the_checkpoint_of_one_and_end_together_when_one_fails(one, places, tmp_path):
    shutil.copytree(one / "sft", tmp_path / "sft", ignore=shutil.ignore_patterns("checkpoint-2", "*.safetensors"))
    statuses, outputs = launch("four", 4, places, tmp_path)
    assert statuses == [75, 75, 1, 75], "\n".join(outputs)
    assert_same_run(tmp_path / "sft", one / "sft")
    assert "ArithmeticError: bad luck" in outputs[2] and "in four" in outputs[2]
    for i in (0, 1, 3):
        assert "process 2 of 4" in outputs[i] and "failed: ArithmeticError: bad luck;" in outputs[i]


MEET = """
import os, signal, subprocess, sys, time
from jaxrlhf.distributed import lifeline
address, process = sys.argv[1], int(sys.argv[2])
line = lifeline.join(address, 3, process, timeout=60, silence=2)
pids = line.gather("process ids", os.getpid())
if process == 1:
    ACTION
line.gather("what never comes", None)
"""
STOP = """watch = f"while kill -0 {pids[0]} 2>/dev/null; do sleep 0.1; done; kill -CONT {pids[1]}"
    subprocess.Popen(["sh", "-c", watch])
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(60)"""


@pytest.mark.parametrize(
    ("action", "status", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "is gone (its connection closed)"),
        ("line.fail('InputError: row 7 is bad'); os._exit(2)", 2, "failed: InputError: row 7 is bad"),
        (STOP, lifeline.LOST, "is gone since"),
        ("line.stop('step 3 takes too long', stacks=True)", lifeline.LOST, "(most recent call first)"),
        ("line.gather('another place', None)", lifeline.LOST, "the processes are at different places of the program"),
        ("line.post(0, b'0' * (lifeline.MAX_MESSAGE + 1)); time.sleep(60)", lifeline.LOST, "67108864 bytes"),
        ("line.post(0, b'{'); time.sleep(60)", lifeline.LOST, "not a JSON message"),
    ],
    ids=["killed", "failed", "silent", "hanging", "strayed", "too large", "junk"],
)
def test_all_end_with_the_reason_when_one_process_is_lost_fails_strays_or_sends_nonsense(action, status, reason):
    address = f"127.0.0.1:{free_port()}"
    program = MEET.replace("ACTION", action)
    statuses, outputs = run_all([[sys.executable, "-c", program, address, str(i)] for i in range(3)])
    assert statuses == [lifeline.LOST, status, lifeline.LOST], "\n".join(outputs)
    assert all(reason in outputs[i] and "process" in outputs[i] for i in (0, 2)), outputs


def forward(server, port, cut):
    """Passes on what a process and the hub send each other until the file `cut` exists, and nothing afterwards."""
    near = server.accept()[0]
    far = call(port)

    def pump(source, target):
        while data := source.recv(1 << 16):
            if not cut.exists():
                target.sendall(data)

    threading.Thread(target=pump, args=(far, near), daemon=True).start()
    pump(near, far)


def test_both_sides_of_a_cut_network_end_with_the_reason(tmp_path):
    port, cut = free_port(), tmp_path / "cut"
    program = MEET.replace("ACTION", f"open({str(cut)!r}, 'w').close()")
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=forward, args=(server, port, cut), daemon=True).start()
        ports = (port, server.getsockname()[1], port)
        commands = [[sys.executable, "-c", program, f"127.0.0.1:{ports[i]}", str(i)] for i in range(3)]
        statuses, outputs = run_all(commands)
    assert statuses == [lifeline.LOST] * 3, "\n".join(outputs)
    assert all("process 1 of 3" in outputs[i] and "is gone since" in outputs[i] for i in (0, 2))
    assert "process 0 of 3" in outputs[1] and "the coordinator, is gone since" in outputs[1]


ABORT = """
import signal, threading, time, os, ctypes
from jaxrlhf.distributed import lifeline
lifeline.delay_abort()
threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
time.sleep(0.5)  # an abort that is not delayed happens here
os._exit(lifeline.LOST)
"""


def test_an_abort_from_c_waits_until_the_process_has_ended_by_itself():
    assert run_all([[sys.executable, "-c", ABORT]])[0] == [lifeline.LOST]


def test_a_value_above_the_limit_of_a_message_is_refused_where_it_is_sent(monkeypatch):
    monkeypatch.setattr(lifeline, "MAX_MESSAGE", 100)
    line = lifeline.join(f"127.0.0.1:{free_port()}", 1, 0, 30.0, 30.0)
    assert line.gather("a name", "x") == ["x"]
    with pytest.raises(InputError, match="at most 100 bytes"):
        line.gather("a name", "x" * 100)


def meet(*greetings, timeout=20.0, address=None):
    """Error of `join` per process when these (number, process, facts) come together; None where it succeeds."""
    address, errors = address or f"127.0.0.1:{free_port()}", [None] * len(greetings)

    def come(i, number, process, facts):
        try:
            line = lifeline.join(address, number, process, timeout, 30.0)
            facts = line.gather("comparing facts", facts)
            line.end()
            errors[i] = _differences("settings", facts)
        except InputError as error:
            errors[i] = str(error)

    threads = [threading.Thread(target=come, args=(i, *greeting)) for i, greeting in enumerate(greetings)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    return errors


def test_differing_versions_and_settings_are_named_on_every_process():
    assert meet((2, 0, {"seed": 1}), (2, 1, {"seed": 1})) == [None, None]
    errors = meet((3, 0, {"jax": "0.10.2", "x": 1}), (3, 1, {"jax": "0.12", "x": 1}), (3, 2, {"jax": "0.10.2"}))
    assert len(set(errors)) == 1
    assert 'jax: "0.10.2" on processes 0, 2, "0.12" on process 1' in errors[0]
    assert "x: 1 on processes 0, 1, nothing on process 2" in errors[0]


@pytest.mark.parametrize("number", [2, 24])
def test_one_thread_of_a_process_serves_all_its_connections(number):
    address, lines = f"127.0.0.1:{free_port()}", {}
    before = threading.active_count()

    def come(process):
        lines[process] = lifeline.join(address, number, process, 60.0, 30.0)

    for turn in (come, lambda process: lines[process].gather("a number", process), lambda i: lines[i].end()):
        threads = [threading.Thread(target=turn, args=(process,)) for process in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        if turn is come:
            assert len(lines) == number == threading.active_count() - before


def test_numbers_that_do_not_fit_together_are_refused():
    errors = meet((3, 0, {}), (3, 1, {}), (3, 1, {}))
    assert all("process_id 1 was given to two processes" in error for error in errors)
    assert all("num_processes is 2 on process 0 and 4 on process 1" in e for e in meet((2, 0, {}), (4, 1, {})))


def call(port, data=b""):
    """A stranger's connection to the port, as soon as something listens there."""
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.sendall(data)
            return stranger
        except ConnectionRefusedError:
            time.sleep(0.05)


def speak(stranger, own, token=b"guessed"):
    """Speaks the protocol with a token; returns the last that the other side says before it closes."""
    size, mine = struct.pack("!I", 32), bytes(32)
    stranger.sendall(size + mine)
    theirs = stranger.recv(36, socket.MSG_WAITALL)[4:]
    stranger.sendall(size + hmac.digest(token, own + theirs + mine, "sha256"))
    stranger.recv(36, socket.MSG_WAITALL)
    return stranger.recv(1)


def reflect(stranger):
    """Sends back what the hub sends."""
    for _ in range(2):
        stranger.sendall(stranger.recv(36, socket.MSG_WAITALL))
    return stranger.recv(1)


def forge(port):
    """Strangers that would be process 1."""
    for would_be in (lambda stranger: speak(stranger, b"process"), reflect):
        with call(port) as stranger:
            assert would_be(stranger) == b""


def test_strangers_that_are_silent_send_junk_or_forge_a_process_keep_no_one_waiting(monkeypatch):
    monkeypatch.setenv(meeting.TOKEN, "secret")
    monkeypatch.setattr(meeting, "GREETING_TIMEOUT", 600)  # a hub that waits for a stranger would not end in time
    port, errors = free_port(), []
    hub = threading.Thread(target=lambda: errors.extend(meet((2, 0, {}), address=f"127.0.0.1:{port}")))
    hub.start()
    data = (b"", b"", b"GET / HTTP/1.0\r\n\r\n", struct.pack("!i", 8) + b"hi", struct.pack("!i", -1) + b"\xff" * 8)
    strangers = [call(port, sent) for sent in data]
    forge(port)
    errors += meet((2, 1, {}), address=f"127.0.0.1:{port}")
    hub.join(DEADLINE)
    assert errors == [None, None]
    with pytest.raises(ConnectionRefusedError):  # no one listens there after the start
        socket.create_connection(("127.0.0.1", port))
    for stranger in strangers:
        stranger.close()


def test_connections_without_the_token_are_counted_by_the_coordinator(monkeypatch):
    monkeypatch.setenv(meeting.TOKEN, "secret")
    port, errors = free_port(), []
    hub = threading.Thread(target=lambda: errors.extend(meet((2, 0, {}), address=f"127.0.0.1:{port}", timeout=2.0)))
    hub.start()
    forge(port)
    hub.join(DEADLINE)
    assert "process 1 of 2 did not come" in errors[0]
    assert "JAXRLHF_TOKEN" in errors[0] and "127.0.0.1" in errors[0]


def test_a_process_learns_at_once_that_the_coordinator_has_another_token(monkeypatch):
    monkeypatch.setenv(meeting.TOKEN, "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hub = threading.Thread(target=lambda: speak(server.accept()[0], b"hub"))
        hub.start()
        (error,) = meet((2, 1, {}), address=f"127.0.0.1:{port}", timeout=DEADLINE)
        hub.join(DEADLINE)
    assert "JAXRLHF_TOKEN" in error and str(port) in error


def test_a_coordinator_waits_no_longer_than_it_is_told_and_names_who_did_not_come():
    errors = meet((3, 0, {}), (3, 2, {}), timeout=0.5)
    assert "process 1 of 3 did not come" in errors[0] and "--initialization_timeout" in errors[0]


def test_a_coordinator_that_cannot_be_reached_is_named_by_the_command_with_what_to_check(capsys, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    flags = [
        "--coordinator_address",
        address,
        "--num_processes",
        "2",
        "--process_id",
        "1",
        "--initialization_timeout",
        "1",
    ]
    assert cli.main(["sft", "--output_dir", str(tmp_path / "run"), "--model_name_or_path", "x", *flags]) == 2
    said = capsys.readouterr().err
    assert f"process 1 of 2 cannot reach the coordinator at {address} (waited 1 s; Connection refused)" in said
    assert "--initialization_timeout" in said and not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="process 0 cannot listen on"):
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        lifeline.join(address, 2, 0, 1.0, 30.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator_address": "10.0.0.1"}, "must be HOST:PORT"),
        ({"coordinator_address": "10.0.0.1:99999"}, "must be HOST:PORT"),
        ({"heartbeat_timeout": 0}, "heartbeat_timeout=0 must be at least 1"),
        ({"num_processes": 2}, "--coordinator_address, --process_id missing"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "process_id=2 must be from 0 to 1"),
    ],
)
def test_flags_that_say_too_little_or_nonsense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(**options)


SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[03-06]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2"}
SLURM |= {"SLURM_LOCALID": "1"}


def test_slurm_and_variables_are_detected_flags_come_first_and_one_process_needs_nothing(monkeypatch):
    assert detect(distributed.ProcessConfig()) == (None, None, None, None)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert detect(distributed.ProcessConfig()) == ("node03:61441", 4, 2, [1])
    assert detect(distributed.ProcessConfig(local_device_ids=(0, 1)))[3] == [0, 1]
    assert detect(distributed.ProcessConfig(num_processes=1))[1] == 1
    assert distributed.initialize(num_processes=1) is False
    for name, value in (("COORDINATOR_ADDRESS", "h:1"), ("NUM_PROCESSES", "8"), ("PROCESS_ID", "7")):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert detect(distributed.ProcessConfig(process_id=5))[:3] == ("h:1", 8, 5)
    monkeypatch.setenv("JAX_PROCESS_ID", "seven")
    with pytest.raises(InputError, match=r"\$JAX_PROCESS_ID='seven'"):
        detect(distributed.ProcessConfig())


def test_a_pod_of_an_indexed_job_without_the_kubernetes_package_is_told_what_is_missing(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert detect(distributed.ProcessConfig())[:3] == (None, None, None)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.warns(UserWarning), pytest.raises(InputError, match="package `kubernetes` is missing"):
        detect(distributed.ProcessConfig())


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
