"""The batches of each step: rows of SFT, pairs, labelled rows, and prompts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from jaxrlhf.data.batches import Batch, Data, Indices, fill, filled_mask, length_bucket
from jaxrlhf.data.messages import Prompt
from jaxrlhf.data.tokenized import TokenRow
from jaxrlhf.errors import SharedError

LENGTH_WINDOW = 16  # batches whose rows are sorted by length together


class SFTData(Data):
    """Rows of prompt + response, or of text."""

    sequence_names = ("chosen",)

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds `input_ids, attention_mask, loss_mask` int32 [B, T], right-padded; `row_mask` int32 [B].

        `loss_mask` is 1 at the targets of the loss: the tokens that `train_on` selects. With packing, also
        `segment_ids`. Also the `token_values`.
        """
        width = self.width(indices)
        own = np.asarray(indices) if held is None else np.where(held, indices, -1)
        extra = {name: values.batch(own, width) for name, values in self.token_values.items()}
        extra["row_mask"] = self.row_mask(indices)
        rows = self.read(indices, held)
        if self.bins is not None:
            return self.packed(rows, width) | extra
        units = self.sequences(rows)
        ids = [unit[0][0] if unit else np.zeros(0, np.int32) for unit in units]
        marks = [unit[0][1] if unit else np.zeros(0, np.int32) for unit in units]
        return {
            "input_ids": fill(ids, width, self.pad_id),
            "attention_mask": filled_mask([len(row) for row in ids], width),
            "loss_mask": fill(marks, width, 0),
        } | extra

    def prompt_batch(self, indices: Indices) -> Batch:
        """Builds the prompts of rows that are not packed as `PromptData.batch` does, without `index`.

        Raises SharedError for a row without a prompt.
        """
        rows = [unit[0] for unit in self.values(indices, ["ids_0", "prompt_length"])]
        lengths = [int(row["prompt_length"]) for row in rows]
        if not all(lengths):
            raise SharedError(f"a row of the data {NO_PROMPT}")
        width = length_bucket(max(lengths), self.maximum)
        return prompts_left_padded([row["ids_0"][:n] for row, n in zip(rows, lengths, strict=True)], width, self.pad_id)


NO_PROMPT = "has no prompt that a response could be sampled to; give rows of prompt and response"


def prompts_left_padded(prompts: list[np.ndarray], width: int, pad_id: int) -> Batch:
    """`prompt_ids, prompt_mask` int32 [B, width]."""
    return {
        "prompt_ids": fill(prompts, width, pad_id, left=True),
        "prompt_mask": filled_mask([len(row) for row in prompts], width, left=True),
    }


