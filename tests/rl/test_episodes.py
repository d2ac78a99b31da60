"""Rollouts with an environment: what is masked, where rewards stand, and what bad environments cost."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted_environments

from jaxrlhf import objectives
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.engine import SamplingConfig
from jaxrlhf.environments import Environments
from jaxrlhf.errors import InputError, SharedError
from jaxrlhf.rl import PPOHyperparameters, advantages_and_returns, ppo_step, shaped_scores
from jaxrlhf.rl.config import CONFIGS, PPOConfig
from jaxrlhf.rl.experience import shaped_experience
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.run import train_grpo
from jaxrlhf.rl.trainer import PPOTrainer

SOURCE = Path(scripted_environments.__file__)
OPTIONS = {"max_prompt_seq_len": 40, "max_answer_seq_len": 48, "max_turn_tokens": 4, "seed": 3, "kl_coef": 0.1}
OPTIONS |= {"advantage_estimator": "rloo", "samples_per_prompt": 2, "environment": f"{SOURCE}:Counting"}
OPTIONS |= {"loss_aggregation": "token-mean", "whiten_advantages": False, "clip_reward": None}


def trainer_of(demo, factory=None, **options):
    config = PPOConfig.create(**(OPTIONS | options))
    engine = RLHFEngine(demo.lm, None, demo.tokenizer, 1, config)
    return PPOTrainer(engine, config, environments=factory and Environments(factory))


def sampled(trainer, prompts, **columns):
    ids = np.full((len(prompts), 4), 5)
    batch = {"prompt_ids": ids, "prompt_mask": np.ones_like(ids)}
    return trainer.generate_experience(batch, columns, prompts)


@pytest.fixture(scope="module")
def counting(demo):
    trainer = trainer_of(demo)
    return trainer, jax.device_get(sampled(trainer, ["What is it?", "Say something long about it, please."]))


@pytest.fixture(scope="module")
def holes(setup, lab):
    """Experience of three turns with the environment's tokens between them."""
    ids, mask = lab.prompts()
    batch = setup.engine.episodes(ids, mask, jax.random.key(1), SamplingConfig(20, pad_token_id=0), turn_tokens=4)
    given, rewards = {}, {row: {} for row in range(len(ids))}
    while batch.running.any() or given:
        ended = batch.advance(given)
        given = {row: [7, 8, 9][: 1 + row % 3] for row in ended if batch.room(row) > 8}
        for row in ended:
            rewards[row][int(batch.lengths[row])] = 0.25 * (row % 4)
    experience = setup.experience(batch.rollout(rewards))
    parts = jnp.sum(jnp.where(experience.response_mask, experience.turn_rewards, 0), axis=1)
    return experience.with_scores(experience.scores + parts)


def test_turns_of_an_episode_are_responses_and_messages_of_the_environment_are_not(counting, demo):
    trainer, e = counting
    texts = ["again", "again again"]
    for row in range(4):
        inside, own = e.mask[row], e.response_mask[row]
        ids = e.tokens[row][inside]
        edges = np.flatnonzero(np.diff(own[inside].astype(int)))
        pieces = np.split(ids, edges + 1)
        assert len(pieces) == 6 and [len(piece) for piece in pieces[1::2]] == [4, 4, 4]
        for text, piece in zip(texts, pieces[2::2], strict=False):
            shown = demo.tokenizer.decode(piece)
            assert text in shown and shown.count("again") == text.count("again")
        shown = trainer.texts(e.tokens, e.mask, e.response_mask)
        assert "again again" in shown[1][row] and "again" not in shown[0][row]
    assert not e.logprobs[~e.response_mask].any() or e.longest is not None


def test_rewards_stand_at_the_last_tokens_of_their_turns_and_add_up_to_the_score(counting):
    trainer, e = counting
    for row in range(4):
        columns = np.flatnonzero(e.response_mask[row])
        ends = [columns[3], columns[11]]
        np.testing.assert_array_equal(e.turn_rewards[row][ends], [0.5, 2.0])
        assert e.turn_rewards[row].sum() == 2.5 == e.scores[row]
    metrics = trainer._scored
    assert metrics["environment/turns"] == 3 and metrics["environment/failures"] == 0
    assert metrics["rewards/environment"] == 2.5 and metrics["environment/info/turn"] == 3
    assert metrics["environment/tokens"] == (e.mask & ~e.response_mask).sum() / 4 - prompt_tokens(e)


