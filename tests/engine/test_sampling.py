"""Drawing tokens: frequencies and support against a numpy oracle, log-probs, and keys that belong to rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.engine.sampling import (
    SamplingConfig,
    ended_rows,
    ends_with_stop,
    penalize,
    sample_token,
    sample_truncated,
)
from jaxrlhf.errors import InputError

VOCAB, ROWS = 12, 20_000
LOGITS = np.random.default_rng(0).normal(0, 1.5, VOCAB).astype(np.float32)


def keys(rows=ROWS, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(rows))


def draw(config, rows=ROWS, step=0, logits=LOGITS, row_keys=None):
    logits = np.broadcast_to(logits, (rows, logits.shape[-1]))
    row_keys = keys(rows) if row_keys is None else row_keys
    return (np.asarray(x) for x in sample_token(jnp.asarray(logits), row_keys, step, config))


def oracle(temperature, top_k, top_p, logits=LOGITS) -> np.ndarray:
    """Probabilities after temperature, then top-k, then the smallest prefix of the rest that reaches top_p."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    mass = sum(p[i] for i in order)
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += p[i] / mass
        if total >= top_p:
            break
    result = np.zeros(len(p))
    result[kept] = p[kept] / p[kept].sum()
    return result


def kept(logits, top_k, top_p) -> np.ndarray:
    """The tokens that truncation leaves: row i of V has noise that makes token i the largest if it may be sampled."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(logits), len(logits)))
    tokens = sample_truncated(rows, 3e38 * jnp.eye(len(logits)), top_k, top_p)
    return np.asarray(tokens) == np.arange(len(logits))


def sorted_out(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The tokens that truncation leaves, by sorting, in float64; ties stay."""
    row = logits.astype(np.float64)
    inside = row >= np.sort(row)[::-1][min(top_k, len(row)) - 1] if top_k else np.ones_like(row, bool)
    mass = np.exp(np.where(inside, row, -np.inf) - row.max())
    before = np.array([mass[row > x].sum() for x in row]) / mass.sum()
    return inside & ((before < top_p) | (top_p == 1) | (before == 0))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.7), (1.5, 7, 0.8), (1.0, 1, 1.0), (1.0, 0, 1e-6)],
)
def test_frequencies_follow_the_truncated_distribution(temperature, top_k, top_p):
    config = SamplingConfig(1, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = oracle(temperature, top_k, top_p)
    np.testing.assert_array_equal(kept(LOGITS / temperature, top_k, top_p), expected > 0)
    tokens, _ = draw(config)
    counts = np.bincount(tokens, minlength=VOCAB)
    assert (counts[expected == 0] == 0).all()
    inside = expected > 0
    chi_square = ((counts - ROWS * expected)[inside] ** 2 / (ROWS * expected)[inside]).sum()
    # The 0.999 quantile of chi-square with n-1 degrees of freedom lies below this for every n here.
    assert chi_square <= 2.2 * (inside.sum() - 1) + 11


def test_logprobs_are_those_of_the_tempered_distribution_before_truncation():
    tokens, logprobs = draw(SamplingConfig(1, temperature=0.7, top_k=3, top_p=0.9), rows=200)
    scaled = LOGITS.astype(np.float64) / 0.7
    expected = scaled - np.log(np.exp(scaled).sum())
    np.testing.assert_allclose(logprobs, expected[tokens], rtol=0, atol=1e-6)


def test_greedy_takes_the_largest_logit_and_reports_its_logprob_at_temperature_one():
    tokens, logprobs = draw(SamplingConfig(1, temperature=0, top_k=5, top_p=0.5), rows=3)
    logits = LOGITS.astype(np.float64)
    assert (tokens == LOGITS.argmax()).all()
    np.testing.assert_allclose(logprobs, logits.max() - np.log(np.exp(logits).sum()), rtol=0, atol=1e-6)


def test_ties_at_the_edge_of_top_k_and_top_p_all_stay():
    logits = np.array([3.0, 1.0, 1.0, 1.0, -2.0])
    for top_k, top_p in ((2, 1.0), (0, 0.8), (4, 0.8)):
        np.testing.assert_array_equal(kept(logits, top_k, top_p), [True, True, True, True, False])
    assert kept(logits, 99, 1.0).all()
    np.testing.assert_array_equal(kept(np.zeros(5), 1, 1e-6), np.ones(5, bool))
    np.testing.assert_array_equal(kept(logits, 3, 1e-9), logits == 3)


def test_top_k_and_top_p_of_rows_are_their_own():
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 2, (60, 300)).astype(np.float32).round(1)
    logits[rng.random(logits.shape) < 0.3] = -1e30  # as padded columns and forbidden tokens are
    logits[:20][rng.random((20, 300)) < 0.2] = -np.inf
    noise = rng.gumbel(size=logits.shape).astype(np.float32)
    top_k = rng.choice([0, 1, 5, 40, 300, 999], 60)
    top_p = rng.choice([1.0, 0.95, 0.5, 1e-3, 0.0], 60).astype(np.float32)
    inside = np.stack([sorted_out(*row) for row in zip(logits, top_k.tolist(), top_p.tolist(), strict=True)])
    expected = np.where(inside, logits + noise, -np.inf).argmax(1)
    own = jax.jit(sample_truncated)(logits, noise, top_k, top_p)
    np.testing.assert_array_equal(own, expected)
    one = jax.jit(sample_truncated, static_argnums=(2, 3))
    for k, p in ((5, 1.0), (0, 0.95), (40, 0.5)):
        rows = [sorted_out(row, k, p) for row in logits]
        np.testing.assert_array_equal(one(logits, noise, k, p), np.where(rows, logits + noise, -np.inf).argmax(1))


