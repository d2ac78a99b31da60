"""The watchdog: what counts as hanging, and how a run that hangs ends."""

import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.distributed import watchdog
from jaxrlhf.distributed.activity import BACKEND, activity

HANGING = """
import sys, time
import jax.numpy as jnp
from jaxrlhf.distributed import ProcessConfig, watchdog
from jaxrlhf.runs import Run, TrackingConfig
from jaxrlhf.trainers.loop import fit
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.settings import RunConfig

class Hanging:
    name = title = base_model = "hanging"
    data_names, exports, identity, defaults = (), {}, {}, {}
    best, total_steps, devices = ("loss", -1), 4, 1
    add = Announce(None, "addition", lambda x: x + 1)

    def limits(self, history):
        return {}

    def prepare(self, state, plan):
        pass

    def step(self, state, plan):
        if plan.index == 2 and sys.argv[2] == "hang":
            time.sleep(1e6)
        return {"w": self.add(state["w"])}, {"guard/skipped_updates": 0}

    def evaluate(self, state, done, watch):
        return {"loss": float(state["w"][0])}

    def last_batch(self):
        return {}

    def export(self, state, card):
        print("exported", float(state["w"][0]))

watchdog.TICK = 0.05
config, resume = RunConfig(watchdog=3.0, watchdog_floor=3.0), sys.argv[2] != "hang"
with Run(sys.argv[1], ProcessConfig(), resume=resume, tracking=TrackingConfig(("none",))) as run:
    fit(run, config, Hanging(), {"w": jnp.zeros(2)}, resume=resume)
"""


def test_a_run_that_hangs_prints_its_stacks_saves_and_ends_with_a_status_to_start_again(tmp_path):
    def run(how):
        command = [sys.executable, "-c", HANGING, str(tmp_path / "run"), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=240)

    hung = run("hang")
    assert hung.returncode == 75, hung.stderr
    assert "program started last: addition; compiled last: " in hung.stderr
    assert "(most recent call first)" in hung.stderr and "in step" in hung.stderr
    said = (
        r"step 3 takes longer than 3 s \(usually .* s; --watchdog 3\); checkpoint-2 was saved; this run stops. Continue"
    )
    assert re.search(said, hung.stderr.splitlines()[-1])
    resumed = run("resume")
    assert resumed.returncode == 0 and "exported 4.0" in resumed.stdout, resumed.stderr


@pytest.fixture
def ended(monkeypatch):
    """Runs a body as work under a watchdog whose clock has quick ticks; returns why it ended the run, or None."""
    reasons, over = [], threading.Event()

    def stop_all(reason):
        reasons.append(reason)
        over.set()

    monkeypatch.setattr(watchdog, "stop_all", stop_all)
    monkeypatch.setattr(watchdog, "TICK", 0.01)

    def run(body, factor=2.0, floor=0.2, rescue=lambda kind: f"rescued from {kind}"):
        with watchdog.Watchdog(factor, floor, rescue) as dog:
            for _ in range(3):
                with dog.work("a step"):
                    pass
            with dog.work("a step", "step 4"):
                body(dog, over)
        return reasons[0] if reasons else None

    return run


def forever(dog, over):
    assert over.wait(60)


def test_work_that_takes_far_longer_than_usual_ends_the_run_with_what_was_rescued(ended, capfd):
    reason = ended(forever)
    assert reason == "step 4 takes longer than 0.2 s (usually 0 s; --watchdog 2); rescued from a step"
    assert "forever" in capfd.readouterr().err


def test_a_rescue_that_fails_or_hangs_is_told(ended, monkeypatch):
    def fail(kind):
        raise OSError("disk full")

    assert "no checkpoint was saved (OSError: disk full)" in ended(forever, rescue=fail)


def test_a_rescue_that_hangs_is_given_up(ended, monkeypatch):
    monkeypatch.setattr(watchdog, "RESCUE_LIMIT", 0.05)
    assert "saving takes too long" in ended(forever, rescue=lambda kind: threading.Event().wait(1))


def test_the_first_work_of_a_kind_and_the_work_within_another_have_limits_of_their_own():
    dog = watchdog.Watchdog(20.0, 300.0, str)
    assert dog.limit("a save") == 3600
    with dog.work("a save"):
        pass
    assert dog.limit("a save") == 300
    with dog.work("an evaluation"):
        outer = dog._work
        with dog.work("a batch"):
            assert dog._work is not outer
        assert dog._work is outer
    dog._durations["a save"].extend([100.0, 100.0, 100.0, 4000.0])
    assert dog.limit("a save") == 2000


def test_compilation_does_not_count_and_0_turns_the_watchdog_off(ended):
    ticks = threading.Event()

    def compile_long(dog, over):
        @jax.jit
        def traced(x):
            assert activity.compiling and activity.compiled
            before = dog._work.seconds
            ticks.wait(0.5)  # as long as a compilation
            assert dog._work.seconds - before < 0.1
            assert activity.compile_seconds - compiled >= 0.5  # that in progress counts
            return x

        compiled = activity.compile_seconds
        traced(jnp.zeros(3))
        assert not activity.compiling and "traced" in activity.compiled
        assert activity.compile_seconds - compiled >= 0.5

    assert ended(compile_long) is None
    assert ended(lambda dog, over: over.wait(0.5), factor=0.0) is None


def test_the_compilers_memory_is_given_back_after_a_long_compilation(monkeypatch):
    assert not activity.compiling
    given = []
    monkeypatch.setattr("jaxrlhf.distributed.activity.give_back", lambda: given.append(True))
    jax.monitoring.record_event_duration_secs(BACKEND, 0.1)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 9.0)
    assert not given
    jax.monitoring.record_event_duration_secs(BACKEND, 9.0)
    assert given == [True]
