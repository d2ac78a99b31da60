"""Objectives against float64 oracles: plain Python loops over the unmasked tokens, written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_matches_oracle, mean_oracle, normal, spans_with_edge_cases, spoil, tokens

from jaxrlhf import objectives

CLIP = 0.2


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def whiten_oracle(shift_mean):
    def oracle(x, mask):
        entries = [x[i] for i in tokens(mask)]
        mean = sum(entries) / len(entries)
        variance = sum((e - mean) ** 2 for e in entries) / (len(entries) - 1)
        out = np.zeros(x.shape)
        for i in tokens(mask):
            out[i] = (x[i] - mean) / np.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
        return out

    return oracle


def rewards_oracle(logprobs, ref_logprobs, scores, mask, beta=0.1, clip=5.0):
    out = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        positions = [t for t in range(mask.shape[1]) if mask[row, t]]
        for t in positions:
            out[row, t] = -beta * (logprobs[row, t] - ref_logprobs[row, t])
        if positions:
            out[row, positions[-1]] += min(max(scores[row], -clip), clip)
    return out


def gae_oracle(rewards, values, mask, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}: the definition, not the recursion."""
    out = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        positions = [t for t in range(mask.shape[1]) if mask[row, t]]
        for n, t in enumerate(positions):
            for distance, u in enumerate(positions[n:]):
                after = values[row, positions[n + distance + 1]] if u != positions[-1] else 0.0
                delta = rewards[row, u] + gamma * after - values[row, u]
                out[row, t] += (gamma * lam) ** distance * delta
    return out


def policy_oracle(logprobs, old, advantages, mask, eps=CLIP):
    total = 0.0
    for i in tokens(mask):
        ratio = np.exp(logprobs[i] - old[i])
        total += min(advantages[i] * ratio, advantages[i] * min(max(ratio, 1 - eps), 1 + eps))
    return -total / len(tokens(mask))


def value_oracle(values, old, returns, mask, eps=CLIP):
    total = 0.0
    for i in tokens(mask):
        clipped = old[i] + min(max(values[i] - old[i], -eps), eps)
        total += 0.5 * max((values[i] - returns[i]) ** 2, (clipped - returns[i]) ** 2)
    return total / len(tokens(mask))


@pytest.fixture(params=range(2))
def rng(request):
    return np.random.default_rng(request.param)


def test_sums_and_means_count_unmasked_entries_only(rng):
    mask = spans_with_edge_cases(rng)
    x = normal(rng, mask)
    assert_matches_oracle(objectives.masked_sum, lambda x, m: sum(x[i] for i in tokens(m)), [x, mask], [0])
    assert_matches_oracle(objectives.masked_mean, mean_oracle, [x, mask], [0])
    np.testing.assert_allclose(
        objectives.masked_mean(x, mask, 1000), mean_oracle(x, mask) * len(tokens(mask)) / 1000, 1e-5
    )


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_uses_the_unbiased_variance_of_all_unmasked_entries(rng, shift_mean):
    mask = spans_with_edge_cases(rng)
    x = normal(rng, mask, scale=3.0)
    assert_matches_oracle(
        lambda x, m: objectives.masked_whiten(x, m, shift_mean), whiten_oracle(shift_mean), [x, mask], [0]
    )
    assert np.all(np.asarray(objectives.masked_whiten(x, mask, shift_mean))[mask == 0] == 0)


def test_whitening_one_entry_or_none_is_finite():
    x = np.full((2, 3), np.nan, np.float32)
    np.testing.assert_array_equal(objectives.masked_whiten(x, np.zeros((2, 3))), 0)
    x[1, 1] = 4.0
    mask = np.isfinite(x)
    np.testing.assert_array_equal(objectives.masked_whiten(x, mask), 0)
    np.testing.assert_array_equal(objectives.masked_whiten(x, mask, shift_mean=False), np.where(mask, 4.0, 0))
    assert np.all(np.isfinite(jax.grad(lambda x: objectives.masked_whiten(x, mask).sum())(x)))