def prompt_tokens(e):
    return np.mean([np.argmax(mask) for mask in e.response_mask])


def test_entries_of_the_environments_tokens_change_no_update(holes, setup, lab):
    h = PPOHyperparameters(kl_in_loss=True, kl_estimator="k3", entropy_coef=0.1, importance_sampling_correction=True)
    outside = ~holes.response_mask
    spoiled = holes.replace(
        **{
            name: jnp.where(outside, jnp.nan, getattr(holes, name))
            for name in ("logprobs", "ref_logprobs", "values", "sampler_logprobs", "entropy", "turn_rewards")
        }
    )
    clean, spoilt = (ppo_step(setup.state(lab.sgd, h), e) for e in (holes, spoiled))
    for ours, expected in zip(jax.tree.leaves(spoilt), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", ["clip", "cispo", "sequence"])
def test_the_gradient_of_every_token_of_the_environment_is_exactly_zero(holes, kind):
    e = holes
    advantages = advantages_and_returns(e, jnp.float32(0.1), PPOHyperparameters())[1]

    def loss(logprobs):
        options = {"kind": "cispo"} if kind == "cispo" else {"sequence_ratio": kind == "sequence"}
        weights = objectives.loss_weights(e.response_mask, "sequence-mean")
        policy, _ = objectives.policy_loss(
            logprobs, e.logprobs - 0.01, advantages, e.response_mask, 0.2, token_weights=weights, **options
        )
        kl = objectives.kl_estimate(logprobs, e.ref_logprobs, "k3", e.response_mask)
        return policy + objectives.masked_mean(kl, e.response_mask)

    gradient = np.asarray(jax.grad(loss)(e.logprobs))
    mask = np.asarray(e.response_mask)
    assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).mean() > 0.9


def test_the_sum_of_a_rows_rewards_does_not_depend_on_their_places(holes):
    h = PPOHyperparameters(score_normalization="batch", clip_reward=1.0)
    shaped, _ = shaped_experience(holes, h, None)
    placed = advantages_and_returns(shaped, jnp.float32(0.1), h)[0]
    at_end = advantages_and_returns(shaped.replace(turn_rewards=None), jnp.float32(0.1), h)[0]
    np.testing.assert_allclose(placed.sum(1), at_end.sum(1), atol=1e-5)
    assert (np.abs(placed - at_end) > 1e-3).any()
    np.testing.assert_array_equal(shaped.scores, shaped_scores(holes, h, None)[0])


OF_TRL = """
def turns(completions, environments, log_extra, **kwargs):
    log_extra("asked", [message[0]["content"] for message in kwargs["prompts"]])
    roles = [[message["role"] for message in messages] for messages in completions]
    assert roles == [["assistant", "user", "assistant", "user", "assistant"]] * len(completions)
    return [10 * environment.turn + len(messages) for environment, messages in zip(environments, completions)]
"""


def test_a_function_of_trl_gets_the_messages_of_all_turns_and_the_environments_values(demo, tmp_path):
    (tmp_path / "reward.py").write_text(OF_TRL)
    trainer = trainer_of(demo, reward_functions=(f"{tmp_path}/reward.py:turns",))
    e = jax.device_get(sampled(trainer, ["What is it?", "Say something."]))
    assert trainer._scored["rewards/turns"] == 35 and trainer._scored["rewards/failures"] == 0
    np.testing.assert_array_equal(e.scores, [37.5] * 4)


BEHAVIOURS = {
    "good": ("done", ""),
    "truncates": ("truncated", "turns"),
    "talks too much": ("truncated", "tokens"),
    "raises": ("failed", "KeyError: 'no such thing'"),
    "hangs": ("failed", "took longer than 1 s"),
    "loops": ("failed", "took longer than 1 s"),
    "wrong type": ("failed", "step must return an Observation; found a tuple"),
    "wrong message": ("failed", "content of message 1"),
    "wrong reward": ("failed", "must be a finite number or None"),
    "says nothing": ("failed", "must have done=True"),
    "silent": ("failed", "ended without a reward"),
    "begins badly": ("failed", "message 1 of what reset returns"),
    "begins long": ("failed", "raise max_prompt_seq_len=40"),
}
SCORES = {"good": 1.0, "truncates": -1.0, "talks too much": 0.25}


