"""Reductions over the segments of packed rows against float64 loops, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_matches_oracle, normal

from jaxrlhf import objectives

SEGMENTS = 4
ROWS = (
    (1, 1, 1, 2, 2, 3, 4, 4, 0, 0),
    (1, 2, 3, 4, 0, 0, 0, 0, 0, 0),
    (1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
    (0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
)
"""Segments of one token, a full row, rows with and without padding, a row of padding alone."""


def sums_oracle(x, mask, segment_ids):
    out = np.zeros((len(x), SEGMENTS))
    for row, column in np.argwhere((mask != 0) & (segment_ids > 0)):
        out[row, segment_ids[row, column] - 1] += x[row, column]
    return out


def ends_oracle(values, segment_ids):
    out = np.zeros((len(values), SEGMENTS))
    for row, column in np.argwhere(segment_ids > 0):
        out[row, segment_ids[row, column] - 1] = values[row, column]  # the last one stays
    return out


@pytest.fixture
def segment_ids():
    return np.array(ROWS, np.int32)


@pytest.mark.parametrize("seed", range(2))
def test_sums_of_segments_count_their_marked_entries_alone(segment_ids, seed):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, segment_ids.shape) * (segment_ids > 0)
    mask[3, 2:6] = 0  # a segment without a marked entry
    args = [normal(rng, mask), mask, segment_ids]
    assert_matches_oracle(lambda *a: objectives.segment_sums(*a, SEGMENTS), sums_oracle, args, [0])


@pytest.mark.parametrize("seed", range(2))
def test_scores_are_read_at_the_last_column_of_each_segment(segment_ids, seed):
    ends = (segment_ids != np.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))) & (segment_ids > 0)
    args = [normal(np.random.default_rng(seed), ends), segment_ids]
    assert_matches_oracle(lambda *a: objectives.score_at_segment_ends(*a, SEGMENTS), ends_oracle, args, [0])


def test_a_mask_on_padding_counts_nothing_and_segments_past_the_last_are_left_out(segment_ids):
    ones = np.ones(segment_ids.shape, np.float32)
    counts = [[np.sum(row == s) for s in (1, 2)] for row in segment_ids]
    np.testing.assert_array_equal(objectives.segment_sums(ones, ones, segment_ids, 2), counts)
    np.testing.assert_array_equal(objectives.score_at_segment_ends(ones, segment_ids, 6)[:, 4:], 0)


def test_one_segment_per_row_equals_the_reductions_of_whole_rows():
    rng = np.random.default_rng(0)
    whole = (np.arange(7) < rng.integers(1, 8, (5, 1))).astype(np.int32)
    mask, x = whole * rng.integers(0, 2, whole.shape), normal(rng, whole)
    with jax.enable_x64(True):
        sums, rows = objectives.segment_sums(x, mask, whole, 1), objectives.sequence_logprobs(x, mask)
        np.testing.assert_array_equal(sums[:, 0], rows)
        ends, scores = objectives.score_at_segment_ends(x, whole, 1), objectives.score_at_last_token(x, whole)
        np.testing.assert_array_equal(ends[:, 0], scores)
    assert objectives.segment_sums(jnp.ones((2, 3), jnp.bfloat16), whole[:2, :3], whole[:2, :3], 1).dtype == jnp.float32
