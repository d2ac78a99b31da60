"""GRPO and its variants, RLOO and REINFORCE++ as commands: published settings, runs with and without a reward model."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import pytest

import jaxrlhf
from jaxrlhf.cli import commands
from jaxrlhf.commands.rlhf import RLHFConfig, train_rlhf
from jaxrlhf.config import default_of, parse, settings, to_dict
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained
from jaxrlhf.rl import ALGORITHMS, PPOHyperparameters
from jaxrlhf.rl.config import CONFIGS, GRPOConfig, PPOConfig, PPOOptions, ReinforceConfig, RLOOConfig
from jaxrlhf.rl.run import train_grpo, train_reinforce, train_rloo

pytestmark = pytest.mark.long

PUBLIC = {
    "grpo": (GRPOConfig, train_grpo, "GRPOConfig", "train_grpo"),
    "rloo": (RLOOConfig, train_rloo, "RLOOConfig", "train_rloo"),
    "reinforce++": (ReinforceConfig, train_reinforce, "ReinforceConfig", "train_reinforce"),
}
each = pytest.mark.parametrize("name", PUBLIC)


# ---- settings

SHARED = {"micro_batches": 1, "response_length": 256}
PUBLISHED = {
    "grpo": SHARED
    | {"advantage_estimator": "grpo", "samples_per_prompt": 8, "scale_by_std": True, "whiten_advantages": False}
    | {"clip_reward": None, "kl_in_loss": True, "kl_estimator": "k3", "loss_aggregation": "sequence-mean"},
    "rloo": SHARED
    | {"advantage_estimator": "rloo", "samples_per_prompt": 4, "whiten_advantages": False, "clip_reward": None}
    | {"kl_in_loss": False, "kl_estimator": "k1", "loss_aggregation": "fixed-length"},
    "reinforce++": SHARED
    | {"advantage_estimator": "reinforce++", "whiten_advantages": True, "clip_reward": 10.0, "gamma": 1.0}
    | {"kl_in_loss": False, "kl_estimator": "k1", "loss_aggregation": "token-mean"},
}
VARIANTS = {
    "dapo": {"cliprange_high": 0.28, "loss_aggregation": "token-mean"},
    "dr_grpo": {"scale_by_std": False, "loss_aggregation": "fixed-length"},
    "gspo": {"ratio_level": "sequence", "cliprange": 3e-4, "cliprange_high": 4e-4},
    "cispo": {"policy_loss": "cispo", "cliprange_high": 4.0, "loss_aggregation": "token-mean"},
}
"""Settings of the variants of GRPO, which have no KL penalty, where they differ from GRPO's."""
RATES = {"grpo": (1e-6, 0.04), "rloo": (1e-6, 0.05), "reinforce++": (5e-7, 0.01)}


