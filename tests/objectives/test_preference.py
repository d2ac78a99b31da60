"""The losses of DPO against float64 oracles written from the equations, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import objectives

BETA = 0.3
MARGIN = 0.7
LOSSES = (
    *(("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.0), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)),
    *(("apo_zero", 0.0), ("apo_down", 0.0), ("simpo", 0.0), ("simpo", 0.2), ("cpo", 0.2), ("orpo", 0.0)),
)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def of_pair(c, r, kind, smoothing):
    """The loss of a pair, of values per token where the kind has them."""
    d = BETA * (c - r)
    smoothed = {"simpo": d - MARGIN, "sigmoid": d, "cpo": d}
    if kind in smoothed:
        return -(1 - smoothing) * log_sigmoid(smoothed[kind]) - smoothing * log_sigmoid(-smoothed[kind])
    if kind == "robust":
        return (-(1 - smoothing) * log_sigmoid(d) + smoothing * log_sigmoid(-d)) / (1 - 2 * smoothing)
    if kind == "ipo":
        return (c - r - 1 / (2 * BETA)) ** 2
    if kind == "orpo":
        return -BETA * log_sigmoid(np.log(np.exp(c) / (1 - np.exp(c))) - np.log(np.exp(r) / (1 - np.exp(r))))
    return {
        "hinge": max(0, 1 - d),
        "apo_zero": 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
        "apo_down": sigmoid(BETA * c) + 1 - sigmoid(d),
    }[kind]


def oracle(chosen, rejected, rows, kind, smoothing, chosen_lengths, rejected_lengths):
    per_token = kind in ("ipo", "simpo", "orpo")
    losses = []
    for i in np.flatnonzero(rows):
        c, r = chosen[i], rejected[i]
        if per_token:
            c, r = c / chosen_lengths[i], r / rejected_lengths[i]
        losses.append(of_pair(c, r, kind, smoothing))
    return np.mean(losses)


def batch(kind, seed=0, rows=6):
    """Log-ratios (orpo: log-probs), a row mask with filler rows of garbage, and the lengths of both (0 in filler)."""
    rng = np.random.default_rng(seed)
    mask = np.array([1, 0, 1, 1, 0, 1])[:rows]
    chosen, rejected = (np.where(mask, rng.normal(0, 4, rows), x) for x in (np.nan, np.inf))
    if kind == "orpo":
        chosen, rejected = (np.where(mask, -np.abs(x), x) for x in (chosen, rejected))
    lengths = rng.integers(1, 9, (2, rows)) * mask
    return chosen, rejected, mask, *lengths


@pytest.mark.parametrize(("kind", "smoothing"), LOSSES)
def test_preference_losses_and_their_gradients_follow_the_equations(kind, smoothing):
    chosen, rejected, rows, *lengths = batch(kind)
    args = (chosen, rejected)

    def ours(chosen, rejected):
        return objectives.preference_loss(chosen, rejected, rows, BETA, kind, smoothing, *lengths, margin=MARGIN)

    single = jax.jit(ours)(*(x.astype(np.float32) for x in args))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, oracle(*args, rows, kind, smoothing, *lengths), rtol=1e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours(*args), oracle(*args, rows, kind, smoothing, *lengths), rtol=1e-12)
        gradients = jax.grad(ours, argnums=(0, 1))(*map(jnp.asarray, args))
    for which in range(2):
        for i in range(len(rows)):
            sides = []
            for step in (1e-6, -1e-6):
                moved = [x.copy() for x in args]
                moved[which][i] += step
                sides.append(oracle(*moved, rows, kind, smoothing, *lengths))
            expected = (sides[0] - sides[1]) / 2e-6 if rows[i] else 0
            np.testing.assert_allclose(gradients[which][i], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kind", "smoothing"), LOSSES)
def test_micro_batches_with_the_global_denominator_add_up_and_order_does_not_matter(kind, smoothing):
    chosen, rejected, rows, *lengths = batch(kind, seed=1)

    def loss(part, denominator=None):
        arrays = [x[part] for x in (chosen, rejected, rows)]
        return objectives.preference_loss(*arrays, BETA, kind, smoothing, *(x[part] for x in lengths), denominator)

    whole = loss(slice(None))
    parts = [loss(part, rows.sum()) for part in (slice(0, 2), slice(2, 5), slice(5, 6))]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
    np.testing.assert_allclose(loss(np.array([3, 5, 1, 0, 4, 2])), whole, rtol=1e-6)


def test_the_loss_of_hopeless_and_of_won_pairs_is_finite_and_so_is_its_gradient():
    far = jnp.array([-1e4, 1e4])
    loss, gradient = jax.value_and_grad(lambda x: objectives.preference_loss(x, 0 * x, np.ones(2), 1.0))(far)
    assert loss == 5000
    np.testing.assert_allclose(gradient, [-0.5, 0], atol=1e-7)


def test_equal_policies_lose_log_two_and_the_target_margin_of_ipo_costs_nothing():
    zeros, ones = jnp.zeros(3), jnp.ones(3)
    for kind, smoothing in (*LOSSES[:4], ("cpo", 0.2)):
        loss = objectives.preference_loss(zeros, zeros, ones, BETA, kind, smoothing)
        np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    reached = objectives.preference_loss(4 * ones / (2 * BETA), zeros, ones, BETA, "ipo", 0.0, 4 * ones, ones)
    np.testing.assert_allclose(reached, 0, atol=1e-12)


def test_a_batch_without_pairs_has_zero_loss_and_zero_gradient():
    garbage, nothing = jnp.full(2, jnp.nan), np.zeros(2)
    for kind, smoothing in LOSSES:

        def loss(x, kind=kind, smoothing=smoothing):
            return objectives.preference_loss(x, x, nothing, BETA, kind, smoothing, nothing, nothing)

        value, gradient = jax.value_and_grad(loss)(garbage)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_sequence_logprobs_add_up_counted_tokens_alone():
    logprobs = np.array([[-1.0, -2.0, np.nan], [np.inf, -3.0, -4.0], [np.nan] * 3])
    mask = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(objectives.sequence_logprobs(logprobs, mask), [-3, -7, 0])
    gradient = jax.grad(lambda x: objectives.sequence_logprobs(x, mask).sum())(jnp.asarray(logprobs))
    np.testing.assert_array_equal(gradient, mask)


def test_the_odds_of_a_certain_response_are_finite_and_so_are_their_gradients():
    args = jnp.array([0.0, -1e-9, -80.0]), jnp.array([-80.0, 0.0, 0.0]), np.ones(3), BETA, "orpo", 0.0, *np.ones((2, 3))
    value, gradients = jax.value_and_grad(objectives.preference_loss, argnums=(0, 1))(*args)
    assert np.isfinite([value, *np.ravel(gradients)]).all()


def test_losses_that_are_not_defined_are_refused():
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match="kind='hinges' of preference loss is not one of 'sigmoid', 'robust', 'ipo'"):
        objectives.preference_loss(ones, ones, ones, BETA, "hinges")
    with pytest.raises(ValueError, match="kind='simpo' of preference loss needs the lengths of both responses"):
        objectives.preference_loss(ones, ones, ones, BETA, "simpo")
    with pytest.raises(ValueError, match="kind='ipo' of preference loss has no label smoothing"):
        objectives.preference_loss(ones, ones, ones, BETA, "ipo", 0.1, ones, ones)


# ---- unpaired


def kto_rows(seed=0, rows=7):
    rng = np.random.default_rng(seed)
    mask = np.array([1, 0, 1, 1, 0, 1, 1])[:rows]
    return np.where(mask, rng.normal(0, 4, rows), np.nan), np.array([1, 1, 0, 1, 0, 0, 0])[:rows], mask


@pytest.mark.parametrize("kl", [0.0, 1.3])
def test_the_kto_loss_and_its_gradient_follow_the_equation(kl):
    logratios, good, rows = kto_rows()

    def oracle(logratios):
        losses = []
        for r, label in zip(logratios[rows == 1], good[rows == 1], strict=True):
            value = 1.5 * sigmoid(BETA * (r - kl)) if label else 0.7 * sigmoid(BETA * (kl - r))
            losses.append((1.5 if label else 0.7) - value)
        return np.mean(losses)

    def ours(logratios):
        return objectives.kto_loss(logratios, good, np.full(len(rows), kl), rows, BETA, 1.5, 0.7)

    np.testing.assert_allclose(jax.jit(ours)(logratios.astype(np.float32)), oracle(logratios), rtol=1e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours(logratios), oracle(logratios), rtol=1e-12)
        gradient = jax.grad(ours)(jnp.asarray(logratios))
    for i in range(len(rows)):
        sides = [oracle(np.where(np.arange(len(rows)) == i, logratios + step, logratios)) for step in (1e-6, -1e-6)]
        expected = (sides[0] - sides[1]) / 2e-6 if rows[i] else 0
        np.testing.assert_allclose(gradient[i], expected, rtol=1e-6, atol=1e-9)


def test_the_kl_of_kto_is_the_mean_of_real_rows_never_negative_and_has_no_gradient():
    logratios, good, rows = kto_rows()
    mean = logratios[rows == 1].mean()
    np.testing.assert_allclose(objectives.kto_kl(logratios, rows), max(mean, 0), rtol=1e-6)
    np.testing.assert_allclose(objectives.kto_kl(-logratios, rows), max(-mean, 0), rtol=1e-6)
    assert objectives.kto_kl(jnp.full(7, jnp.nan), np.zeros(7)) == 0

    def loss(kl):
        return objectives.kto_loss(logratios, good, kl, rows, BETA)

    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(7)), 0)


def test_micro_batches_of_kto_add_up():
    logratios, good, rows = kto_rows(seed=3)
    parts = [
        objectives.kto_loss(logratios[p], good[p], np.full(7, 0.4)[p], rows[p], BETA, denominator=rows.sum())
        for p in (slice(0, 3), slice(3, 7))
    ]
    whole = objectives.kto_loss(logratios, good, np.full(7, 0.4), rows, BETA)
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