def test_plain_sampling_is_that_of_jax():
    logits = np.random.default_rng(5).normal(0, 3, (64, 700)).astype(np.float32)
    tokens, _ = draw(SamplingConfig(1), rows=64, logits=logits)
    stepped = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys(64))
    np.testing.assert_array_equal(tokens, jax.vmap(jax.random.categorical)(stepped, logits))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_truncation_of_logits_that_are_not_finite_ends_with_a_token_of_the_vocabulary(bad):
    logits = np.stack([np.full(9, bad), np.where(np.arange(9) == 4, bad, 1.0)]).astype(np.float32)
    tokens = sample_truncated(jnp.asarray(logits), jnp.zeros((2, 9)), 3, 0.5)
    assert ((tokens >= 0) & (tokens < 9)).all()


def test_a_draw_depends_on_its_own_key_and_the_step_alone():
    config = SamplingConfig(1)
    first, _ = draw(config, rows=256)
    order = np.random.default_rng(1).permutation(256)
    moved, _ = draw(config, rows=256, row_keys=keys(256)[order])
    np.testing.assert_array_equal(moved, first[order])
    few, _ = draw(config, rows=5, row_keys=keys(256)[40:45])
    np.testing.assert_array_equal(few, first[40:45])
    other = np.broadcast_to(LOGITS, (256, VOCAB)).copy()
    other[1:] = 0.0
    alone, _ = draw(config, rows=256, logits=other)
    assert alone[0] == first[0]
    later, _ = draw(config, rows=256, step=1)
    assert 0.2 < (later != first).mean() < 1
    same, _ = draw(config, rows=256, row_keys=jnp.broadcast_to(keys(1), 256))
    assert len(set(same.tolist())) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eos_cannot_be_drawn_before_min_new_tokens(temperature):
    eos = (int(LOGITS.argmax()), int(np.argsort(LOGITS)[-2]))
    config = SamplingConfig(8, temperature=temperature, eos_token_id=eos, min_new_tokens=3)
    for step in (0, 2):
        tokens, logprobs = draw(config, rows=500, step=step)
        assert not np.isin(tokens, eos).any()
        full = LOGITS - np.log(np.exp(LOGITS).sum())
        np.testing.assert_allclose(logprobs, full[tokens], rtol=0, atol=1e-6)
    tokens, _ = draw(config, rows=500, step=3)
    assert np.isin(tokens, eos).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_new_tokens", 9),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("samples_per_prompt", 0),
    ],
)
def test_a_bad_setting_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"{name}={value}.*must be"):
        SamplingConfig(**({"max_new_tokens": 8} | {name: value}))


