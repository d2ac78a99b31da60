"""Spikes: their limits, steps that are left out, and runs that go back; with a task whose steps cost nothing."""

import io
import math
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.distributed import ProcessConfig
from jaxrlhf.errors import Interrupted, TrainingDiverged
from jaxrlhf.runs import Run, TrackingConfig
from jaxrlhf.runs.checkpoints import list_checkpoints
from jaxrlhf.trainers import guards
from jaxrlhf.trainers.guards import GuardConfig, robust_limit
from jaxrlhf.trainers.loop import fit
from jaxrlhf.trainers.settings import RunConfig

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Limits exist after four steps."""
    monkeypatch.setattr(guards, "FIRST", 4)


class Counting:
    """A task whose weight grows by the number of each batch that it trains on; some batches have a loss of their own.

    An update above the limits changes nothing, as in the jitted steps.
    """

    name = title = base_model = "counting"
    data_names, exports, identity, defaults, best, devices = (), {}, {}, {}, ("loss", -1), 1

    def __init__(self, steps=12, losses=None, stop_after=None, dies_in_call=None):
        self.total_steps, self.losses, self.stop_after = steps, losses or {}, stop_after
        self.dies_in_call = dies_in_call
        self.batches = []

    def limits(self, history):
        return {"loss": robust_limit(history.get("loss", ()), 6.0)}

    def step(self, state, plan):
        self.batches.append(plan.batch)
        if len(self.batches) == self.dies_in_call:
            raise ZeroDivisionError
        loss = self.losses.get(plan.batch, 1 + 0.1 * (plan.batch % 3))
        spike = plan.limits is not None and loss > plan.limits["loss"]
        made = not spike and math.isfinite(loss)
        state = {"w": state["w"] * 1.5 + plan.batch, "step": state["step"] + 1} if made else {**state}
        if plan.index + 1 == self.stop_after:
            signal.raise_signal(signal.SIGINT)
        skipped = {"guard/skipped_updates": int(not math.isfinite(loss)), "loss": loss}
        return state, skipped | ({} if plan.limits is None else {"guard/spike": int(spike)})

    def evaluate(self, state, done, watch=None):
        return {"loss": float(state["w"][0])}

    def export(self, state, card):
        pass

    def prepare(self, state, plan):
        pass

    def last_batch(self):
        return {"batch": jnp.array(self.batches[-1:])}


def run_task(folder, task, resume=False, **options):
    """(final weight, console) of a run."""
    stream = io.StringIO()
    names = ("save_steps", "save_total_limit", "eval_steps")
    common = {"save_total_limit": 0, "max_steps": task.total_steps}
    config = RunConfig(
        **common | {name: options.pop(name) for name in names if name in options}, guard=GuardConfig(**options)
    )
    tracking = TrackingConfig(("none",))
    with Run(folder, ProcessConfig(), resume=resume, stream=stream, tracking=tracking, logging_steps=99) as run:
        try:
            state = fit(run, config, task, {"w": jnp.zeros(2), "step": jnp.int32(0)}, resume=resume)
        except (Interrupted, TrainingDiverged, ZeroDivisionError) as error:
            return error, stream.getvalue()
    return float(state["w"][0]), stream.getvalue()


def weight_after(batches):
    weight = jnp.zeros(2)
    for batch in batches:
        weight = weight * 1.5 + batch
    return float(weight[0])


def records(folder):
    return [{k: v for k, v in r.items() if k not in ("time", "perf/peak_memory_gib")} for r in read(folder)]


def read(folder):
    return read_jsonl(folder / "metrics.jsonl")


def test_limits_ignore_earlier_spikes_and_leave_room_for_a_metric_that_does_not_move():
    values = list(np.random.default_rng(0).normal(2.0, 0.1, 100))
    clean, spoiled = robust_limit(values, 6.0), robust_limit([*values, 50.0, 80.0, 1e9], 6.0)
    assert 2.4 < clean < 2.8 and spoiled == pytest.approx(clean, abs=0.05)
    assert robust_limit([2.0] * 50, 6.0) == pytest.approx(2.0 + 6 * 0.02 * 2)
    assert robust_limit(values[:3], 6.0) == math.inf
    assert robust_limit(values, 6.0, updates=4) - 2.0 == pytest.approx(2 * (clean - 2.0), rel=0.05)


def test_a_spike_is_skipped_recorded_and_printed_and_without_the_option_it_is_trained_on(tmp_path):
    task = Counting(losses={7: 9.0})
    weight, printed = run_task(tmp_path / "skip", task, on_spike="skip")
    assert weight == weight_after(b for b in range(12) if b != 7)
    assert [r["guard/spike"] for r in records(tmp_path / "skip") if "guard/spike" in r] == [0] * 7 + [1] + [0] * 4
    assert "step 8: skipped 1 update, because loss=9 is above 1." in printed
    weight, _ = run_task(tmp_path / "none", Counting(losses={7: 9.0}))
    assert weight == weight_after(range(12))


def test_several_spikes_in_a_row_end_the_run_with_the_batch(tmp_path):
    losses = dict.fromkeys(range(6, 12), 9.0)
    error, _ = run_task(tmp_path, Counting(losses=losses), on_spike="skip", max_skipped_steps=2)
    assert isinstance(error, TrainingDiverged)
    assert "loss=9 is above" in str(error) and "in 2 steps in a row" in str(error) and "checkpoint-8" in str(error)
    assert np.load(tmp_path / "spike-step-8.npz")["batch"] == [7]


@pytest.mark.parametrize(("back", "to"), [(1, 6), (3, 4), (50, 2)])
def test_a_rollback_goes_to_the_newest_checkpoint_that_is_old_enough_and_leaves_out_the_batches_since(
    tmp_path, back, to
):
    task = Counting(losses={7: 9.0})
    weight, printed = run_task(tmp_path, task, on_spike="rollback", rollback_steps=back, save_steps=2)
    assert task.batches == [*range(8), *range(8, 8 + 12 - to)]
    assert weight == weight_after([*range(to), *range(8, 8 + 12 - to)])
    assert f"step 8: back to checkpoint-{to}; the {8 - to} batches since then are left out (rollback 1 of 3)" in printed
    steps = [r["step"] for r in records(tmp_path) if "loss" in r]
    assert steps == list(range(1, 13)), "each step once"
    (event,) = (r for r in records(tmp_path) if "guard/rollbacks" in r)
    assert event == {"step": to, "guard/spike": 1, "guard/rollbacks": 1} | {
        "guard/left_out_batches": 8 - to,
        "guard/rolled_back_from": 8,
    }


def test_a_run_with_rollbacks_resumes_to_the_same_bits_and_records_from_any_step(tmp_path):
    losses, options = {7: 9.0, 12: 9.0}, {"on_spike": "rollback", "rollback_steps": 2, "save_steps": 3, "eval_steps": 4}
    whole, _ = run_task(tmp_path / "whole", Counting(14, losses), **options)
    assert [r["guard/rollbacks"] for r in records(tmp_path / "whole") if "guard/rollbacks" in r] == [1, 2]
    for stop in (5, 9):
        folder = tmp_path / str(stop)
        error, _ = run_task(folder, Counting(14, losses, stop_after=stop), **options)
        assert isinstance(error, Interrupted)
        resumed, _ = run_task(folder, Counting(14, losses), resume=True, **options)
        assert resumed == whole and records(folder) == records(tmp_path / "whole")
    for call in (9, 14):  # without a checkpoint of its own, before and after the rollbacks
        folder = tmp_path / f"died-{call}"
        error, _ = run_task(folder, Counting(14, losses, dies_in_call=call), **options)
        assert isinstance(error, ZeroDivisionError)
        resumed, _ = run_task(folder, Counting(14, losses), resume=True, **options)
        assert resumed == whole and records(folder) == records(tmp_path / "whole")


def test_a_rollback_deletes_the_checkpoints_that_led_to_the_spike(tmp_path):
    losses = {7: 9.0, 8: math.nan, 9: math.nan, 10: math.nan}
    error, _ = run_task(tmp_path, Counting(losses=losses), on_spike="rollback", rollback_steps=3, save_steps=2)
    assert isinstance(error, TrainingDiverged) and "step 7" in str(error)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-7"]


def test_the_run_ends_at_the_spike_after_its_last_rollback_and_skips_where_there_is_no_checkpoint(tmp_path):
    losses = dict.fromkeys((5, 9, 13, 17), 9.0)
    options = {"on_spike": "rollback", "rollback_steps": 1, "max_rollbacks": 2}
    error, printed = run_task(tmp_path / "a", Counting(losses=losses), save_steps=1, **options)
    assert isinstance(error, TrainingDiverged) and "loss=9" in str(error) and "after 2 rollbacks" in str(error)
    assert printed.count("back to checkpoint") == 2
    weight, printed = run_task(tmp_path / "b", Counting(losses={5: 9.0}), **options)
    assert weight == weight_after(b for b in range(12) if b != 5)
    assert "there is no checkpoint to go back to yet" in printed
