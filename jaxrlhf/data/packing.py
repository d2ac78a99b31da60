"""Packing: rows of different lengths in bins of one length, so that almost no position is padding."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bins:
    """Rows by bin: bin `i` holds `rows[offsets[i] : offsets[i + 1]]`.

    Attributes:
        rows: int64 [n]: row numbers.
        offsets: int64 [bins + 1].
    """

    rows: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.rows[self.offsets[i] : self.offsets[i + 1]]

    @property
    def largest(self) -> int:
        """The most rows that a bin holds."""
        return int(np.diff(self.offsets).max())


def pack(lengths: np.ndarray, capacity: int, seed: int = 0) -> Bins:
    """Packs rows into bins by best-fit decreasing: the longest row first, each into the fullest bin that has room.

    Args:
        lengths: int [n]: tokens of each row, at most `capacity`.
        capacity: tokens that a bin holds.
        seed: key of the order of rows of one length, and of the order of the bins.

    Returns:
        Bins that hold each row once.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))
    order = shuffled[np.argsort(-np.asarray(lengths)[shuffled], kind="stable")]
    bins: list[list[int]] = []
    rooms: list[int] = []  # the rooms that some bin has, sorted
    by_room: dict[int, list[int]] = {}
    for row in order.tolist():
        length = int(lengths[row])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        bins[number].append(row)
        left = room - length
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(number)
    mixed = [bins[i] for i in rng.permutation(len(bins))]
    sizes = [len(members) for members in mixed]
    return Bins(np.array([row for members in mixed for row in members], np.int64), np.cumsum([0, *sizes]))
