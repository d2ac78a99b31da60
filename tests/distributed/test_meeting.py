"""How processes meet: who they are, strangers and forgers at the port, and mistakes at the start."""

import hmac
import socket
import struct
import sys
import threading

import pytest
from together import DEADLINE, call, free_port, meet

from jaxrlhf import cli, distributed
from jaxrlhf.distributed import lifeline, meeting
from jaxrlhf.distributed.processes import detect
from jaxrlhf.errors import InputError


def test_differing_versions_and_settings_are_named_on_every_process():
    assert meet((2, 0, {"seed": 1}), (2, 1, {"seed": 1})) == [None, None]
    errors = meet((3, 0, {"jax": "0.10.2", "x": 1}), (3, 1, {"jax": "0.12", "x": 1}), (3, 2, {"jax": "0.10.2"}))
    assert len(set(errors)) == 1
    assert 'jax: "0.10.2" on processes 0, 2, "0.12" on process 1' in errors[0]
    assert "x: 1 on processes 0, 1, nothing on process 2" in errors[0]


def test_numbers_that_do_not_fit_together_are_refused():
    errors = meet((3, 0, {}), (3, 1, {}), (3, 1, {}))
    assert all("process_id 1 was given to two processes" in error for error in errors)
    assert all("num_processes is 2 on process 0 and 4 on process 1" in e for e in meet((2, 0, {}), (4, 1, {})))


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
