"""What fits, against published runs, and the nearest setting that does."""

import json

import pytest
from planning import config_of, fits, programs_of

from jaxrlhf.config import parse
from jaxrlhf.errors import InputError
from jaxrlhf.plan.command import make_plan, run_plan
from jaxrlhf.plan.programs import experience
from jaxrlhf.plan.search import CHANGES, EXPERTS, capacity, flags_between, largest_micro_batches, nearest_on_mesh, peak
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system
from jaxrlhf.runs.console import Console


def test_a_run_without_a_critic_needs_less_than_one_with_it():
    peaks = [make_plan(config_of(actor="opt-1.3b", devices=8, trainer=name)).peak for name in ("grpo", "ppo")]
    assert peaks[0] < peaks[1]
    assert build_system(config_of(actor="opt-1.3b", trainer="grpo")).config.value("samples_per_prompt") == 8


def test_scoring_leaves_the_policy_out_where_the_update_computes_its_logprobs():
    options = {"actor": "opt-1.3b", "trainer": "grpo", "reward": None}
    once, twice = (make_plan(config_of(**options, ppo_epochs=epochs)) for epochs in (1, 2))
    assert once.system.scoring == ("reference",) and twice.system.scoring == ("actor", "reference")
    assert once.cost.seconds["score"] == pytest.approx(twice.cost.seconds["score"] / 2)
    assert experience(once.system).logprobs is None and experience(twice.system).logprobs is not None


@pytest.mark.parametrize("device", ["h200", "b200", "gb200", "mi300x"])
def test_a_larger_device_holds_what_an_a100_does_not(device):
    settings = {"actor": "opt-6.7b", "trainer": "sft", "devices": 1, "remat_policy": "full", "max_length": 512}
    assert not fits(config_of(**settings))
    assert fits(config_of(**settings | {"device": device}))


# ---- the published table (arXiv 2308.01320, tables 1 to 3)


def test_one_device_of_80_gb_trains_13b_with_adapters_and_not_whole():
    assert not fits(config_of(actor="opt-13b", remat_policy="full", per_device_train_batch_size=1))
    with_adapters = {"lora_r": 64, "remat_policy": "full", "per_device_train_batch_size": 1}
    assert fits(config_of(actor="opt-13b", gradient_accumulation_steps=4, **with_adapters))
    proposed = make_plan(
        config_of(actor="opt-13b", per_device_train_batch_size=4, gradient_accumulation_steps=4)
    ).nearest
    assert "--lora_r 64" in proposed.flags and not proposed.same_training


@pytest.mark.parametrize(
    ("actor", "devices", "layout"),
    [
        ("opt-1.3b", 1, {}),
        ("opt-13b", 8, {}),
        ("opt-13b", 64, {}),
        ("opt-66b", 64, {"generate_tensor_parallel": 8}),
        ("opt-175b", 64, {"mesh_tensor": 8, "generate_tensor_parallel": 32}),
    ],
)
def test_what_was_published_as_trained_fits(actor, devices, layout):
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "remat_policy": "full"}
    assert fits(config_of(actor=actor, devices=devices, **small, **layout))


def test_66b_does_not_fit_one_host_of_eight_with_all_parameters_trained():
    plan = make_plan(config_of(actor="opt-66b", devices=8, per_device_train_batch_size=1, remat_policy="full"))
    assert not plan.fits
    assert plan.nearest is None or not plan.nearest.same_training
    assert plan.larger is not None and plan.larger.config.devices > 8


# ---- the nearest setting


def test_the_nearest_setting_fits_and_is_told_in_flags():
    asked = ["--actor", "opt-13b", "--device", "a100-80g", "--devices", "8", "--per_device_train_batch_size", "64"]
    plan = make_plan(parse(PlanConfig, asked, "plan", ""))
    assert not plan.fits and plan.nearest.same_training and plan.larger is None
    again = make_plan(parse(PlanConfig, asked + plan.nearest.flags.split(), "plan", ""))
    assert again.fits
    assert again.config == plan.nearest.config
    assert again.system.rows == plan.system.rows


def test_changes_of_layout_keep_the_rollout_batch():
    config = config_of(actor="opt-175b", devices=16, per_device_train_batch_size=2, zero_stage=1, devices_per_host=8)
    sparse = config.replace(actor="mixtral-8x7b", reward=None, trainer="grpo", generate_tensor_parallel=16)
    tried = 0
    for change in CHANGES:
        asked = sparse if change is EXPERTS else config
        rows, changed = build_system(asked).rows, change.apply(asked)
        assert changed != asked, change.reason
        if change.same_training:
            assert build_system(changed).rows == rows, flags_between(asked, changed)
            tried += 1
    assert tried == len(CHANGES) - 2 == 9
    assert flags_between(sparse, EXPERTS.apply(sparse)) == "--mesh_expert 8 --generate_tensor_parallel 2"
    assert EXPERTS.apply(config) is config


def test_experts_are_split_where_that_alone_lets_a_sparse_model_fit():
    settings = {"trainer": "sft", "actor": "mixtral-8x7b", "device": "v6e", "devices": 32, "max_length": 1024}
    config = config_of(**settings, per_device_train_batch_size=1, remat_policy="full")
    found = nearest_on_mesh(config)
    assert not fits(config) and found.flags == "--mesh_expert 4" and found.same_training
    assert nearest_on_mesh(config, kept=("mesh_expert",)).config.value("mesh_expert") == 1


def test_micro_batches_are_tried_before_anything_that_costs_more():
    config = config_of(actor="opt-1.3b", devices=8, per_device_train_batch_size=256)
    found = nearest_on_mesh(config)
    assert found.flags == "--per_device_train_batch_size 128 --gradient_accumulation_steps 2"
    assert not fits(config), "the next larger one"


def test_the_largest_micro_batches_of_training_and_of_scoring_are_proposed():
    config = config_of(actor="opt-1.3b", per_device_train_batch_size=8, gradient_accumulation_steps=32)
    larger = largest_micro_batches(config)
    flags = "--per_device_train_batch_size 64 --gradient_accumulation_steps 4 --per_device_score_batch_size 256"
    assert flags_between(config, larger) == flags
    assert peak(programs_of(larger)) <= capacity(config) and build_system(larger).rows == build_system(config).rows
    assert largest_micro_batches(larger) == larger
    next_one = larger.replace(per_device_train_batch_size=128, gradient_accumulation_steps=2)
    assert peak(programs_of(next_one)) > capacity(config)


def test_a_model_that_fits_nowhere_in_the_mesh_is_refused_with_the_devices_it_takes(tmp_path):
    config = config_of(actor="opt-175b", devices=1, per_device_train_batch_size=1, json=str(tmp_path / "plan.json"))
    with pytest.raises(InputError, match=r"no setting fits 1 × a100-80g[\s\S]*--devices \d+"):
        run_plan(config, Console(quiet=True))
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"] is False
    assert written["nearest"] is None
    assert "--devices" in written["nearest_with_more_devices"]["flags"]
