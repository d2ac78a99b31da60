"""Selects the rows of a source that a step trains on, and those that every step evaluates on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxrlhf.errors import InputError

SHARES = {"sft": (0, 1), "reward": (1, 2), "ppo": (2, 3), "dpo": (1, 3), "kto": (1, 3)}
"""First and last (exclusive) share of `data_split` that each step trains on; dpo or kto replaces reward and ppo."""


def parse_split(data_split: str) -> tuple[float, ...] | None:
    """Parses `2,4,4` into the shares of sft, reward and ppo. None for the empty string: each step uses all rows."""
    if not data_split:
        return None
    try:
        weights = tuple(map(float, data_split.split(",")))
    except ValueError:
        weights = ()
    if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(f"data_split '{data_split}': must be three shares, of sft, reward and ppo, such as 2,4,4")
    return weights


def split_among(steps: Sequence[str], data_split: str) -> str:
    """The split of a source that serves these steps alone: they share all its rows, equally where none has a share."""
    weights = parse_split(data_split)
    served = {k for step in steps for k in range(*SHARES[step])}
    if weights is None or len(served) == len(weights):
        return data_split
    own = [weight if k in served else 0.0 for k, weight in enumerate(weights)]
    return ",".join(map(str, own if any(own) else (float(k in served) for k in range(len(weights)))))


def split_groups(
    groups: np.ndarray, step: str, *, data_split: str, held_out: float, seed: int, name: str = "the data"
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the rows of a source into those that a step trains on and those that every step evaluates on.

    Rows of one group, such as several comparisons of one prompt, stay together. One permutation of the groups, keyed by
    `seed`, is cut into contiguous slices: first the held-out groups, then one slice per step. The steps' training rows
    are disjoint (dpo has those of reward and ppo) and, with the held-out rows, complete.

    Args:
        groups: int64 [n]: the group of each row; -1: the row is left out; less: it is unusable, and counted with the
            rows to train on.
        step: "sft", "reward", "ppo", "dpo" or "kto".
        data_split: shares of the steps; see `parse_split`.
        held_out: fraction of the groups to evaluate on (at least one group), or 0.
        seed: key of the permutation.
        name: the source, for messages.

    Returns:
        Sorted row numbers (int64) to train on and to evaluate on.
    """
    rows, unusable = np.flatnonzero(groups >= 0), np.flatnonzero(groups < -1)
    if not len(rows):
        return unusable, unusable  # what is wrong with them is told where they are tokenised
    _, first, member = np.unique(groups[rows], return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))  # groups are numbered by their first row
    member = number[member]
    n = len(first)
    order = np.random.default_rng(seed).permutation(n)
    n_eval = max(1, round(n * held_out)) if held_out else 0
    if n_eval >= n:
        raise InputError(f"{name} has {n} prompt(s), too few to hold out {n_eval} for evaluation; give eval_data_path")
    evaluation, train = order[:n_eval], order[n_eval:]
    weights = parse_split(data_split)
    if weights is not None:
        ends = np.round(np.cumsum((0.0, *weights)) / sum(weights) * len(train)).astype(int)
        begin, end = SHARES[step]
        train = train[ends[begin] : ends[end]]
    return np.sort(np.concatenate([rows[np.isin(member, train)], unusable])), rows[np.isin(member, evaluation)]


def limit_rows(rows: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of these entries, chosen at random and in their order; 0: all."""
    if not 0 < limit < len(rows):
        return rows
    order = np.random.default_rng((seed, 1)).permutation(len(rows))
    return rows[np.sort(order[:limit])]
