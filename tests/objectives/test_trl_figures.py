"""Newer objectives against what TRL 1.12.0 computes (figures of fixtures/make_trl_figures.py), to 1e-6."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import objectives

FIXTURES = Path(__file__).parents[1] / "fixtures"
GIVEN, FIGURES = (json.loads((FIXTURES / f"{name}_figures.json").read_text()) for name in ("peer", "trl"))
X = {name: np.array(value) for name, value in GIVEN["inputs"].items()}
DPO = {name: np.array(value) for name, value in GIVEN["dpo_inputs"].items()}
S = FIGURES["settings"]
BETA, MASK = S["beta"], X["mask"]
ONES = np.ones(4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-6, atol=1e-6)


def compare(loss, x, theirs):
    close(loss(x), theirs["loss"])
    close(jax.grad(loss)(jnp.asarray(x)), theirs["gradient"])


def answer_logprobs(logits, order=slice(None)):
    ids, answers = DPO["input_ids"][order], DPO["answer_mask"][order]
    logps = jax.nn.log_softmax(jnp.asarray(logits)[order][:, :-1])
    per_token = jnp.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0]
    return objectives.sequence_logprobs(per_token, answers[:, 1:])


LENGTHS = DPO["answer_mask"][:, 1:].sum(1)


@pytest.mark.parametrize("name", FIGURES["rewards"])
def test_losses_of_reward_models_are_those_of_trl(name):
    options = {"center": S["center"]} if name != "margins" else {}
    options |= {"margin": np.array(S["margins"])} if name != "centred" else {}

    def loss(scores):
        return objectives.pairwise_loss(*jnp.split(scores, 2), np.ones(len(scores) // 2), **options)

    compare(loss, X["scores"], FIGURES["rewards"][name])


@pytest.mark.parametrize("name", FIGURES["paired"])
def test_losses_of_pairs_from_logits_on_are_those_of_trl(name):
    kind, smoothing = [*name.split(" "), "0"][:2]
    kind, _, sft = kind.partition("+")

    def loss(logits):
        logps = answer_logprobs(logits)
        if objectives.PREFERENCE_LOSSES[kind].reference:
            compared = jnp.split(logps - answer_logprobs(DPO["ref_logits"]), 2)
        else:
            compared = jnp.split(logps, 2)
        options = (ONES, BETA, kind, float(smoothing), *np.split(LENGTHS, 2))
        value = objectives.preference_loss(*compared, *options, margin=S["simpo_gamma"])
        return value - (0.2 * logps[:4].sum() / LENGTHS[:4].sum() if sft else 0)

    compare(loss, DPO["logits"], FIGURES["paired"][name])


@pytest.mark.parametrize("name", ["kto", "kto at zero", "apo_zero_unpaired"])
def test_losses_of_single_responses_from_logits_on_are_those_of_trl(name):
    theirs = FIGURES["unpaired"][name]
    labels, order = (np.array(FIGURES["unpaired"][key]) for key in ("labels", "order"))
    rows = np.ones(8)

    def kl_of(logits):
        if name == "apo_zero_unpaired":
            return jnp.zeros(())
        gap = answer_logprobs(theirs["scale"] * logits, order) - answer_logprobs(DPO["ref_logits"], order)
        return objectives.kto_kl(gap, rows)

    def loss(logits):
        ratios = answer_logprobs(logits) - answer_logprobs(DPO["ref_logits"])
        return objectives.kto_loss(ratios, labels, kl_of(logits), rows, BETA, *S["kto_weights"])

    compare(loss, DPO["logits"], theirs)
    close(kl_of(DPO["logits"]), theirs["metrics"]["kl"])
    assert (theirs["metrics"]["kl"] > 0.1) == (name == "kto")


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("dapo", {"clip_range_high": S["clip_range_high"]}, ("token-mean",)),
        ("dr_grpo", {"clip_range_high": S["clip_range_high"]}, ("fixed-length", MASK.shape[1])),
        ("cispo", {"clip_range_high": S["cispo_bound"] - 1, "kind": "cispo"}, ("token-mean",)),
        ("gspo", {"clip_range_high": S["clip_range_high"], "sequence_ratio": True}, ("sequence-mean",)),
    ],
)
def test_losses_of_the_variants_of_grpo_are_those_of_trl(name, options, weights):
    advantages = np.broadcast_to(X["scores"][:, None], MASK.shape)
    options = options | {"token_weights": objectives.loss_weights(MASK, *weights)}

    def loss(logprobs):
        return objectives.policy_loss(logprobs, X["old_logprobs"], advantages, MASK, S["clip_range"], **options)[0]

    compare(loss, X["logprobs"], FIGURES["online"][name])
    _, stats = objectives.policy_loss(X["logprobs"], X["old_logprobs"], advantages, MASK, S["clip_range"], **options)
    assert 0 < stats["clipfrac"] < 1