def test_sft_loss_is_the_mean_negative_logprob_of_counted_targets(rng):
    mask = rng.integers(0, 2, (5, 8))
    mask[2] = 0
    logprobs = spoil(-rng.exponential(size=mask.shape), mask, rng)
    assert_matches_oracle(objectives.sft_loss, lambda x, m: -mean_oracle(x, m), [logprobs, mask], [0])


def test_pairwise_loss_is_bradley_terry_over_real_rows(rng):
    rows = np.array([1, 0, 1, 1, 0, 1])
    chosen, rejected = normal(rng, rows, 2.0), normal(rng, rows, 2.0)

    def oracle(chosen, rejected, rows):
        real = [i for i in range(len(rows)) if rows[i]]
        return -sum(log_sigmoid(chosen[i] - rejected[i]) for i in real) / len(real)

    assert_matches_oracle(objectives.pairwise_loss, oracle, [chosen, rejected, rows], [0, 1])


def test_pairwise_loss_has_margins_wrong_labels_and_centred_scores(rng):
    rows = np.array([1, 0, 1, 1, 0, 1])
    chosen, rejected, margin = (normal(rng, rows, 2.0) for _ in range(3))
    wrong, center = 0.1, 0.05

    def oracle(chosen, rejected, rows, margin):
        total = 0.0
        for i in np.flatnonzero(rows):
            difference = chosen[i] - rejected[i] - margin[i]
            total -= (1 - wrong) * log_sigmoid(difference) + wrong * log_sigmoid(-difference)
            total += center * (chosen[i] + rejected[i]) ** 2
        return total / rows.sum()

    def loss(chosen, rejected, rows, margin):
        options = {"label_smoothing": wrong, "center": center}
        return objectives.pairwise_loss(chosen, rejected, rows, margin=margin, **options)

    assert_matches_oracle(loss, oracle, [chosen, rejected, rows, margin], [0, 1])


def test_pairwise_loss_is_linear_not_infinite_for_a_hopeless_margin():
    loss = objectives.pairwise_loss(jnp.array([-500.0]), jnp.array([500.0]), jnp.ones(1))
    assert loss == 1000.0


def pairs(rng, rows=8, columns=10):
    """Pairs of unequal lengths; among them an identical one, prefixes of each other, and one that differs at once."""
    ids = rng.integers(1, 50, (2, rows, columns))
    lengths = rng.integers(4, columns + 1, (2, rows))
    ids[1, :, :3] = ids[0, :, :3]
    ids[1, 0] = ids[0, 0]
    lengths[:, 0] = 6
    ids[1, 1] = ids[0, 1]
    lengths[:, 1] = 5, 8
    ids[1, 2] = ids[0, 2]
    lengths[:, 2] = 9, 4
    ids[1, 3, 0] = ids[0, 3, 0] + 1
    masks = (np.arange(columns) < lengths[:, :, None]).astype(np.int32)
    row_mask = np.ones(rows, np.int32)
    row_mask[-1] = 0
    return ids, masks, row_mask, lengths


def tokenwise_oracle(chosen, rejected, chosen_ids, rejected_ids, chosen_mask, rejected_mask, row_mask, margin=None):
    total = 0.0
    real_rows = [row for row in range(len(row_mask)) if row_mask[row]]
    for row in real_rows:
        a, b = int(chosen_mask[row].sum()), int(rejected_mask[row].sum())
        start = 0
        while start < min(a, b) and chosen_ids[row, start] == rejected_ids[row, start]:
            start += 1
        end = max(a, b)
        if start == end:
            start = end - 1
        wanted = 0.0 if margin is None else margin[row]
        differences = [chosen[row, min(t, a - 1)] - rejected[row, min(t, b - 1)] for t in range(start, end)]
        losses = [-log_sigmoid(difference - wanted) for difference in differences]
        total += sum(losses) / len(losses)
    return total / len(real_rows)