def test_eos_given_as_a_list_is_still_hashable():
    config = SamplingConfig(4, eos_token_id=[3, 9])
    assert config.eos_ids == (3, 9)
    assert hash(config) == hash(SamplingConfig(4, eos_token_id=(3, 9)))


def test_stop_sequences_given_as_lists_are_still_hashable_and_never_empty():
    config = SamplingConfig(4, stop_sequences=[[3, 9], [4]])
    assert config.stop_sequences == ((3, 9), (4,))
    assert hash(config) == hash(SamplingConfig(4, stop_sequences=((3, 9), (4,))))
    with pytest.raises(InputError, match=r"stop_sequences=.*empty"):
        SamplingConfig(4, stop_sequences=[[3], []])


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    rng = np.random.default_rng(2)
    seen = rng.random((3, VOCAB)) < 0.5
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    expected = np.where(seen, np.where(logits > 0, logits / 1.7, logits * 1.7), logits)
    np.testing.assert_allclose(penalize(jnp.asarray(logits), jnp.asarray(seen), 1.7), expected, rtol=1e-6)


def test_steps_and_temperatures_of_rows_are_their_own():
    rows, config = 300, SamplingConfig(8, min_new_tokens=3, eos_token_id=int(LOGITS.argmax()))
    rng = np.random.default_rng(3)
    steps, temperatures = rng.integers(0, 8, rows), rng.choice([0.0, 0.5, 1.0], rows)
    logits = jnp.asarray(np.broadcast_to(LOGITS, (rows, VOCAB)))
    got = sample_token(logits, keys(rows), jnp.asarray(steps), config, temperature=jnp.asarray(temperatures))
    for step, temperature in {*zip(steps.tolist(), temperatures.tolist(), strict=True)}:
        same = (steps == step) & (temperatures == temperature)
        alone = draw(SamplingConfig(8, temperature, min_new_tokens=3, eos_token_id=config.eos_token_id), rows, step)
        for ours, expected in zip(got, alone, strict=True):
            np.testing.assert_allclose(np.asarray(ours)[same], expected[same], rtol=0, atol=1e-6)


def test_a_response_ends_with_any_of_the_stops_once_it_is_long_enough_to_hold_it():
    config = SamplingConfig(9, stop_sequences=((5,), (1, 2), (2, 2, 3)))
    tails = [(-1, -1, 5), (-1, 1, 2), (2, 1, 2), (2, 2, 3), (1, 2, 3), (-1, 2, 3), (5, 5, 1), (-1, -1, -1)]
    found = np.asarray(ends_with_stop(jnp.asarray(tails), config))
    np.testing.assert_array_equal(found, [True, True, True, True, False, False, False, False])
    assert [config.ended([t for t in tail if t >= 0]) for tail in tails] == found.tolist()


def test_rows_that_ended_are_told_from_those_cut_off_as_for_single_responses():
    config = SamplingConfig(6, eos_token_id=(3, 4), stop_sequences=((7, 8), (9,)), min_new_tokens=2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 10, (400, 9))
    begin, length = rng.integers(0, 4, 400), rng.integers(0, 6, 400)
    columns = np.arange(9)[None]
    mask = (columns >= begin[:, None]) & (columns < (begin + length)[:, None])
    expected = [config.ended(row[inside]) for row, inside in zip(tokens, mask, strict=True)]
    assert 50 < sum(expected) < 350
    np.testing.assert_array_equal(ended_rows(tokens, mask, config), expected)
    plain = SamplingConfig(6, eos_token_id=3)
    expected = [plain.ended(row[inside]) for row, inside in zip(tokens, mask, strict=True)]
    np.testing.assert_array_equal(ended_rows(tokens, mask, plain), expected)


def test_the_end_of_a_response_of_several_turns_is_that_of_its_last_turn():
    config = SamplingConfig(9, eos_token_id=3, stop_sequences=((7, 8),))
    tokens = np.array([[5, 3, 9, 9, 6, 3], [5, 3, 9, 9, 6, 6], [5, 7, 9, 9, 8, 0], [5, 3, 9, 7, 8, 0]])
    mask = np.array([[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 0]], bool)
    np.testing.assert_array_equal(ended_rows(tokens, mask, config), [True, False, False, True])
