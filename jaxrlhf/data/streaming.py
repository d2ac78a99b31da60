"""Training rows that are read as they are needed, for data that does not fit on the disk.

A source is read in windows of `shuffle_buffer` rows, which are shuffled (and packed) by themselves. The order is a pure
function of the seed and the position in the stream. To find a position, as a resumed run does, the rows before it are
read but not tokenised.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.data.batches import Data, Indices
from jaxrlhf.data.messages import BadRow
from jaxrlhf.data.order import Schedule, epoch_permutation
from jaxrlhf.data.packing import Bins, pack
from jaxrlhf.data.reading import Opened
from jaxrlhf.data.selection import SHARES, parse_split
from jaxrlhf.data.steps import PairData, PromptData, RewardData, SFTData
from jaxrlhf.data.tokenized import Encoding, Part, TokenRow, features_of, group_of, make_part, tokenise
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import InputError

SOURCE_BITS = 44  # a unit's number holds the source above these bits
GROUP_RANGE = 2**63
StreamRow = tuple[int, object, int]
"""The number of a row, the row, and the number of its table."""


@dataclass(frozen=True)
class StreamOrder:
    """The rows of a stream that a step trains on, and their order."""

    window: int
    """Rows that are shuffled together."""
    shares: tuple[float, float]
    """Bounds, as fractions of the prompts, of those that the step trains on."""
    packing: int
    """Tokens of a packed row; 0: rows are not packed."""
    seed: tuple[int, ...]
    """Key of the order."""


class StreamSource:
    """The rows of one source that a step trains on, in windows.

    Args:
        name: the source's short name.
        opened: its tables, streamed.
        encoding: how rows become tokens.
        tokenizer: the tokenizer.
        order: which rows the step trains on, and in what order.
        record: file that keeps the number of packed rows of each window, so that a resumed run need not pack anew.
    """

    def __init__(
        self,
        name: str,
        opened: Sequence[Opened],
        encoding: Encoding,
        tokenizer: Tokenizer,
        order: StreamOrder,
        record: Path,
    ) -> None:
        self.name, self.opened, self.encoding, self.tokenizer = name, opened, encoding, tokenizer
        self.window, self.shares, self.packing, self.seed = order.window, order.shares, order.packing, order.seed
        self.record = record
        self.units: list[int] = []
        self.complete = False
        self.skipped: dict[str, int] = {}
        if order.packing and record.exists():
            kept = json.loads(record.read_text(encoding="utf-8"))
            self.units, self.complete = kept["units"], kept["complete"]
        self._restart()

    def _restart(self) -> None:
        self._rows, self._next = self.rows(), 0
        self._window, self._raw = -1, []
        self._packed: tuple[list[TokenRow], Bins] | None = None

    def rows(self, shares: tuple[float, float] | None = None) -> Iterator[StreamRow]:
        """Yields the rows whose prompts lie in `shares` (the step's): number, row and table; counts the unusable."""
        self.skipped = {}
        first, last = shares or self.shares
        for k, opened in enumerate(self.opened):
            for i, line in enumerate(opened.table.each()):
                (row,) = opened.table.parse({name: [value] for name, value in line.items()}, i)
                if row is None:
                    continue
                try:
                    group = group_of(opened.reader.all(row)[0])
                except BadRow as problem:
                    self.skipped[str(problem)] = self.skipped.get(str(problem), 0) + 1
                    continue
                if first <= group / GROUP_RANGE < last:
                    yield i, row, k

    def first(self, count: int | None, fraction: float, origin: str) -> Part:
        """The first `count` rows (None: all), tokenised, of those in the first `fraction` of the prompts.

        `origin` says in the log where they come from. Raises InputError when there is none.
        """
        from datasets import Dataset

        columns: dict[str, list[Any]] = {}
        rows = list(itertools.islice(self.rows((0.0, fraction)), count))
        for k, group in itertools.groupby(rows, key=lambda row: row[2]):
            numbered = [(i, row) for i, row, _ in group]
            opened = self.opened[k]
            made = tokenise(numbered, opened.table, opened.reader, self.tokenizer, self.encoding)
            columns = {name: columns.get(name, []) + values for name, values in made.items()}
        if not rows:
            raise InputError(f"data_path '{self.name}': no usable row is {origin}, to evaluate on; give eval_data_path")
        table = Dataset.from_dict(columns, features=features_of(self.encoding.step))
        return make_part(self.name, [table], len(rows), (), f"{self.opened[0].words}, {origin}")

    def locate(self, number: int) -> tuple[int, int, int]:
        """The pass, the window in the pass, and the place in the window of the source's unit `number`."""
        while not self.complete and number >= sum(self.units):
            self._measure(len(self.units))
        starts = list(itertools.accumulate(self.units, initial=0))
        passed, offset = divmod(number, starts[-1]) if self.complete else (0, number)
        window = bisect.bisect_right(starts, offset) - 1
        return passed, window, offset - starts[window]

    def _measure(self, window: int) -> None:
        """Counts the units of the next window, or finds that there is none."""
        rows = self._read(window)
        if rows:
            self.units.append(len(self._pack(window)[1]) if self.packing else len(rows))
        if len(rows) < self.window:
            self.complete = True
            if not sum(self.units):
                reasons = "; ".join(f"{what} ({n} rows)" for what, n in self.skipped.items()) or "no rows"
                raise InputError(f"data_path '{self.name}': no usable row in the stream: {reasons}")
        if self.packing:
            write_json_atomic(self.record, {"units": self.units, "complete": self.complete})

    def _read(self, window: int) -> list[StreamRow]:
        """The rows of a window. Reads on from the newest one, or from the beginning."""
        if window != self._window:
            if window < self._next:
                self._restart()
            while self._next <= window:
                self._raw = list(itertools.islice(self._rows, self.window))
                self._window, self._packed, self._next = self._next, None, self._next + 1
        return self._raw

    def _pack(self, window: int) -> tuple[list[TokenRow], Bins]:
        """All usable rows of a window, tokenised, and their bins."""
        rows = self._read(window)
        if self._packed is None:
            tokens = self.tokenised(rows)
            names = [name for name in (tokens[0] if tokens else {}) if name.startswith("length_")]
            lengths = np.array([sum(row[name] for name in names) for row in tokens], np.int64)
            self._packed = tokens, pack(lengths, self.packing, self.seed[0])
        return self._packed

    def tokenised(self, rows: Sequence[StreamRow]) -> list[TokenRow]:
        """The usable ones of these rows as columns by name."""
        result = []
        for k, group in itertools.groupby(rows, key=lambda row: row[2]):
            table, reader = self.opened[k].table, self.opened[k].reader
            columns = tokenise([(i, row) for i, row, _ in group], table, reader, self.tokenizer, self.encoding)
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                if row["problem"] is None and row["ids_0"]:
                    arrays = {key: np.asarray(value, np.int32) for key, value in row.items() if isinstance(value, list)}
                    result.append(row | arrays)
        return result

    def _usable(self, window: int, unit: int) -> list[TokenRow]:
        """The tokenised row of a window, or the next usable one, so that a batch has no holes."""
        rows = self._read(window)
        for row in rows[unit:] + rows[:unit]:
            if tokens := self.tokenised([row]):
                return tokens[:1]
        raise InputError(f"data_path '{self.name}': none of {len(rows):,} rows in a row of the stream is usable")

    def fetch(self, numbers: Sequence[int]) -> list[list[TokenRow]]:
        """The tokenised rows of these units of the source."""
        found: dict[int, list[TokenRow]] = {}
        places = sorted(((*self.locate(number), number) for number in numbers), key=lambda item: item[:2])
        for (passed, window), group in itertools.groupby(places, key=lambda item: item[:2]):
            order = epoch_permutation(self.units[window], (*self.seed, window), passed)
            for _, _, place, number in group:
                unit = int(order[place])
                if self.packing:
                    tokens, bins = self._pack(window)
                    found[number] = [tokens[row] for row in bins[unit]]
                else:
                    found[number] = self._usable(window, unit)
        return [found[number] for number in numbers]


class StreamData(Data):
    """Training data of streamed sources. Every batch has the width `maximum`."""

    def __init__(
        self,
        streams: Sequence[StreamSource],
        tokenizer: Tokenizer,
        maximum: int,
        key: str,
        weights: Sequence[float | None],
    ):
        super().__init__([], tokenizer, maximum, key)
        self.streams = list(streams)
        if self.streams[0].packing:
            self.maximum, self.bins = self.capacity, []
        self.schedule = Schedule([weight or 1.0 for weight in weights])

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(stream.name for stream in self.streams)

    def __len__(self) -> int:
        raise InputError("streaming requires max_steps: the number of rows is not known before all are read")

    @property
    def size(self) -> int | None:
        return None

    def units_at(self, positions: np.ndarray) -> np.ndarray:
        source, number = self.schedule.take(positions)
        return (source.astype(np.int64) << SOURCE_BITS) + number

    def values(self, units: Indices, columns: Sequence[str]) -> list[list[TokenRow]]:
        result: list[list[TokenRow]] = [[] for _ in range(len(units))]
        for k, stream in enumerate(self.streams):
            own = [i for i, unit in enumerate(units) if unit >= 0 and int(unit) >> SOURCE_BITS == k]
            numbers = [int(units[i]) & ((1 << SOURCE_BITS) - 1) for i in own]
            for i, rows in zip(own, stream.fetch(numbers), strict=True):
                result[i] = rows
        return result

    def width(self, indices: Indices) -> int:
        return self.maximum


class SFTStream(StreamData, SFTData):
    """Streamed rows of prompt + response, or of text."""


class PairStream(StreamData, PairData):
    """Streamed rows of prompt + chosen and prompt + rejected."""


class RewardStream(StreamData, RewardData):
    """Streamed pairs with their margins."""


class PromptStream(StreamData, PromptData):
    """Streamed prompts."""

    group_by_length = False


STREAMS: dict[str, type[StreamData]] = {
    "sft": SFTStream,
    "reward": RewardStream,
    "ppo": PromptStream,
    "dpo": PairStream,
}


def stream_shares(step: str, data_split: str, held_out: float) -> tuple[float, float]:
    """Bounds, as fractions of the prompts, of those that a step trains on; below `held_out` they are held out."""
    weights = parse_split(data_split) or (1.0, 1.0, 1.0)
    first, last = SHARES[step] if data_split else (0, 3)
    total, room = sum(weights), 1 - held_out
    return held_out + room * sum(weights[:first]) / total, held_out + room * sum(weights[:last]) / total