def test_tokenwise_loss_runs_from_the_first_difference_and_never_reads_padding(rng):
    ids, masks, row_mask, _ = pairs(rng)
    real = masks * row_mask[:, None]
    args = [normal(rng, real[0]), normal(rng, real[1]), *ids, *masks, row_mask]
    assert_matches_oracle(objectives.tokenwise_pairwise_loss, tokenwise_oracle, args, [0, 1])
    with_margin = lambda *a: objectives.tokenwise_pairwise_loss(*a[:-1], margin=a[-1])  # noqa: E731
    assert_matches_oracle(with_margin, tokenwise_oracle, [*args, normal(rng, row_mask)], [0, 1])
    for side in (2, 3):
        changed = [a.copy() for a in args]
        changed[side][masks[side - 2] == 0] += 7
        assert objectives.tokenwise_pairwise_loss(*changed) == objectives.tokenwise_pairwise_loss(*args)


def test_tokenwise_loss_can_reproduce_deepspeed_chat_padding_included(rng):
    ids, masks, _, lengths = pairs(rng)
    pad = 0
    ids = np.where(masks == 1, ids, pad)
    values = rng.normal(size=ids.shape)

    def oracle(chosen, rejected, chosen_ids, rejected_ids, *_):
        total = 0.0
        for row in range(len(chosen_ids)):
            ends = []
            for side in (chosen_ids, rejected_ids):
                pads = [t for t, token in enumerate(side[row]) if token == pad]
                ends.append(pads[0] if pads else len(side[row]))
            different = [t for t in range(len(side[row])) if chosen_ids[row, t] != rejected_ids[row, t]]
            span = range(different[0], max(ends)) if different else [lengths[0, row] - 1]
            total += np.mean([-log_sigmoid(chosen[row, t] - rejected[row, t]) for t in span])
        return total / len(chosen_ids)

    args = [*values, *ids, *masks, np.ones(len(ids[0]), np.int32)]
    assert_matches_oracle(lambda *a: objectives.tokenwise_pairwise_loss(*a, read_padding=True), oracle, args, [0, 1])


def test_tokenwise_loss_of_identical_pairs_is_log_two_and_pushes_nowhere():
    ids = np.arange(6).reshape(2, 3)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    values = jnp.where(mask == 1, 0.7, jnp.nan)

    def loss(values):
        return objectives.tokenwise_pairwise_loss(values, values, ids, ids, mask, mask, np.ones(2))

    np.testing.assert_allclose(loss(values), np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(loss)(values), 0)


def test_last_token_is_found_under_either_padding_and_empty_rows_score_zero():
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    values = np.where(mask == 1, np.arange(20.0).reshape(5, 4), np.nan)
    np.testing.assert_array_equal(objectives.last_token_index(mask), [1, 3, 2, 0, 0])
    np.testing.assert_array_equal(objectives.score_at_last_token(values, mask), [1, 7, 10, 0, 16])
    gradient = jax.grad(lambda v: objectives.score_at_last_token(v, mask).sum())(jnp.asarray(values))
    np.testing.assert_array_equal(gradient, [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])


def test_kl_estimators_follow_their_definitions(rng):
    mask = spans_with_edge_cases(rng)
    policy, reference = normal(rng, mask), normal(rng, mask)
    definitions = {
        "k1": lambda p, r: p - r,
        "k2": lambda p, r: (p - r) ** 2 / 2,
        "k3": lambda p, r: np.exp(r - p) - 1 - (r - p),
    }
    for kind, definition in definitions.items():

        def oracle(policy, reference, mask, definition=definition):
            out = np.zeros(mask.shape)
            for i in tokens(mask):
                out[i] = definition(policy[i], reference[i])
            return out

        assert_matches_oracle(
            lambda p, r, m, kind=kind: objectives.kl_estimate(p, r, kind, m), oracle, [policy, reference, mask], [0]
        )
    np.testing.assert_allclose(objectives.kl_estimate(np.zeros(3), np.ones(3), "k3"), np.e - 2, rtol=1e-6)
    with pytest.raises(ValueError, match="k9"):
        objectives.kl_estimate(np.zeros(1), np.zeros(1), "k9")


