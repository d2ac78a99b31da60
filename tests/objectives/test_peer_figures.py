"""Objectives against what verl 0.9.1 and TRL 1.12.0 compute (figures of fixtures/make_peer_figures.py), to 1e-6.

Where the peers differ from us, a test shows that the difference is the one docs/algorithms.md tells of, and no other.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import objectives
from jaxrlhf.rl import PPOHyperparameters
from jaxrlhf.rl.algorithms import ALGORITHMS

FIGURES = json.loads((Path(__file__).parents[1] / "fixtures" / "peer_figures.json").read_text())
X = {name: np.array(value) for name, value in FIGURES["inputs"].items()}
DPO = {name: np.array(value) for name, value in FIGURES["dpo_inputs"].items()}
VERL, TRL, SETTINGS = FIGURES["verl"], FIGURES["trl"], FIGURES["settings"]
MASK, FULL = X["mask"], X["full_mask"]
CLIP, HIGH, DUAL, VALUE_CLIP = (SETTINGS[k] for k in ("clip_range", "clip_range_high", "dual_clip", "value_clip"))
GAMMA, LAM, BETA, SMOOTHING = (SETTINGS[k] for k in ("gamma", "lam", "beta", "label_smoothing"))
GROUP = SETTINGS["group_size"]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def close(ours, theirs, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=tolerance, atol=tolerance)


def inside(x, mask=MASK):
    """What the peers give for padding is of no meaning."""
    return np.where(mask == 1, np.asarray(x), 0)


def test_whitening_is_that_of_verl_and_trl():
    close(objectives.masked_whiten(X["rewards"], MASK), inside(TRL["whiten"]["shifted"]))
    close(objectives.masked_whiten(X["rewards"], MASK, shift_mean=False), inside(TRL["whiten"]["unshifted"]))
    advantages, _ = objectives.gae(X["rewards"], X["values"], MASK, GAMMA, LAM)
    close(objectives.masked_whiten(advantages, MASK), inside(VERL["gae"]["whitened_advantages"]))


def test_gae_returns_are_those_of_verl():
    close(objectives.gae(X["rewards"], X["values"], MASK, GAMMA, LAM)[1], inside(VERL["gae"]["returns"]))


VARIANTS = {
    "plain": ({}, None),
    "asymmetric": ({"clip_range_high": HIGH}, None),
    "dual": ({"dual_clip": DUAL}, None),
    "token-mean": ({"clip_range_high": HIGH, "dual_clip": DUAL}, ("token-mean", None)),
    "seq-mean-token-mean": ({"clip_range_high": HIGH, "dual_clip": DUAL}, ("sequence-mean", None)),
    "seq-mean-token-sum": ({"clip_range_high": HIGH, "dual_clip": DUAL}, ("fixed-length", 1)),
    "seq-mean-token-sum-norm": ({"clip_range_high": HIGH, "dual_clip": DUAL}, ("fixed-length", MASK.shape[1])),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_policy_losses_are_those_of_verl(name):
    options, weights = VARIANTS[name]
    if weights:
        options = options | {"token_weights": objectives.loss_weights(MASK, *weights)}
    theirs = VERL["policy_loss"][name]

    def loss(logprobs):
        return objectives.policy_loss(logprobs, X["old_logprobs"], X["advantages"], MASK, CLIP, **options)

    value, stats = loss(X["logprobs"])
    close(value, theirs["loss"])
    close(stats["clipfrac"], theirs["clipfrac"])
    close(jax.grad(lambda x: loss(x)[0])(jnp.asarray(X["logprobs"])), theirs["gradient"])


def test_the_inputs_exercise_every_clipping():
    """Else the comparisons above would hold for anything."""
    figures = VERL["policy_loss"]
    assert figures["dual"]["clipfrac_lower"] > 0
    assert len({figures[name]["loss"] for name in figures}) == len(figures)
    assert 0 < VERL["value_loss"]["clipfrac"] < 1


def test_value_loss_is_that_of_verl():
    def loss(values):
        return objectives.value_loss(values, X["old_values"], X["returns"], MASK, VALUE_CLIP)

    value, clipped = loss(X["values"])
    close(value, VERL["value_loss"]["loss"])
    close(clipped, VERL["value_loss"]["clipfrac"])
    close(jax.grad(lambda x: loss(x)[0])(jnp.asarray(X["values"])), VERL["value_loss"]["gradient"])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token-mean", ("token-mean",)),
        ("seq-mean-token-mean", ("sequence-mean",)),
        ("seq-mean-token-sum", ("fixed-length", 1)),
        ("seq-mean-token-sum-norm", ("fixed-length", MASK.shape[1])),
    ],
)
def test_aggregated_losses_are_those_of_verl(theirs, ours):
    close(jnp.sum(objectives.loss_weights(MASK, *ours) * X["rewards"]), VERL["aggregation"][theirs])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_are_those_of_verl_but_for_its_bound_on_k3(kind):
    def estimate(logprobs):
        return objectives.kl_estimate(logprobs, X["ref_logprobs"], kind)

    ours, gradient = estimate(X["logprobs"]), jax.grad(lambda x: estimate(x).sum())(jnp.asarray(X["logprobs"]))
    theirs = {name: np.array(value) for name, value in VERL["kl"][kind].items()}
    beyond = np.asarray(ours) > 10 if kind == "k3" else np.zeros(MASK.shape, bool)
    assert beyond.sum() == (1 if kind == "k3" else 0)
    close(np.where(beyond, 10, ours), theirs["estimate"])
    close(np.where(beyond, 0, gradient), theirs["gradient"])  # its bound stops the gradient where it is needed most


@pytest.mark.parametrize(("name", "scale"), [("grpo", True), ("dr_grpo", False)])
def test_group_advantages_are_those_of_verl_and_of_trl_with_its_epsilon(name, scale):
    close(objectives.group_advantages(X["scores"], GROUP, scale), VERL[name])
    close(objectives.group_advantages(X["scores"], GROUP, scale, epsilon=1e-4), TRL[name])


def test_leave_one_out_advantages_are_those_of_verl_and_trl():
    ours = objectives.rloo_advantages(X["scores"], GROUP)
    close(ours, VERL["rloo"])
    close(ours, TRL["rloo"])


def test_reinforce_plus_plus_is_that_of_verl():
    ours = objectives.reward_to_go(X["rewards"], MASK, GAMMA)
    close(ours, VERL["reinforce_plus_plus"]["returns"])
    close(objectives.masked_whiten(ours, MASK), VERL["reinforce_plus_plus"]["whitened_advantages"])


def test_the_estimator_of_runs_with_reinforce_plus_plus_is_that_of_verl():
    """The step whitens what the estimator gives, because `whiten_advantages` is a default of the algorithm."""
    declared = ALGORITHMS["reinforce++"]
    assert declared.defaults["whiten_advantages"]
    h = PPOHyperparameters(advantage_estimator=declared.estimator, gamma=GAMMA)
    advantages, _ = declared.advantages(jnp.asarray(X["rewards"]), cast(Any, SimpleNamespace(response_mask=MASK)), h)
    close(objectives.masked_whiten(advantages, MASK), VERL["reinforce_plus_plus"]["whitened_advantages"])


def test_the_adaptive_kl_controller_is_that_of_verl():
    coefficient = SETTINGS["kl_coef"]
    constants = (SETTINGS["kl_target"], SETTINGS["kl_horizon"], SETTINGS["kl_samples"])
    for kl, theirs in zip(X["controller_kl"], VERL["adaptive_kl"], strict=True):
        coefficient = objectives.adaptive_kl_coef(coefficient, kl, *constants)
        close(coefficient, theirs, 1e-12)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_ppo_from_scores_to_losses_is_that_of_trl_where_no_response_ends_early(kind):
    theirs = TRL["ppo_full"][kind]
    old, reference = X["old_logprobs"], X["ref_logprobs"]
    rewards = objectives.kl_penalty_rewards(old, reference, X["scores"], FULL, SETTINGS["kl_coef"], kind=kind)
    close(rewards, theirs["rewards"])
    advantages, returns = objectives.gae(rewards, X["old_values"], FULL, GAMMA, LAM)
    close(returns, theirs["returns"])
    advantages = objectives.masked_whiten(advantages, FULL)
    close(advantages, theirs["advantages"])

    def policy(logprobs):
        return objectives.policy_loss(logprobs, old, advantages, FULL, CLIP)

    def value(values):
        return objectives.value_loss(values, X["old_values"], returns, FULL, VALUE_CLIP)[0]

    loss, stats = policy(X["logprobs"])
    close(loss, theirs["policy_loss"])
    close(stats["clipfrac"], theirs["policy_clipfrac"])
    close(jax.grad(lambda x: policy(x)[0])(jnp.asarray(X["logprobs"])), theirs["policy_gradient"])
    close(value(X["values"]), theirs["value_loss"])
    close(jax.grad(value)(jnp.asarray(X["values"])), theirs["value_gradient"])


def test_trl_ppo_differs_where_responses_end_early_by_one_slot_for_score_and_value_alone():
    theirs = TRL["ppo_ragged"]
    rows = MASK.any(axis=1)
    mask, old, reference, scores, old_values = (
        X[name][rows] for name in ("mask", "old_logprobs", "ref_logprobs", "scores", "old_values")
    )
    short = mask.sum(1) < mask.shape[1]
    rewards = objectives.kl_penalty_rewards(old, reference, scores, mask, SETTINGS["kl_coef"])
    assert not np.allclose(rewards[short], np.array(theirs["rewards"])[short])

    longer = mask.copy()
    longer[short, mask.sum(1)[short]] = 1
    moved = objectives.kl_penalty_rewards(old, reference, np.zeros(len(mask)), mask, SETTINGS["kl_coef"])
    moved = moved.at[np.arange(len(mask)), longer.sum(1) - 1].add(scores)
    close(moved, theirs["rewards"])
    advantages, returns = objectives.gae(moved, old_values, longer, GAMMA, LAM)
    close(returns, theirs["returns"])
    advantages = objectives.masked_whiten(advantages, mask)
    close(advantages, theirs["advantages"])
    close(objectives.policy_loss(X["logprobs"][rows], old, advantages, mask, CLIP)[0], theirs["policy_loss"])
    close(objectives.value_loss(X["values"][rows], old_values, returns, longer, VALUE_CLIP)[0], theirs["value_loss"])


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("bnpo", ("token-mean",)),
        ("grpo", ("sequence-mean",)),
        ("dr_grpo", ("fixed-length", MASK.shape[1])),
        ("kl", ("token-mean",)),
    ],
)
def test_grpo_losses_are_those_of_trl(name, weights):
    weights = objectives.loss_weights(MASK, *weights)
    advantages = np.broadcast_to(X["scores"][:, None], MASK.shape)

    def loss(logprobs):
        options = {"clip_range_high": HIGH, "token_weights": weights}
        value = objectives.policy_loss(logprobs, X["old_logprobs"], advantages, MASK, CLIP, **options)[0]
        if name == "kl":
            penalty = objectives.kl_estimate(logprobs, X["ref_logprobs"], "k3", MASK)
            value += SETTINGS["kl_coef"] * jnp.sum(penalty * weights)
        return value

    theirs = TRL["grpo_loss"][name]
    close(loss(X["logprobs"]), theirs["loss"])
    close(jax.grad(loss)(jnp.asarray(X["logprobs"])), theirs["gradient"])


def test_trl_bounds_the_ratio_where_dual_clipping_bounds_the_loss_of_bad_tokens():
    """The same bound for tokens of negative advantage; TRL's holds the others too, where clipping is tighter anyway."""
    advantages = np.broadcast_to(X["scores"][:, None], MASK.shape)
    loss, _ = objectives.policy_loss(
        X["logprobs"], X["old_logprobs"], advantages, MASK, CLIP, clip_range_high=HIGH, dual_clip=DUAL
    )
    close(loss, TRL["grpo_loss"]["two_sided"]["loss"])


