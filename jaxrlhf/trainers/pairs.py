"""Batches of pairs, packed or not: the sequences that a model reads, and their tokens reduced to one number per side.

The losses of reward models and of DPO read a batch through `read_pairs`, so they are written once for both forms.

- Not packed: `{chosen,rejected}_{ids,mask,loss_mask}` int32 `[B, T]` and `row_mask` int32 `[B]`.
- Packed: `input_ids, attention_mask, segment_ids, loss_mask` int32 `[B, T]` and `pair_mask` int32 `[B, P]`. Segments
  2p + 1 and 2p + 2 of a row are the chosen and the rejected sequence of its pair p, counted from 0.

A loss mask is set for the tokens of a completion, its EOS included, and never for the first token of a sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrlhf import objectives
from jaxrlhf.trainers.supervised import Batch

Sides = dict[str, jax.Array]
"""An array for "chosen" and one for "rejected"."""
SIDES = ("chosen", "rejected")


class Pairs(NamedTuple):
    """The sequences of a batch of pairs. Not packed, the first half of the R = 2B rows is chosen; packed, R = B."""

    input_ids: jax.Array
    """int32 `[R, T]`."""
    attention_mask: jax.Array
    """int32 `[R, T]`."""
    loss_mask: jax.Array
    """int32 `[R, T]`."""
    segment_ids: jax.Array | None
    """int32 `[R, T]`; None: not packed."""
    mask: jax.Array
    """int32 `[B]`, packed `[B, P]`: 1 for real pairs. Every result of the methods has its shape."""

    def sums(self, x: jax.Array) -> Sides:
        """Sums `x` `[R, T]` over the completion of each sequence."""
        if self.segment_ids is None:
            return self._sides(objectives.sequence_logprobs(x, self.loss_mask))
        return self._sides(objectives.segment_sums(x, self.loss_mask, self.segment_ids, 2 * self.mask.shape[1]))

    def lengths(self) -> Sides:
        """Tokens of each completion, float32; 0 where there is no pair."""
        return self.sums(jnp.ones(self.loss_mask.shape))

    def last(self, values: jax.Array) -> Sides:
        """Reads `values` `[R, T]` at the last token of each sequence."""
        if self.segment_ids is None:
            return self._sides(objectives.score_at_last_token(values, self.attention_mask))
        return self._sides(objectives.score_at_segment_ends(values, self.segment_ids, 2 * self.mask.shape[1]))

    def _sides(self, x: jax.Array) -> Sides:
        """Splits `[2B]`, or `[B, 2P]` of packed rows."""
        parts = jnp.split(x, 2) if self.segment_ids is None else (x[:, 0::2], x[:, 1::2])
        return dict(zip(SIDES, parts, strict=True))


def pair_mask(rows: Batch) -> jax.Array:
    """Real pairs: int32 `[B]`, of packed rows `[B, P]`."""
    return rows["pair_mask"] if "pair_mask" in rows else rows["row_mask"]


def pair_count(rows: Batch) -> jax.Array:
    """Number of real pairs."""
    return pair_mask(rows).sum()


def read_pairs(rows: Batch) -> Pairs:
    """Reads a batch of either form."""
    if "pair_mask" in rows:
        names = ("input_ids", "attention_mask", "loss_mask", "segment_ids", "pair_mask")
        return Pairs(*(rows[name] for name in names))
    ids, mask, loss_mask = (
        jnp.concatenate([rows[f"{side}_{kind}"] for side in SIDES]) for kind in ("ids", "mask", "loss_mask")
    )
    return Pairs(ids, mask, loss_mask, None, rows["row_mask"])
