"""Parts of a step's data: the tokenised rows of one source, which of them are usable, and why the others are not."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrlhf.data.files import Table
from jaxrlhf.data.tokenized import CUT_PROMPT, CUT_RESPONSE, DROPPED

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 3  # places of bad rows that a report names
COUNTS = {"truncated_prompts": CUT_PROMPT, "truncated_responses": CUT_RESPONSE, "dropped_too_long": DROPPED}


@dataclass(frozen=True)
class Part:
    """Tokenised rows of one source, in a step's training or evaluation data.

    Attributes:
        name: the source's short name, in metrics.
        table: a `datasets.Dataset` with `ids_j`, `mask_j`, `row`, `prompt_length`, and in ppo `kept`.
        rows: int64 [n]: the entries of the table that are kept.
        lengths: int32 [sequences, n]: tokens of each sequence of each kept row.
        counts: rows given, kept, skipped, truncated and dropped.
        problems: reasons and places of skipped rows.
        described: the format in words.
        tables: int [entries]: the number of the source's table that each entry of `table` came from.
        reading: the `Reading` of the source; None for rows of a stream.
    """

    name: str
    table: Any
    rows: np.ndarray
    lengths: np.ndarray
    counts: dict[str, int]
    problems: tuple[str, ...]
    described: str = ""
    tables: np.ndarray | None = None
    reading: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def margins(self) -> int:
        """Number of kept rows that have a margin."""
        if "margin" not in self.table.column_names:
            return 0
        return int(self.table.with_format("arrow")["margin"][:].is_valid().to_numpy()[self.rows].sum())

    def fetch(self, numbers: Sequence[int] | np.ndarray, columns: Sequence[str]) -> dict[str, Any]:
        """The values of these columns in kept rows, each column a list of numpy arrays or values."""
        return self.table.with_format("numpy", columns=list(columns))[self.rows[np.asarray(numbers)]]


def problems_of(tables: Sequence[Dataset], origins: Sequence[Table]) -> tuple[str, ...]:
    """The most frequent reasons why rows could not be used, with the first places of each. `origins`: where the rows
    of each table stood."""
    places: dict[str, list[str]] = collections.defaultdict(list)
    for table, origin in zip(tables, origins, strict=False):
        numbered = zip(table["row"][:], table["problem"][:], strict=True)
        for row, problem in sorted((row, problem) for row, problem in numbered if problem is not None):
            places[problem].append(origin.where(row))
    frequent = sorted(places.items(), key=lambda item: -len(item[1]))[:SHOWN]
    return tuple(f"{found[0]}: {what}{repeated(found)}" for what, found in frequent)


def repeated(places: Sequence[str]) -> str:
    """The number of further places, with the first of them."""
    others = places[1:]
    shown = ", ".join(others[: SHOWN - 1]) + (", …" if len(others) >= SHOWN else "")
    return f" (and {len(others)} more: {shown})" if others else ""


def make_part(name: str, tables: Sequence[Dataset], given: int, problems: tuple[str, ...], described: str) -> Part:
    """The usable rows of the tokenised tables of a source, and the count of the others."""
    import datasets

    table = datasets.concatenate_datasets(list(tables))
    plain = table.select_columns(["cut", "problem", *(c for c in table.column_names if c.startswith("length_"))])
    columns: Any = plain.with_format("arrow")[:]
    cut = columns.column("cut").to_numpy()
    dropped = (cut & DROPPED) != 0
    bad = columns.column("problem").is_valid().to_numpy()
    kept = np.flatnonzero(~bad & ~dropped)
    lengths = [columns.column(name).to_numpy()[kept] for name in plain.column_names if name.startswith("length_")]
    counts = {"rows": given, "kept": len(kept), "skipped": int(bad.sum())}
    counts |= {count: int(((cut & bit) != 0).sum()) for count, bit in COUNTS.items()}
    return Part(name, table, kept, np.stack(lengths).astype(np.int32), counts, problems, described)
