"""The losses of DPO against float64 oracles written from the equations, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import objectives

BETA = 0.3
LOSSES = (("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.0), ("robust", 0.2), ("ipo", 0.0))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def oracle(chosen, rejected, rows, kind, smoothing, chosen_lengths, rejected_lengths):
    losses = []
    for i in np.flatnonzero(rows):
        d = BETA * (chosen[i] - rejected[i])
        if kind == "ipo":
            per_token = chosen[i] / chosen_lengths[i] - rejected[i] / rejected_lengths[i]
            losses.append((per_token - 1 / (2 * BETA)) ** 2)
        elif kind == "sigmoid":
            losses.append(-(1 - smoothing) * log_sigmoid(d) - smoothing * log_sigmoid(-d))
        else:
            losses.append((-(1 - smoothing) * log_sigmoid(d) + smoothing * log_sigmoid(-d)) / (1 - 2 * smoothing))
    return np.mean(losses)


def batch(seed=0, rows=6):
    """Log-ratios, a row mask with filler rows that hold garbage, and the lengths of both (0 in filler)."""
    rng = np.random.default_rng(seed)
    mask = np.array([1, 0, 1, 1, 0, 1])[:rows]
    chosen, rejected = (np.where(mask, rng.normal(0, 4, rows), x) for x in (np.nan, np.inf))
    lengths = rng.integers(1, 9, (2, rows)) * mask
    return chosen, rejected, mask, *lengths


@pytest.mark.parametrize(("kind", "smoothing"), LOSSES)
def test_preference_losses_and_their_gradients_follow_the_equations(kind, smoothing):
    chosen, rejected, rows, *lengths = batch()
    args = (chosen, rejected)

    def ours(chosen, rejected):
        return objectives.preference_loss(chosen, rejected, rows, BETA, kind, smoothing, *lengths)

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
    chosen, rejected, rows, *lengths = batch(seed=1)

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
    for kind, smoothing in LOSSES[:4]:
        loss = objectives.preference_loss(zeros, zeros, ones, BETA, kind, smoothing)
        np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    reached = objectives.preference_loss(4 * ones / (2 * BETA), zeros, ones, BETA, "ipo", 0.0, 4 * ones, ones)
    np.testing.assert_allclose(reached, 0, atol=1e-12)


def test_a_batch_without_pairs_has_zero_loss_and_zero_gradient():
    garbage, nothing = jnp.full(2, jnp.nan), np.zeros(2)
    for kind, smoothing in LOSSES:
        loss = lambda x, k=kind, s=smoothing: objectives.preference_loss(x, x, nothing, BETA, k, s, nothing, nothing)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(garbage)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_sequence_logprobs_add_up_counted_tokens_alone():
    logprobs = np.array([[-1.0, -2.0, np.nan], [np.inf, -3.0, -4.0], [np.nan] * 3])
    mask = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(objectives.sequence_logprobs(logprobs, mask), [-3, -7, 0])
    gradient = jax.grad(lambda x: objectives.sequence_logprobs(x, mask).sum())(jnp.asarray(logprobs))
    np.testing.assert_array_equal(gradient, mask)


def test_losses_that_are_not_defined_are_refused():
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match="kind='hinge' of preference loss is not one of 'sigmoid', 'robust', 'ipo'"):
        objectives.preference_loss(ones, ones, ones, BETA, "hinge")
    with pytest.raises(ValueError, match="lengths of both responses"):
        objectives.preference_loss(ones, ones, ones, BETA, "ipo")
    with pytest.raises(ValueError, match="no label smoothing"):
        objectives.preference_loss(ones, ones, ones, BETA, "ipo", 0.1, ones, ones)
