"""Attention and its masks against a float64 loop: groups, windows, ALiBi, rows without any key, gradients, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.kernels import attention, attention_mask


def oracle(query, key, value, mask, scale, slopes=None, positions=None):
    """Attention row by row in float64; `mask` `[B, T, S]`."""
    batch, heads, length, width = query.shape
    group = heads // key.shape[1]
    output = np.zeros((batch, heads, length, width))
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                seen = np.flatnonzero(mask[b, t])
                if not len(seen):
                    continue
                scores = key[b, h // group, seen].astype(np.float64) @ query[b, h, t].astype(np.float64) * scale
                if slopes is not None:
                    scores += slopes[h] * positions[b, seen]
                weights = np.exp(scores - scores.max())
                output[b, h, t] = weights / weights.sum() @ value[b, h // group, seen]
    return output


def problem(kv_heads=2, heads=4, length=7, keys=7, width=5):
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    key_mask = np.ones((3, keys), bool)
    key_mask[0, :3] = False
    key_mask[1, 5:] = False
    return make(3, heads, length, width), make(3, kv_heads, keys, width), make(3, kv_heads, keys, width), key_mask


def expected_mask(key_mask, length, window=0, offset=0):
    mask = np.zeros((len(key_mask), length, key_mask.shape[1]), bool)
    for b in range(len(key_mask)):
        for t in range(length):
            for s in range(key_mask.shape[1]):
                distance = offset + t - s
                mask[b, t, s] = key_mask[b, s] and distance >= 0 and (not window or distance < window)
    return mask


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_attention_equals_the_oracle_and_rows_without_keys_are_zero(kv_heads):
    query, key, value, key_mask = problem(kv_heads)
    mask = attention_mask(jnp.asarray(key_mask), 7)
    expected = oracle(query, key, value, expected_mask(key_mask, 7), 0.3)
    got = attention(query, key, value, mask, scale=0.3)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
    assert not np.asarray(got)[0, :, :3].any() and np.abs(expected[0, :, 3:]).min() > 0


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize(("length", "offset"), [(7, 0), (1, 5), (2, 4)])
def test_masks_equal_the_definition(window, length, offset):
    key_mask = problem()[3]
    got = attention_mask(jnp.asarray(key_mask), length, window=window, query_offset=offset)
    assert got.shape == (3, 1, length, 7) and got.dtype == bool
    np.testing.assert_array_equal(got[:, 0], expected_mask(key_mask, length, window, offset))
    traced = jax.jit(lambda w, o: attention_mask(jnp.asarray(key_mask), length, window=w, query_offset=o))
    np.testing.assert_array_equal(traced(window, offset), got)


def test_masks_of_packed_rows_begin_where_each_query_does():
    key_mask = np.arange(7) < np.array([7, 5, 6])[:, None]
    starts = np.array([[0, 0, 2, 2, 2, 5, 5], [0, 1, 1, 1, 1, 5, 5], [0, 0, 0, 0, 0, 0, 6]])
    got = attention_mask(jnp.asarray(key_mask), 7, window=3, starts=jnp.asarray(starts))
    first = np.arange(7) >= starts[:, :, None]
    np.testing.assert_array_equal(got[:, 0], expected_mask(key_mask, 7, 3) & first)


def test_alibi_adds_slope_times_key_position():
    query, key, value, key_mask = problem()
    slopes = np.array([0.5, 0.25, 0.1, 1.5], np.float32)
    positions = np.maximum(key_mask.cumsum(1) - 1, 0) * key_mask
    got = attention(
        query,
        key,
        value,
        attention_mask(jnp.asarray(key_mask), 7),
        scale=0.3,
        alibi_slopes=jnp.asarray(slopes),
        positions=jnp.asarray(positions),
    )
    expected = oracle(query, key, value, expected_mask(key_mask, 7), 0.3, slopes, positions)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_large_scores_neither_overflow_nor_lose_the_winner():
    query, key, value, key_mask = problem()
    got = attention(query * 1e4, key * 1e4, value, attention_mask(jnp.asarray(key_mask), 7), scale=1.0)
    expected = oracle(query * 1e4, key * 1e4, value, expected_mask(key_mask, 7), 1.0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_gradients_equal_finite_differences_and_masked_rows_give_none():
    query, key, value, key_mask = problem(length=4, keys=4)
    mask = attention_mask(jnp.asarray(key_mask[:, :4]), 4)
    weights = np.random.default_rng(1).normal(size=query.shape)

    def loss(*arrays):
        return (attention(*arrays, mask, scale=0.3) * weights).sum()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(query, key, value)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.asarray(grads[0])[0, :, :3].any()
    arrays, plain = (query, key, value), expected_mask(key_mask[:, :4], 4)
    rng = np.random.default_rng(2)
    for i, grad in enumerate(grads):
        direction, step = rng.normal(size=arrays[i].shape), 1e-5
        moved = [[a + s * step * direction if j == i else a for j, a in enumerate(arrays)] for s in (1.0, -1.0)]
        up, down = ((oracle(*m, plain, 0.3) * weights).sum() for m in moved)
        assert (np.asarray(grad) * direction).sum() == pytest.approx((up - down) / (2 * step), rel=1e-4)


def test_dropout_keeps_the_expectation():
    query, key, value, key_mask = problem()
    mask = attention_mask(jnp.asarray(key_mask), 7)

    @jax.jit
    @jax.vmap
    def dropped(key_):
        return attention(query, key, value, mask, scale=0.3, dropout_rate=0.25, dropout_key=key_)

    samples = np.asarray(dropped(jax.random.split(jax.random.key(0), 4000)))
    plain = attention(query, key, value, mask, scale=0.3)
    assert samples.std(0).max() > 0.1
    np.testing.assert_allclose(samples.mean(0), plain, atol=0.06)


@pytest.mark.parametrize("held", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_keys_and_values_of_another_dtype_neither_give_the_output_theirs_nor_round_the_weights(held):
    query, key, value, key_mask = problem()
    key, value = (jnp.asarray(x, held) for x in (key, value))
    got = attention(query, key, value, attention_mask(jnp.asarray(key_mask), 7), scale=0.3)
    assert got.dtype == jnp.float32
    meant = (np.asarray(x, np.float32) for x in (key, value))
    np.testing.assert_allclose(got, oracle(query, *meant, expected_mask(key_mask, 7), 0.3), rtol=0, atol=2e-6)


def test_output_keeps_the_queries_dtype():
    query, key, value, key_mask = problem()
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    got = attention(*arrays, attention_mask(jnp.asarray(key_mask), 7), scale=0.3)
    assert got.dtype == jnp.bfloat16
    expected = oracle(*(np.asarray(x, np.float64) for x in arrays), expected_mask(key_mask, 7), 0.3)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.03)