@each
def test_the_defaults_are_the_published_ones(name):
    config = CONFIGS[name]()
    assert config.hyperparameters() == PPOHyperparameters(**PUBLISHED[name])
    assert (config.optimizer.learning_rate, config.algorithm.kl_coef) == RATES[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_grpo_is_grpo_with_other_settings(name):
    config, changes = CONFIGS[name](), VARIANTS[name] | {"kl_coef": 0.0}
    refills = 4 if name == "dapo" else 0
    same = GRPOConfig.create(**changes, dynamic_sampling=refills)
    expected = dataclasses.replace(same.hyperparameters(), advantage_estimator=name)
    assert config.hyperparameters() == expected
    assert config.rollout == same.rollout and config.rollout.dynamic_sampling == refills
    assert config.optimizer == same.optimizer and config.sampling == same.sampling
    assert ALGORITHMS[name].advantages is ALGORITHMS["grpo"].advantages


@each
def test_the_command_sets_nothing_that_ppo_could_not_be_told(name):
    config = CONFIGS[name]()
    values = dict(config.items()) | {"advantage_estimator": name}
    ppo = PPOConfig.create(**values)
    assert {setting: ppo.value(setting) for setting in values} == values
    for setting in ALGORITHMS[name].unused:
        assert ppo.value(setting) == config.value(setting) == default_of(PPOConfig, setting)
    assert ppo.hyperparameters() == config.hyperparameters()


@each
def test_what_means_nothing_to_an_algorithm_is_no_flag_of_it_and_refused_by_name(name):
    config, unused = CONFIGS[name], ALGORITHMS[name].unused
    assert set(settings(PPOConfig)) - set(settings(config)) == {"advantage_estimator", *unused}
    assert not set(to_dict(config())) & {"advantage_estimator", *unused}
    for flag in (*unused, "advantage_estimator"):
        with pytest.raises(InputError, match=rf"{flag}\b"):
            parse(config, [f"--{flag}", "1"], f"jaxrlhf {name}", "")
    with pytest.raises(InputError, match="lam"):
        config.create(lam=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"advantage_estimator": "grpo", "critic_learning_rate": 1.0},
            "critic_learning_rate=1.0 with .*=grpo.*no critic",
        ),
        ({"advantage_estimator": "rloo", "cliprange_value": 0.3}, "cliprange_value=0.3 with .*=rloo.*no critic"),
        ({"advantage_estimator": "reinforce++", "lam": 0.9}, r"lam=0.9 with .*=reinforce\+\+.*no critic"),
        ({"advantage_estimator": "rloo", "gamma": 0.9}, "gamma=0.9 with .*=rloo"),
        ({"advantage_estimator": "rloo", "scale_by_std": False}, "scale_by_std=False with .*=rloo"),
        ({"scale_by_std": False}, "scale_by_std=False with advantage_estimator=gae"),
        ({"dynamic_sampling": 2}, "dynamic_sampling=2 with advantage_estimator=gae"),
        ({"advantage_estimator": "reinforce++", "dynamic_sampling": 2}, r"dynamic_sampling=2 with .*=reinforce\+\+"),
    ],
)
def test_ppo_refuses_options_that_its_estimator_does_not_use_naming_both(options, message):
    with pytest.raises(InputError, match=message):
        PPOOptions.create(**({"samples_per_prompt": 2} | options))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", {"samples_per_prompt": 1}, "samples_per_prompt=1 with advantage_estimator=grpo"),
        ("rloo", {"samples_per_prompt": 1}, "samples_per_prompt=1 with advantage_estimator=rloo"),
        ("grpo", {"kl_estimator": "k1"}, "kl_estimator=k1 with kl_in_loss"),
        ("rloo", {"kl_in_loss": True}, "kl_estimator=k1 with kl_in_loss"),
        ("reinforce++", {"kl_target": 3.0, "kl_coef": 0.0}, "kl_target=3.0 requires kl_coef"),
        ("grpo", {"reward_functions": ("length",)}, "reward function length: give one of target and limit"),
        ("rloo", {"reward_zero_stage": 5}, "reward_zero_stage=5 must be"),
        ("grpo", {"policy_loss": "cispo", "dual_clip": 3.0}, "dual_clip=3.0: policy_loss=cispo bounds every ratio"),
        (
            "grpo",
            {"policy_loss": "cispo", "cliprange": 0.3, "cliprange_high": 4.0},
            "cliprange=0.3: policy_loss=cispo has no lower bound",
        ),
        ("cispo", {"cliprange": 0.3}, "cliprange"),
        ("dapo", {"overlong_buffer": 4, "length_penalty": 0.1}, "overlong_buffer=4 and length_penalty=0.1 exclude"),
        ("dapo", {"overlong_buffer": 9, "max_answer_seq_len": 8}, "overlong_buffer=9 must be at most .*8"),
        (
            "gspo",
            {"importance_sampling_mode": "token_mask"},
            "mode.*importance_sampling_correction",
        ),
        (
            "gspo",
            {"importance_sampling_correction": True, "importance_sampling_floor": 2.0},
            "importance_sampling_floor=2.0 must be below importance_sampling_cap=2.0",
        ),
    ],
)
def test_contradictory_options_are_refused_naming_the_pair(name, options, message):
    with pytest.raises(InputError, match=message):
        CONFIGS[name].create(**options)


