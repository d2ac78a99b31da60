"""Micro-batches of rows of similar length, each cut to the columns that its rows use.

On a CPU a column of padding costs as much as one of text, and a step has many small micro-batches. So rows are sorted
by length before they are split, and a micro-batch runs at the narrowest of a few widths that holds it. Every width is a
branch of the program with a compile of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.models import DecoderConfig
from jaxrlhf.sharding import current_rules, platform

PyTree = Any

WIDTHS = 4
MULTIPLE = 16
"""Widths are multiples of it."""
NARROWEST = 32
"""Least width, where there are as many columns: a narrower branch would cost more compiling than it saves."""
WORTH = 1e11
"""Floating-point operations of a forward pass, at least. Below, a run is over before it has won back the compiles."""


def real_columns(batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """The columns of padded rows that one of the batch's masks `[B, T]` has, as bool `[B, T]`; None for packed rows."""
    masks = [x for name, x in batch.items() if name.endswith("_mask") and x.ndim == 2]
    return None if "segment_ids" in batch else jnp.any(jnp.stack(masks), axis=0)


def worth_cutting(mask: jax.Array | None, config: DecoderConfig) -> jax.Array | None:
    """The mask `[B, T]`, if a pass of such a model over all its columns takes `WORTH` operations or more; else None."""
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_layers * layer + config.vocab_size * config.embedding_size  # about
    return None if mask is None or 2 * weights * mask.size < WORTH else mask


def mask_to_cut_by(mask: jax.Array | None, asked: int, parts: int) -> jax.Array | None:
    """The mask, if a single CPU device works on more `parts` than were asked for, because of their size; else None."""
    current = current_rules()
    alone = platform() == "cpu" and (current is None or current[0].size == 1)
    return mask if parts > asked and alone else None


def order_by_length(mask: jax.Array, parts: int) -> jax.Array:
    """Row numbers int `[B]`, so that each of the `parts` that `split_rows` makes has rows of similar length.

    Args:
        mask: bool `[B, T]`, set for real columns.
        parts: Divides B.
    """
    order = jnp.argsort(_lengths(mask), stable=True)
    return order.reshape(parts, -1).T.reshape(-1)


def widths_of(columns: int) -> list[int]:
    """Widths of the branches for rows of so many columns, narrowest first."""
    shares = (-(-columns * k // (WIDTHS * MULTIPLE)) * MULTIPLE for k in range(1, WIDTHS + 1))
    return sorted({min(columns, max(NARROWEST, width)) for width in shares})


def narrowed(function: Callable[[PyTree], PyTree], rows: PyTree, mask: jax.Array, *, widen: bool = False) -> PyTree:
    """`function(rows)`, computed on the columns of `rows` up to the last real one or a few more.

    Args:
        function: What it returns for a row must not depend on columns after the row's last real one.
        rows: Arrays `[m, T, …]` are cut; others stay whole.
        mask: bool `[m, T]`, set for real columns.
        widen: Arrays `[m, width, …]` of the result get zeros up to T.
    """
    size, columns = mask.shape
    widths = widths_of(columns)

    def at(width: int) -> Callable[[PyTree], PyTree]:
        def cut(x: jax.Array) -> jax.Array:
            return x[:, :width] if x.ndim > 1 and x.shape[:2] == (size, columns) else x

        def whole(x: jax.Array) -> jax.Array:
            if not widen or x.shape[:2] != (size, width):
                return x
            return jnp.pad(x, [(0, 0), (0, columns - width), *[(0, 0)] * (x.ndim - 2)])

        return lambda rows: jax.tree.map(whole, function(jax.tree.map(cut, rows)))

    fitting = jnp.searchsorted(jnp.array(widths[:-1]), jnp.max(_lengths(mask)))
    return jax.lax.switch(fitting, [at(width) for width in widths], rows)


def _lengths(mask: jax.Array) -> jax.Array:
    """Number of the last real column, from 1, of each row, int `[B]`; 0 without one."""
    return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)
