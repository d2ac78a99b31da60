"""Replay of earlier rollouts: what is kept of them, the corrected loss, what is refused, and whole runs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_matches_oracle, normal, spans_with_edge_cases, spoil, tokens

from jaxrlhf import objectives
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.errors import InputError, Interrupted
from jaxrlhf.rl.build import updates_of
from jaxrlhf.rl.config import CONFIGS, GRPOConfig, PPOConfig
from jaxrlhf.rl.replay import kept, narrowed, replays, with_replays
from jaxrlhf.rl.run import train_grpo

OPTIONS = {"importance_sampling_correction": True, "replay_steps": 2}
CLIP, CAP = 0.2, 2.0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (GRPOConfig, {"importance_sampling_correction": False}, "replay_steps=2 requires importance_sampling"),
        (GRPOConfig, {"replay_steps": -1}, "replay_steps=-1"),
        (GRPOConfig, {"async_steps": 3}, "async_steps=3 must be below replay_steps=2"),
        (GRPOConfig, {"async_steps": 2}, "async_steps=2 must be below replay_steps=2"),
        (PPOConfig, {}, "replay_steps=2 with advantage_estimator=gae"),
    ],
)
def test_what_cannot_be_replayed_is_refused(config, options, message):
    with pytest.raises(InputError, match=message):
        config.create(**(OPTIONS | options))


def test_a_rollout_is_used_until_it_is_as_old_as_the_limit():
    assert GRPOConfig.create(**OPTIONS).rollout.reuses == 2
    assert GRPOConfig.create(**OPTIONS, async_steps=1).rollout.reuses == 1
    assert GRPOConfig.create(**OPTIONS | {"replay_steps": 0, "async_steps": 1}).rollout.reuses == 0
    for steps in range(1, 6):
        for reuses in range(4):
            assert replays(steps, reuses) == sum(min(step, reuses) for step in range(steps))
    assert updates_of(GRPOConfig.create(**OPTIONS, ppo_epochs=3), 10)[0] == 3 * (10 + 17)


def corrected_oracle(new, proximal, sampler, advantages, mask):
    """The decoupled objective, one token after the other: min(π_proximal / π_sampler, cap) · the clipped surrogate."""
    total = 0.0
    for i in tokens(mask):
        weight = min(np.exp(proximal[i] - sampler[i]), CAP)
        ratio = np.exp(new[i] - proximal[i])
        total -= weight * min(advantages[i] * ratio, advantages[i] * min(max(ratio, 1 - CLIP), 1 + CLIP))
    return total / mask.sum()


def test_the_corrected_loss_of_a_stale_rollout_is_the_decoupled_objective_in_value_and_gradient():
    rng = np.random.default_rng(0)
    mask = spans_with_edge_cases(rng)
    sampler = normal(rng, mask)
    proximal = spoil(sampler + rng.normal(scale=0.6, size=mask.shape), mask, rng)
    new = spoil(proximal + rng.normal(scale=0.2, size=mask.shape), mask, rng)

    def ours(new, proximal, sampler, advantages, mask):
        weights = objectives.importance_weights(proximal, sampler, mask, high=CAP)
        return objectives.policy_loss(new, proximal, advantages, mask, CLIP, weights=weights)[0]

    args = [new, proximal, sampler, normal(rng, mask), mask]
    assert_matches_oracle(ours, corrected_oracle, args, [0])
    weights = [np.exp(proximal[i] - sampler[i]) for i in tokens(mask)]
    assert min(weights) < 1 < CAP < max(weights), "the cap acts"


@pytest.fixture(scope="module")
def experience(setup, lab):
    scored = setup.experience(setup.rollout(lab.sampling))
    scores = np.arange(lab.ROWS, dtype=np.float32)
    scores[2] = np.nan
    return scored.with_scores(jnp.asarray(scores))


def test_a_kept_rollout_scores_as_before_with_the_same_models(experience, setup):
    width = experience.tokens.shape[1]
    old = kept(experience, 7, width=width + 5, mesh=setup.mesh)
    assert (int(old.step), int(old.columns), old.rollout.tokens.shape[1]) == (7, width, width + 5)
    assert not old.rollout.mask[:, width:].any() and old.rollout.prompt_length == width + 5 - experience.longest
    again = setup.experience(narrowed(old)).with_scores(old.scores)
    names = ("tokens", "mask", "response_mask", "sampler_logprobs", "scores", "ended", "longest")
    chex.assert_trees_all_equal(*({n: getattr(e, n) for n in names} for e in (again, experience)))
    chex.assert_trees_all_close(again.ref_logprobs[3:], experience.ref_logprobs[3:], atol=1e-6)
    assert not again.row_mask[2] and again.row_mask.sum() == experience.row_mask.sum()


def test_metrics_of_replays_stand_beside_those_of_the_step():
    own = {"loss/policy_avg": 1.0, "guard/skipped_updates": 1.0, "val/ratio": 1.0}
    replayed = [
        {"loss/policy_avg": value, "guard/skipped_updates": 1.0, "sampling/staleness": age, "timing/replay": 0.5}
        for value, age in ((2.0, 1), (4.0, 2))
    ]
    assert with_replays(own, replayed, 0) == own | {
        "replay/loss/policy_avg": 3.0,
        "guard/skipped_updates": 3.0,
        "sampling/replays": 2,
        "sampling/staleness": 1.0,
        "timing/replay": 1.0,
    }
    nothing = {"sampling/replays": 0, "sampling/staleness": 0.0, "timing/replay": 0}
    assert with_replays(own, [], 0) == own | nothing


# ---- whole runs


@pytest.fixture
def train(demo, tmp_path, no_report):
    def start(name, config=CONFIGS["grpo"], **options):
        common = {"data_path": demo.train, "eval_data_path": demo.eval, "data_cache_dir": demo.cache, "seed": 3}
        common |= {"max_prompt_seq_len": 32, "max_answer_seq_len": 8, "max_eval_samples": 8, "sample_steps": 0}
        common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "samples_per_prompt": 2}
        common |= {"actor_model_name_or_path": demo.lm, "output_dir": str(tmp_path / name), "max_steps": 4}
        common |= {"reward_functions": ("length:target=3",), "logging_steps": 100}
        common |= {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "importance_sampling_correction": True}
        return train_grpo(config.create(**(common | options)))

    return start


def steps_of(folder):
    return [r for r in read_jsonl(folder / "metrics.jsonl") if "objective/kl" in r]


@pytest.mark.long
def test_a_resumed_run_replays_what_the_stopped_one_has_kept(train, tmp_path, sigint_after):
    whole = train("whole", replay_steps=2)
    records = steps_of(tmp_path / "whole")
    assert [r["sampling/replays"] for r in records] == [0, 1, 2, 2]
    assert [r["sampling/staleness"] for r in records] == [0, 0.5, 1, 1]
    assert [int(old.step) for old in whole.replay] == [3, 2] and int(whole.step) == 4
    assert all(r["sampling/logp_difference/mean"] < 1e-5 for r in records), "the step's own rollout is fresh"
    gaps = [r["replay/sampling/logp_difference/mean"] for r in records[1:]]
    assert min(gaps) > 1e-3, "the weights of the others are to the policy that sampled them"
    with sigint_after(2, "objective/kl"), pytest.raises(Interrupted):
        train("parts", replay_steps=2)
    resumed = train("parts", replay_steps=2, resume=True)
    chex.assert_trees_all_equal(*(jax.tree.leaves(jax.device_get(state)) for state in (resumed, whole)))
    names = ("objective/scores", "replay/loss/policy_avg", "replay/sampling/importance_sampling_ratio/mean")
    again = steps_of(tmp_path / "parts")
    assert [[r.get(name) for name in names] for r in again] == [[r.get(name) for name in names] for r in records]
    with pytest.raises(InputError, match="replay_steps: 2 then, 1 now"):
        train("parts", replay_steps=1, resume=True)


@pytest.mark.long
def test_the_first_step_is_that_of_a_run_without_replay_and_rollouts_ahead_go_along(train, tmp_path):
    plain, ahead = train("plain", max_steps=2), train("ahead", replay_steps=3, async_steps=1, dynamic_sampling=1)
    assert plain.replay == () and len(ahead.replay) == 2
    assert [r["sampling/staleness"] for r in steps_of(tmp_path / "ahead")] == pytest.approx([0, 1, 5 / 3, 2], abs=1e-6)
    train("replay", max_steps=2, replay_steps=1)
    first, other = (steps_of(tmp_path / name) for name in ("plain", "replay"))
    same = ("objective/scores", "loss/policy_avg", "policy/grad_norm")
    assert [first[0][name] for name in same] == [other[0][name] for name in same]
    assert [first[1][name] for name in same] == [other[1][name] for name in same], "the replay of step 2 comes after it"
