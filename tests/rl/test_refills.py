"""Dynamic sampling: which groups are replaced by which, what a step's prompts depend on, and whole runs with it."""

from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.errors import InputError, Interrupted
from jaxrlhf.rl.config import CONFIGS, PPOConfig
from jaxrlhf.rl.experience import Experience
from jaxrlhf.rl.refills import differing, refilled
from jaxrlhf.rl.run import PPOTask, train_grpo
from jaxrlhf.rl.samples import Sampled

PAD = 99


def sampled(first, scores, width=4, **metrics):
    """Samples whose tokens number their rows from `first`; a score that is NaN is unknown."""
    rows = np.arange(first, first + len(scores))
    tokens = jnp.asarray(np.repeat(rows[:, None], width, axis=1), jnp.int32)
    ones = jnp.ones(tokens.shape, bool)
    arrays = {name: ones * 0.5 for name in ("logprobs", "ref_logprobs", "sampler_logprobs", "entropy")}
    given = {"tokens": tokens, "mask": ones, "response_mask": ones, "values": None, "longest": 3}
    experience = Experience(**given, **arrays, scores=jnp.zeros(len(rows)), ended=ones[:, 0])
    rewards = {"own": np.asarray(rows, np.float32)}
    return Sampled(experience.with_scores(jnp.asarray(scores, jnp.float32)), metrics, rewards, {})


def test_groups_differ_by_two_known_scores():
    unknown = float("nan")
    scores = [1, 1, 1, 0, unknown, 0, unknown, unknown, 2, unknown, 1, 2]
    assert differing(sampled(0, scores).experience, 2).tolist() == [False, True, False, False, False, True]
    assert differing(sampled(0, scores).experience, 3).tolist() == [False, False, False, True]


def test_equal_groups_are_replaced_in_order_by_the_first_that_differ():
    batches = {1: sampled(10, [0, 0, 1, 0, 2, 2], **{"timing/score": 2.0, "rewards/own": 4.0, "rewards/failures": 1})}
    batches[2] = sampled(20, [0, 1, 3, 4, 5, 5], 6, **{"timing/score": 3.0, "rewards/own": 9.0, "rewards/failures": 0})
    asked = []

    def more(number):
        asked.append(number)
        return batches[number]

    first = sampled(0, [1, 1, 0, 1, 0, 0], **{"timing/score": 1.0, "rewards/own": 2.0, "rewards/failures": 2})
    found = refilled(first, more, 2, 4, pad_id=PAD, mesh=None)
    assert asked == [1, 2]
    rows = [12, 13, 2, 3, 20, 21]
    e = found.experience
    expected = [[row] * 4 + ([row] * 2 if row >= 20 else [PAD] * 2) for row in rows]
    assert e.tokens.tolist() == expected
    assert e.mask.tolist() == [[value != PAD for value in row] for row in expected] == e.response_mask.tolist()
    assert e.scores.tolist() == [1, 0, 0, 1, 0, 1] and e.longest == 3 and e.values is None
    assert found.rewards["own"].tolist() == rows
    assert found.metrics == {
        "timing/score": 6.0,
        "rewards/own": 5.0,
        "rewards/failures": 3,
        "sampling/refills": 2,
        "sampling/equal_groups": pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3),
    }


def test_no_more_batches_than_the_limit_are_sampled_and_none_without_need():
    equal = [sampled(10 * i, [1, 1, 0, 0]) for i in range(3)]
    asked = []
    found = refilled(equal[0], lambda i: (asked.append(i), equal[i])[1], 2, 2, pad_id=PAD, mesh=None)
    assert asked == [1, 2]
    assert found.rewards["own"].tolist() == [0, 1, 2, 3], "groups that nothing replaces stay"
    assert found.metrics == {"sampling/refills": 2, "sampling/equal_groups": 1.0}
    good = sampled(0, [0, 1, 2, 3])
    found = refilled(good, lambda i: pytest.fail("needs no refill"), 2, 2, pad_id=PAD, mesh=None)
    assert found.experience is good.experience
    assert found.metrics == {"sampling/refills": 0, "sampling/equal_groups": 0.0}