def test_rewards_put_the_clipped_score_on_the_last_response_token(rng):
    mask = spans_with_edge_cases(rng)
    scores = rng.normal(scale=6.0, size=len(mask))
    scores[0] = np.nan  # the row without a response
    args = [normal(rng, mask), normal(rng, mask), scores, mask]
    assert_matches_oracle(lambda *a: objectives.kl_penalty_rewards(*a, 0.1, 5.0), rewards_oracle, args, [0, 1, 2])

    zeros = np.zeros((1, 4), np.float32)
    unclipped = objectives.kl_penalty_rewards(zeros, zeros, np.array([9.0]), np.array([[0, 1, 1, 0]]), 0.1)
    np.testing.assert_array_equal(unclipped, [[0, 0, 9, 0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0)])
def test_gae_sums_discounted_deltas_over_the_response_alone(rng, gamma, lam):
    mask = spans_with_edge_cases(rng)
    args = [normal(rng, mask), normal(rng, mask), mask]
    assert_matches_oracle(
        lambda *a: objectives.gae(*a, gamma, lam)[0], lambda *a: gae_oracle(*a, gamma, lam), args, [0, 1]
    )
    assert_matches_oracle(
        lambda *a: objectives.gae(*a, gamma, lam)[1],
        lambda *a: gae_oracle(*a, gamma, lam) + np.where(mask == 1, a[1], 0),
        args,
        [0, 1],
    )


def test_gae_does_not_depend_on_the_column_where_a_response_stands(rng):
    rewards, values = rng.normal(size=(2, 1, 4)).astype(np.float32)
    placed = []
    for offset in (0, 3, 6):
        inside = slice(offset, offset + 4)
        wide_rewards, wide_values, mask = np.full((2, 1, 10), np.nan), np.full((1, 10), np.inf), np.zeros((1, 10))
        wide_rewards[0][:, inside], wide_values[:, inside], mask[:, inside] = rewards, values, 1
        placed.append(np.asarray(objectives.gae(wide_rewards[0], wide_values, mask, 1.0, 0.95)[0])[:, inside])
    # Sums of a tree: its shape, and with it rounding, is another one in other columns.
    np.testing.assert_allclose(placed[0], placed[1], rtol=1e-6)
    np.testing.assert_allclose(placed[0], placed[2], rtol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8)])
