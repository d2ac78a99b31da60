"""Batches of tokenised rows: static shapes, explicit masks, and an order that depends only on (seed, step).

A batch is a dict of numpy arrays. T (or P) is the smallest length bucket that holds the batch's longest row, so few
shapes occur. A row number of -1 makes a filler row: one pad token, 0 in `row_mask` and in `loss_mask`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxrlhf.data.renderer import Prompt
from jaxrlhf.data.tokenized import Ragged
from jaxrlhf.data.tokenizer import pad_token_id

SMALLEST_BUCKET = 32
Batch = dict[str, np.ndarray]
Indices = Sequence[int] | np.ndarray
"""Row numbers [B]; -1 for a filler row."""


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


def padding_fraction(batch: Batch, tokens: int) -> float:
    """Share of a batch's positions that hold padding. `tokens`: the batch's `token_count`."""
    names = ("attention_mask", "chosen_mask", "rejected_mask", "prompt_mask")
    return 1.0 - tokens / sum(batch[name].size for name in names if name in batch)


def fill(rows: Sequence[np.ndarray], width: int, pad_id: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of tokens to int32 [B, width] ids and mask; `left` puts the padding first. An empty row is one pad."""
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
    """Tokenised rows of one step, made by `load_data` and read at random by row number.

    Attributes:
        ragged: the tokens and where they came from.
        tokenizer: the Hugging Face tokenizer that encoded them.
        maximum: longest sequence in tokens.
        key: hash of the rows, the tokenizer, and the settings of the tokenisation.
    """

    sequences: tuple[tuple[int, ...], ...]
    """Fields of a row (0: prompt, 1: chosen, 2: rejected) that each sequence of a batch joins."""

    def __init__(self, ragged: Ragged, tokenizer, maximum: int, key: str = ""):
        self.ragged, self.tokenizer, self.maximum, self.key = ragged, tokenizer, maximum, key
        self.counts, self.problems = ragged.counts, ragged.problems
        self.pad_id = pad_token_id(tokenizer)

    def __len__(self) -> int:
        return len(self.ragged)

    def text(self, i: int) -> dict[str, str]:
        """Decodes row `i`: prompt and, where the step reads them, chosen and rejected."""
        names = ("prompt", "chosen", "rejected")[: self.ragged.parts]
        parts = [self.ragged.part(i, j).tolist() for j in range(len(names))]
        return dict(zip(names, self.tokenizer.batch_decode(parts, skip_special_tokens=True), strict=True))

    def source(self, i: int) -> tuple[str, int]:
        """The source of row `i`, as the user named it, and the row's number in it (from 0)."""
        source, row = self.ragged.rows[i]
        return self.ragged.sources[source], int(row)

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds the batch of these rows.

        Args:
            indices: row numbers [B]; -1 for a filler row.
            held: bool [B]: the rows to read; the others become filler rows. Shapes and `row_mask` are those of the
                whole batch, so processes that hold different rows agree.
        """
        raise NotImplementedError

    def lengths(self, indices: Indices) -> np.ndarray:
        """int64 [sequences, B]: tokens of each sequence; 0 in filler rows."""
        indices = np.asarray(indices)
        fields = [self.ragged.lengths_of(indices, j) * (indices >= 0) for j in range(self.ragged.parts)]
        return np.stack([np.sum([fields[j] for j in sequence], axis=0) for sequence in self.sequences])

    def token_count(self, indices: Indices) -> int:
        """Number of tokens of the rows' sequences, in all processes."""
        return int(self.lengths(indices).sum())

    def joined(self, indices: Indices, held: np.ndarray | None) -> tuple[list[list[np.ndarray]], int]:
        """Each row of each sequence (empty where filler or not held), and the width that holds the longest row."""
        read = np.asarray(indices) if held is None else np.where(held, indices, -1)
        empty = np.zeros(0, np.int32)
        sequences = [
            [np.concatenate([self.ragged.part(i, j) if i >= 0 else empty for j in sequence]) for i in read.tolist()]
            for sequence in self.sequences
        ]
        return sequences, length_bucket(int(self.lengths(indices).max()), self.maximum)

    def row_mask(self, indices: Indices) -> np.ndarray:
        """int32 [B]: 0 in filler rows."""
        return (np.asarray(indices) >= 0).astype(np.int32)


