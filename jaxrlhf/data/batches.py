"""Batches of tokenised rows: static shapes, explicit masks, and an order that depends only on (seed, step).

A batch is a dict of numpy arrays, made of units: a unit is a row or, with packing, a bin of several rows. T (or P) is
the smallest length bucket that holds the batch's longest unit, so few shapes occur. A unit number of -1 makes a filler
row: one pad token, 0 in `row_mask` and in `loss_mask`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxrlhf.data.order import Schedule, epoch_units, stream_positions
from jaxrlhf.data.packing import Bins, pack
from jaxrlhf.data.parts import Part
from jaxrlhf.data.tokenized import TokenRow
from jaxrlhf.data.tokenizer import pad_token_id

SMALLEST_BUCKET = 32
Batch = dict[str, np.ndarray]
Indices = Sequence[int] | np.ndarray
"""Unit numbers [B]; -1 for a filler row."""


def length_bucket(length: int, maximum: int) -> int:
    """Rounds a length up to 32, 64, 96, 128, 192, 256, 384, 512, … (2^k and 1.5·2^k), at most `maximum`.

    Raises ValueError when `length` exceeds `maximum`.
    """
    if length > maximum:
        raise ValueError(f"length {length} exceeds the maximum {maximum}")
    size = SMALLEST_BUCKET
    while size < length:
        size = size + size // 2 if size & (size - 1) == 0 and size > SMALLEST_BUCKET else 1 << size.bit_length()
    return min(size, maximum)


def fill(rows: Sequence[np.ndarray], width: int, value: int, *, left: bool = False) -> np.ndarray:
    """Pads rows to int32 [B, width]; `left` puts the padding first."""
    filled = np.full((len(rows), width), value, np.int32)
    for i, row in enumerate(rows):
        filled[i, width - len(row) if left else 0 : width if left else len(row)] = row
    return filled


def filled_mask(lengths: Sequence[int], width: int, *, left: bool = False) -> np.ndarray:
    """int32 [B, width]: 1 where `fill` puts tokens.

    A filler row attends to one token: a row that attends to nothing gives NaN in some attention kernels.
    """
    ones = [np.ones(max(length, 1), np.int32) for length in lengths]
    return fill(ones, width, 0, left=left)


def padded(
    sequences: Sequence[Sequence[int] | np.ndarray], rows: int, width: int, pad: int, *, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Pads sequences to ids and mask, int32 `[rows, width]` each. Filler rows hold one pad token."""
    arrays = [np.asarray(ids, np.int32) for ids in sequences]
    arrays += [np.array([pad], np.int32)] * (rows - len(arrays))
    ones = [np.ones(len(ids), np.int32) for ids in arrays]
    return fill(arrays, width, pad, left=left), fill(ones, width, 0, left=left)


class TokenValues(NamedTuple):
    """Values of each token of each unit."""

    values: np.ndarray
    """`[tokens, …]`, one unit after the other."""
    starts: np.ndarray
    """int64 `[units + 1]`: where the tokens of each unit begin."""

    def batch(self, units: Indices, width: int) -> np.ndarray:
        """`[B, width, …]`; 0 behind a unit's tokens and in filler rows."""
        found = np.zeros((len(units), width, *self.values.shape[1:]), self.values.dtype)
        for i, unit in enumerate(np.asarray(units).tolist()):
            if unit >= 0:
                begin, end = self.starts[unit], self.starts[unit + 1]
                found[i, : end - begin] = self.values[begin:end]
        return found


