"""An advantage estimator of the user's own, named as `file.py:function`: the same program as a built-in one."""

import chex
import jax
import numpy as np
import pytest
from lab import without_critic

from jaxrlhf.config import parse
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.errors import InputError
from jaxrlhf.rl import PPOHyperparameters, ppo_step
from jaxrlhf.rl.algorithms import find_algorithm
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.run import train_ppo

FILE = '''
import jax
import jax.numpy as jnp

from jaxrlhf import objectives


def reward_to_go(rewards, experience, hyperparameters):
    """REINFORCE++, written out: the discounted sum of the rewards from a token on."""

    def add(following, reward):
        following = reward + hyperparameters.gamma * following
        return following, following

    _, columns = jax.lax.scan(add, jnp.zeros(rewards.shape[0]), rewards.T, reverse=True)
    advantages = jnp.where(experience.response_mask, columns.T, 0.0)
    return advantages, advantages


def built_in(rewards, experience, hyperparameters):
    advantages = objectives.reward_to_go(rewards, experience.response_mask, hyperparameters.gamma)
    return advantages, advantages


def with_critic(rewards, experience, hyperparameters):
    h = hyperparameters
    return objectives.gae(rewards, experience.values, experience.response_mask, h.gamma, h.lam)


with_critic.needs_critic = True


def of_rows(rewards, experience, hyperparameters):
    return rewards.sum(axis=1), rewards.sum(axis=1)


def alone(rewards, experience, hyperparameters):
    return rewards


number = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("estimators") / "estimators.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def experience(setup, lab):
    e = jax.device_get(setup.experience(setup.rollout(lab.sampling)))
    return e.replace(scores=np.random.default_rng(3).normal(size=lab.ROWS).astype(np.float32))


def step(setup, lab, experience, estimator):
    state = setup.state(lab.sgd, PPOHyperparameters(advantage_estimator=estimator, gamma=0.9))
    if not find_algorithm(estimator).needs_critic:
        state, experience = without_critic(state), experience.replace(values=None)
    state, metrics = ppo_step(state, experience)
    return jax.device_get((state.actor_params, state.critic_params, metrics))


@pytest.mark.parametrize(("own", "built_in"), [("reward_to_go", "reinforce++"), ("with_critic", "gae")])
def test_a_step_with_an_estimator_that_computes_the_same_is_the_same(own, built_in, file, experience, setup, lab):
    ours, theirs = (step(setup, lab, experience, name) for name in (f"{file}:{own}", built_in))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ours[0], jax.device_get(setup.actor.params))
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize(("name", "found"), [("of_rows", r"\(16,\), \(16,\)"), ("alone", r"\(16, 16\)")])
def test_an_estimator_whose_arrays_have_other_shapes_is_named(name, found, file, experience, setup, lab):
    with pytest.raises(InputError, match=rf"advantage_estimator=.*estimators\.py:{name} .*{found}"):
        step(setup, lab, experience, f"{file}:{name}")


@pytest.mark.parametrize("name", ["missing", "number"])
def test_a_name_in_the_file_that_is_no_function_is_refused(name, file):
    with pytest.raises(InputError, match=rf"advantage_estimator .*estimators\.py:{name}"):
        PPOHyperparameters(advantage_estimator=f"{file}:{name}")


def test_an_estimator_without_a_critic_refuses_the_critics_settings(file):
    with pytest.raises(InputError, match=r"lam=0\.5 with advantage_estimator=.*reward_to_go.*no critic"):
        PPOConfig.create(advantage_estimator=f"{file}:reward_to_go", lam=0.5)
    assert PPOConfig.create(advantage_estimator=f"{file}:with_critic", lam=0.5).algorithm.has_critic


@pytest.mark.long
def test_the_flag_trains_as_the_built_in_estimator_does(file, demo, tmp_path):
    def run(estimator, folder):
        flags = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        flags |= {"max_prompt_seq_len": 32, "max_answer_seq_len": 8, "max_eval_samples": 16, "max_steps": 1}
        flags |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "sample_steps": 0}
        flags |= {"actor_model_name_or_path": demo.lm, "reward_model_name_or_path": demo.reward}
        flags |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "output_dir": folder}
        flags |= {"advantage_estimator": estimator}
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        state = jax.device_get(train_ppo(parse(PPOConfig, argv, "jaxrlhf ppo", "")))
        (record,) = [r for r in read_jsonl(folder / "metrics.jsonl") if "loss/policy_avg" in r]
        return state, record

    own, record = run(f"{file}:built_in", tmp_path / "own")
    expected, theirs = run("reinforce++", tmp_path / "theirs")
    assert own.critic is None and own.critic_params is None
    chex.assert_trees_all_equal(own.actor_params, expected.actor_params)
    for name in ("loss/policy_avg", "objective/rlhf_reward", "objective/kl"):
        assert record[name] == theirs[name]
    assert "estimators.py:built_in" in (tmp_path / "own" / "config.yaml").read_text()