def test_tokens_of_an_environment_are_no_steps_of_gae(rng, gamma, lam):
    mask = np.array([[0, 1, 1, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0, 0]])
    args = [normal(rng, mask), normal(rng, mask), mask]
    assert_matches_oracle(
        lambda *a: objectives.gae(*a, gamma, lam)[0], lambda *a: gae_oracle(*a, gamma, lam), args, [0, 1]
    )
    for row in range(3):
        inside = mask[row] == 1
        alone = [x[row][inside][None] for x in args]
        found = objectives.gae(*(x[row : row + 1] for x in args), gamma, lam)
        for ours, expected in zip(found, objectives.gae(*alone, gamma, lam), strict=True):
            np.testing.assert_allclose(ours[0][inside], expected[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(ours[0][~inside], 0)


def test_parts_of_a_score_are_paid_at_their_places_and_the_rest_at_the_end(rng):
    mask = np.array([[0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 0, 0, 0]])
    logprobs, ref, scores = normal(rng, mask), normal(rng, mask), np.array([2.0, 9.0])
    placed = np.array([[0, 0, 1.5, 7, 0, 0.5, 7], [7.0, -1, 7, 0, 0, 0, 0]])
    placed[1, 0] = 0

    def oracle(logprobs, ref, scores, placed):
        out = rewards_oracle(logprobs, ref, scores, mask)
        for row in range(2):
            positions = np.flatnonzero(mask[row])
            for t in positions[:-1]:
                out[row, t] += placed[row, t]
                out[row, positions[-1]] -= placed[row, t]
        return out

    def ours(logprobs, ref, scores, placed):
        return objectives.kl_penalty_rewards(logprobs, ref, scores, mask, 0.1, 5.0, placed=placed)

    assert_matches_oracle(ours, oracle, [logprobs, ref, scores, placed], [0, 1, 2])


def test_policy_loss_is_the_clipped_surrogate(rng):
    mask = spans_with_edge_cases(rng)
    old = normal(rng, mask)
    args = [spoil(old + rng.normal(scale=0.3, size=mask.shape), mask, rng), old, normal(rng, mask), mask]
    assert_matches_oracle(lambda *a: objectives.policy_loss(*a, CLIP)[0], policy_oracle, args, [0])


@pytest.mark.parametrize("cap", [2.0, 0.9, np.inf])
def test_importance_weights_are_truncated_ratios_and_weigh_the_policy_loss(rng, cap):
    mask = spans_with_edge_cases(rng)
    logprobs, sampler = normal(rng, mask), normal(rng, mask)
    spoiled = (spoil(x, mask, rng) for x in (logprobs, sampler))
    weights = objectives.importance_weights(*spoiled, mask, high=cap)
    expected = np.ones(mask.shape)
    for i in tokens(mask):
        expected[i] = min(np.exp(logprobs[i] - sampler[i]), cap)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert (expected[mask == 1] < 1).any() and (np.isinf(cap) or (expected[mask == 1] == cap).any())

    def oracle(new, old, advantages, weights, mask):
        total = 0.0
        for i in tokens(mask):
            ratio = np.exp(new[i] - old[i])
            clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
            total += weights[i] * max(-advantages[i] * ratio, -advantages[i] * clipped)
        return total / max(mask.sum(), 1)

    new = spoil(logprobs + rng.normal(scale=0.3, size=mask.shape), mask, rng)
    args = [new, logprobs, normal(rng, mask), spoil(expected, mask, rng), mask]
    weighted = lambda new, old, a, w, mask: objectives.policy_loss(new, old, a, mask, CLIP, weights=w)[0]  # noqa: E731
    assert_matches_oracle(weighted, oracle, args, [0])


def test_policy_statistics_describe_the_unmasked_tokens(rng):
    mask = spans_with_edge_cases(rng)
    old, advantages = normal(rng, mask), normal(rng, mask)
    new = spoil(old + rng.normal(scale=0.3, size=mask.shape), mask, rng)
    ratios = [np.exp(new[i] - old[i]) for i in tokens(mask)]
    bound = [
        (ratio > 1 + CLIP and advantages[i] > 0) or (ratio < 1 - CLIP and advantages[i] < 0)
        for ratio, i in zip(ratios, tokens(mask), strict=True)
    ]
    _, stats = objectives.policy_loss(new, old, advantages, mask, CLIP)
    np.testing.assert_allclose(1 + stats["ratio_shift"], np.mean(ratios), rtol=1e-5)
    np.testing.assert_allclose(objectives.ratio_variance(stats), np.var(ratios), rtol=1e-5)
    np.testing.assert_allclose(stats["clipfrac"], np.mean(bound), rtol=1e-6)
    np.testing.assert_allclose(stats["approx_kl"], 0.5 * np.mean(np.log(ratios) ** 2), rtol=1e-5)


def test_unchanged_policy_has_ratio_exactly_one_and_the_policy_gradient(rng):
    mask = spans_with_edge_cases(rng)
    logprobs, advantages = normal(rng, mask).astype(np.float32), normal(rng, mask).astype(np.float32)
    loss = lambda new: objectives.policy_loss(new, logprobs, advantages, mask, CLIP)  # noqa: E731
    gradient, stats = jax.grad(loss, has_aux=True)(jnp.asarray(logprobs))
    np.testing.assert_allclose(gradient, np.where(mask == 1, -advantages / mask.sum(), 0), rtol=1e-6)
    for name, expected in {"ratio_shift": 0, "ratio_spread": 0, "clipfrac": 0, "approx_kl": 0}.items():
        assert stats[name] == expected


def test_ratio_one_stays_exactly_one_when_micro_batches_are_added_up():
    counts = (134, 101, 88, 11)  # whose shares of their sum do not add up to 1 in float32
    assert sum((np.float32(n) / np.float32(sum(counts)) for n in counts), np.float32(0)) != 1
    mask = np.arange(max(counts))[None] < np.array(counts)[:, None]
    zeros = np.zeros(mask.shape, np.float32)
    parts = [objectives.policy_loss(zeros, zeros, zeros, m, CLIP, sum(counts))[1] for m in mask]
    stats = jax.tree.map(lambda *x: sum(x), *parts)
    assert 1 + stats["ratio_shift"] == 1
    assert objectives.ratio_variance(stats) == 0


def test_value_loss_takes_the_worse_of_plain_and_clipped(rng):
    mask = spans_with_edge_cases(rng)
    old = normal(rng, mask)
    args = [spoil(old + rng.normal(scale=0.4, size=mask.shape), mask, rng), old, normal(rng, mask), mask]
    assert_matches_oracle(lambda *a: objectives.value_loss(*a, CLIP)[0], value_oracle, args, [0])

    values, old, returns, mask = args
    worse = [
        abs(old[i] + np.clip(values[i] - old[i], -CLIP, CLIP) - returns[i]) > abs(values[i] - returns[i])
        for i in tokens(mask)
        if abs(values[i] - old[i]) > CLIP
    ]
    _, clipfrac = objectives.value_loss(*args, CLIP)
    np.testing.assert_allclose(clipfrac, sum(worse) / len(tokens(mask)), rtol=1e-6)


def losses_of_a_batch(rng):
    """Each loss as a function of (row slice, denominator), and its global denominator."""
    mask = spans_with_edge_cases(rng, rows=8)
    a, b, c = (normal(rng, mask).astype(np.float32) for _ in range(3))
    ids, masks, row_mask, _ = pairs(rng)
    chosen, rejected = rng.normal(size=(2, *masks[0].shape)).astype(np.float32)
    tokens_, rows_ = int(mask.sum()), int(row_mask.sum())
    tokenwise = (chosen, rejected, *ids, *masks, row_mask)
    return {
        "sft": (lambda s, d: objectives.sft_loss(a[s], mask[s], d), tokens_),
        "pairwise": (lambda s, d: objectives.pairwise_loss(chosen[s, 0], rejected[s, 0], row_mask[s], d), rows_),
        "tokenwise": (lambda s, d: objectives.tokenwise_pairwise_loss(*(x[s] for x in tokenwise), d), rows_),
        "policy": (lambda s, d: objectives.policy_loss(a[s], b[s], c[s], mask[s], CLIP, d), tokens_),
        "value": (lambda s, d: objectives.value_loss(a[s], b[s], c[s], mask[s], CLIP, d), tokens_),
    }


@pytest.mark.parametrize("name", ["sft", "pairwise", "tokenwise", "policy", "value"])
def test_micro_batches_with_the_global_denominator_add_up_to_the_whole_batch(rng, name):
    loss, denominator = losses_of_a_batch(rng)[name]
    whole = loss(slice(None), None)
    splits = [slice(0, 1), slice(1, 4), slice(4, 8)]  # the first token micro-batch is empty
    added = jax.tree.map(lambda *parts: sum(parts), *[loss(split, denominator) for split in splits])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), added, whole)


def test_a_batch_without_any_token_has_zero_loss_and_zero_gradient():
    nothing, garbage = np.zeros((2, 3)), jnp.full((2, 3), jnp.nan)
    ids = np.zeros((2, 3), np.int32)
    losses = [
        lambda x: objectives.sft_loss(x, nothing),
        lambda x: objectives.pairwise_loss(x[:, 0], x[:, 1], nothing[:, 0]),
        lambda x: objectives.tokenwise_pairwise_loss(x, x, ids, ids, nothing, nothing, nothing[:, 0]),
        lambda x: objectives.tokenwise_pairwise_loss(x, x, ids, ids, nothing, nothing, np.ones(2)),
        lambda x: objectives.policy_loss(x, x, x, nothing, CLIP)[0],
        lambda x: objectives.value_loss(x, x, x, nothing, CLIP)[0],
        lambda x: objectives.masked_mean(x, nothing, 0),
    ]
    for loss in losses:
        value, gradient = jax.value_and_grad(loss)(garbage)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_reductions_of_half_precision_inputs_are_float32():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    assert objectives.masked_sum(x, jnp.ones_like(x)) == 4096
    assert objectives.gae(x, x, jnp.ones_like(x), 1.0, 1.0)[0].dtype == jnp.float32