@each
def test_the_command_and_the_public_names_lead_to_the_algorithm(name):
    config, train, *names = PUBLIC[name]
    command = commands()[name]
    assert CONFIGS[name] is config and [getattr(jaxrlhf, public) for public in names] == [config, train]
    assert command.config is config and getattr(importlib.import_module(command.module), command.function) is train
    parsed = parse(config, ["--reward_model_name_or_path", "a", "--num_generations", "2"], f"jaxrlhf {name}", "")
    assert parsed.models.reward_model_name_or_path == "a" and parsed.sampling.samples_per_prompt == 2
    assert parse(config, ["--critic_model_name_or_path", "a", "--rloo_k", "2"], "jaxrlhf", "") == parsed


# ---- runs


@pytest.fixture(scope="module")
def train(demo):
    """`train("grpo", folder, **options)`: a run on the demo data on all devices, 16 rows a step."""

    def start(name, folder, **options):
        config, run = CONFIGS[name], train_grpo
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_prompt_seq_len": 32, "max_answer_seq_len": 8, "max_eval_samples": 16}
        common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "samples_per_prompt": 4}
        common |= {"actor_model_name_or_path": demo.lm, "output_dir": str(folder), "sample_steps": 0}
        common |= {"lr_scheduler_type": "constant", "logging_steps": 100}
        return run(config.create(**(common | options)))

    return start


