"""Random streams: one per purpose, and none that a step or row number of another purpose leads to."""

import itertools

import jax
import numpy as np

from jaxrlhf.keys import Stream, stream

SEEDS, STEPS, ROWS = (0, 1, 42), 1000, 50


def words(keys) -> list[tuple[int, ...]]:
    """The key data of one key or of an array of keys, as tuples."""
    return [tuple(key) for key in np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()]


def folded(seed, purpose, count, *numbers):
    """The keys of `count` numbers after `numbers`, in one call."""
    return words(jax.vmap(lambda number: stream(seed, purpose, *numbers, number))(np.arange(count)))


def test_no_two_purposes_share_a_number():
    assert len({int(purpose) for purpose in Stream.__members__.values()}) == len(Stream.__members__)


def test_streams_differ_by_purpose_and_by_seed():
    roots = [key for seed, purpose in itertools.product(SEEDS, Stream) for key in words(stream(seed, purpose))]
    assert len(set(roots)) == len(SEEDS) * len(Stream)


def test_a_number_folded_in_leads_to_no_other_stream():
    """The roots, steps of all purposes, and rows within two steps: every key is a different one."""
    for seed in SEEDS:
        keys = [key for purpose in Stream for key in words(stream(seed, purpose))]
        for purpose in Stream:
            keys += folded(seed, purpose, STEPS)
            keys += folded(seed, purpose, ROWS, 0) + folded(seed, purpose, ROWS, 1)
        assert len(set(keys)) == len(keys) == len(Stream) * (1 + STEPS + 2 * ROWS)


def test_numbers_are_folded_in_one_after_the_other():
    key = jax.random.key(7)
    for number in (Stream.EVALUATION, 3, 5):
        key = jax.random.fold_in(key, int(number))
    assert words(key) == words(stream(7, Stream.EVALUATION, 3, 5))
    assert words(stream(7, Stream.EVALUATION, 3, 5)) != words(stream(7, Stream.EVALUATION, 5, 3))
