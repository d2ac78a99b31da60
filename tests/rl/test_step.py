"""Experience and the PPO step against an independent float64 oracle, and under what must not matter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.engine import Rollout
from jaxrlhf.errors import InputError
from jaxrlhf.rl import PPOHyperparameters, advantages_and_returns, ppo_step
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.step import minibatch_rows

BETA = 0.1


@pytest.fixture(scope="module")
def lengths(lab):
    """Response lengths by row: EOS at once, short, and as long as can be without EOS."""
    return np.array([1, 3, lab.ANSWER, 7] * (lab.ROWS // 4))


def handmade_rollout(lab, lengths, pad) -> Rollout:
    """A rollout `[B, P+N]` with responses of the given lengths; those shorter than N end with EOS."""
    ids, prompt_mask = lab.prompts()
    response = np.random.default_rng(9).integers(40, 60, (lab.ROWS, lab.ANSWER))
    inside = np.arange(lab.ANSWER)[None] < lengths[:, None]
    closing = (np.arange(lab.ANSWER)[None] == lengths[:, None] - 1) & (lengths < lab.ANSWER)[:, None]
    response = np.where(closing, lab.EOS[0], np.where(inside, response, pad))
    tokens = np.concatenate([np.where(prompt_mask, ids, pad), response], axis=1)
    response_mask = np.concatenate([np.zeros_like(prompt_mask), inside], axis=1)
    return Rollout(
        tokens=jnp.asarray(tokens, jnp.int32),
        mask=jnp.asarray(np.concatenate([prompt_mask, inside], axis=1)),
        response_mask=jnp.asarray(response_mask),
        logprobs=jnp.where(response_mask, -1.5, 0.0).astype(jnp.float32),
        prompt_length=lab.PROMPT,
    )


@pytest.fixture(scope="module")
def experience(setup, lab, lengths):
    return jax.device_get(setup.experience(handmade_rollout(lab, lengths, lab.EOS[0])))


def naive_logprobs(module, params, e, temperature=1.0):
    logp = jax.nn.log_softmax(module.apply({"params": params}, e.tokens, e.mask) / temperature)
    picked = jnp.take_along_axis(logp[:, :-1], jnp.asarray(e.tokens)[:, 1:, None], axis=-1)[..., 0]
    return jnp.concatenate([jnp.zeros((len(picked), 1)), picked], axis=1)


def naive_values(module, params, e):
    values = module.apply({"params": params}, e.tokens, e.mask)
    return jnp.concatenate([jnp.zeros((len(values), 1)), values[:, :-1]], axis=1)


# ---- the oracle: DESIGN's PPO in float64, one token after the other


def oracle_targets(e, beta, h) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rewards, advantages, returns = (np.zeros(e.tokens.shape) for _ in range(3))
    for b in range(len(e.tokens)):
        steps = [t for t in range(e.tokens.shape[1]) if e.response_mask[b, t]]
        for t in steps:
            rewards[b, t] = -beta * (float(e.logprobs[b, t]) - float(e.ref_logprobs[b, t]))
        if steps:
            rewards[b, steps[-1]] += min(max(float(e.scores[b]), -h.clip_reward), h.clip_reward)
        following, next_value = 0.0, 0.0
        for t in reversed(steps):
            delta = rewards[b, t] + h.gamma * next_value - float(e.values[b, t])
            following = delta + h.gamma * h.lam * following
            next_value = float(e.values[b, t])
            advantages[b, t] = following
            returns[b, t] = following + next_value
    inside = np.asarray(e.response_mask)
    chosen = advantages[inside]
    whitened = np.where(inside, (advantages - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8), 0)
    return rewards, whitened, returns


def oracle_losses(logprobs, values, old, advantages, returns, rows, h) -> dict[str, float]:
    policy = value = clipped_policy = clipped_value = ratios = squares = 0.0
    count = 0
    for b in rows:
        for t in np.flatnonzero(old.response_mask[b]):
            count += 1
            log_ratio = float(logprobs[b, t]) - float(old.logprobs[b, t])
            ratio = np.exp(log_ratio)
            a = advantages[b, t]
            plain, clipped = -a * ratio, -a * min(max(ratio, 1 - h.cliprange), 1 + h.cliprange)
            policy += max(plain, clipped)
            clipped_policy += clipped > plain
            v, v_old, target = float(values[b, t]), float(old.values[b, t]), returns[b, t]
            v_clipped = min(max(v, v_old - h.cliprange_value), v_old + h.cliprange_value)
            value += 0.5 * max((v - target) ** 2, (v_clipped - target) ** 2)
            clipped_value += (v_clipped - target) ** 2 > (v - target) ** 2
            ratios += ratio
            squares += 0.5 * log_ratio**2
    names = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/clipfrac_avg", "val/ratio")
    sums = (policy, value, clipped_policy, clipped_value, ratios, squares)
    return dict(zip((*names, "policy/approxkl_avg"), (s / count for s in sums), strict=True))


# ---- experience


def test_every_row_stays_and_masks_hold_the_eos_even_when_it_is_the_pad(experience, lab, lengths):
    prompt_lengths = lab.prompts()[1].sum(1)
    columns = np.arange(lab.PROMPT + lab.ANSWER)[None]
    np.testing.assert_array_equal(experience.mask, columns < (prompt_lengths + lengths)[:, None])
    inside = (columns >= prompt_lengths[:, None]) & (columns < (prompt_lengths + lengths)[:, None])
    np.testing.assert_array_equal(experience.response_mask, inside)
    ended = lengths < lab.ANSWER
    last = experience.tokens[np.arange(lab.ROWS), prompt_lengths + lengths - 1]
    assert (last[ended] == lab.EOS[0]).all()


def test_logprobs_and_values_of_a_token_come_from_the_column_before_it(experience, setup, lab):
    e, keep = experience, experience.response_mask
    for name, model in (("logprobs", setup.actor), ("ref_logprobs", setup.reference)):
        expected = np.asarray(naive_logprobs(model.module, model.params, e))
        assert not getattr(e, name)[e.mask & ~keep].any(), "the head does not run on prompts"
        np.testing.assert_allclose(getattr(e, name)[keep], expected[keep], rtol=0, atol=1e-5)
    raw = np.asarray(setup.critic.module.apply({"params": setup.critic.params}, e.tokens, e.mask))
    np.testing.assert_allclose(e.values[:, 1:], raw[:, :-1], rtol=0, atol=1e-5)
    logits = np.asarray(setup.actor.module.apply({"params": setup.actor.params}, e.tokens, e.mask), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)[:, :-1]
    np.testing.assert_allclose(e.entropy[:, 1:][keep[:, 1:]], entropy[keep[:, 1:]], rtol=0, atol=1e-5)
    assert (e.sampler_logprobs == np.where(e.response_mask, np.float32(-1.5), 0)).all()


def test_logprobs_are_taken_at_the_sampling_temperature(setup, lab, lengths):
    e = setup.experience(handmade_rollout(lab, lengths, 0), PPOHyperparameters(temperature=0.6))
    for name, model in (("logprobs", setup.actor), ("ref_logprobs", setup.reference)):
        expected = np.asarray(naive_logprobs(model.module, model.params, e, 0.6))[e.response_mask]
        np.testing.assert_allclose(np.asarray(getattr(e, name))[e.response_mask], expected, rtol=0, atol=2e-5)


def test_the_score_is_read_and_paid_at_the_last_response_token(experience, setup, lab, lengths):
    e, rows = experience, np.arange(lab.ROWS)
    last = lab.prompts()[1].sum(1) + lengths - 1
    raw = np.asarray(setup.reward.module.apply({"params": setup.reward.params}, e.tokens, e.mask))
    np.testing.assert_allclose(e.scores, raw[rows, last], rtol=0, atol=1e-5)
    assert np.abs(e.scores).max() > 0.5, "scores this small would hide a misplaced one"
    rewards, _, _ = advantages_and_returns(e, jnp.float32(0), PPOHyperparameters(clip_reward=0.5))
    expected = np.zeros_like(raw)
    expected[rows, last] = np.clip(e.scores, -0.5, 0.5)
    np.testing.assert_array_equal(rewards, expected)


def real_entries(e) -> dict:
    """The experience with everything that stands on padding blanked."""
    keep = {"tokens": e.mask, "logprobs": e.mask, "ref_logprobs": e.mask, "entropy": e.mask, "values": e.response_mask}
    held = {name: x for name, x in jax.device_get(e).__dict__.items() if name != "longest" and x is not None}
    return {name: np.where(keep[name], x, 0) if name in keep else np.asarray(x) for name, x in held.items()}


def test_what_fills_the_padding_is_irrelevant(experience, setup, lab, lengths):
    other = setup.experience(handmade_rollout(lab, lengths, pad=77))
    chex.assert_trees_all_equal(real_entries(other), real_entries(experience))


def test_scoring_in_chunks_changes_nothing(experience, setup, lab, lengths):
    chunked = setup.experience(handmade_rollout(lab, lengths, 0), PPOHyperparameters(num_mini_batches=2))
    chex.assert_trees_all_close(real_entries(chunked), real_entries(experience), rtol=0, atol=1e-5)


def test_rewards_advantages_and_returns_equal_the_oracle(experience):
    for h in (PPOHyperparameters(clip_reward=0.7), PPOHyperparameters(gamma=0.9, lam=0.5)):
        ours = advantages_and_returns(experience, jnp.float32(BETA), h)
        for got, expected in zip(ours, oracle_targets(experience, BETA, h), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    plain = advantages_and_returns(experience, jnp.float32(BETA), h.replace(whiten_advantages=False))[1]
    np.testing.assert_allclose(
        plain, oracle_targets(experience, BETA, h)[2] - experience.values * experience.response_mask, rtol=0, atol=1e-5
    )


# ---- the step


def test_the_whole_step_equals_a_plain_reimplementation(experience, setup, lab):
    """Two epochs of two minibatches: losses in float64, gradients of an unchunked forward, SGD and EMA by hand."""
    h = PPOHyperparameters(ppo_epochs=2, num_mini_batches=2, cliprange=0.1, cliprange_value=0.05, ema_decay=0.9)
    e = experience
    state, metrics = ppo_step(setup.state(lab.sgd, h, BETA), e)

    _, advantages, returns = oracle_targets(e, BETA, h)

    def losses(actor, critic, weight):
        ratio = jnp.exp(naive_logprobs(setup.actor.module, actor, e) - e.logprobs)
        policy = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - h.cliprange, 1 + h.cliprange))
        values = naive_values(setup.critic.module, critic, e)
        near = jnp.clip(values, e.values - h.cliprange_value, e.values + h.cliprange_value)
        value = 0.5 * jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
        return jnp.sum(weight * jnp.where(e.response_mask, policy + value, 0))

    gradient = jax.jit(jax.grad(losses, argnums=(0, 1)))
    forward = jax.jit(lambda a, c: (naive_logprobs(setup.actor.module, a, e), naive_values(setup.critic.module, c, e)))
    actor, critic, ema = setup.actor.params, setup.critic.params, setup.actor.params
    order = np.asarray(minibatch_rows(h, 0, jnp.int32(0), lab.ROWS))
    seen = []
    for rows in order:
        seen.append(oracle_losses(*forward(actor, critic), e, advantages, returns, rows, h))
        weight = np.zeros((lab.ROWS, 1))
        weight[rows] = 1 / e.response_mask[rows].sum()
        grads = gradient(actor, critic, weight)
        norms = [np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(g))) for g in grads]
        seen[-1] |= {"policy/grad_norm": norms[0], "val/grad_norm": norms[1]}
        actor, critic = (
            jax.tree.map(lambda p, g: p - 0.1 * g, p, g) for p, g in zip((actor, critic), grads, strict=True)
        )
        ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, ema, actor)
    for name in seen[0]:
        expected = np.mean([s[name] for s in seen])
        assert float(metrics[name]) == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    assert 0.05 < float(metrics["policy/clipfrac_avg"]) < 0.95
    assert 0.05 < float(metrics["val/clipfrac_avg"]) < 0.95
    chex.assert_trees_all_close(state.actor_params, actor, rtol=0, atol=2e-5)
    chex.assert_trees_all_close(state.critic_params, critic, rtol=0, atol=2e-5)
    chex.assert_trees_all_close(state.ema_params, ema, rtol=0, atol=2e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.actor_params, setup.actor.params)
    assert min(jax.tree.leaves(moved)) > 1e-3, "parameters that hardly move would hide a wrong gradient"
    assert int(state.step) == 1


def test_metrics_describe_the_experience(experience, setup, lab):
    e, h = experience, PPOHyperparameters()
    _, metrics = ppo_step(setup.state(lab.sgd, h, BETA), e)
    inside = np.asarray(e.response_mask)
    kl = np.where(inside, e.logprobs.astype(np.float64) - e.ref_logprobs, 0).sum(1).mean()
    gap = np.abs(e.logprobs - e.sampler_logprobs)[inside]
    expected = {
        "objective/kl": kl,
        "objective/non_score_reward": -BETA * kl,
        "objective/rlhf_reward": -BETA * kl + e.scores.mean(),
        "objective/scores": e.scores.mean(),
        "objective/scores_std": e.scores.std(),
        "objective/kl_coef": BETA,
        "objective/entropy": -np.where(inside, e.logprobs, 0).sum(1).mean(),
        "policy/entropy_avg": e.entropy[inside].mean(),
        "val/response_length": inside.sum(1).mean(),
        "val/value_avg": e.values[inside].mean(),
        "sampling/logp_difference/mean": gap.mean(),
        "sampling/logp_difference/max": gap.max(),
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name


def test_minibatches_are_a_new_permutation_each_epoch_and_step():
    h = PPOHyperparameters(ppo_epochs=3, num_mini_batches=4)
    orders = [np.asarray(minibatch_rows(h, 1, jnp.int32(step), 16)) for step in (0, 1, 0)]
    assert orders[0].shape == (12, 4)
    for epoch in orders[0].reshape(3, 16):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(16))
    np.testing.assert_array_equal(orders[0], orders[2])
    assert len({tuple(o) for order in orders[:2] for o in order.reshape(3, 16).tolist()}) == 6
    other = np.asarray(minibatch_rows(h, 2, jnp.int32(0), 16))
    assert (other != orders[0]).any()


@pytest.mark.parametrize(
    ("options", "split"),
    [({}, (2, 2, 4)), ({"dtype": jnp.bfloat16, "remat": "full"}, (1, 2, 2))],
    ids=["float32", "bfloat16-remat"],
)
def test_ratio_is_exactly_one_until_parameters_move(options, split, lab, lengths):
    """A learning rate of 0 makes every minibatch of every epoch the first one. Meshes: see one_iteration below."""
    h = PPOHyperparameters(ppo_epochs=split[0], num_mini_batches=split[1], micro_batches=split[2], temperature=0.8)
    models = lab.Setup(lab.mesh_of(), **options)
    experience = models.experience(handmade_rollout(lab, lengths, 0), h)
    state, metrics = ppo_step(models.state(lab.still, h), experience)
    for name, value in (("val/ratio", 1), ("val/ratio_var", 0), ("policy/approxkl_avg", 0), ("policy/clipfrac_avg", 0)):
        assert float(metrics[name]) == value, name
    assert float(metrics["policy/grad_norm"]) > 1e-2
    chex.assert_trees_all_equal(state.actor_params, models.actor.params)


def test_scoring_in_chunks_of_its_own_changes_nothing(experience, setup, lab, lengths):
    rollout = handmade_rollout(lab, lengths, lab.EOS[0])
    parts = setup.experience(rollout, PPOHyperparameters(score_batches=4))
    chex.assert_trees_all_close(jax.device_get(parts), experience, rtol=1e-5, atol=2e-6)
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    assert PPOConfig.create(**rows).hyperparameters().score_batches is None
    assert PPOConfig.create(**rows, per_device_score_batch_size=8).hyperparameters().score_batches == 2
    with pytest.raises(InputError, match="per_device_score_batch_size=5 must divide the 16 rows per device"):
        PPOConfig.create(**rows, per_device_score_batch_size=5)


def step_with(setup, lab, experience, micro_batches=1):
    h = PPOHyperparameters(micro_batches=micro_batches)
    state, metrics = ppo_step(setup.state(lab.sgd, h, BETA), experience)
    return jax.device_get((state.actor_params, state.critic_params)), jax.device_get(metrics)


def test_gradient_accumulation_changes_nothing(experience, setup, lab):
    whole = step_with(setup, lab, experience)
    parts = step_with(setup, lab, experience, micro_batches=8)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=2e-6)


def test_the_order_of_rows_changes_nothing(experience, setup, lab):
    order = np.random.default_rng(2).permutation(lab.ROWS)
    shuffled = jax.tree.map(lambda x: x[order], experience)
    chex.assert_trees_all_close(
        step_with(setup, lab, shuffled), step_with(setup, lab, experience), rtol=1e-5, atol=2e-6
    )


def test_rows_without_a_response_and_more_padding_change_neither_losses_nor_gradients(experience, setup, lab):
    half = lab.ROWS // 2
    silent = np.where(np.arange(lab.ROWS)[:, None] < half, experience.response_mask, False)
    params, metrics = step_with(setup, lab, experience.replace(response_mask=silent))
    wider = jax.tree.map(lambda x: np.pad(x[:half], ((0, 0), (0, 5))) if x.ndim > 1 else x[:half], experience)
    alone, few = step_with(setup, lab, wider.replace(tokens=np.where(wider.mask, wider.tokens, 99)))
    chex.assert_trees_all_close(params, alone, rtol=1e-5, atol=2e-6)
    for name in ("loss/policy_avg", "loss/value_avg", "val/ratio", "policy/grad_norm", "val/grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(few[name]), rel=1e-5, abs=1e-6), name


def test_an_experience_that_names_no_longest_response_gives_the_same_step(experience, setup, lab):
    """One made by hand, say. Its log-probs hold something everywhere, which the response mask hides."""
    assert experience.longest == lab.ANSWER
    e = experience
    filled = {n: np.where(e.response_mask, getattr(e, n), -2.5) for n in ("logprobs", "ref_logprobs", "entropy")}
    byhand = step_with(setup, lab, e.replace(longest=None, **filled))
    params, metrics = step_with(setup, lab, e)
    chex.assert_trees_all_close(byhand[0], params, rtol=1e-5, atol=2e-6)
    chex.assert_trees_all_close(byhand[1], metrics, rtol=1e-5, atol=2e-6)


def test_minibatches_that_do_not_divide_the_rollout_are_refused(experience, setup, lab):
    state = setup.state(lab.sgd, PPOHyperparameters(num_mini_batches=3))
    with pytest.raises(InputError, match=r"num_mini_batches=3.*must divide the rollout batch of 16 rows"):
        ppo_step(state, experience)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("name", "value"),
    [("ppo_epochs", 0), ("micro_batches", 0), ("lam", 1.5), ("gamma", -0.1), ("cliprange", 0.0), ("temperature", 0.0)],
)
def test_a_bad_hyperparameter_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name}={value} must"):
        PPOHyperparameters(**{name: value})