@pytest.fixture(scope="module", params=PUBLIC)
def finished(request, train, demo, tmp_path_factory):
    """Three steps of one algorithm with a reward model: its name, final state and folder."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    state = train(request.param, folder, reward_model_name_or_path=demo.reward, learning_rate=1e-3, max_steps=3)
    return SimpleNamespace(name=request.param, state=jax.device_get(state), folder=folder)


def test_a_run_with_a_reward_model_trains_the_policy_alone_and_says_by_what(finished, demo):
    assert finished.state.critic_params is None and finished.state.critic is None
    loaded = load_pretrained(finished.folder)
    chex.assert_trees_all_equal(jax.device_get(loaded.params), finished.state.actor_params)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), loaded.params, load_pretrained(demo.lm).params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert not (finished.folder / "critic").exists()
    assert json.loads((finished.folder / "summary.json").read_text())["trainer"] == finished.name
    title = {"grpo": "GRPO", "rloo": "RLOO", "reinforce++": "REINFORCE++"}[finished.name]
    assert f"<h2>{title}</h2>" in (finished.folder / "report.html").read_text()
    assert title in (finished.folder / "README.md").read_text()
    records = [r for r in read_jsonl(finished.folder / "metrics.jsonl") if "objective/scores" in r]
    assert len(records) == 3
    for record in records:
        assert "loss/value_avg" not in record and ("loss/kl_avg" in record) == (finished.name == "grpo")
    assert records[0]["val/ratio"] == pytest.approx(1, abs=1e-6)


def test_another_algorithm_does_not_resume_the_run(finished, train, demo):
    other = "rloo" if finished.name == "grpo" else "grpo"
    with pytest.raises(InputError, match=rf"cannot resume .*trainer: '{finished.name.replace('+', '.')}' then"):
        train(other, finished.folder, reward_model_name_or_path=demo.reward, learning_rate=1e-3, resume=True)


@each
def test_a_reward_function_alone_is_learned(name, train, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def brief(prompts, responses):\n    return [-len(response) / 10 for response in responses]\n"
    )
    options = {"reward_functions": (f"{tmp_path}/rewards.py:brief",), "kl_coef": 1e-4, "learning_rate": 2e-2}
    train(name, tmp_path / "run", max_steps=12, **options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = summary["eval_before"], summary["eval_after"]
    assert after["scores"] - before["scores"] > before["scores_std"], "by more than the answers differed at the start"


def test_online_dpo_learns_the_order_of_the_scores_alone(train, tmp_path):
    """Scores a thousand times as large give the same run, to the bit."""
    (tmp_path / "rewards.py").write_text(
        "def brief(prompts, responses):\n    return [-len(response) / 8 for response in responses]\n"
    )
    common = {"reward_functions": (f"{tmp_path}/rewards.py:brief",), "max_steps": 12, "learning_rate": 2e-2}
    states = [
        train("online_dpo", tmp_path / str(weight), reward_weights=(weight,), **common) for weight in (1.0, 1024.0)
    ]
    chex.assert_trees_all_equal(*(jax.device_get(state.actor_params) for state in states))
    summary = json.loads((tmp_path / "1.0" / "summary.json").read_text())
    before, after = summary["eval_before"], summary["eval_after"]
    assert summary["title"] == "online DPO" and after["scores"] - before["scores"] > before["scores_std"]
    with pytest.raises(InputError, match="kl_coef=0 with advantage_estimator=online_dpo"):
        train("online_dpo", tmp_path / "none", kl_coef=0.0, **common)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_grpo_trains_from_a_reward_function(name, train, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def brief(prompts, responses):\n    return [-len(response) / 10 for response in responses]\n"
    )
    options = {"reward_functions": (f"{tmp_path}/rewards.py:brief",), "learning_rate": 1e-3, "num_mini_batches": 2}
    options |= {"importance_sampling_correction": True, "importance_sampling_mode": "sequence_mask"}
    options |= {"per_device_train_batch_size": 1} | ({"overlong_buffer": 2} if name == "dapo" else {})
    train(name, tmp_path / "run", max_steps=2, **options)
    records = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "objective/scores" in r]
    assert len(records) == 2 and all(r["policy/grad_norm"] > 0 for r in records)
    assert all(("sampling/refills" in r) == (name == "dapo") for r in records)
    assert records[0]["val/ratio"] == pytest.approx(1, abs=0.01) and records[0]["objective/kl"] == pytest.approx(
        0, abs=1e-3
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trainer"] == name


def test_group_sizes_that_do_not_divide_the_batch_are_refused_before_anything_is_written(train, demo, tmp_path):
    for options, message in (
        ({"samples_per_prompt": 3}, "samples_per_prompt=3 must divide the rollout batch of 16 rows"),
        ({"generation_batches": 3}, "generation_batches=3 must divide the 4 prompts of a rollout batch"),
    ):
        with pytest.raises(InputError, match=message):
            train("grpo", tmp_path / "run", reward_model_name_or_path=demo.reward, **options)
    with pytest.raises(InputError, match=r"reward_model_name_or_path: name a model folder .* reward_functions"):
        train("rloo", tmp_path / "run")
    with pytest.raises(InputError, match=r"no scalar head.*language model, not a reward model"):
        train("rloo", tmp_path / "run", reward_model_name_or_path=demo.lm)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_third_step_of_three_may_do_without_a_critic(demo, tmp_path, monkeypatch):
    def trained_before(model, figure):
        def train(config):
            shutil.copytree(model, config.folder.output_dir)
            text = json.dumps({"eval_before": {figure: 1.0}, "eval_after": {figure: 0.5}, "seconds": 1.0, "steps": 1})
            (Path(config.folder.output_dir) / "summary.json").write_text(text)

        return train

    monkeypatch.setattr("jaxrlhf.commands.rlhf.train_sft", trained_before(demo.lm, "loss"))
    monkeypatch.setattr("jaxrlhf.commands.rlhf.train_reward", trained_before(demo.reward, "accuracy"))
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_answer_seq_len": 8}
    config = RLHFConfig.create(
        output_dir=str(tmp_path / "all"),
        actor_model_name_or_path=demo.lm,
        data_path=(demo.train,),
        eval_data_path=(demo.eval,),
        data_cache_dir=demo.cache,
        max_eval_samples=16,
        max_prompt_seq_len=32,
        ppo=PPOOptions.create(advantage_estimator="rloo", samples_per_prompt=4, max_steps=1, **options),
    )
    summary = train_rlhf(config)
    assert set(summary["seconds"]) == {"sft", "reward", "ppo"} and summary["ppo_kl"] == pytest.approx(0, abs=1e-3)
    assert "<h2>RLOO</h2>" in (tmp_path / "all" / "report.html").read_text()
    assert not (tmp_path / "all" / "ppo" / "critic").exists()


@each
def test_what_the_algorithms_share_has_a_critic_nowhere(name):
    assert not [setting for setting in settings(CONFIGS[name]) if setting.startswith("critic_")]
