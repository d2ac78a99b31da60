"""The PPO step's relatives and options against plain reimplementations, and what must leave the models alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import DEFAULTS, few, without_critic

from jaxrlhf.errors import InputError
from jaxrlhf.objectives import Moments
from jaxrlhf.rl import PPOHyperparameters, advantages_and_returns, ppo_step, score_rollout, shaped_scores
from jaxrlhf.rl.config import CONFIGS
from jaxrlhf.rl.experience import RLModels

BETA, RATE = 0.1, 0.1
CRITIC_FREE = {
    "grpo": {"kl_in_loss": True, "kl_estimator": "k3", "loss_aggregation": "sequence-mean", "whiten_advantages": False},
    "rloo": {"whiten_advantages": False, "loss_aggregation": "fixed-length", "response_length": 11},
    "reinforce++": {"gamma": 0.9, "entropy_coef": 0.03, "dual_clip": 1.05},
}


@pytest.fixture(scope="module")
def sampled(setup, lab):
    """Sixteen sampled answers, eight of them ended by EOS."""
    return jax.device_get(setup.experience(setup.rollout(lab.sampling)))


@pytest.fixture(scope="module")
def experience(sampled, lab):
    """The answers with one old policy and another one that is trained."""
    e = sampled
    rng = np.random.default_rng(3)
    moved = np.where(e.response_mask, e.logprobs + rng.normal(scale=0.3, size=e.logprobs.shape), 0).astype(np.float32)
    return e.replace(logprobs=moved, scores=rng.normal(size=lab.ROWS).astype(np.float32))


def naive(module, params, e):
    """Log-probs and entropies `[B, T]` from whole logits."""
    logp = jax.nn.log_softmax(module.apply({"params": params}, e.tokens, e.mask))
    picked = jnp.take_along_axis(logp[:, :-1], jnp.asarray(e.tokens)[:, 1:, None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)[:, :-1]
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (picked, entropy))


def oracle_advantages(e, name, h) -> np.ndarray:
    """In float64, one row after the other."""
    rewards, advantages = np.zeros(e.tokens.shape), np.zeros(e.tokens.shape)
    for b in range(len(e.tokens)):
        steps = np.flatnonzero(e.response_mask[b])
        if not h.kl_in_loss:
            rewards[b, steps] = -BETA * (e.logprobs[b, steps].astype(float) - e.ref_logprobs[b, steps])
        rewards[b, steps[-1]] += float(e.scores[b])
    totals = rewards.sum(1).reshape(-1, h.samples_per_prompt)
    if name == "grpo":
        of_rows = (totals - totals.mean(1, keepdims=True)) / (totals.std(1, ddof=1, keepdims=True) + 1e-6)
    elif name == "rloo":
        of_rows = totals - (totals.sum(1, keepdims=True) - totals) / (h.samples_per_prompt - 1)
    if name != "reinforce++":
        return np.where(e.response_mask, of_rows.reshape(-1, 1), 0.0)
    for b in range(len(e.tokens)):
        following = 0.0
        for t in np.flatnonzero(e.response_mask[b])[::-1]:
            following = advantages[b, t] = rewards[b, t] + h.gamma * following
    chosen = advantages[e.response_mask]
    return np.where(e.response_mask, (advantages - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8), 0)


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_a_step_without_a_critic_equals_a_plain_reimplementation(name, experience, setup, lab):
    h = PPOHyperparameters(
        advantage_estimator=name, samples_per_prompt=4, clip_reward=None, cliprange=0.15, cliprange_high=0.25,
        micro_batches=2, **CRITIC_FREE[name],
    )  # fmt: skip
    e, mask = experience, experience.response_mask
    advantages = oracle_advantages(e, name, h)
    lengths = mask.sum(1, keepdims=True)
    weight = {"sequence-mean": 1 / lengths / lab.ROWS, "fixed-length": 1 / 11 / lab.ROWS}.get(
        h.loss_aggregation, 1 / mask.sum()
    )

    def loss(params):
        logprobs, entropy = naive(setup.actor.module, params, e)
        ratio = jnp.exp(logprobs - e.logprobs)
        value = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 0.85, 1.25))
        if h.dual_clip:
            value = jnp.where(advantages < 0, jnp.minimum(value, -advantages * h.dual_clip), value)
        if h.kl_in_loss:
            gap = logprobs - e.ref_logprobs
            value += BETA * (jnp.exp(-gap) - 1 + gap)
        return jnp.sum(jnp.where(mask, weight * (value - h.entropy_coef * entropy), 0))

    expected, gradient = jax.jit(jax.value_and_grad(loss))(setup.actor.params)
    state, metrics = ppo_step(without_critic(setup.state(lab.sgd, h, BETA)), e.replace(values=None))
    assert float(metrics["loss/policy_avg"]) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)
    after = jax.tree.map(lambda p, g: p - RATE * g, setup.actor.params, gradient)
    chex.assert_trees_all_close(state.actor_params, after, rtol=0, atol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-2
    assert state.critic_params is None and not any("value" in name or "val/grad" in name for name in metrics)


SKIPPED = {
    "grpo": CRITIC_FREE["grpo"] | {"kl_target": 6.0},
    "entropy": {"entropy_coef": 0.03, "loss_aggregation": "fixed-length", "response_length": 11},
    "corrected": {"importance_sampling_correction": True, "importance_sampling_cap": 1.2},
    "gspo": {"ratio_level": "sequence", "importance_sampling_correction": True, "policy_loss": "cispo"}
    | {"importance_sampling_mode": "sequence_mask"},
}


@pytest.mark.parametrize("name", SKIPPED)
def test_an_update_with_its_own_logprobs_equals_one_with_scored_ones(name, sampled, setup, lab):
    """Losses, gradients, limits and metrics; the ratio is exactly 1. Micro-batches take rows out of order."""
    options = {"advantage_estimator": "grpo", "samples_per_prompt": 4, "clip_reward": None, "micro_batches": 2}
    h = PPOHyperparameters(**options | SKIPPED[name])
    beta = BETA if h.kl_in_loss else 0.0
    scored = sampled.replace(values=None)
    bare = scored.replace(logprobs=None, entropy=None)
    limits = {"objective/kl": 1e3, "policy/grad_norm": 1e3}
    h = h.replace(kl_coef=beta)
    expected, before = ppo_step(without_critic(setup.state(lab.sgd, h, beta)), scored, limits=limits)
    state, metrics = ppo_step(without_critic(setup.state(lab.sgd, h, beta)), bare, limits=limits)
    assert set(metrics) == set(before)
    for metric, value in before.items():
        assert float(metrics[metric]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), metric
    chex.assert_trees_all_close(state.actor_params, expected.actor_params, rtol=0, atol=1e-6)
    assert float(state.kl_coef) == pytest.approx(float(expected.kl_coef), rel=1e-6)
    assert float(metrics["val/ratio"]) == 1 and float(metrics["val/ratio_var"]) == 0
    assert float(metrics["policy/grad_norm"]) > 1e-2
    if name == "grpo":  # a limit of the KL, which only the update knows, holds for that update
        limits["objective/kl"] = float(before["objective/kl"]) - 1
        still, metrics = ppo_step(without_critic(setup.state(lab.sgd, h, beta)), bare, limits=limits)
        assert float(metrics["guard/spike"]) == 1
        chex.assert_trees_all_equal(still.actor_params, setup.actor.params)


def test_an_experience_without_logprobs_is_refused_where_they_are_needed(sampled, setup, lab):
    bare = sampled.replace(logprobs=None, entropy=None)
    for options in ({"num_mini_batches": 2}, {"ppo_epochs": 2}, {"kl_coef": 0.1, "kl_in_loss": False}):
        h = PPOHyperparameters(**{"kl_coef": 0.0, **options})
        assert h.needs_old_logprobs
        with pytest.raises(InputError, match="log-probs"):
            ppo_step(setup.state(lab.sgd, h, 0.0), bare)


def test_the_policy_is_scored_where_its_logprobs_are_read_before_the_update():
    grpo = CONFIGS["grpo"]
    assert not grpo().scores_policy and not CONFIGS["dapo"]().scores_policy
    assert CONFIGS["ppo"]().scores_policy and not CONFIGS["ppo"].create(kl_coef=0.0).scores_policy
    assert CONFIGS["rloo"]().scores_policy and CONFIGS["online_dpo"]().scores_policy
    assert grpo.create(kl_in_loss=False, kl_estimator="k1").scores_policy
    assert grpo.create(num_mini_batches=2).scores_policy and grpo.create(ppo_epochs=2).scores_policy
    assert grpo.create(async_steps=1, importance_sampling_correction=True).scores_policy


def test_scoring_without_the_actor_leaves_its_logprobs_out(sampled, setup, lab):
    models = RLModels(None, setup.reference, setup.critic, setup.reward)
    rollout = setup.rollout(lab.sampling)
    bare = score_rollout(rollout, models, hyperparameters=DEFAULTS, mesh=setup.mesh, sampling=lab.sampling)
    assert bare.logprobs is None and bare.entropy is None
    chex.assert_trees_all_close(bare, sampled.replace(logprobs=None, entropy=None), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def text(lab):
    ids = np.random.default_rng(5).integers(3, 101, (lab.ROWS, 12)).astype(np.int32)
    loss_mask = np.ones_like(ids)
    loss_mask[:, 0] = 0
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "loss_mask": loss_mask}


def test_the_pretraining_loss_adds_its_gradient_to_the_same_update(experience, text, setup, lab):
    h = PPOHyperparameters(ptx_coef=27.8, micro_batches=2)
    plain, alone = ppo_step(setup.state(lab.sgd, h.replace(ptx_coef=0.0), BETA), experience)
    mixed, metrics = ppo_step(setup.state(lab.sgd, h, BETA), experience, text)

    def loss(params):
        logits = setup.actor.module.apply({"params": params}, text["input_ids"], text["attention_mask"])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), text["input_ids"][:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    expected, gradient = jax.jit(jax.value_and_grad(loss))(setup.actor.params)
    assert float(metrics["loss/ptx_avg"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["loss/policy_avg"]) == pytest.approx(float(alone["loss/policy_avg"]), abs=1e-6)
    after = jax.tree.map(lambda p, g: p - RATE * 27.8 * g, plain.actor_params, gradient)
    chex.assert_trees_all_close(mixed.actor_params, after, rtol=0, atol=5e-5)
    chex.assert_trees_all_close(mixed.critic_params, plain.critic_params, rtol=0, atol=1e-6)


def test_packed_pretraining_text_gives_the_same_update(experience, text, setup, lab):
    h = PPOHyperparameters(ptx_coef=27.8, micro_batches=2)
    packed = {name: x.reshape(lab.ROWS // 2, 24) for name, x in text.items()}
    packed["segment_ids"] = np.repeat([[1, 2]], 12, axis=1).repeat(lab.ROWS // 2, axis=0).astype(np.int32)
    (expected, metrics), (found, of_packed) = (
        ppo_step(setup.state(lab.sgd, h, BETA), experience, rows) for rows in (text, packed)
    )
    for name in ("loss/ptx_avg", "policy/ptx_grad_norm", "policy/grad_norm"):
        assert float(of_packed[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    chex.assert_trees_all_close(found.actor_params, expected.actor_params, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", few(["grpo", "rloo", "gae"], ["gae"]))
def test_groups_minibatches_and_text_are_the_same_on_a_mesh(name, experience, text, setup, lab):
    options = {"samples_per_prompt": 4} | CRITIC_FREE[name] if name in CRITIC_FREE else {"ptx_coef": 1.0}
    options |= {"ppo_epochs": 2, "num_mini_batches": 2, "micro_batches": 2}
    # Seed 0 puts a token within rounding of the clip boundary, where a rounding error moves its whole gradient.
    h = PPOHyperparameters(advantage_estimator=name, **options)
    results = []
    for models in (setup, lab.Setup(lab.mesh_of(2, 2, 2))):
        state, e = models.state(lab.sgd, h, BETA, seed=1), experience
        if name in CRITIC_FREE:
            state, e = without_critic(state), e.replace(values=None)
        state, metrics = ppo_step(state, e, text if h.ptx_coef else None)
        results.append(jax.device_get((state.actor_params, state.critic_params, metrics)))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), results[0][0], jax.device_get(setup.actor.params))
    assert max(jax.tree.leaves(moved)) > 1e-2
    chex.assert_trees_all_close(results[1][:2], results[0][:2], rtol=0, atol=3e-5)
    chex.assert_trees_all_close(results[1][2], results[0][2], rtol=1e-4, atol=1e-4)


def test_text_and_its_weight_go_together(experience, text, setup, lab):
    with pytest.raises(InputError, match=r"ptx_coef=27.8 .*pretraining text"):
        ppo_step(setup.state(lab.sgd, PPOHyperparameters(ptx_coef=27.8)), experience)
    with pytest.raises(InputError, match=r"ptx_coef=0.0 .*pretraining text"):
        ppo_step(setup.state(lab.sgd), experience, text)
    odd = {name: x[:15] for name, x in text.items()}
    with pytest.raises(InputError, match=r"num_mini_batches=2 .* must divide the 15 rows of pretraining text"):
        ppo_step(setup.state(lab.sgd, PPOHyperparameters(ptx_coef=1.0, num_mini_batches=2)), experience, odd)


def test_updates_after_the_one_that_moved_too_far_are_left_out(setup, lab):
    e = jax.device_get(setup.experience(setup.rollout(lab.sampling)))  # its log-probs are the actor's own
    once, _ = ppo_step(setup.state(lab.sgd, PPOHyperparameters(), BETA), e)
    h = PPOHyperparameters(ppo_epochs=4, early_stop_kl=1e-6)
    stopped, metrics = ppo_step(setup.state(lab.sgd, h, BETA), e)
    assert float(metrics["policy/early_stopped"]) == 3
    chex.assert_trees_all_close(stopped.actor_params, once.actor_params, rtol=0, atol=1e-6)
    chex.assert_trees_all_close(stopped.critic_params, once.critic_params, rtol=0, atol=1e-6)
    assert (
        float(metrics["policy/approxkl_avg"]) > 0.5e-6
    )  # the mean of the first update and of the one that was too far
    free, metrics = ppo_step(setup.state(lab.sgd, h.replace(early_stop_kl=1e3), BETA), e)
    assert float(metrics["policy/early_stopped"]) == 0
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), free.actor_params, once.actor_params)
    assert max(jax.tree.leaves(gaps)) > 1e-3


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(experience, setup, lab):
    h = PPOHyperparameters(num_mini_batches=2, whiten_advantages=False)
    bad = experience.values.copy()
    bad[3, np.flatnonzero(experience.response_mask[3])[0]] = np.nan
    one_row = experience.replace(values=bad)
    state, metrics = ppo_step(setup.state(lab.sgd, h, BETA), one_row)
    assert float(metrics["guard/skipped_updates"]) == 1
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))
    losses = ("loss/policy_avg", "loss/value_avg", "policy/grad_norm", "val/grad_norm")
    assert all(np.isfinite(float(metrics[name])) for name in losses)
    everywhere = experience.replace(values=np.full_like(bad, np.nan))
    state, metrics = ppo_step(setup.state(lab.sgd, h, BETA), everywhere)
    assert float(metrics["guard/skipped_updates"]) == 2
    chex.assert_trees_all_equal(state.actor_params, setup.actor.params)
    chex.assert_trees_all_equal(state.critic_params, setup.critic.params)
    assert all(np.isnan(float(metrics[name])) for name in losses)


def test_updates_above_a_limit_change_nothing_and_a_kl_above_its_own_leaves_out_all(experience, setup, lab):
    h = PPOHyperparameters(num_mini_batches=2)

    def step(**limits):
        names = {"kl": "objective/kl", "norm": "policy/grad_norm", "value": "loss/value_avg"}
        limits = {name: np.float32(limits.get(key, np.inf)) for key, name in names.items()}
        return ppo_step(setup.state(lab.sgd, h, BETA), experience, None, limits)

    _, metrics = step()
    assert float(metrics["guard/spike"]) == 0
    state, metrics = step(kl=float(metrics["objective/kl"]) - 0.1)
    assert float(metrics["guard/spike"]) == 2 and float(metrics["guard/skipped_updates"]) == 0
    assert float(metrics["policy/early_stopped"]) == 0
    for name in ("actor", "critic"):
        chex.assert_trees_all_equal(getattr(state, f"{name}_params"), getattr(setup, name).params)
    chex.assert_trees_all_equal(state.ema_params, setup.actor.params)
    _, metrics = step(value=float(metrics["loss/value_avg"]))  # above the mean of both updates, so one of them
    assert float(metrics["guard/spike"]) == 1 and np.isfinite(float(metrics["policy/grad_norm"]))


@pytest.mark.parametrize("where", ["scores", "logprobs"])
def test_a_batch_that_is_not_finite_leaves_no_trace_in_what_the_next_ones_use(where, experience, setup, lab):
    h = PPOHyperparameters(kl_target=0.5, kl_horizon=100.0, score_normalization="running")
    held = setup.state(lab.sgd, h, BETA).replace(score_moments=Moments(*map(jnp.float32, (3, 0.5, 2))))
    expected, _ = ppo_step(held, experience)
    values = np.array(getattr(experience, where))
    values[(3,) if where == "scores" else np.nonzero(experience.response_mask)] = np.nan
    held = setup.state(lab.sgd, h, BETA).replace(score_moments=Moments(*map(jnp.float32, (3, 0.5, 2))))
    state, metrics = ppo_step(held, experience.replace(**{where: values}))
    assert float(metrics["guard/skipped_updates"]) == 1
    assert float(state.kl_coef) == (np.float32(BETA) if where == "logprobs" else pytest.approx(float(expected.kl_coef)))
    if where == "scores":
        assert [float(x) for x in state.score_moments] == [3, 0.5, 2]
    _, metrics = ppo_step(state, experience)
    assert float(metrics["guard/skipped_updates"]) == 0 and np.isfinite(float(metrics["loss/policy_avg"]))


def test_the_critic_learns_alone_first_and_the_average_follows_from_its_start(experience, setup, lab):
    h = PPOHyperparameters(critic_only_steps=1, ema_start_step=2, ema_decay=0.5, kl_target=0.5)
    first, _ = ppo_step(setup.state(lab.sgd, h, BETA), experience)
    first = jax.device_get(first)
    assert first.kl_coef == np.float32(BETA), "a policy that stands still says nothing about its penalty"
    chex.assert_trees_all_equal(first.actor_params, jax.device_get(setup.actor.params))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first.critic_params, setup.critic.params)
    assert min(jax.tree.leaves(moved)) > 1e-5
    again = setup.state(lab.sgd, h, BETA).replace(step=jnp.int32(1))
    second, _ = ppo_step(again, experience)
    second = jax.device_get(second)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), second.actor_params, setup.actor.params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    chex.assert_trees_all_equal(second.ema_params, second.actor_params)
    third, _ = ppo_step(setup.state(lab.sgd, h, BETA).replace(step=jnp.int32(2)), experience)
    half = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, third.actor_params, setup.actor.params)
    chex.assert_trees_all_close(third.ema_params, half, rtol=0, atol=1e-6)


def test_the_kl_weight_and_the_moments_of_scores_move_with_each_step(experience, setup, lab):
    h = PPOHyperparameters(kl_target=0.5, kl_horizon=100.0, score_normalization="running", missing_eos_penalty=0.7)
    seen = experience.scores[:3] * 2
    moments = Moments(*(np.float32(x) for x in (3, seen.mean(), ((seen - seen.mean()) ** 2).sum())))
    held = setup.state(lab.sgd, h, BETA).replace(score_moments=jax.tree.map(jnp.asarray, moments))
    state, metrics = ppo_step(held, experience)
    kl = float(metrics["objective/kl"])
    expected = BETA * (1 + np.clip(kl / 0.5 - 1, -0.2, 0.2) * lab.ROWS / 100)
    assert float(state.kl_coef) == pytest.approx(expected, rel=1e-5) and expected != BETA
    paid = experience.scores - 0.7 * ~experience.ended
    assert experience.ended.any() and not experience.ended.all()
    together = np.concatenate([seen, paid])
    np.testing.assert_allclose(state.score_moments.std, together.std(ddof=1), rtol=1e-5)
    shaped, _ = shaped_scores(experience, h, moments)
    np.testing.assert_allclose(shaped, (paid - together.mean()) / together.std(ddof=1), rtol=1e-4, atol=1e-5)
    by_batch, _ = shaped_scores(experience, h.replace(score_normalization="batch"), None)
    np.testing.assert_allclose(by_batch, (paid - paid.mean()) / paid.std(ddof=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_an_answer_without_a_score_counts_neither_for_itself_nor_in_its_group(name, experience, lab):
    h = PPOHyperparameters(advantage_estimator=name, samples_per_prompt=4, whiten_advantages=False, clip_reward=None)
    failed = experience.scores.copy()
    failed[[2, 8, 9, 10]] = np.nan
    e = jax.device_get(experience.with_scores(failed))
    assert e.row_mask.tolist() == (~np.isnan(failed)).tolist()
    _, advantages, _ = advantages_and_returns(e, jnp.float32(0), h)
    advantages = np.asarray(advantages)
    assert (advantages[[2, 8, 9, 10]] == 0).all() and np.isfinite(advantages).all()
    three = h.replace(samples_per_prompt=3)
    rest = jax.tree.map(lambda x: x[[0, 1, 3]], experience)
    _, alone, _ = advantages_and_returns(rest, jnp.float32(0), three)
    np.testing.assert_allclose(advantages[[0, 1, 3]], alone, rtol=1e-5, atol=1e-6)
    assert (advantages[11] == 0).all(), "alone in its group"


def test_rewards_scaled_to_unit_variance_keep_their_mean(experience):
    plain, _, _ = advantages_and_returns(experience, jnp.float32(BETA), PPOHyperparameters())
    white, _, _ = advantages_and_returns(experience, jnp.float32(BETA), PPOHyperparameters(whiten_rewards=True))
    inside = experience.response_mask
    before, after = (np.asarray(x)[inside] for x in (plain, white))
    assert after.std(ddof=1) == pytest.approx(1, rel=1e-4) and after.mean() == pytest.approx(before.mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"advantage_estimator": "vpg"}, "advantage_estimator='vpg' must be one of gae, grpo, dapo, dr_grpo, gspo, ci"),
        (
            {"advantage_estimator": "reinforce++", "critic_only_steps": 3},
            "critic_only_steps=3 with advantage_estimator=reinforce.*no critic",
        ),
        ({"kl_in_loss": True}, "kl_estimator=k1 with kl_in_loss.*take k2"),
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be"),
        ({"kl_target": 0.0}, "kl_target=0.0 must be"),
        ({"early_stop_kl": float("nan")}, "early_stop_kl=nan must be"),
        ({"ptx_coef": -1.0}, "ptx_coef=-1.0 must be"),
        ({"ema_start_step": -1}, "ema_start_step=-1 must be"),
        ({"kl_estimator": "k4"}, "kl_estimator='k4' must be one of k1, k2, k3"),
    ],
)
def test_contradictory_options_are_refused_by_name(options, said):
    with pytest.raises(InputError, match=said):
        PPOHyperparameters(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"advantage_estimator": "grpo"}, "samples_per_prompt=1 with advantage_estimator=grpo.*at least 2"),
        ({"advantage_estimator": "rloo"}, "samples_per_prompt=1 with advantage_estimator=rloo.*at least 2"),
        ({"loss_aggregation": "fixed-length"}, "loss_aggregation=fixed-length .*response_length"),
    ],
)
def test_a_step_without_what_its_options_need_is_refused_by_name(options, said, experience, setup, lab):
    state = setup.state(lab.sgd, PPOHyperparameters(**options))
    with pytest.raises(InputError, match=said):
        ppo_step(state, experience)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def test_groups_that_do_not_divide_the_rollout_are_refused(experience, setup, lab):
    h = PPOHyperparameters(advantage_estimator="rloo", samples_per_prompt=3)
    with pytest.raises(InputError, match=r"samples_per_prompt=3 must divide the rollout batch of 16 rows"):
        ppo_step(without_critic(setup.state(lab.sgd, h)), experience)
