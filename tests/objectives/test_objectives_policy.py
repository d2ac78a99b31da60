"""The objectives of PPO's relatives and options against float64 oracles, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_matches_oracle, normal, spans_with_edge_cases, spoil, tokens

from jaxrlhf import objectives
from jaxrlhf.objectives import Moments

GROUP = 3


@pytest.fixture(params=range(2))
def rng(request):
    return np.random.default_rng(request.param)


@pytest.fixture
def grouped(rng):
    """Scores of four groups of three, with garbage where the mask is 0: one row missing, all but one, all."""
    mask = np.ones(12, np.int32)
    mask[[4, 6, 7, 9, 10, 11]] = 0
    return spoil(rng.normal(size=12), mask, rng), mask


def rows_of_group(mask, row):
    first = row - row % GROUP
    return [r for r in range(first, first + GROUP) if mask[r]]


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_compare_a_score_with_its_group(grouped, scale):
    def oracle(scores, mask):
        out = np.zeros(len(scores))
        for row in np.flatnonzero(mask):
            own = [scores[r] for r in rows_of_group(mask, row)]
            out[row] = scores[row] - sum(own) / len(own)
            if scale:
                variance = sum((s - sum(own) / len(own)) ** 2 for s in own) / max(len(own) - 1, 1)
                out[row] /= np.sqrt(variance) + 1e-6
        return out

    def function(scores, mask):
        return objectives.group_advantages(scores, GROUP, scale, mask)

    assert_matches_oracle(function, oracle, grouped)
    everyone = np.ones(12, np.int32)
    scores = np.random.default_rng(7).normal(size=12)
    assert_matches_oracle(function, oracle, (scores, everyone), [0])


def test_equal_scores_of_a_group_have_no_advantage():
    scores = jnp.asarray([0.1] * GROUP + [1.0, 2.0, 4.0], jnp.float32)
    advantages = objectives.group_advantages(scores, GROUP)
    assert not np.asarray(advantages[:GROUP]).any() and np.abs(np.asarray(advantages[GROUP:])).min() > 0.1
    for score in np.random.default_rng(0).normal(scale=10, size=50).astype(np.float32):
        same, mask = jnp.full(64, score), jnp.arange(64) % 5 != 0
        assert not np.asarray(objectives.group_advantages(same, 8)).any(), score
        assert not np.asarray(objectives.group_advantages(jnp.where(mask, same, 7), 8, row_mask=mask)).any(), score
        moments = objectives.add_moments(objectives.Moments.empty(), same, mask)
        assert not np.asarray(objectives.standardised(same, moments)).any(), score
        moments = objectives.add_moments(moments, same, mask)
        assert not np.asarray(objectives.standardised(same, moments)).any(), score
    assert (objectives.rloo_advantages(jnp.ones(6), GROUP) == 0).all()


def test_the_fixed_length_of_loss_weights_must_be_given():
    with pytest.raises(ValueError, match="needs length"):
        objectives.loss_weights(jnp.ones((2, 3)), "fixed-length")


def test_leave_one_out_compares_a_score_with_the_others_of_its_group(grouped):
    def oracle(scores, mask):
        out = np.zeros(len(scores))
        for row in np.flatnonzero(mask):
            others = [scores[r] for r in rows_of_group(mask, row) if r != row]
            out[row] = scores[row] - sum(others) / len(others) if others else 0.0
        return out

    assert_matches_oracle(lambda s, m: objectives.rloo_advantages(s, GROUP, m), oracle, grouped, [0])


def test_the_advantages_of_a_pair_are_those_of_its_best_and_its_worst_response(grouped):
    scores, mask = grouped
    ratios = spoil(np.random.default_rng(3).normal(size=len(scores)), mask, np.random.default_rng(4))

    def oracle(scores, ratios, mask):
        out = np.zeros(len(scores))
        for first in range(0, len(scores), GROUP):
            rows = [row for row in range(first, first + GROUP) if mask[row]]
            if len({scores[row] for row in rows}) < 2:
                continue
            best, worst = max(rows, key=lambda row: scores[row]), min(rows, key=lambda row: scores[row])
            out[best] = 0.3 / (1 + np.exp(0.3 * (ratios[best] - ratios[worst])))
            out[worst] = -out[best]
        return out

    assert_matches_oracle(
        lambda s, r, m: objectives.pair_advantages(s, r, GROUP, 0.3, m), oracle, (scores, ratios, mask), [1]
    )
    assert not np.asarray(objectives.pair_advantages(jnp.ones(6), jnp.arange(6.0), GROUP, 0.3)).any()


def test_the_policy_loss_with_the_advantages_of_pairs_has_the_gradient_of_dpo(rng):
    mask = np.arange(7) < rng.integers(2, 8, size=(6, 1))
    logprobs, reference = (jnp.asarray(rng.normal(size=mask.shape)) for _ in range(2))
    scores, beta = jnp.asarray([3.0, 1.0, 2.0, 0.0, 5.0, 4.0]), 0.7

    def dpo(logprobs):
        ratios = objectives.sequence_logprobs(logprobs - reference, mask)
        return objectives.preference_loss(ratios[jnp.array([0, 4])], ratios[jnp.array([1, 3])], jnp.ones(2), beta)

    def policy(new):
        ratios = objectives.sequence_logprobs(logprobs - reference, mask)
        advantages = objectives.pair_advantages(scores, ratios, GROUP, beta)[:, None] * mask
        weights = objectives.loss_weights(mask, "fixed-length", 7)
        return objectives.policy_loss(new, logprobs, advantages, mask, 0.2, token_weights=weights)[0] * GROUP * 7

    np.testing.assert_allclose(jax.grad(policy)(logprobs), jax.grad(dpo)(logprobs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function", [objectives.group_advantages, objectives.rloo_advantages])
def test_groups_that_do_not_divide_the_rows_are_refused(function):
    with pytest.raises(ValueError, match="group_size=5 does not divide 12 rows"):
        function(jnp.zeros(12), 5)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_reward_to_go_is_the_discounted_sum_from_each_token_on(rng, gamma):
    mask = spans_with_edge_cases(rng)

    def oracle(rewards, mask):
        out = np.zeros(mask.shape)
        for row, t in tokens(mask):
            later = [u for u in range(t, mask.shape[1]) if mask[row, u]]
            out[row, t] = sum(gamma ** (u - t) * rewards[row, u] for u in later)
        return out

    args = (normal(rng, mask), mask)
    assert_matches_oracle(lambda r, m: objectives.reward_to_go(r, m, gamma), oracle, args, [0])


@pytest.mark.parametrize("high", [None, 0.5])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_the_ratio_is_clipped_on_each_side_and_bounded_for_worse_tokens(rng, high, dual):
    mask = spans_with_edge_cases(rng, rows=12)
    old = normal(rng, mask)
    new = spoil(np.where(mask, old, 0) + rng.normal(scale=0.7, size=mask.shape), mask, rng)
    args = [new, old, normal(rng, mask), mask]
    seen = {"low": 0, "high": 0, "dual": 0}

    def oracle(logprobs, old, advantages, mask):
        total = 0.0
        for i in tokens(mask):
            ratio, a = np.exp(logprobs[i] - old[i]), advantages[i]
            top = 1 + (0.2 if high is None else high)
            loss = max(-a * ratio, -a * min(max(ratio, 0.8), top))
            seen["low"] += ratio < 0.8 and a < 0
            seen["high"] += ratio > top and a > 0
            if dual is not None and a < 0:
                seen["dual"] += loss > -a * dual
                loss = min(loss, -a * dual)
            total += loss
        return total / len(tokens(mask))

    options = {"clip_range_high": high, "dual_clip": dual}
    assert_matches_oracle(lambda *a: objectives.policy_loss(*a, 0.2, **options)[0], oracle, args, [0])
    assert seen["low"] and seen["high"] and (dual is None or seen["dual"])


@pytest.mark.parametrize("kind", objectives.AGGREGATIONS)
def test_losses_are_aggregated_over_tokens_rows_or_a_fixed_length(rng, kind):
    mask = spans_with_edge_cases(rng)
    x = normal(rng, mask)

    def oracle(x, mask):
        rows = [[x[row, t] for t in range(mask.shape[1]) if mask[row, t]] for row in range(len(mask))]
        rows = [row for row in rows if row]
        if kind == "token-mean":
            return sum(map(sum, rows)) / sum(map(len, rows))
        if kind == "sequence-mean":
            return sum(sum(row) / len(row) for row in rows) / len(rows)
        return sum(sum(row) / 11 for row in rows) / len(rows)

    def function(x, mask):
        return objectives.masked_sum(jnp.where(mask != 0, x, 0) * objectives.loss_weights(mask, kind, 11), mask)

    assert_matches_oracle(function, oracle, (x, mask), [0])
    old = normal(rng, mask)
    new = spoil(np.where(mask, old, 0) + 0.1, mask, rng)
    weights = objectives.loss_weights(mask, kind, 11)
    loss, _ = objectives.policy_loss(new, old, x, mask, 0.2, token_weights=weights)
    plain = oracle(np.where(mask, -x * np.exp(0.1), 0), mask)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)


def test_an_unknown_aggregation_is_refused_by_name():
    with pytest.raises(ValueError, match="kind='mean' of loss weights is not one of 'token-mean'"):
        objectives.loss_weights(jnp.ones((2, 2)), "mean")


def test_scores_pay_for_a_missing_end_and_for_length(rng):
    scores, lengths = rng.normal(size=6), np.array([1, 4, 5, 6, 9, 0])
    ended = np.array([1, 0, 1, 0, 1, 0], bool)

    def oracle(scores, lengths, ended):
        return np.array(
            [s - (0 if e else 2.0) - 0.25 * max(n - 5, 0) for s, n, e in zip(scores, lengths, ended, strict=True)]
        )

    function = lambda *a: objectives.penalised_scores(*a, 2.0, 0.25, 5)  # noqa: E731
    assert_matches_oracle(function, oracle, (scores, lengths, ended), [0])


def test_moments_added_in_parts_are_those_of_everything(rng):
    x = rng.normal(3, 2, size=(4, 25))
    mask = rng.random((4, 25)) < 0.6
    mask[2] = False
    moments = Moments.empty()
    for part, keep in zip(x, mask, strict=True):
        moments = jax.jit(objectives.add_moments)(moments, spoil(part, keep, rng).astype(np.float32), keep)
    chosen = x[mask]
    assert float(moments.count) == len(chosen)
    np.testing.assert_allclose(moments.mean, chosen.mean(), rtol=1e-5)
    np.testing.assert_allclose(moments.std, chosen.std(ddof=1), rtol=1e-5)
    expected = (x[0] - chosen.mean()) / chosen.std(ddof=1)
    np.testing.assert_allclose(objectives.standardised(x[0], moments), expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(objectives.standardised(jnp.ones(2), Moments.empty())).all()


def test_the_kl_weight_follows_its_target_by_at_most_a_fifth_per_horizon():
    def oracle(coef, kl):
        return coef * (1 + min(max(kl / 6.0 - 1, -0.2), 0.2) * 64 / 1000)

    for kl in (-3.0, 0.0, 5.0, 6.0, 6.9, 60.0):
        got = objectives.adaptive_kl_coef(jnp.float32(0.1), kl, 6.0, 1000, 64)
        assert float(got) == pytest.approx(oracle(0.1, kl), rel=1e-6)


def test_the_variance_is_the_unbiased_one(rng):
    mask = spans_with_edge_cases(rng)
    oracle = lambda x, mask: np.var([x[i] for i in tokens(mask)], ddof=1)  # noqa: E731
    assert_matches_oracle(objectives.masked_variance, oracle, (normal(rng, mask), mask), [0])
    assert float(objectives.masked_variance(jnp.ones(3), jnp.asarray([0, 1, 0]))) == 0
