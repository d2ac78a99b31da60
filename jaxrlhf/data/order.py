"""The order of training: which unit (a row, or a packed row) of which source stands at which position of the stream.

Everything is a pure function of (seed, position), so that a resumed run needs only the number of its step and every
process finds the same order.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence

import numpy as np


@functools.lru_cache(maxsize=16)
def epoch_permutation(n: int, seed: int | tuple[int, ...], epoch: int) -> np.ndarray:
    """int64 [n]: the order of the units in an epoch, a read-only array that depends only on the arguments."""
    seeds = seed if isinstance(seed, tuple) else (seed,)
    order = np.random.default_rng((*seeds, epoch)).permutation(n)
    order.flags.writeable = False
    return order


def epoch_units(numbers: np.ndarray, n: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """int64, as `numbers`: the units of a source of `n` units, where `numbers` count its units over all epochs.

    The stream joins the permutations of all epochs, so no unit is dropped at the end of one.
    """
    epochs, places = np.divmod(numbers, n)
    result = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = epoch_permutation(n, seed, int(epoch))[places[chosen]]
    return result


class Schedule:
    """The source of each position of the stream.

    After any number of positions each source has had within one unit of its share, also after another source ended.
    The rule is that of Tijdeman 1980 ("The chairman assignment problem"): of the sources that may have one unit more,
    the one that must have it first.

    Args:
        weights: of each source, above 0.
        limits: the units after which each source ends; None: it never ends. When all have ended, all begin again.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None] | None = None):
        self.weights = [float(weight) for weight in weights]
        self.limits = list(limits or [None] * len(self.weights))
        self._rounds = [0] * len(self.weights)  # units given when all last began again
        self._sources, self._numbers = array("i"), array("q")
        self._counts = [0] * len(self.weights)
        self._start_segment()

    def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source (int32) at each position (int64, from 0), and the number of its units before it (int64)."""
        if len(self.weights) == 1:
            return np.zeros(len(positions), np.int32), np.asarray(positions, np.int64)
        self._extend(int(np.max(positions, initial=-1)) + 1)
        return np.frombuffer(self._sources, np.int32)[positions], np.frombuffer(self._numbers, np.int64)[positions]

    def counts(self, positions: int) -> np.ndarray:
        """int64 [sources]: the units that each source gives in the first `positions`."""
        if len(self.weights) == 1:
            return np.array([positions])
        self._extend(positions)
        return np.bincount(np.frombuffer(self._sources, np.int32)[:positions], minlength=len(self.weights))

    def _extend(self, length: int) -> None:
        while len(self._sources) < length:
            k = self._next()
            self._sources.append(k)
            self._numbers.append(self._counts[k])
            self._counts[k] += 1
            self._given[k] += 1
            self._step += 1
            limit = self.limits[k]
            if limit is not None and self._counts[k] - self._rounds[k] >= limit:
                self._start_segment()

    def _start_segment(self) -> None:
        """Shares the positions anew among the sources that have units left."""

        def open_sources() -> list[int]:
            pairs = enumerate(zip(self.limits, self._counts, self._rounds, strict=True))
            return [k for k, (limit, count, first) in pairs if limit is None or count - first < limit]

        if not (chosen := open_sources()):
            self._rounds = list(self._counts)
            chosen = open_sources()
        total = sum(self.weights[k] for k in chosen)
        self._shares = {k: self.weights[k] / total for k in chosen}
        self._given, self._step = [0] * len(self.weights), 1
        self._slack = 1 / (2 * len(chosen) - 2) if len(chosen) > 1 else 0.0

    def _next(self) -> int:
        best, first = -1, float("inf")
        for k, share in self._shares.items():
            given = self._given[k]
            deadline = (given + 1 - self._slack) / share
            if share * self._step - given >= self._slack - 1e-9 and deadline < first:
                best, first = k, deadline
        return best


def stream_positions(step: int, batch_size: int) -> np.ndarray:
    """int64 [batch_size]: the positions of training step `step` (from 0)."""
    return np.arange(step * batch_size, (step + 1) * batch_size)