class Data:
    """Tokenised rows of one step, made by `load_data` and read at random by unit number.

    Attributes:
        parts: the rows of each source.
        tokenizer: the Hugging Face tokenizer that encoded them.
        maximum: the longest unit in tokens.
        key: hash of the rows, the tokenizer, and the settings of the tokenisation.
        schedule: the source of each position of the stream.
        sequence_names: the sequences that a row has.
        numbers: columns with a number for each row, which go into the batches.
        bins: with packing, the rows of each unit of each source.
        unusable: the parts of sources without a usable row.
        attached: further float32 arrays `[units, …]` by name, whose entries go into the batches.
        token_values: further values of tokens by name, which go into the batches of SFT.
    """

    sequence_names: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    unusable: Sequence[Part] = ()
    attached: Mapping[str, np.ndarray] = {}
    token_values: Mapping[str, TokenValues] = {}

    def __init__(
        self,
        parts: Sequence[Part],
        tokenizer,
        maximum: int,
        key: str = "",
        *,
        seed: int = 0,
        weights: Sequence[float | None] | None = None,
        epochs: Sequence[float] | None = None,
        packing: bool = False,
    ):
        self.parts, self.tokenizer, self.maximum, self.key, self.seed = list(parts), tokenizer, maximum, key, seed
        self.pad_id = pad_token_id(tokenizer)
        self.bins: list[Bins] | None = None
        if packing:
            self.maximum = self.capacity
            self.bins = [pack(self.unit_lengths(part), self.maximum, seed) for part in self.parts]
        self.sizes = [len(units) for units in (self.bins or self.parts)]
        self.starts = np.cumsum([0, *self.sizes])
        shares = [
            size if weight is None else weight for size, weight in zip(self.sizes, weights or self.sizes, strict=True)
        ]
        limits = [
            round(n * size) if n else None for n, size in zip(epochs or [0] * len(self.sizes), self.sizes, strict=True)
        ]
        self.schedule = Schedule(shares or [1.0], limits or None)

    @property
    def capacity(self) -> int:
        """Tokens that a bin holds."""
        return self.maximum

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources' short names."""
        return tuple(part.name for part in self.parts)

    @property
    def counts(self) -> dict[str, int]:
        """Rows given, kept, skipped, truncated and dropped, of all sources."""
        return {name: sum(part.counts[name] for part in self.parts) for name in self.parts[0].counts}

    @property
    def problems(self) -> tuple[str, ...]:
        """Reasons and places of skipped rows."""
        return tuple(problem for part in self.parts for problem in part.problems)

    def unit_lengths(self, part: Part) -> np.ndarray:
        """int [n]: tokens that each row needs in a bin."""
        return part.lengths.sum(axis=0)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def size(self) -> int | None:
        """Number of units; None where a stream has not come to its end."""
        return len(self)

    @property
    def rows(self) -> int:
        """Number of rows, packed or not."""
        return sum(map(len, self.parts))

    def indices(self, step: int, batch_size: int) -> np.ndarray:
        """int64 [batch_size]: the units of training step `step` (from 0): a function of the seed and the step alone."""
        return self.units_at(stream_positions(step, batch_size))

    def units_at(self, positions: np.ndarray) -> np.ndarray:
        """int64, as `positions`: the units at these positions of the training stream."""
        source, number = self.schedule.take(positions)
        units = np.empty(len(positions), np.int64)
        for k in np.unique(source):
            chosen = source == k
            seed = self.seed if len(self.parts) == 1 else (self.seed, int(k))
            units[chosen] = self.starts[k] + epoch_units(number[chosen], self.sizes[k], seed)
        return units

    def progress(self, step: int, batch_size: int) -> dict[str, np.float64]:
        """After `step` steps: the epoch, and with several sources the share that each has had of the units."""
        done = step * batch_size
        metrics = {"epoch": np.float64(done / self.size)} if self.size else {}
        if len(self.sources) > 1:
            shares = self.schedule.counts(done) / done
            metrics |= {f"data/{name}/share": share for name, share in zip(self.sources, shares, strict=True)}
        return metrics

    def rows_by_source(self) -> dict[str, np.ndarray]:
        """int64: the units of each source, by its short name."""
        return {
            part.name: np.arange(a, b) for part, a, b in zip(self.parts, self.starts, self.starts[1:], strict=False)
        }

    def members(self, unit: int) -> list[tuple[int, int]]:
        """The rows of a unit, each as the number of its source and its number in the source; none for a filler row."""
        if unit < 0:
            return []
        k = int(np.searchsorted(self.starts, unit, side="right")) - 1
        place = int(unit - self.starts[k])
        rows = self.bins[k][place].tolist() if self.bins is not None else [place]
        return [(k, row) for row in rows]

    def values(self, units: Indices, columns: Sequence[str]) -> list[list[TokenRow]]:
        """The columns of each row of each unit."""
        members = [self.members(int(unit)) for unit in units]
        found: dict[tuple[int, int], TokenRow] = {}
        for k, part in enumerate(self.parts):
            if wanted := sorted({row for unit in members for source, row in unit if source == k}):
                fetched = part.fetch(wanted, columns)
                for j, row in enumerate(wanted):
                    found[k, row] = {name: fetched[name][j] for name in columns}
        return [[found[member] for member in unit] for unit in members]

    def text(self, unit: int) -> dict[str, str]:
        """Decodes a row: its prompt and, where the step reads them, chosen and rejected."""
        columns = [f"ids_{j}" for j in range(len(self.sequence_names))]
        row = self.values([unit], ["prompt_length", *columns])[0][0]
        n = int(row["prompt_length"])
        pieces = {"prompt": row["ids_0"][:n]}
        if self.sequence_names != ("prompt",):
            pieces |= {name: row[column][n:] for name, column in zip(self.sequence_names, columns, strict=True)}
        texts = self.tokenizer.batch_decode(list(pieces.values()), skip_special_tokens=True)
        return dict(zip(pieces, texts, strict=True))

    def source(self, i: int) -> tuple[str, int]:
        """The source of a row by its short name, and the row's number in it (from 0)."""
        ((k, row),) = self.members(i)[:1]
        return self.parts[k].name, int(self.parts[k].fetch([row], ["row"])["row"][0])

    def where(self, i: int) -> str:
        """The place of a row for messages: `rows.jsonl line 3`."""
        ((k, row),) = self.members(i)[:1]
        part, number = self.parts[k], self.source(i)[1]
        if part.reading is None or part.tables is None:
            return f"{part.name} row {number + 1}"
        return part.reading.where(int(part.tables[part.rows[row]]), number)

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds the batch of these units.

        Args:
            indices: unit numbers [B]; -1 for a filler row.
            held: bool [B]: the units to read; the others become filler rows. Shapes and `row_mask` are those of the
                whole batch, so processes that hold different rows agree.
        """
        raise NotImplementedError

    def lengths(self, indices: Indices) -> np.ndarray:
        """int64 [sequences, B]: tokens of each sequence of a row; 0 in filler rows. Not for packed rows."""
        result = np.zeros((len(self.sequence_names), len(indices)), np.int64)
        for i, unit in enumerate(np.asarray(indices).tolist()):
            for k, row in self.members(unit):
                result[:, i] += self.parts[k].lengths[:, row]
        return result

    def width(self, indices: Indices) -> int:
        """The length bucket that holds the longest unit."""
        lengths = self.lengths(indices)
        longest = lengths.sum(axis=0) if self.bins is not None else lengths.max(axis=0)
        return length_bucket(int(longest.max()), self.maximum)

    def row_mask(self, indices: Indices) -> np.ndarray:
        """int32 [B]: 0 in filler rows."""
        return (np.asarray(indices) >= 0).astype(np.int32)

    def attachments(self, indices: Indices) -> Batch:
        """The entries of `attached` for these units; 0 in filler rows."""
        units = np.asarray(indices)
        found = {name: values[np.maximum(units, 0)] for name, values in self.attached.items()}
        return {name: x * (units >= 0).reshape(-1, *[1] * (x.ndim - 1)) for name, x in found.items()}

    def read(self, indices: Indices, held: np.ndarray | None) -> list[list[TokenRow]]:
        """The rows of each unit, with their tokens and `numbers`; none where filler or not held."""
        names = [f"{kind}_{j}" for j in range(len(self.sequence_names)) for kind in ("ids", "mask")]
        units = np.asarray(indices) if held is None else np.where(held, indices, -1)
        return self.values(units, [*names, *self.numbers])

    def sequences(self, rows: list[list[TokenRow]]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """The sequences of each unit as (ids, mask): those of its rows, in order."""
        names = [(f"ids_{j}", f"mask_{j}") for j in range(len(self.sequence_names))]
        return [[(row[ids], row[mask]) for row in unit for ids, mask in names] for unit in rows]

    def packed(self, rows: list[list[TokenRow]], width: int) -> Batch:
        """`input_ids, attention_mask, segment_ids, loss_mask` int32 [B, T], where each sequence is a segment."""
        units = self.sequences(rows)
        nothing = np.zeros(0, np.int32)
        ids = [np.concatenate([nothing, *(ids for ids, _ in unit)]) for unit in units]
        marks = [np.concatenate([nothing, *(mask for _, mask in unit)]) for unit in units]
        segments = [
            np.repeat(np.arange(1, len(unit) + 1), [len(tokens) for tokens, _ in unit]) if unit else np.ones(1, int)
            for unit in units
        ]
        segment_ids = fill(segments, width, 0)
        return {
            "input_ids": fill(ids, width, self.pad_id),
            "attention_mask": (segment_ids > 0).astype(np.int32),
            "segment_ids": segment_ids,
            "loss_mask": fill(marks, width, 0),
        }


class Batches(Protocol):
    """Units that come in batches: `Data` or `TextBlocks`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch: ...


def eval_batches(
    data: Batches, batch_size: int, rows: np.ndarray | None = None, **options: np.ndarray | None
) -> Iterator[Batch]:
    """Yields every unit once, in order; filler rows complete the last batch.

    Args:
        data: the rows.
        batch_size: units of a batch.
        rows: int [n]: unit numbers; None: all.
        options: passed to `data.batch`.
    """
    rows = np.arange(len(data)) if rows is None else rows
    for start in range(0, len(rows), batch_size):
        indices = rows[start : start + batch_size]
        yield data.batch(np.pad(indices, (0, batch_size - len(indices)), constant_values=-1), **options)
