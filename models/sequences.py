"""The layout of a batch of whole sequences: real columns, positions, and the segments of packed rows."""

import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.rotary import rotation


class SequenceContext(flax.struct.PyTreeNode):
    """Facts about a batch of whole sequences that the attention of every layer needs (training, scoring, prefill)."""

    key_mask: jax.Array
    """bool `[B, T]`: columns that hold real tokens."""
    positions: jax.Array
    """int `[B, T]`: position of each column within its sequence, 0 on padding."""
    rotation: tuple[jax.Array, jax.Array] | None = None
    """cos and sin of the query columns as `rotation` returns them; None without rotary positions."""
    starts: jax.Array | None = None
    """int `[B, T]`: first column of each column's segment; None when rows are not packed."""
    contiguous: bool = flax.struct.field(pytree_node=False, default=False)
    """True if the caller knows that the real columns of each row lie side by side. Kernels that see a row by its first
    and last column then get it by themselves ("auto"); otherwise the mask may have holes, and XLA's form runs."""


def positions_from_mask(mask: jax.Array) -> jax.Array:
    """Position of each column within its sequence, int32 `[B, T]`: counts the real tokens of `mask`, 0 on padding."""
    mask = mask.astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0) * mask


def segment_bounds(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First column of each column's segment, and the column after its last one, int32 `[B, T]` each.

    A segment is a run of equal ids in `segment_ids`, int `[B, T]`. Padding is one too.
    """
    length = segment_ids.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(first, columns, 0), axis=1)
    stops = jax.lax.cummin(jnp.where(last, columns + 1, length), axis=1, reverse=True)
    return starts, stops


def sequence_context(
    config: DecoderConfig,
    mask: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    longest: int | None = None,
    contiguous: bool = False,
) -> SequenceContext:
    """The context of rows with real tokens in `mask`, bool `[B, T]`.

    Args:
        config: The decoder's configuration.
        mask: bool `[B, T]`, set for real tokens.
        segment_ids: int `[B, T]`: rows are packed, with 0 on padding. Positions restart at 0 where the id changes.
            None: each row is one sequence.
        longest: Longest sequence that generation may make of a row; None: rows are whole.
        contiguous: No row has padding between real tokens.

    Raises:
        InputError: `segment_ids` has another shape than `mask`.
    """
    if segment_ids is None:
        positions, starts, lengths = positions_from_mask(mask), None, None
    elif segment_ids.shape != mask.shape:
        raise InputError(f"segment_ids has shape {segment_ids.shape}; it must be that of the token ids, {mask.shape}")
    else:
        mask = mask & (segment_ids > 0)
        starts, stops = segment_bounds(segment_ids)
        positions = jnp.where(mask, jnp.arange(mask.shape[1], dtype=jnp.int32) - starts, 0)
        lengths = stops - starts
    rotary = rotation(config, positions, lengths, longest) if config.position == "rotary" else None
    return SequenceContext(mask, positions, rotary, starts, contiguous)
