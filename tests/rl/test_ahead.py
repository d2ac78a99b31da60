"""Rollouts made some steps before their update: which policy makes which, that they are corrected, whole runs."""

import threading

import chex
import jax
import numpy as np
import pytest
import scripted_environments

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.errors import InputError, Interrupted
from jaxrlhf.rl.config import CONFIGS, PPOConfig
from jaxrlhf.rl.models import meshes
from jaxrlhf.rl.outcomes import Outcome, Played
from jaxrlhf.rl.run import train_grpo, train_ppo
from jaxrlhf.rl.sampler import Sampler
from jaxrlhf.rl.trainer import PPOTrainer

REWARD = """
def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]

def said(prompts, responses, transcript):
    return [sum("again" in message["content"] for message in messages) / 4 for messages in transcript]
"""
OPTIONS = {"importance_sampling_correction": True, "async_steps": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_sampling_correction": False}, "async_steps=2 requires importance_sampling_correction"),
        ({"async_steps": -1}, "async_steps=-1"),
        ({"on_spike": "rollback"}, "async_steps=2 with on_spike=rollback"),
    ],
)
def test_what_cannot_wait_for_its_update_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        PPOConfig.create(**(OPTIONS | options))


@pytest.fixture
def train(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
    (tmp_path / "rewards.py").write_text(REWARD)

    def start(name, train=train_grpo, config=CONFIGS["grpo"], **options):
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_prompt_seq_len": 32, "max_answer_seq_len": 8, "max_eval_samples": 8, "sample_steps": 0}
        common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "samples_per_prompt": 2}
        common |= {"actor_model_name_or_path": demo.lm, "output_dir": str(tmp_path / name), "max_steps": 5}
        common |= {"reward_functions": (f"{tmp_path}/rewards.py:vowels",), "logging_steps": 100}
        common |= {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
        return train(config.create(**(common | options)))

    return start


def steps_of(folder):
    return [r for r in read_jsonl(folder / "metrics.jsonl") if "objective/kl" in r]


@pytest.mark.long
def test_rollouts_come_from_the_policy_of_that_many_steps_ago_and_a_resumed_run_is_the_whole_one(
    train, tmp_path, monkeypatch, sigint_after
):
    made = []
    start = Sampler.start

    def watched(self, params, prompts, plan):
        if plan.sampling.samples_per_prompt > 1:  # not an evaluation
            made.append((prompts.progress["global_step"], jax.random.key_data(plan.key).tolist()))
        return start(self, params, prompts, plan)

    monkeypatch.setattr(Sampler, "start", watched)
    whole = train("whole", **OPTIONS)
    assert [step for step, _ in made] == [0, 0, 0, 1, 2]
    keys = [key for _, key in made]
    records = steps_of(tmp_path / "whole")
    assert [r["sampling/staleness"] for r in records] == [0, 1, 2, 2, 2]
    assert all(r["val/ratio"] == pytest.approx(1, abs=1e-5) for r in records), "the ratio is to the policy of the step"
    gaps = [r["sampling/logp_difference/mean"] for r in records]
    assert gaps[0] < 1e-5 < 1e-3 < min(gaps[1:]), "the weights are to the policy of the rollout"
    made.clear()
    with sigint_after(2, "objective/kl"), pytest.raises(Interrupted):
        train("parts", **OPTIONS)
    with pytest.raises(InputError, match="total_steps: 5 then, 6 now"):
        train("parts", resume=True, max_steps=6, **OPTIONS)
    resumed = train("parts", resume=True, **OPTIONS)
    assert [key for _, key in made] == keys, "what waits is not sampled again"
    states = (jax.tree.leaves(jax.device_get(state.replace(pending=()))) for state in (resumed, whole))
    chex.assert_trees_all_equal(*states)
    names = ("objective/scores", "objective/kl", "rewards/vowels", "sampling/importance_sampling_ratio/mean")
    again = steps_of(tmp_path / "parts")
    assert [[r[name] for name in names] for r in again] == [[r[name] for name in names] for r in records]


@pytest.mark.long
@pytest.mark.parametrize("apart", [{}, {"generation_devices": 4, "per_device_train_batch_size": 4}])
def test_episodes_wait_for_their_update_and_a_resumed_run_plays_none_of_them_again(
    train, tmp_path, monkeypatch, sigint_after, apart
):
    """Rewards of the environment and of functions that read transcripts come back from the checkpoint."""
    played, start = [], Sampler.start

    def watched(self, params, prompts, plan):
        if plan.sampling.samples_per_prompt > 1:
            played.append(prompts.progress["global_step"])
        return start(self, params, prompts, plan)

    monkeypatch.setattr(Sampler, "start", watched)
    options = {"environment": f"{scripted_environments.__file__}:Varied", "max_turn_tokens": 4, "kl_coef": 0.1}
    options |= {"reward_functions": (f"{tmp_path}/rewards.py:said",), "max_prompt_seq_len": 40, "max_steps": 4}
    options |= {"importance_sampling_correction": True, "async_steps": 1, "max_answer_seq_len": 48} | apart
    whole = train("whole", **options)
    assert played == [0, 0, 1, 2]
    records = steps_of(tmp_path / "whole")
    assert [r["sampling/staleness"] for r in records] == [0, 1, 1, 1]
    assert all(r["val/ratio"] == pytest.approx(1, abs=1e-5) for r in records)
    gaps = [r["sampling/logp_difference/mean"] for r in records]
    assert gaps[0] < 1e-5 < 1e-3 < min(gaps[1:])
    assert [(r["environment/turns"], r["rewards/said"]) for r in records] == [(3, 0.75)] * 4
    played.clear()
    with sigint_after(2, "objective/kl"), pytest.raises(Interrupted):
        train("parts", **options)
    resumed = train("parts", resume=True, **options)
    assert played == [0, 0, 1, 2]
    states = (jax.device_get(state.replace(pending=(), pending_episodes=())) for state in (resumed, whole))
    chex.assert_trees_all_equal(*map(jax.tree.leaves, states))
    names = ("objective/scores", "rewards/environment", "rewards/said", "environment/tokens", "environment/info/turn")
    again = steps_of(tmp_path / "parts")
    assert [[r[name] for name in names] for r in again] == [[r[name] for name in names] for r in records]


def test_the_outcomes_of_episodes_come_back_from_their_text():
    messages = [{"role": "user", "content": "Again\ud800"}, {"role": "assistant", "content": "Yes"}]
    first = Outcome("truncated", "turns", {3: 0.1, 12: -2.0}, "Yes", messages, 1, 2, 1, 1, 7, {"turn": 2.0})
    played = Played([first, Outcome("failed", "reset: no")], waited=0.25, has_tools=True)
    found = Played.from_json(played.as_json())
    assert found == played and found.metrics() == played.metrics()


@pytest.mark.long
def test_without_steps_ahead_nothing_changes_and_with_one_the_first_step_does_not(train, tmp_path):
    """A reward model and a critic score with their newest parameters, and rollouts in pieces and refills go along."""
    options = {"importance_sampling_correction": True, "generation_batches": 2, "dynamic_sampling": 1, "max_steps": 3}
    runs = {name: train(name, async_steps=k, **options) for name, k in (("none", 0), ("one", 1))}
    none, one = (steps_of(tmp_path / name) for name in runs)
    assert none[0]["objective/scores"] == one[0]["objective/scores"]
    assert none[0]["policy/grad_norm"] == one[0]["policy/grad_norm"]
    assert [len(state.pending) for state in runs.values()] == [0, 1]
    assert none[2]["objective/scores"] != one[2]["objective/scores"]


@pytest.mark.long
def test_ppo_with_a_critic_and_a_reward_model_trains_on_rollouts_that_have_waited(train, tmp_path, demo):
    options = {"samples_per_prompt": 1, "critic_model_name_or_path": demo.reward, "reward_functions": ()}
    train("ppo", train_ppo, PPOConfig, **OPTIONS | options)
    records = steps_of(tmp_path / "ppo")
    assert [r["sampling/staleness"] for r in records] == [0, 1, 2, 2, 2]
    assert all(np.isfinite(r["loss/value_avg"]) and np.isfinite(r["loss/policy_avg"]) for r in records)


@pytest.mark.long
def test_devices_that_only_generate_give_the_run_of_devices_that_do_both(train, tmp_path, monkeypatch, sigint_after):
    """Up to rounding, which differs with the number of devices; and a run after a stop is the same to the bit."""
    own = {"importance_sampling_correction": True, "async_steps": 1, "max_steps": 4}
    train("both", **own)
    own |= {"generation_devices": 4, "per_device_train_batch_size": 4}
    updating, started = threading.Event(), []
    update, start = PPOTrainer.update, Sampler.start

    def watched_update(self, state, *args):
        if int(state.step) == 1:
            updating.set()
        return update(self, state, *args)

    def watched_start(self, params, prompts, plan):
        if plan.sampling.samples_per_prompt > 1 and prompts.progress["global_step"] == 1:
            started.append(updating.wait(60))
        return start(self, params, prompts, plan)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "update", watched_update)
        patch.setattr(Sampler, "start", watched_start)
        whole = train("whole", **own)
    assert started == [True], "the step trains while its successor's rollout is made"
    names = ("objective/scores", "objective/kl", "loss/policy_avg", "sampling/importance_sampling_ratio/mean")
    both, apart = ([[r[n] for n in names] for r in steps_of(tmp_path / name)] for name in ("both", "whole"))
    np.testing.assert_allclose(apart, both, rtol=1e-3, atol=1e-4)
    with sigint_after(2, "objective/kl"), pytest.raises(Interrupted):
        train("parts", **own)
    resumed = train("parts", resume=True, **own)
    leaves = (jax.tree.leaves(jax.device_get(state.replace(pending=()))) for state in (resumed, whole))
    chex.assert_trees_all_equal(*leaves)


@pytest.mark.parametrize(
    ("count", "message"), [(8, "leaves none of the 8 devices to train"), (3, "does not divide the 5 devices")]
)
def test_devices_apart_leave_some_to_train(count, message):
    with pytest.raises(InputError, match=message):
        meshes(PPOConfig.create(**OPTIONS, generation_devices=count, mesh_data=4))