DPO_LOSSES = {
    "sigmoid": ("sigmoid", 0.0),
    "reference_free": ("sigmoid", 0.0),
    "ipo": ("ipo", 0.0),
    "robust": ("robust", SMOOTHING),
    "conservative": ("sigmoid", SMOOTHING),
}


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_preference_losses_from_logits_on_are_those_of_trl(name):
    kind, smoothing = DPO_LOSSES[name]
    theirs = TRL["dpo"][name]
    targets, answers = DPO["input_ids"][:, 1:, None], DPO["answer_mask"][:, 1:]
    pairs = len(targets) // 2
    counted = np.ones(pairs, int)
    lengths = jnp.split(answers.sum(1), 2)

    def answer_logprobs(logits):
        per_token = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), targets, axis=-1)[..., 0]
        return objectives.sequence_logprobs(per_token, answers)

    reference = 0 if name == "reference_free" else answer_logprobs(DPO["ref_logits"])

    def loss(logits):
        logratios = jnp.split(answer_logprobs(logits) - reference, 2)
        return objectives.preference_loss(*logratios, counted, BETA, kind, smoothing, *lengths)

    close(loss(DPO["logits"]), theirs["loss"])
    close(jax.grad(loss)(jnp.asarray(DPO["logits"])), theirs["gradient"])
    logps = answer_logprobs(DPO["logits"])
    chosen, rejected = jnp.split(BETA * (logps - reference), 2)
    ours = {"logps/chosen": logps[:pairs].mean(), "logps/rejected": logps[pairs:].mean()}
    ours |= {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    ours |= {"rewards/margins": (chosen - rejected).mean(), "rewards/accuracies": (chosen > rejected).mean()}
    for metric, value in ours.items():
        close(value, theirs["metrics"][metric])
