"""Attention head by head, and its gradients, against a float64 oracle; poisoned and unseen keys; long scores."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.kernels import head_attention
from tests.support.compiled import operand_types

SCALE = 0.3
# H, H_kv, T, D, window, ALiBi
PROBLEMS = [
    (2, 2, 37, 64, 0, False),
    (4, 2, 50, 80, 0, True),
    (4, 1, 33, 10, 9, False),
    (6, 2, 20, 5, 4, True),
    (1, 1, 1, 8, 0, False),
]
ids = ["-".join(map(str, problem)) for problem in PROBLEMS]


def make(heads, kv_heads, size, width, window, alibi, dtype=jnp.float32):
    """Arrays and masks of six rows: all real, none, left and right padding, one real key, holes."""
    rng = np.random.default_rng(size)
    shapes = [(6, n, size, width) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    at, middle = np.arange(size), size // 2
    rows = [at >= 0, at < 0, at >= size // 3, at < size - size // 3, at == middle, at % 3 != 1]
    key_mask = np.stack(rows)
    positions = np.maximum(key_mask.cumsum(1) - 1, 0) * key_mask
    slopes = rng.random(heads).astype(np.float32) if alibi else None
    return arrays, key_mask, positions, slopes


def oracle(query, key, value, upstream, key_mask, positions, slopes, window):
    """Output and the gradients of query, key and value in float64, query by query."""
    query, key, value, upstream = (np.asarray(x, np.float64) for x in (query, key, value, upstream))
    output, *gradients = (np.zeros(x.shape) for x in (query, query, key, value))
    group = query.shape[1] // key.shape[1]
    for b, h, t in np.ndindex(*query.shape[:3]):
        first = max(0, t + 1 - window) if window else 0
        seen = first + np.flatnonzero(key_mask[b, first : t + 1])
        if not len(seen):
            continue
        kv = h // group
        scores = key[b, kv, seen] @ query[b, h, t] * SCALE
        scores += 0 if slopes is None else slopes[h].astype(np.float64) * positions[b, seen]
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        output[b, h, t] = weights @ value[b, kv, seen]
        by_score = weights * ((value[b, kv, seen] - output[b, h, t]) @ upstream[b, h, t]) * SCALE
        gradients[0][b, h, t] = by_score @ key[b, kv, seen]
        gradients[1][b, kv, seen] += by_score[:, None] * query[b, h, t]
        gradients[2][b, kv, seen] += weights[:, None] * upstream[b, h, t]
    return output, *gradients


def value_and_gradients(arrays, key_mask, positions, slopes, window, starts=None):
    """All options traced, as the scan over layers has them."""

    @jax.jit
    def run(arrays, key_mask, positions, slopes, scale, window):
        options = {"scale": scale, "window": window, "alibi_slopes": slopes, "positions": positions, "starts": starts}
        output, back = jax.vjp(lambda *x: head_attention(*x, key_mask, **options), *arrays[:3])
        return output, *back(arrays[3].astype(output.dtype))

    return run(arrays, jnp.asarray(key_mask), positions, slopes, jnp.float32(SCALE), jnp.int32(window))


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_output_and_gradients_equal_the_oracle(problem):
    arrays, *masks = make(*problem)
    window = problem[4]
    got = value_and_gradients(arrays, *masks, window)
    expected = oracle(*arrays, *masks, window)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))
    assert not np.asarray(got[0])[1].any(), "a row without any key"
    assert all(not np.asarray(g)[1].any() for g in got[1:])


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_bfloat16_differs_by_its_rounding(problem):
    arrays, *masks = make(*problem, dtype=jnp.bfloat16)
    got = value_and_gradients(arrays, *masks, problem[4])
    expected = oracle(*(np.asarray(x, np.float64) for x in arrays), *masks, problem[4])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=2**-7 * max(1, np.abs(b).max()))


def test_bfloat16_is_multiplied_as_such():
    query, key = (jnp.ones((2, heads, 64, 32), jnp.bfloat16) for heads in (6, 2))
    total = lambda *x: head_attention(*x, jnp.ones((2, 64), bool), scale=SCALE).astype(jnp.float32).sum()  # noqa: E731
    assert operand_types(total, query, key, key) == {"bf16"}
    assert operand_types(jax.grad(total, argnums=(0, 1, 2)), query, key, key) == {"bf16"}


@pytest.mark.parametrize("problem", PROBLEMS[:4], ids=ids[:4])
def test_packed_rows_give_what_their_segments_give_alone(problem):
    arrays, _, _, slopes = make(*problem)
    size, window = problem[2], problem[4]
    columns = np.arange(size)
    edges = np.repeat([[0, 5, 6, size], [0, size // 2, size - 4, size - 3]], 3, axis=0)
    starts = np.stack([row[np.searchsorted(row, columns, side="right") - 1] for row in edges])
    key_mask = columns < edges[:, 3:]
    positions = (columns - starts) * key_mask
    got = value_and_gradients(arrays, key_mask, positions, slopes, window, jnp.asarray(starts))
    expected = [np.zeros(x.shape) for x in (arrays[0], *arrays[:3])]
    for row, cuts in enumerate(edges):
        for begin, end in pairwise(cuts):
            at = np.s_[row : row + 1, :, begin:end]
            masks = np.ones((1, end - begin), bool), columns[None, : end - begin]
            for whole, part in zip(expected, oracle(*(x[at] for x in arrays), *masks, slopes, window), strict=True):
                whole[at] = part
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


def test_bfloat16_is_right_within_its_rounding_and_stays_bfloat16():
    problem = PROBLEMS[1]
    arrays, *masks = make(*problem, dtype=jnp.bfloat16)
    got = value_and_gradients(arrays, *masks, problem[4])
    for a, b in zip(got, oracle(*arrays, *masks, problem[4]), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=2**-8 * np.abs(b).max())


def test_what_stands_on_masked_keys_is_never_read():
    problem = PROBLEMS[0]
    (query, key, value, upstream), *masks = make(*problem)
    clean = value_and_gradients((query, key, value, upstream), *masks, 0)
    at = masks[0][:, None, :, None]
    loud = [jnp.where(at, x, 1e4) for x in (key, value)]
    poisoned = value_and_gradients((query, *loud, upstream), *masks, 0)
    for a, b in zip(poisoned, clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_large_scores_neither_overflow_nor_lose_the_winner():
    (query, key, value, upstream), *masks = make(*PROBLEMS[0])
    arrays = (query * 100, key * 100, value, upstream)
    got = value_and_gradients(arrays, *masks, 0)
    expected = oracle(*arrays, *masks, 0)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=2e-2)  # scores of 1e5 know their last digit to 1e-2
    assert all(np.isfinite(g).all() for g in got)
