"""Going on from a checkpoint: which one, other settings, other devices; and starting from another run's parameters."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import numpy as np
import pytest

from jaxrlhf.config import lasting_defaults, parse
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.errors import InputError
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.runs import pending_save, saving
from jaxrlhf.runs.checkpoints import list_checkpoints, set_aside
from jaxrlhf.runs.console import Console
from jaxrlhf.runs.saving import save_checkpoint
from jaxrlhf.trainers.optimizer import OptimizerConfig, make_schedule, same_past
from jaxrlhf.trainers.resuming import CheckpointOptions, changes_since, chosen, same_rows, start_from
from jaxrlhf.trainers.sft import SFTConfig, train_sft


class Quiet(Console):
    """A console that keeps what it prints, with the folder of a run."""

    def __init__(self, folder):
        super().__init__(quiet=True)
        self.output_dir, self.lines = folder, []

    def print(self, text):
        self.lines.append(text)


def checkpoint(folder, step, identity=None, devices=4, **trees):
    metadata = {"identity": identity or {}, "devices": devices, "exports": {name: {} for name in trees}}
    return save_checkpoint(folder, step, trees or {"params": {"w": np.zeros(2)}}, metadata)


# ---- which checkpoint


def test_a_checkpoint_is_named_by_its_name_number_or_path(tmp_path):
    for step in (8, 12):
        checkpoint(tmp_path / "run", step)
    run = tmp_path / "run"
    assert chosen(run, "") == run / "checkpoint-12"
    for name in ("checkpoint-8", "8", str(run / "checkpoint-8"), f"{run}/checkpoint-8/"):
        assert chosen(run, name) == run / "checkpoint-8"
    assert chosen(tmp_path / "empty", "") is None
    shutil.copytree(run, tmp_path / "other")
    for name in ("checkpoint-9", "9", "run", str(tmp_path / "other" / "checkpoint-8"), "../checkpoint-8"):
        with pytest.raises(InputError, match=r"has checkpoint-8, checkpoint-12; name one.*init_from_checkpoint"):
            chosen(run, name)


def test_later_checkpoints_are_set_aside_and_not_the_newest_any_more(tmp_path):
    for step in (8, 12):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12.aside").mkdir()
    assert set_aside(tmp_path, 8) == ["checkpoint-12"]
    assert (tmp_path / "checkpoint-12.aside" / "metadata.json").exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-8"]


RESUMPTIONS = [("true", True, ""), ("False", False, ""), ("auto", True, ""), ("8", True, "8")]


@pytest.mark.parametrize(("given", "resume", "named"), RESUMPTIONS)
def test_resume_from_checkpoint_takes_truth_values_and_names(given, resume, named):
    folder = SFTConfig.create(model_name_or_path="m", resume_from_checkpoint=given).folder
    assert (folder.resume, folder.resume_from_checkpoint) == (resume, named)


def test_resume_auto_is_resume():
    words = ["--model_name_or_path", "m", "--resume"]
    assert parse(SFTConfig, [*words, "auto"], "sft", "").folder.resume
    with pytest.raises(InputError, match="resume='maybe' must be true or false"):
        parse(SFTConfig, [*words, "maybe"], "sft", "")


# ---- what may change


def task_with(same=False, devices=4, defaults=None, **identity):
    return SimpleNamespace(identity=identity, defaults=defaults or {}, devices=devices, same_past=lambda steps: same)


RUN = {"trainer": "sft", "learning_rate": 0.1, "micro_batches": 1, "total_steps": 10, "data": "d"}


@pytest.mark.parametrize(
    ("now", "options", "changed"),
    [
        ({}, {}, []),
        ({"learning_rate": 0.2}, {"allowed": ("learning_rate", "dtype")}, ["learning_rate"]),
        ({"total_steps": 20}, {"same": True}, ["total_steps"]),
        ({"total_steps": 20}, {"allowed": ("max_steps",)}, ["total_steps"]),
        ({"total_steps": 8}, {"allowed": ("max_steps",)}, ["total_steps"]),
        ({"micro_batches": 2}, {"devices": 2}, []),
    ],
)
def test_allowed_changes_are_listed(tmp_path, now, options, changed):
    allowed = options.pop("allowed", ())
    metadata = {"identity": RUN, "step": 8, "devices": 4}
    found = changes_since(tmp_path, metadata, task_with(**options, **(RUN | now)), allowed)
    assert found == {name: (RUN[name], now[name]) for name in changed}


def test_a_setting_that_is_younger_than_the_checkpoint_had_its_default(tmp_path):
    metadata = {"identity": RUN, "step": 8, "devices": 4}
    defaults = lasting_defaults(SFTConfig)
    assert defaults["weight_decay"] == 0 and "logging_steps" not in defaults
    assert changes_since(tmp_path, metadata, task_with(**RUN, weight_decay=0.0, defaults=defaults), ()) == {}
    with pytest.raises(InputError, match=r"weight_decay: 0\.0 then, 0\.1 now"):
        changes_since(tmp_path, metadata, task_with(**RUN, weight_decay=0.1, defaults=defaults), ())


@pytest.mark.parametrize(
    ("now", "options", "text"),
    [
        ({"learning_rate": 0.2}, {}, r"learning_rate: 0.1 then, 0.2 now.*--allow_changes learning_rate, or start"),
        (
            {"total_steps": 20},
            {},
            r"total_steps: 10 then, 20 now.*--allow_changes max_steps; with another number of steps",
        ),
        ({"total_steps": 8}, {"same": True}, r"--allow_changes max_steps"),
        (
            {"total_steps": 7},
            {"allowed": ("max_steps",)},
            r"it is at step 8, and the run would have 7 steps; give more",
        ),
        (
            {"data": "e", "learning_rate": 2},
            {"allowed": ("learning_rate",)},
            r"one: data: 'd' .* now\. Restore .*, or st",
        ),
        ({"micro_batches": 2}, {}, "micro_batches: 1 then, 2 now"),
    ],
)
def test_other_changes_are_refused_with_what_can_be_done(tmp_path, now, options, text):
    allowed = options.pop("allowed", ())
    metadata = {"identity": RUN, "step": 8, "devices": 4}
    with pytest.raises(InputError, match=text) as caught:
        changes_since(tmp_path, metadata, task_with(**options, **(RUN | now)), allowed)
    assert "--allow_changes" not in str(caught.value) or "data" not in now


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"lr_scheduler_type": "constant"}, True),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, True),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.5}, False),
        ({"lr_scheduler_type": "cosine"}, False),
        ({"lr_scheduler_type": "linear", "warmup_steps": 3}, False),
    ],
)
def test_a_longer_schedule_has_the_same_past_exactly_when_its_rates_agree(options, same):
    config = OptimizerConfig(**options)
    rates = [np.array([make_schedule(config, total)(n) for n in range(8)]) for total in (8, 12)]
    assert same_past(config, 8, 12) == same == bool((rates[0] == rates[1]).all())


def test_an_unknown_change_is_refused():
    with pytest.raises(InputError, match=r"allow_changes=.*seed.* must be one of learning_rate, "):
        SFTConfig.create(model_name_or_path="m", allow_changes=("seed",))


# ---- other devices


def config_for(folder, cls=SFTConfig, **options):
    models = {SFTConfig: {"model_name_or_path": "m"}, PPOConfig: {"actor_model_name_or_path": "m"}}
    return cls.create(output_dir=str(folder), resume=True, **models[cls], **options)


@pytest.mark.parametrize(
    ("devices", "options", "expected"),
    [
        (2, {"per_device_train_batch_size": 8}, (8, 2)),
        (8, {"per_device_train_batch_size": 8}, (4, 1)),
        (1, {"per_device_train_batch_size": 3}, (2, 16)),
        (4, {"per_device_train_batch_size": 4}, (4, 1)),
    ],
)
def test_on_other_devices_a_step_keeps_its_rows_with_micro_batches_of_at_most_the_given_size(
    tmp_path, devices, options, expected
):
    checkpoint(tmp_path, 2, {"global_batch_size": 32})
    run, config = Quiet(tmp_path), config_for(tmp_path, **options)
    new = same_rows(config, run, config.run.per_device_train_batch_size * devices, devices)
    assert (new.run.per_device_train_batch_size, new.run.gradient_accumulation_steps) == expected
    assert len(run.lines) == (devices != 4)
    if run.lines:
        assert f"checkpoint-2 has 32 rows per step, of 4 devices; on {devices} devices, " in run.lines[0]
        assert f"--gradient_accumulation_steps {expected[1]} keep the step the same" in run.lines[0]


def test_ppo_keeps_its_rows_of_rollouts_and_of_text(tmp_path):
    checkpoint(tmp_path, 2, {"rollout_batch_size": 64, "pretraining_text": ["key", 9, 16, 32]})
    options = {"num_mini_batches": 2, "per_device_train_batch_size": 8, "ptx_data_path": "t.txt", "ptx_coef": 1.0}
    config = config_for(tmp_path, PPOConfig, **options, per_device_ptx_batch_size=4)
    new = same_rows(config, Quiet(tmp_path), config.rows_per_device * 2, 2)
    assert (new.run.per_device_train_batch_size, new.run.gradient_accumulation_steps) == (8, 2)
    assert new.rollout_rows(2) == 64 and new.ptx_rows(2) == 32


def test_rows_that_do_not_divide_among_the_devices_are_refused_with_what_does(tmp_path):
    checkpoint(tmp_path, 2, {"global_batch_size": 32})
    config = config_for(tmp_path, per_device_train_batch_size=8)
    with pytest.raises(InputError, match=r"32 rows per step, of 4 devices, .* Use a number of devices that divides 32"):
        same_rows(config, Quiet(tmp_path), 24, 3)


# ---- from another run's parameters


@flax.struct.dataclass
class State:
    actor_params: Any
    ema_params: Any
    critic_params: Any = None
    step: int = 0


def values(tree):
    return None if tree is None else float(tree["w"][0])


@pytest.mark.parametrize(
    ("chosen_params", "expected"),
    [((), (1, 3, 2)), (("actor_params",), (1, 1, 0)), (("actor_params=ema_params", "critic_params"), (3, 3, 2))],
)
def test_a_new_run_takes_the_parameters_of_a_checkpoint_and_nothing_else(tmp_path, chosen_params, expected):
    trees = {
        name: {"w": np.full(2, n)} for n, name in ((1.0, "actor_params"), (2.0, "critic_params"), (3.0, "ema_params"))
    }
    checkpoint(tmp_path / "old", 7, **trees)
    zero = {"w": np.zeros(2)}
    options = CheckpointOptions(init_from_checkpoint=str(tmp_path / "old"), init_params=chosen_params)
    state = start_from(Quiet(tmp_path / "new"), options, State(zero, zero, zero), resume=True)
    assert (values(state.actor_params), values(state.ema_params), values(state.critic_params)) == expected
    assert state.step == 0
    checkpoint(tmp_path / "new", 1)
    again = start_from(Quiet(tmp_path / "new"), options, State(zero, zero, zero), resume=True)
    assert values(again.actor_params) == 0, "a resumed run has its own"


def test_parameters_that_do_not_fit_are_named(tmp_path):
    path = str(checkpoint(tmp_path / "old", 7, params={"w": np.zeros(3)}))
    state = State({"w": np.zeros(2)}, None)

    def start(*names, source=path):
        options = CheckpointOptions(init_from_checkpoint=source, init_params=names)
        return start_from(Quiet(tmp_path / "new"), options, state, resume=False)

    with pytest.raises(InputError, match=r"init_params=none: this run has actor_params, and .* has params; name pairs"):
        start()
    with pytest.raises(InputError, match=r"init_params=critic_params=params: this run has actor_params"):
        start("critic_params=params")
    with pytest.raises(InputError, match=r"params/w: checkpoint has float64\[3\], expected float64\[2\]"):
        start("actor_params=params")
    with pytest.raises(InputError, match="there is no checkpoint; name a checkpoint or a run's folder"):
        start(source=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="requires init_from_checkpoint"):
        CheckpointOptions(init_params=("params",))


# ---- whole runs


@pytest.fixture(scope="module")
def train(demo):
    """A run on four batch devices, with a learning rate that is the same whatever the length."""

    def start(folder, **options):
        common = {"model_name_or_path": demo.lm, "disable_dropout": True, "mesh_fsdp": 4, "mesh_tensor": 2, "seed": 3}
        common |= {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache}
        common |= {"max_length": 32, "packing": False, "max_eval_samples": 4, "per_device_train_batch_size": 2}
        common |= {"lr_scheduler_type": "constant", "learning_rate": 1e-2, "adam_epsilon": 1e-2, "max_steps": 4}
        common |= {"save_steps": 1, "save_total_limit": 0, "output_dir": str(folder), "per_device_eval_batch_size": 2}
        return train_sft(SFTConfig.create(**(common | options)))

    return start


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """A run whose disk is full at the first checkpoint; its folder, and what it printed."""
    folder, write, calls = tmp_path_factory.mktemp("finished"), pending_save.file_facts, []

    def full_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return write(*args)

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
        patch.setattr("jaxrlhf.runs.Run.print", lambda self, text: said.append(text))
        patch.setattr(saving, "RETRY", 0.0)
        patch.setattr(pending_save, "file_facts", full_once)
        state = train(folder, async_save=False)
    return SimpleNamespace(folder=folder, said=said, params=jax.device_get(state.params))


def losses(folder):
    return {r["step"]: r["loss"] for r in read_jsonl(folder / "metrics.jsonl") if "loss" in r}


def copied(finished, folder, last):
    """The run as it was after `last` steps."""
    shutil.copytree(finished.folder, folder)
    for path in list_checkpoints(folder):
        if int(path.name.partition("-")[2]) > last:
            shutil.rmtree(path)
    return folder


@pytest.mark.long
@pytest.mark.usefixtures("no_report")
class TestRuns:
    def test_a_full_disk_costs_a_checkpoint_and_no_step(self, finished):
        assert list(losses(finished.folder)) == [1, 2, 3, 4]
        warnings = [line for line in finished.said if "WARNING" in line]
        assert len(warnings) == 1 and "checkpoint-1: no space left on the disk; training goes on" in warnings[0]
        assert [path.name for path in list_checkpoints(finished.folder)] == [f"checkpoint-{n}" for n in (2, 3, 4)]
        assert not list(finished.folder.glob("*.unfinished"))

    def test_a_finished_run_gets_more_steps_and_its_record_says_so(self, finished, train, tmp_path):
        folder = copied(finished, tmp_path / "run", 4)
        train(folder, resume=True, max_steps=5)
        assert list(losses(folder)) == [1, 2, 3, 4, 5]
        (record,) = read_jsonl(folder / "changes.jsonl")
        assert record["step"] == 4 and record["changes"] == {"total_steps": [4, 5]}
        with pytest.raises(InputError, match=r"learning_rate: 0.01 then, 0.001 now.*--allow_changes learning_rate"):
            train(folder, resume=True, max_steps=5, learning_rate=1e-3)

    def test_an_earlier_checkpoint_goes_on_with_an_allowed_change(self, finished, train, tmp_path, capsys):
        folder, steps = copied(finished, tmp_path / "run", 4), [p.name for p in list_checkpoints(finished.folder)]
        changes = {"learning_rate": 5e-3, "allow_changes": ("learning_rate",)}
        state = train(folder, resume_from_checkpoint="3", **changes)
        said = capsys.readouterr().err
        assert "checkpoint-3" in steps and "changed from step 4 on: learning_rate 0.01 → 0.005" in said
        assert "checkpoint-4: set aside" in said and (folder / "checkpoint-4.aside").is_dir()
        assert losses(folder) == losses(finished.folder), "the loss of step 4 is of the parameters before it"
        new = jax.tree.leaves(jax.device_get(state.params))
        assert any((a != b).any() for a, b in zip(new, jax.tree.leaves(finished.params), strict=True))
        metadata = json.loads((folder / "checkpoint-4" / "metadata.json").read_text())
        assert metadata["identity"]["learning_rate"] == 5e-3

    def test_half_the_devices_make_the_same_steps(self, finished, train, tmp_path, capsys):
        folder = copied(finished, tmp_path / "run", 2)
        state = train(folder, resume=True, mesh_fsdp=2, mesh_tensor=4)
        assert "--gradient_accumulation_steps 2 keep the step the same" in capsys.readouterr().err
        ours, theirs = losses(folder), losses(finished.folder)
        assert list(ours) == [1, 2, 3, 4] and [ours[n] for n in ours] == pytest.approx(
            [theirs[n] for n in ours], rel=2e-5
        )
        for a, b in zip(*map(jax.tree.leaves, (jax.device_get(state.params), finished.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    def test_a_new_run_begins_with_the_parameters_of_another(self, finished, train, tmp_path):
        train(tmp_path / "new", max_steps=1, init_from_checkpoint=str(finished.folder / "checkpoint-4"))
        records = [read_jsonl(folder / "metrics.jsonl") for folder in (finished.folder, tmp_path / "new")]
        evaluations = [[r["eval/loss"] for r in part if "eval/loss" in r] for part in records]
        assert evaluations[1][0] == evaluations[0][-1]
        assert losses(tmp_path / "new").keys() == {1}
