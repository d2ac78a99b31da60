"""What float64 oracles of objectives share: masks with edge cases, garbage where they are 0, and the comparison."""

import jax
import jax.numpy as jnp
import numpy as np

GARBAGE = (np.nan, np.inf, -np.inf, 1e30)


def spans_with_edge_cases(rng, rows=7, columns=9):
    """A response mask of contiguous spans: an empty row, one-token spans at both edges, a full row, random others."""
    mask = np.zeros((rows, columns), np.int32)
    mask[1, 0] = 1
    mask[2, -1] = 1
    mask[3, :] = 1
    for row in range(4, rows):
        start = rng.integers(0, columns - 1)
        mask[row, start : rng.integers(start + 1, columns + 1)] = 1
    return mask


def spoil(x, mask, rng):
    """A float64 copy of `x` with infinities, NaN and huge numbers wherever the mask is zero."""
    return np.where(mask != 0, x, rng.choice(GARBAGE, size=x.shape)).astype(np.float64)


def normal(rng, mask, scale=1.0):
    return spoil(rng.normal(scale=scale, size=mask.shape), mask, rng)


def numerical_gradient(f, args, which, step=1e-6):
    gradient = np.zeros(args[which].shape)
    for index in np.ndindex(*gradient.shape):
        sides = []
        for sign in (1, -1):
            moved = args[which].copy()
            moved[index] += sign * step
            sides.append(f(*args[:which], moved, *args[which + 1 :]))
        gradient[index] = (sides[0] - sides[1]) / (2 * step)
    return gradient


def assert_matches_oracle(function, oracle, args, differentiate=()):
    """Value in float64 to 1e-10 and in float32 to 1e-5; gradient of a fixed weighting of the result to 1e-7.

    Garbage in masked places must not disturb the gradient either: there it has to be 0.
    """
    expected = np.asarray(oracle(*args))
    single = [a.astype(np.float32) if a.dtype == np.float64 else a for a in args]
    result = jax.jit(function)(*single)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    weights = np.cos(np.arange(expected.size)).reshape(expected.shape)
    with jax.enable_x64(True):
        np.testing.assert_allclose(function(*args), expected, rtol=1e-10, atol=1e-10)
        for which in differentiate:
            gradient = jax.grad(lambda *a: jnp.sum(function(*a) * weights), argnums=which)(*map(jnp.asarray, args))
            numerical = numerical_gradient(lambda *a: np.sum(oracle(*a) * weights), args, which)
            np.testing.assert_allclose(gradient, numerical, rtol=1e-6, atol=1e-7)


def tokens(mask):
    return [(row, t) for row in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[row, t]]


def mean_oracle(x, mask):
    return sum(x[i] for i in tokens(mask)) / max(len(tokens(mask)), 1)