def test_the_prompts_and_keys_of_a_step_and_of_its_refills_depend_on_its_number_alone(monkeypatch):
    """And no two of them are the same, so no prompt comes twice where the data has enough."""
    seen = {}

    def task(step):
        def sample(state, prompts, plan, policy):
            assert not policy
            return int(prompts.ids[0, 0]), plan

        trainer = SimpleNamespace(rewards=(), sample=sample, sampling=SimpleNamespace(pad_token_id=0))
        trainer.reading, trainer.progress = (lambda rows, indices: {}), (lambda step, epoch: {})
        trainer.rollout_plan = lambda step, refill: (step, refill)
        rows = SimpleNamespace(indices=lambda number, prompts: np.arange(number * prompts, (number + 1) * prompts))
        rows.progress = lambda number, prompts: {}
        rows.batch = lambda indices: {"prompt_ids": indices[:, None], "prompt_mask": indices[:, None] >= 0}
        config = SimpleNamespace(rollout=SimpleNamespace(dynamic_sampling=2), scores_policy=False)
        config.sampling = SimpleNamespace(samples_per_prompt=2)
        parts = {"trainer": trainer, "data": SimpleNamespace(train=rows), "config": config, "total_steps": 5}
        own = SimpleNamespace(**parts, prompts=4, engine=SimpleNamespace(mesh=None), ahead=None)
        own._prompts = partial(PPOTask._prompts, own)
        return own, SimpleNamespace(step=step)

    def keep(first, more, size, limit, *, pad_id, mesh):
        assert (size, limit) == (2, 2)
        return [first, *map(more, range(1, limit + 1))]

    monkeypatch.setattr("jaxrlhf.rl.run.refilled", keep)
    for step in (3, 0, 4, 1, 2, 3):
        own, state = task(step)
        found = PPOTask._sample(own, state, SimpleNamespace(batch=step, index=step))
        assert seen.setdefault(step, found) == found
    assert [plan for _, plan in seen[3]] == [(3, 0), (3, 1), (3, 2)]
    places = [place for found in seen.values() for place, _ in found]
    assert sorted(places) == list(range(0, 15 * 4, 4))
    assert [seen[step][0][0] for step in range(5)] == [0, 4, 8, 12, 16], "the run's own prompts come first"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"advantage_estimator": "grpo", "samples_per_prompt": 2, "streaming": True},
            "dynamic_sampling=1 and streaming exclude each other",
        ),
        ({}, "dynamic_sampling=1 compares the responses to one prompt.*samples_per_prompt"),
        ({"advantage_estimator": "reinforce++"}, "dynamic_sampling=1"),
    ],
)
def test_dynamic_sampling_without_groups_or_of_a_stream_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        PPOConfig.create(dynamic_sampling=1, **options)


def test_the_limit_is_a_number_of_batches():
    with pytest.raises(InputError, match="dynamic_sampling=-1 must be"):
        CONFIGS["dapo"].create(dynamic_sampling=-1)
    assert CONFIGS["dapo"].create(streaming=True, dynamic_sampling=0).data.streaming


# ---- runs

REWARD = '''
def even(prompts, responses):
    """1 for responses of an even length: equal in many groups of two."""
    return [float(len(response) % 2 == 0) for response in responses]
'''


@pytest.fixture
def train(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
    (tmp_path / "rewards.py").write_text(REWARD)

    def start(name, **options):
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_prompt_seq_len": 32, "max_answer_seq_len": 8, "max_eval_samples": 8, "sample_steps": 0}
        common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "samples_per_prompt": 2}
        common |= {"actor_model_name_or_path": demo.lm, "output_dir": str(tmp_path / name), "max_steps": 3}
        common |= {"reward_functions": (f"{tmp_path}/rewards.py:even",), "dynamic_sampling": 2, "logging_steps": 100}
        common |= {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
        return train_grpo(CONFIGS["dapo"].create(**(common | options)))

    return start


@pytest.mark.long
def test_a_run_with_refills_learns_from_groups_that_differ_and_resumes_as_if_never_stopped(
    train, tmp_path, sigint_after
):
    whole = train("whole")
    steps = [r for r in read_jsonl(tmp_path / "whole" / "metrics.jsonl") if "sampling/refills" in r]
    assert len(steps) == 3 and sum(r["sampling/refills"] for r in steps) > 0
    assert all(0 <= r["sampling/refills"] <= 2 and 0 <= r["sampling/equal_groups"] <= 1 for r in steps)
    assert all(r["objective/equal_groups"] == 0 or r["sampling/refills"] == 2 for r in steps)
    assert all(r["val/ratio"] == pytest.approx(1, abs=1e-5) for r in steps)
    with sigint_after(1, "objective/kl"), pytest.raises(Interrupted):
        train("parts")
    with pytest.raises(InputError, match="total_steps: 3 then, 4 now"):
        train("parts", resume=True, max_steps=4)
    resumed = train("parts", resume=True)
    chex.assert_trees_all_equal(jax.tree.leaves(jax.device_get(resumed)), jax.tree.leaves(jax.device_get(whole)))
    again = [r for r in read_jsonl(tmp_path / "parts" / "metrics.jsonl") if "sampling/refills" in r]
    names = ("sampling/refills", "sampling/equal_groups", "objective/scores")
    assert [[r[name] for name in names] for r in again] == [[r[name] for name in names] for r in steps]