def test_a_bad_environment_costs_its_episodes_their_scores_and_no_more(demo, capsys, monkeypatch):
    def as_json(what, make):  # as values travel to the other processes of a run
        return json.loads(json.dumps(make()))

    monkeypatch.setattr("jaxrlhf.rl.episodes.from_primary", as_json)
    options = {"environment_timeout": 1.0, "max_turns": 3, "samples_per_prompt": 1, "environment": f"{SOURCE}:Scripted"}
    trainer = trainer_of(demo, advantage_estimator="reinforce++", loss_aggregation="token-mean", **options)
    outcomes = []
    begin = trainer.runner.begin
    trainer.runner.begin = lambda *args: outcomes.append(begin(*args)) or outcomes[0]
    e = jax.device_get(sampled(trainer, ["a"] * len(BEHAVIOURS), behaviour=list(BEHAVIOURS)))
    for row, (name, (status, reason)) in enumerate(BEHAVIOURS.items()):
        outcome = outcomes[0].outcomes[row]
        assert (outcome.status, reason in outcome.reason) == (status, True), (name, outcome)
        assert "WrongAnswer" not in outcome.reason
        assert e.response_mask[row].any() == (status != "failed")
        assert e.scores[row] == SCORES.get(name, 0.0)
    metrics = trainer._scored
    assert metrics["environment/failures"] == 10 and metrics["environment/truncated"] == pytest.approx(2 / 13)
    assert "and 7 more episodes of this batch failed" in capsys.readouterr().out
    loss = trainer.train_rlhf(jax.tree.map(jnp.asarray, e))[0]
    assert np.isfinite(loss)


def test_an_environment_that_never_works_ends_the_run(demo):
    class Broken:
        def reset(self, row):
            raise RuntimeError("the game is not installed")

        def step(self, messages, response):
            raise AssertionError

    trainer = trainer_of(demo, Broken, samples_per_prompt=32)
    with pytest.raises(SharedError, match=r"last 64 episodes failed.*the game is not installed"):
        sampled(trainer, ["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "Counting"}, "environment 'Counting': must be package.module:name"),
        ({"environment": f"{SOURCE}:Missing"}, "has no 'Missing'"),
        ({"environment": "", "max_turns": 3}, "max_turns=3 requires environment or tools"),
        ({"generation_slots": 4}, "generation_slots=4 with an environment"),
        ({"environment": f"{SOURCE}:asyncio"}, "must be a function"),
        ({"environment": "threading:Event"}, "reset and step"),
    ],
)
def test_wrong_settings_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        PPOConfig.create(**(OPTIONS | {"max_turn_tokens": 0} | options)).environments.load()


@pytest.mark.long
def test_a_run_with_an_environment_is_the_same_in_pieces_and_after_a_resume(demo, tmp_path, no_report):
    """On all devices, and with further groups in the place of those that have one score."""
    options = {name: value for name, value in OPTIONS.items() if name not in ("advantage_estimator", "seed")}
    options |= {"actor_model_name_or_path": demo.lm, "data_path": (demo.train,), "eval_data_path": (demo.eval,)}
    options |= {"data_cache_dir": demo.cache, "max_eval_samples": 6, "per_device_train_batch_size": 2}
    options |= {"samples_per_prompt": 2, "dynamic_sampling": 1, "learning_rate": 1e-3, "save_steps": 1, "max_steps": 2}
    options |= {"kl_in_loss": False, "kl_estimator": "k1", "environment": f"{SOURCE}:Varied"}

    def run(**more):
        config = CONFIGS["grpo"].create(**(options | {"output_dir": str(tmp_path / "run")} | more))
        train_grpo(config)
        records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
        assert any("eval/scores" in record for record in records)
        return [record for record in records if "environment/turns" in record]

    whole = run()
    assert [record["environment/failures"] for record in whole] == [0, 0]
    assert [record["environment/turns"] for record in whole] == [3, 3]
    assert whole[0]["objective/scores_std"] > 0 and whole[1]["objective/kl"] != 0
    again = run(resume_from_checkpoint="checkpoint-1", generation_batches=2)
    for name in ("objective/scores", "objective/kl", "loss/policy_avg", "environment/tokens", "policy/grad_norm"):
        assert again[-1][name] == pytest.approx(whole[-1][name], rel=1e-4, abs=1e-6), name