class PairData(Data):
    """Rows of prompt + chosen and prompt + rejected."""

    sequence_names = ("chosen", "rejected")

    @property
    def capacity(self) -> int:
        return 2 * self.maximum

    @property
    def most_pairs(self) -> int:
        """The most pairs of a packed row. A pair has at least four tokens."""
        return max((bins.largest for bins in self.bins or ()), default=self.maximum // 4)

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds `{chosen,rejected}_{ids,mask,loss_mask}` int32 [B, T], right-padded; `row_mask` int32 [B].

        `…_loss_mask` is 1 at the tokens of the response, EOS included. With packing: `input_ids, attention_mask,
        segment_ids, loss_mask` int32 [B, T] and `pair_mask` int32 [B, P]; pair p is the segments 2p + 1 (chosen) and
        2p + 2 (rejected). Also the `attached` arrays.
        """
        rows, width = self.read(indices, held), self.width(indices)
        extra = self.attachments(indices) | {"row_mask": self.row_mask(indices)}
        if self.bins is not None:
            batch = self.packed(rows, width)
            counts = batch["segment_ids"].max(axis=1, keepdims=True) // 2
            pair_mask = (np.arange(self.most_pairs) < counts).astype(np.int32)
            return batch | {"pair_mask": pair_mask} | self.per_pair(rows, pair_mask.shape) | extra
        units = self.sequences(rows)
        batch = self.per_pair(rows, (len(rows),))
        for j, side in enumerate(("chosen", "rejected")):
            ids = [unit[j][0] if unit else np.zeros(0, np.int32) for unit in units]
            marks = [unit[j][1] if unit else np.zeros(0, np.int32) for unit in units]
            batch[f"{side}_ids"] = fill(ids, width, self.pad_id)
            batch[f"{side}_mask"] = filled_mask([len(row) for row in ids], width)
            batch[f"{side}_loss_mask"] = fill(marks, width, 0)
        return batch | extra

    def per_pair(self, rows: list[list[TokenRow]], shape: tuple[int, ...]) -> Batch:
        """`numbers` as float32 [B], packed [B, P]; 0 where a row has none."""
        batch: Batch = {}
        for name in self.numbers:
            values = np.zeros(shape, np.float32).reshape(len(rows), -1)
            for i, unit in enumerate(rows):
                values[i, : len(unit)] = np.nan_to_num(np.array([row[name] for row in unit], np.float32))
            batch[name] = values.reshape(shape)
        return batch


class RewardData(PairData):
    """Pairs with their margins: `margin` in the batches of `PairData`."""

    numbers = ("margin",)


class UnpairedData(Data):
    """Rows of prompt + completion, each labelled good or bad, and the prompt of each + the completion of another row.

    These mismatched pairs estimate the policy's KL from the reference (KTO). The other row is half the data away, so it
    has another prompt also where the completions of one prompt stand side by side. It does not depend on the batch.
    """

    sequence_names = ("completion",)

    def labels(self) -> np.ndarray:
        """bool [rows]: the label of every row."""
        return np.concatenate([part.fetch(np.arange(len(part)), ["label"])["label"] for part in self.parts])

    def partners(self, indices: Indices) -> np.ndarray:
        """int64 [B]: the row whose completion each row's prompt gets; -1 for filler rows."""
        units = np.asarray(indices)
        return np.where(units >= 0, (units + (len(self) + 1) // 2) % len(self), -1)

    def width(self, indices: Indices) -> int:
        """The length bucket that holds the longest row and the longest mismatched pair, cut at the longest length."""
        units, others = np.asarray(indices), self.partners(indices)
        prompts, cut = (
            np.array([int(unit[0]["prompt_length"]) if unit else 0 for unit in self.values(rows, ["prompt_length"])])
            for rows in (units, others)
        )
        mixed = np.minimum(prompts + self.lengths(others)[0] - cut, self.maximum)
        return length_bucket(int(max(self.lengths(units).max(), mixed.max())), self.maximum)

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds `input_ids, attention_mask, loss_mask` int32 [B, T], right-padded; `label, row_mask` int32 [B].

        Also the mismatched pairs as `kl_ids, kl_mask, kl_loss_mask` int32 [B, T], and the `attached` arrays.
        """
        columns = ["ids_0", "mask_0", "prompt_length", "label"]
        read = np.asarray(indices) if held is None else np.where(held, indices, -1)
        units, others = self.values(read, columns), self.values(self.partners(read), columns)
        width = self.width(indices)
        own = [(unit[0]["ids_0"], unit[0]["mask_0"]) if unit else NOTHING for unit in units]
        mixed = [
            mismatched(unit[0], other[0], self.maximum) if unit else NOTHING
            for unit, other in zip(units, others, strict=True)
        ]
        batch: Batch = {}
        for name, rows in (("input_ids attention_mask loss_mask", own), ("kl_ids kl_mask kl_loss_mask", mixed)):
            ids, mask, marks = name.split()
            batch[ids] = fill([tokens for tokens, _ in rows], width, self.pad_id)
            batch[mask] = filled_mask([len(tokens) for tokens, _ in rows], width)
            batch[marks] = fill([targets for _, targets in rows], width, 0)
        batch["label"] = np.array([bool(unit[0]["label"]) if unit else False for unit in units], np.int32)
        return batch | self.attachments(indices) | {"row_mask": self.row_mask(indices)}


NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.int32))


def mismatched(row: TokenRow, other: TokenRow, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and targets of a row's prompt and another row's completion, cut at `longest` tokens."""
    n, m = int(row["prompt_length"]), int(other["prompt_length"])
    ids = np.concatenate([row["ids_0"][:n], other["ids_0"][m:]])
    targets = np.concatenate([row["mask_0"][:n], other["mask_0"][m:]])
    return ids[:longest], targets[:longest]


class PromptData(Data):
    """Prompts, and the further columns of their rows that rewards need.

    Attributes:
        column_names: the further columns.
        group_by_length: batches of a window hold prompts of like lengths.
    """

    sequence_names = ("prompt",)
    column_names: tuple[str, ...] = ()
    group_by_length = True

    def indices(self, step: int, batch_size: int) -> np.ndarray:
        """As in `Data`. The rows of a window of batches are sorted by length, and its batches are then shuffled."""
        window, place = divmod(step, LENGTH_WINDOW)
        if not self.group_by_length:
            return super().indices(step, batch_size)
        units = self.units_at(np.arange(window * LENGTH_WINDOW * batch_size, (window + 1) * LENGTH_WINDOW * batch_size))
        ordered = units[np.argsort(self.lengths(units)[0], kind="stable")]
        batch = int(np.random.default_rng((self.seed, 2, window)).permutation(LENGTH_WINDOW)[place])
        return ordered[batch * batch_size : (batch + 1) * batch_size]

    def kept(self, indices: Indices) -> list[list[Any] | None]:
        """Each row's prompt as the data has it, and its further columns; None for filler rows."""
        return [json.loads(str(unit[0]["kept"])) if unit else None for unit in self.values(indices, ["kept"])]

    def prompts(self, indices: Indices) -> list[Prompt | None]:
        """The prompts of these rows as the data has them, before rendering; None in filler rows."""
        return [row and row[0] for row in self.kept(indices)]

    def prompt_texts(self, indices: Indices) -> list[str]:
        """The prompts as text, conversations as rendered for the model; empty in filler rows."""
        rows = zip(indices, self.prompts(indices), strict=True)
        return [self.text(int(i))["prompt"] if isinstance(prompt, list) else prompt or "" for i, prompt in rows]

    def columns(self, indices: Indices) -> dict[str, list[object]]:
        """The JSON value of each further column in these rows; None in filler rows."""
        rows = self.kept(indices)
        return {name: [row and row[1 + j] for row in rows] for j, name in enumerate(self.column_names)}

    def batch(self, indices: Indices, *, held: np.ndarray | None = None) -> Batch:
        """Builds `prompt_ids, prompt_mask` int32 [B, P], left-padded; `index, row_mask` int32 [B] (filler: -1, 0)."""
        units, width = self.sequences(self.read(indices, held)), self.width(indices)
        prompts = [unit[0][0] if unit else np.zeros(0, np.int32) for unit in units]
        own = {"index": np.asarray(indices, np.int32), "row_mask": self.row_mask(indices)}
        return prompts_left_padded(prompts, width, self.pad_id) | own
