"""The lifeline: all processes end with the reason when one is lost, and one thread serves all connections."""

import socket
import sys
import threading

import pytest
from together import DEADLINE, call, free_port, run_all

from jaxrlhf.distributed import lifeline
from jaxrlhf.errors import InputError

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
