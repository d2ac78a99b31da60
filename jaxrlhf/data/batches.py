"""Batches of tokenised rows: static shapes, explicit masks, and an order that depends only on (seed, step).

Every batch is a dict of numpy arrays. T (or P) is the smallest length bucket that holds the batch's longest row, so few
shapes occur. A row number of -1 makes a filler row: one pad token, `row_mask` 0, nothing counted in `loss_mask`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxrlhf.data.templates import pad_token_id
from jaxrlhf.data.tokenized import Ragged

SMALLEST_BUCKET = 32
Batch = dict[str, np.ndarray]


def length_bucket(length: int, maximum: int) -> int:
    """The smallest of 32, 64, 96, 128, 192, 256, 384, 512, … (2^k and 1.5·2^k), capped at `maximum`, ≥ `length`.

    Raises ValueError when `length` exceeds `maximum`.
    """
    if length > maximum:
        raise ValueError(f"length {length} exceeds the maximum {maximum}")
    size = SMALLEST_BUCKET
    while size < length:
        size = size + size // 2 if size & (size - 1) == 0 and size > SMALLEST_BUCKET else 1 << size.bit_length()
    return min(size, maximum)


def padding_fraction(batch: Batch, tokens: int) -> float:
    """The share of a batch's token places that hold none of its `tokens` (`data.token_count`; 0: no waste)."""
    names = ("attention_mask", "chosen_mask", "rejected_mask", "prompt_mask")
    return 1.0 - tokens / sum(batch[name].size for name in names if name in batch)


def fill(rows: Sequence[np.ndarray], width: int, pad_id: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Put rows of tokens into int32 [B, width] ids and mask, at the right end if `left`. An empty row is one pad."""
    ids = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        n = len(row)
        place = slice(width - n, width) if left else slice(0, n)
        ids[i, place] = row
        # A filler row attends to one token: a row that attends to nothing gives NaN in some attention kernels.
        mask[i, place if n else (-1 if left else 0)] = 1
    return ids, mask


class Data:
    """Tokenised rows of one step, read at random by row number; made by `load_data`.

    `counts`: how many rows were given, kept, skipped, truncated and dropped. `problems`: what was wrong, and where.
    `key`: changes with the rows, the tokenizer, and the settings they were tokenised with.
    """

    def __init__(self, ragged: Ragged, tokenizer, maximum: int, key: str = ""):
        self.ragged, self.tokenizer, self.maximum, self.key = ragged, tokenizer, maximum, key
        self.pad_id = pad_token_id(tokenizer)

    def __len__(self) -> int:
        return len(self.ragged)

    @property
    def counts(self) -> dict[str, int]:
        return self.ragged.counts

    @property
    def problems(self) -> tuple[str, ...]:
        return self.ragged.problems

    def text(self, i: int) -> dict[str, str]:
        """Row `i` decoded for people: prompt and, where the step reads them, chosen and rejected."""
        names = ("prompt", "chosen", "rejected")[: self.ragged.parts]
        parts = [self.ragged.part(i, j).tolist() for j in range(len(names))]
        return dict(zip(names, self.tokenizer.batch_decode(parts, skip_special_tokens=True), strict=True))

    def source(self, i: int) -> tuple[str, int]:
        """Where row `i` came from: the source's name, as the user gave it, and the row's number in it (from 0)."""
        source, row = self.ragged.rows[i]
        return self.ragged.sources[source], int(row)

    def batch(self, indices: Sequence[int], *, held: np.ndarray | None = None) -> Batch:
        """The batch of these rows. With `held` (bool [B]) only those rows are read, the others are as filler rows.

        Shapes and `row_mask` are those of the whole batch, so that processes that hold different rows agree.
        """
        raise NotImplementedError

    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """The parts of a row (0: prompt, 1: chosen, 2: rejected) that each sequence of a batch is joined from."""
        raise NotImplementedError

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """int64 [sequences, B]: tokens of each sequence; 0 in filler rows."""
        indices = np.asarray(indices)
        of_part = [self.ragged.lengths_of(indices, j) * (indices >= 0) for j in range(self.ragged.parts)]
        return np.stack([sum(of_part[j] for j in parts) for parts in self.sequences()])

    def token_count(self, indices: Sequence[int]) -> int:
        """Tokens of the rows' sequences, wherever they are held."""
        return int(self.lengths(indices).sum())

    def joined(self, indices: Sequence[int], held: np.ndarray | None) -> tuple[list[list[np.ndarray]], int]:
        """(the sequences of each row, empty where filler or not held; the width that holds the longest of all)."""
        width = length_bucket(int(self.lengths(indices).max()), self.maximum)
        read = [i if held is None or held[b] else -1 for b, i in enumerate(indices)]
        return [[np.concatenate([self.part(i, j) for j in parts]) for i in read] for parts in self.sequences()], width

    def part(self, i: int, j: int) -> np.ndarray:
        return self.ragged.part(i, j) if i >= 0 else np.zeros(0, np.int32)

    def row_mask(self, indices: Sequence[int]) -> np.ndarray:
        return (np.asarray(indices) >= 0).astype(np.int32)


class SFTData(Data):
    """Rows of prompt + chosen."""

    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return ((0, 1),)

    def batch(
        self, indices: Sequence[int], *, held: np.ndarray | None = None, completion_only_loss: bool = True
    ) -> Batch:
        """`input_ids, attention_mask, loss_mask` int32 [B, T] right-padded; `row_mask` int32 [B].

        `loss_mask` is 1 where the token is a counted target: the response with its EOS, or with
        `completion_only_loss=False` every token but the first.
        """
        (rows,), width = self.joined(indices, held)
        ids, mask = fill(rows, width, self.pad_id)
        first = self.ragged.lengths_of(np.asarray(indices), 0) if completion_only_loss else np.ones(len(rows), int)
        row_mask = self.row_mask(indices)
        # The first token has no predecessor to be predicted from, so it is never a target.
        targets = np.arange(width)[None, :] >= np.maximum(first, 1)[:, None]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "loss_mask": mask * targets.astype(np.int32) * row_mask[:, None],
            "row_mask": row_mask,
        }