class SFTData(Data):
    """Rows of prompt + chosen."""

    sequences = ((0, 1),)

    def batch(self, indices: Indices, *, held: np.ndarray | None = None, completion_only_loss: bool = True) -> Batch:
        """Builds `input_ids, attention_mask, loss_mask` int32 [B, T], right-padded; `row_mask` int32 [B].

        `loss_mask` is 1 at the targets of the loss: the response with its EOS, or every token but the first with
        `completion_only_loss=False`.
        """
        (rows,), width = self.joined(indices, held)
        ids, mask = fill(rows, width, self.pad_id)
        first = self.ragged.lengths_of(np.asarray(indices), 0) if completion_only_loss else np.ones(len(rows), int)
        row_mask = self.row_mask(indices)
        # Nothing predicts the first token, so it is never a target.
        targets = np.arange(width)[None, :] >= np.maximum(first, 1)[:, None]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "loss_mask": mask * targets.astype(np.int32) * row_mask[:, None],
            "row_mask": row_mask,
        }


class PairData(Data):
    """Rows of prompt + chosen and prompt + rejected."""

    sequences = ((0, 1), (0, 2))

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds `chosen_ids, chosen_mask, rejected_ids, rejected_mask` int32 [B, T], right-padded;
        `prompt_length, row_mask` int32 [B].

        Both responses of a row begin at column `prompt_length` (filler: 0) and end with EOS.
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
    """Prompts, and the further fields of their rows that rewards need."""

    sequences = ((0,),)

    def prompts(self, indices: Indices) -> list[Prompt | None]:
        """The prompts of these rows as the data has them, before rendering; None in filler rows."""
        return [self.ragged.kept(i)[0] if i >= 0 else None for i in indices]

    def prompt_texts(self, indices: Indices) -> list[str]:
        """The prompts as text, conversations as rendered for the model; empty in filler rows."""
        rows = zip(indices, self.prompts(indices), strict=True)
        return [self.text(i)["prompt"] if isinstance(prompt, list) else prompt or "" for i, prompt in rows]

    def columns(self, indices: Indices) -> dict[str, list[object]]:
        """The JSON value of each kept field in these rows; None in filler rows."""
        names = self.ragged.columns
        rows = [self.ragged.kept(i)[1:] if i >= 0 else [None] * len(names) for i in indices]
        return {name: [row[j] for row in rows] for j, name in enumerate(names)}

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds `prompt_ids, prompt_mask` int32 [B, P], left-padded; `index, row_mask` int32 [B] (filler: -1, 0)."""
        (prompts,), width = self.joined(indices, held)
        ids, mask = fill(prompts, width, self.pad_id, left=True)
        index = np.asarray(indices, np.int32)
        return {"prompt_ids": ids, "prompt_mask": mask, "index": index, "row_mask": self.row_mask(indices)}


@functools.lru_cache(maxsize=4)
def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [n]: the order of the rows in an epoch, a read-only array that depends only on the arguments."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False
    return order


def stream_indices(step: int, batch_size: int, n: int, seed: int) -> np.ndarray:
    """int64 [batch_size]: the row numbers of training step `step` (from 0).

    The stream joins the permutations of all epochs. A batch may span two epochs, so no row is dropped, and a resumed
    run needs only the step number.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, n)
    result = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = epoch_permutation(n, seed, int(epoch))[places[chosen]]
    return result


class Batches(Protocol):
    """Rows that come in batches: `Data` or `TextBlocks`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch: ...


def eval_batches(data: Batches, batch_size: int, **options: Any) -> Iterator[Batch]:
    """Yields every row once, in order; filler rows complete the last batch. `options` go to `data.batch`."""
    for start in range(0, len(data), batch_size):
        indices = np.arange(start, start + batch_size)
        yield data.batch(np.where(indices < len(data), indices, -1), **options)
