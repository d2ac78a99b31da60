"""Training rows that are read as they are needed, for data that does not fit on the disk.

A source is read in windows of `shuffle_buffer` rows, which are shuffled (and packed) by themselves. The order is a pure
function of the seed and the position in the stream. To find a position, as a resumed run does, the rows before it are
read but not tokenised. Which rows share a packed row depends on the lengths of all rows of a window: each process
tokenises a share of these, and they exchange the lengths.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.data.batches import Data, Indices
from jaxrlhf.data.messages import BadRow
from jaxrlhf.data.order import Schedule, epoch_permutation
from jaxrlhf.data.packing import Bins, pack
from jaxrlhf.data.parts import Part, make_part
from jaxrlhf.data.reading import Opened
from jaxrlhf.data.selection import SHARES, parse_split
from jaxrlhf.data.steps import PairData, PromptData, RewardData, SFTData
from jaxrlhf.data.tokenized import SEQUENCES, Encoding, TokenRow, features_of, group_of, tokenise
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.distributed import gather
from jaxrlhf.errors import InputError

SOURCE_BITS = 44  # a unit's number holds the source above these bits
GROUP_RANGE = 2**63
RECENT = 2  # windows that a source keeps, because a batch may span two
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


class PackedWindow(NamedTuple):
    """The packed rows of a window."""

    rows: list[StreamRow]
    """All rows of the window."""
    places: list[tuple[int, int]]
    """The row of each usable example, and its number among the examples of that row."""
    bins: Bins
    """The examples of each packed row."""
    tokens: dict[int, list[TokenRow]]
    """The examples of the rows that this process has tokenised."""


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
        self._agreed = False
        self._recent: dict[int, list[StreamRow]] = {}
        self._packed: dict[int, PackedWindow] = {}
        self._restart()

    def _restart(self) -> None:
        self._rows, self._next = self.rows(), 0

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
            self.units.append(len(self._pack(window).bins) if self.packing else len(rows))
        if len(rows) < self.window:
            self.complete = True
            if not sum(self.units):
                reasons = "; ".join(f"{what} ({n} rows)" for what, n in self.skipped.items()) or "no rows"
                raise InputError(f"data_path '{self.name}': no usable row in the stream: {reasons}")
        if self.packing:
            write_json_atomic(self.record, {"units": self.units, "complete": self.complete})

    def _read(self, window: int) -> list[StreamRow]:
        """The rows of a window: a recent one, or read on, or from the beginning."""
        if window not in self._recent:
            if window < self._next:
                self._restart()
            while self._next <= window:
                keep(self._recent, self._next, list(itertools.islice(self._rows, self.window)))
                self._next += 1
        return self._recent[window]

    def _pack(self, window: int) -> PackedWindow:
        """The packed rows of a window. All processes call it at the same place."""
        if window not in self._packed:
            rows, count = self._read(window), jax.process_count()
            first, last = (len(rows) * k // count for k in (jax.process_index(), jax.process_index() + 1))
            own = self.tokenised(rows[first:last])
            names = [f"length_{j}" for j in range(SEQUENCES[self.encoding.step])]
            lengths = [[sum(row[name] for name in names) for row in each] for each in own]
            every = [each for share in gather(f"packing {self.name}", lengths) for each in share]
            places = [(i, j) for i, each in enumerate(every) for j in range(len(each))]
            bins = pack(np.array([n for each in every for n in each], np.int64), self.packing, self.seed[0])
            keep(self._packed, window, PackedWindow(rows, places, bins, dict(enumerate(own, first))))
        return self._packed[window]

    def tokenised(self, rows: Sequence[StreamRow]) -> list[list[TokenRow]]:
        """The usable examples of each of these rows, as columns by name."""
        result: list[list[TokenRow]] = []
        for k, group in itertools.groupby(rows, key=lambda row: row[2]):
            numbered = [(i, row) for i, row, _ in group]
            found: dict[int, list[TokenRow]] = {i: [] for i, _ in numbered}
            table, reader = self.opened[k].table, self.opened[k].reader
            columns = tokenise(numbered, table, reader, self.tokenizer, self.encoding)
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                if row["problem"] is None and row["ids_0"]:
                    arrays = {key: np.asarray(value, np.int32) for key, value in row.items() if isinstance(value, list)}
                    found[row["row"]].append(row | arrays)
            result += found.values()
        return result

    def _usable(self, window: int, units: Mapping[int, int]) -> dict[int, list[TokenRow]]:
        """The tokenised row of each unit of a window, or the next usable one, so that a batch has no holes."""
        rows, found = self._read(window), {}
        made = self.tokenised([rows[unit] for unit in units.values()])
        for (number, unit), tokens in zip(units.items(), made, strict=True):
            others = (other for row in rows[unit + 1 :] + rows[:unit] for other in self.tokenised([row]))
            usable = tokens or next((other for other in others if other), [])
            if not usable:
                problem = f"none of {len(rows):,} rows in a row of the stream is usable"
                raise InputError(f"data_path '{self.name}': {problem}")
            found[number] = usable[:1]
        return found

    def prepare(self, numbers: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """Packs the windows of these units of the source; returns pass, window, place and number of each, in order.

        All processes call it with the same units.
        """
        if self.packing and not self._agreed:  # a process may lack the record of an earlier run
            own: list[Any] = [self.units, self.complete]
            records = gather(f"windows of {self.name}", own)
            self.units, self.complete = max(records, key=lambda record: (len(record[0]), record[1]))
            self._agreed = True
        places = sorted((*self.locate(number), number) for number in numbers)
        if self.packing:
            windows = dict.fromkeys(window for _, window, _, _ in places)
            if not windows.keys() <= self._packed.keys():
                self._packed = {window: self._pack(window) for window in windows}
        return places

    def fetch(self, numbers: Sequence[int]) -> list[list[TokenRow]]:
        """The tokenised rows of these units of the source."""
        found: dict[int, list[TokenRow]] = {}
        for (passed, window), group in itertools.groupby(self.prepare(numbers), key=lambda item: item[:2]):
            order = epoch_permutation(self.units[window], (*self.seed, window), passed)
            units = {number: int(order[place]) for _, _, place, number in group}
            find = self._packed_rows if self.packing else self._usable
            found |= find(window, units)
        return [found[number] for number in numbers]

    def _packed_rows(self, window: int, units: Mapping[int, int]) -> dict[int, list[TokenRow]]:
        """The examples of packed rows of a window. Tokenises those that other processes have tokenised."""
        packed = self._pack(window)
        members = {number: [packed.places[i] for i in packed.bins[unit]] for number, unit in units.items()}
        missing = sorted({row for places in members.values() for row, _ in places} - packed.tokens.keys())
        made = self.tokenised([packed.rows[row] for row in missing])
        tokens = packed.tokens | dict(zip(missing, made, strict=True))
        return {number: [tokens[row][j] for row, j in places] for number, places in members.items()}


def keep(recent: dict[int, Any], window: int, value: object) -> None:
    """Adds a window to the recent ones; the oldest make room."""
    recent[window] = value
    while len(recent) > RECENT:
        del recent[next(iter(recent))]


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

    def of_source(self, k: int, units: Indices) -> dict[int, int]:
        """The number in source `k` of each unit that comes from it, by its place among `units`."""
        found = {i: int(unit) for i, unit in enumerate(units) if unit >= 0}
        return {i: unit & ((1 << SOURCE_BITS) - 1) for i, unit in found.items() if unit >> SOURCE_BITS == k}

    def values(self, units: Indices, columns: Sequence[str]) -> list[list[TokenRow]]:
        result: list[list[TokenRow]] = [[] for _ in range(len(units))]
        for k, stream in enumerate(self.streams):
            own = self.of_source(k, units)
            for i, rows in zip(own, stream.fetch(list(own.values())), strict=True):
                result[i] = rows
        return result

    def read(self, indices: Indices, held: np.ndarray | None) -> list[list[TokenRow]]:
        for k, stream in enumerate(self.streams):
            if stream.packing:  # each process packs the windows of the whole batch
                stream.prepare(list(self.of_source(k, indices).values()))
        return super().read(indices, held)

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
