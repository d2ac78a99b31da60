"""A reference that moves towards the policy, and training without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.rl import PPOHyperparameters, advantages_and_returns
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.experience import RLModels, score_rollout
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.refresh import refreshed
from jaxrlhf.rl.trainer import PPOTrainer


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_refreshed_reference_is_the_weighted_mean_of_policy_and_reference(setup, weight, dtype):
    old = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), setup.reference.params)
    before = jax.tree.map(lambda x: np.asarray(x, np.float64), old)
    options = {"weight": weight, "module": setup.reference.module, "mesh": setup.mesh}
    new = refreshed(old, setup.actor.params, **options)
    for a, b, c in zip(*map(jax.tree.leaves, (new, before, setup.actor.params)), strict=True):
        expected = weight * np.asarray(c, np.float64) + (1 - weight) * b
        assert a.dtype == dtype
        tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
        np.testing.assert_allclose(np.asarray(a, np.float64), expected, rtol=tolerance, atol=1e-7)


def test_without_a_reference_the_penalty_is_on_the_log_prob(setup, lab):
    h = PPOHyperparameters(advantage_estimator="reinforce++", whiten_advantages=False, clip_reward=None)
    models = RLModels(setup.actor, None, None, setup.reward)
    rollout = setup.rollout(lab.sampling)
    e = jax.device_get(score_rollout(rollout, models, hyperparameters=h, mesh=setup.mesh, sampling=lab.sampling))
    _, advantages, _ = jax.device_get(advantages_and_returns(e, jnp.float32(0.3), h))
    expected = np.zeros(e.tokens.shape)
    for b in range(len(e.tokens)):
        total = float(e.scores[b])
        for t in np.flatnonzero(e.response_mask[b])[::-1]:
            total += -0.3 * float(e.logprobs[b, t])
            expected[b, t] = total
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    with_one = jax.device_get(setup.experience(rollout))
    np.testing.assert_array_equal(e.logprobs, with_one.logprobs)
    assert not e.ref_logprobs.any() and with_one.ref_logprobs.any()


SMALL = {"max_prompt_seq_len": 32, "max_answer_seq_len": 4, "advantage_estimator": "reinforce++"}


@pytest.mark.long
def test_the_reference_follows_the_policy_after_every_second_step(demo, lab):
    config = PPOConfig.create(**SMALL, reference_sync_steps=2, learning_rate=1e-2, lr_scheduler_type="constant")
    engine = RLHFEngine(demo.lm, demo.reward, demo.tokenizer, num_total_iters=3, config=config)
    trainer = PPOTrainer(engine)
    ids, mask = lab.prompts(rows=8, width=32, vocab=400)
    kl, kept = [], jax.device_get(engine.state.reference_params)
    for step in range(3):
        trainer.train_rlhf(trainer.generate_experience({"prompt_ids": ids, "prompt_mask": mask}))
        kl.append(trainer.metrics["objective/kl"])
        same = [
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (kept, jax.device_get(engine.state.reference_params))), strict=True)
        ]
        assert all(same) == (step == 0) or step == 2
    assert kl[0] == pytest.approx(0, abs=1e-5) and abs(kl[1]) > 1e-3 and kl[2] == pytest.approx(0, abs=1e-5)


@pytest.mark.long
def test_an_engine_without_a_reference_trains(demo, lab):
    config = PPOConfig.create(**SMALL, reference_free=True, kl_coef=0.0)
    engine = RLHFEngine(demo.lm, demo.reward, demo.tokenizer, num_total_iters=1, config=config)
    assert engine.frozen.reference is None and engine.state.reference_params is None
    trainer = PPOTrainer(engine)
    ids, mask = lab.prompts(rows=8, width=32, vocab=400)
    trainer.train_rlhf(trainer.generate_experience({"prompt_ids": ids, "prompt_mask": mask}))
    metrics = trainer.metrics
    assert metrics["objective/kl"] == pytest.approx(-metrics["objective/entropy"], rel=1e-5)
    assert metrics["objective/non_score_reward"] == 0 and np.isfinite(metrics["loss/policy_avg"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_mixup": 0.5}, "reference_mixup=0.5 requires reference_sync_steps"),
        ({"reference_sync_steps": 2, "lora_r": 4}, "reference_sync_steps=2 with lora_r=4"),
        ({"reference_sync_steps": 2, "offload_reference_model": True}, "with offload_reference_model"),
        ({"reference_free": True, "reference_sync_steps": 2}, "reference_free with reference_sync_steps=2"),
        ({"reference_free": True, "offload_reference_model": True}, "reference_free with offload_reference_model=True"),
        ({"reference_free": True, "kl_target": 6.0}, "reference_free with kl_target=6.0"),
        ({"reference_free": True, "kl_in_loss": True, "kl_estimator": "k3"}, "reference_free with kl_in_loss=True"),
        ({"reference_free": True, "kl_estimator": "k2"}, "reference_free with kl_estimator=k2"),
    ],
)
def test_settings_of_the_reference_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(InputError) as caught:
        PPOConfig.create(**options)
    assert message in str(caught.value)