class PairData(Data):
    """Rows of prompt + chosen and prompt + rejected."""

    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return ((0, 1), (0, 2))

    def batch(self, indices: Sequence[int], *, held: np.ndarray | None = None) -> Batch:
        """`chosen_ids, chosen_mask, rejected_ids, rejected_mask` int32 [B, T] right-padded; `prompt_length, row_mask`
        int32 [B].

        Both answers of a row begin at column `prompt_length` (filler: 0) and hold their EOS.
        """
        (chosen, rejected), width = self.joined(indices, held)
        row_mask = self.row_mask(indices)
        chosen_ids, chosen_mask = fill(chosen, width, self.pad_id)
        rejected_ids, rejected_mask = fill(rejected, width, self.pad_id)
        return {
            "chosen_ids": chosen_ids,
            "chosen_mask": chosen_mask,
            "rejected_ids": rejected_ids,
            "rejected_mask": rejected_mask,
            "prompt_length": (self.ragged.lengths_of(np.asarray(indices), 0) * row_mask).astype(np.int32),
            "row_mask": row_mask,
        }


class PromptData(Data):
    """Prompts to answer, with the further fields of their rows that rewards need."""

    @property
    def column_names(self) -> tuple[str, ...]:
        return self.ragged.columns

    def prompts(self, indices: Sequence[int]) -> list[str | list[dict[str, str]] | None]:
        """The prompts of these rows as the data has them, before rendering; None in filler rows."""
        return [self.ragged.kept(i)[0] if i >= 0 else None for i in indices]

    def prompt_texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts as text: as the data has them, conversations as rendered for the model; filler rows are empty."""
        plain = zip(indices, self.prompts(indices), strict=True)
        return [p or "" if not isinstance(p, list) else self.text(i)["prompt"] for i, p in plain]

    def columns(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """Each kept field's JSON value in these rows; None in filler rows."""
        rows = [self.ragged.kept(i)[1:] if i >= 0 else [None] * len(self.column_names) for i in indices]
        return {name: [row[j] for row in rows] for j, name in enumerate(self.column_names)}

    def sequences(self) -> tuple[tuple[int, ...], ...]:
        return ((0,),)

    def batch(self, indices: Sequence[int], *, held: np.ndarray | None = None) -> Batch:
        """`prompt_ids, prompt_mask` int32 [B, P] left-padded; `index, row_mask` int32 [B] (filler: index -1)."""
        (prompts,), width = self.joined(indices, held)
        ids, mask = fill(prompts, width, self.pad_id, left=True)
        index = np.asarray(indices, np.int32)
        return {"prompt_ids": ids, "prompt_mask": mask, "index": index, "row_mask": self.row_mask(indices)}


@functools.lru_cache(maxsize=4)
def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n]: the order of the rows in an epoch, a function of its arguments only (read-only array)."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False
    return order


def stream_indices(step: int, batch_size: int, n: int, seed: int) -> np.ndarray:
    """int64 [batch_size]: the rows of training step `step` (from 0).

    The stream is the permutations of all epochs one after the other; a batch may span two epochs, so nothing is dropped
    and a resumed run needs only the step number.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, n)
    result = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = epoch_permutation(n, seed, int(epoch))[places[chosen]]
    return result


def eval_batches(data: Data, batch_size: int, **options: Any) -> Iterator[Batch]:
    """Every row once, in order; the last batch is filled up with filler rows. `options` go to `data.batch`."""
    for start in range(0, len(data), batch_size):
        indices = np.arange(start, start + batch_size)
        yield data.batch(np.where(indices < len(data), indices, -1), **options)
