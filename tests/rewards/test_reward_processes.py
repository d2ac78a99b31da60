"""Reward functions that end, hang, flood or fill their process: their samples lose the score, the caller goes on."""

import os
import sys
import threading
import time

import numpy as np
import pytest

from jaxrlhf.errors import InputError, SharedError
from jaxrlhf.rewards import Limits, Rewards, processes

FUNCTIONS = """
import ctypes, faulthandler, itertools, os, re, signal, subprocess, sys, threading, time
def bad(action):
    def function(prompts, responses):
        for response in responses:
            if response == "bad":
                action()
        return [float(len(r)) for r in responses]
    return function
def flood():
    while True:
        print("x" * 1000)
def flood_descriptor():
    while True:
        os.write(1, b"y" * 100000)
def interrupt():
    raise KeyboardInterrupt("not from you")
class Strange(BaseException):
    pass
def strange():
    raise Strange("odd")
def fork():
    os.fork()
def leave_threads():
    for _ in range(3):
        threading.Thread(target=time.sleep, args=(1e6,)).start()
end = bad(lambda: os._exit(3))
crash = bad(lambda: ctypes.string_at(0))
sleeping = bad(lambda: time.sleep(1e6))
exploding = bad(lambda: re.match("(a+)+$", "a" * 50 + "b"))
filling = bad(lambda: [bytearray(1 << 24) for _ in itertools.count()])
printing = bad(flood)
writing = bad(flood_descriptor)
interrupting = bad(interrupt)
base = bad(strange)
leaving = bad(lambda: sys.exit("stop"))
terminating = bad(lambda: os.killpg(0, signal.SIGTERM))
stopped = bad(lambda: os.kill(os.getpid(), signal.SIGSTOP))
forking = bad(fork)
threads = bad(leave_threads)
class Endless:
    def __len__(self):
        return 4
    def __iter__(self):
        return itertools.count()
def endless(prompts, responses):
    return Endless() if "bad" in responses else [float(len(r)) for r in responses]
def always(prompts, responses):
    os._exit(7)
def once(prompts, responses):
    if not os.path.exists("died"):
        open("died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(responses)
def parents(prompts, responses):
    print("printed")
    subprocess.run(["echo", "from a child"])
    return [float(os.getppid()), float(os.getpid()), float("jax" in sys.modules)]
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A working directory with a module of functions that do harm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "harm.py").write_text(FUNCTIONS)
    return tmp_path


def scored(names, responses, say=lambda text: None, limits=processes.DEFAULT_LIMITS):
    rewards = Rewards([f"harm.py:{name}" for name in names], say=say, limits=limits)
    return rewards.submit(["p"] * len(responses), responses).result()


ENDS = {
    "end": "its process ended with status 3",
    "crash": "its process ended by signal 11 (Segmentation fault)",
    "terminating": "its process ended by signal 15 (Terminated)",
    "filling": "MemoryError",
    "interrupting": "KeyboardInterrupt: not from you",
    "base": "Strange: odd",
    "leaving": "SystemExit: stop",
}
HANGS = ("sleeping", "exploding", "stopped", "printing", "writing", "endless")
HANGS = dict.fromkeys(HANGS, "it took longer than 0.25 s (--reward_time_limit 2)")


@pytest.mark.parametrize(("reasons", "limits"), [(ENDS, Limits(60.0, 0.3)), (HANGS, Limits(2.0, 1.0))])
def test_harm_costs_the_score_of_its_sample_alone(functions, reasons, limits):
    result = scored(reasons, ["aa", "bad", "c", "dddd"], limits=limits)
    for part in result.parts.values():
        np.testing.assert_array_equal(part, [2, np.nan, 1, 4])
    assert [(name, sample) for name, sample, _ in result.failures] == [(name, 1) for name in reasons]
    for name, _, reason in result.failures:
        assert reasons[name] in reason


@pytest.mark.parametrize("name", ["forking", "threads"])
def test_copies_and_threads_that_a_function_leaves_behind_disturb_no_call(functions, name):
    rewards = Rewards([f"harm.py:{name}"])
    for _ in range(2):
        assert rewards.submit(["p"] * 2, ["bad", "dddd"]).result().scores.tolist() == [3, 4]


def test_the_stack_of_a_function_that_hangs_and_what_its_children_print_are_shown(functions, monkeypatch):
    read = processes.RewardProcess._read

    def late(*arguments):  # the thread that reads has its turn after the answer
        time.sleep(2)
        read(*arguments)

    monkeypatch.setattr(processes.RewardProcess, "_read", late)
    said = []
    scored(["sleeping"], ["bad"], said.append, Limits(0.5))
    assert any("line" in line and "harm.py" in line and "in <lambda>" in line for line in said)
    rewards = Rewards(["harm.py:parents"], say=said.append)
    parent, own, has_jax = rewards.submit(["p"] * 3, ["r"] * 3).result().scores.tolist()
    assert (parent, has_jax) == (os.getpid(), 0) and own != os.getpid()
    assert "parents: printed" in said and "parents: from a child" in said


def test_a_function_that_dies_once_loses_no_score_and_one_that_always_dies_ends_the_run(functions, monkeypatch):
    said = []
    assert scored(["once"], "abcd", said.append).scores.tolist() == [1] * 4
    assert (
        said[0]
        == "once: its process ended by signal 9 (Killed), perhaps for lack of memory; every sample is scored alone"
    )
    monkeypatch.setattr(processes, "LONGEST_WAIT", 0.0)
    rewards = Rewards(["harm.py:always"], say=said.append)
    for _ in range(processes.DEAD_CALLS - 1):
        assert np.isnan(rewards.submit(["p"], ["r"]).result().scores).all()
    with pytest.raises(SharedError, match=r"its process died in 3 calls in a row.* status 7.* Correct"):
        rewards.submit(["p"], ["r"]).result()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import time; time.sleep(1e6)", "importing it failed: it took longer than 1 s"),
        ("import os; os._exit(4)", "importing it failed: its process ended with status 4"),
        ("raise KeyboardInterrupt('x')", "importing it failed: KeyboardInterrupt: x (line 1 of import.py)"),
    ],
)
def test_an_import_that_hangs_ends_or_interrupts_is_refused(functions, line, message):
    (functions / "import.py").write_text(f"{line}\ndef f(prompts, responses): pass\n")
    with pytest.raises(InputError) as caught:
        Rewards(["import.py:f"], limits=Limits(0.1))
    assert message in str(caught.value) and "import.py:f" in str(caught.value)


def test_a_regular_expression_that_explodes_costs_the_score_of_its_sample():
    rewards = Rewards(["regex:pattern=(a+)+$"], say=lambda text: None, limits=Limits(1.0))
    scores = rewards.submit(["p"] * 2, ["aa", "a" * 50 + "b"]).result().scores
    np.testing.assert_array_equal(scores, [1, np.nan])


def test_the_process_and_the_thread_end_with_their_owner(functions):
    rewards = Rewards(["harm.py:parents"], say=lambda text: None)
    pid = int(rewards.submit(["p"] * 3, ["r"] * 3).result().scores[1])
    (thread,) = (t for t in threading.enumerate() if t.name == "reward harm.py:parents")
    os.kill(pid, 0)
    del rewards
    thread.join(60)
    assert not thread.is_alive()
