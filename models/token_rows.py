"""Rows of the token tables that are trained while the tables are frozen: LoRA's part for tokens that are new."""

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

TABLES = {"embed_rows": "embed/embedding", "head_rows": "lm_head/kernel"}
"""The leaf of the table by the module that holds its trained rows."""
LEAF = "lora_rows"


class TokenRows(nn.Module):
    """Trained rows `[n, E]` of a token table; they replace the table's."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None))
        return cast(jax.Array, self.param(LEAF, init, self.shape))


def replace_rows(table: jax.Array, tokens: tuple[int, ...], rows: jax.Array) -> jax.Array:
    """Returns the table `[V, E]` with `rows` `[n, E]` in place of those of `tokens`."""
    return table.at[jnp.asarray(tokens)].set(rows.astype(table.dtype))


def look_up(embedded: jax.Array, input_ids: jax.Array, tokens: tuple[int, ...], rows: jax.Array) -> jax.Array:
    """Returns the embeddings `[B, T, E]` with those of `tokens` (ascending) taken from `rows` `[n, E]`."""
    known = jnp.asarray(tokens)
    slot = jnp.minimum(jnp.searchsorted(known, input_ids), len(tokens) - 1)
    return jnp.where((known[slot] == input_ids)[..., None], rows.astype(embedded.dtype)[slot], embedded)
