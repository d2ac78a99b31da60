"""A rollout batch generated in pieces of prompts of similar length, one after the other, and put together again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxrlhf.data import length_bucket
from jaxrlhf.engine import Rollout, SamplingConfig


def pieces_by_length(prompt_mask: np.ndarray, pieces: int) -> list[tuple[np.ndarray, int]]:
    """The row numbers of each of `pieces` equal pieces, shortest prompts first, and each piece's own prompt width."""
    lengths = np.asarray(prompt_mask).sum(axis=1)
    parts = np.split(np.argsort(lengths, kind="stable"), pieces)
    return [(rows, length_bucket(int(lengths[rows].max()), np.shape(prompt_mask)[1])) for rows in parts]


@partial(jax.jit, static_argnames=("prompt_length", "pad_id", "sharding"))
def join(parts: list[Rollout], order: jax.Array, *, prompt_length: int, pad_id: int, sharding: Sharding) -> Rollout:
    """One rollout with prompts of `prompt_length` columns, its rows placed by `order`, where `parts` have theirs."""
    place = jnp.argsort(order)
    fills = Rollout(tokens=pad_id, mask=False, response_mask=False, logprobs=0.0, prompt_length=prompt_length)

    def joined(fill: Any, *xs: jax.Array) -> jax.Array:
        wide = [
            jnp.pad(x, ((0, 0), (prompt_length - part.prompt_length, 0)), constant_values=fill)
            for x, part in zip(xs, parts, strict=True)
        ]
        return jax.lax.with_sharding_constraint(jnp.take(jnp.concatenate(wide), place, axis=0), sharding)

    return jax.tree.map(joined, fills, *(part.replace(prompt_length=prompt_length) for part in parts))


def generate_in_pieces(
    generate: Callable[..., Rollout],
    prompt_ids: Any,
    prompt_mask: Any,
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    pieces: int,
    sample_index: Any = None,
    each: Callable[[np.ndarray, Rollout], None] | None = None,
    **options: Any,
) -> Rollout:
    """What `generate` (a HybridEngine's) gives for the whole batch, with the cache of only a piece at a time.

    Samples keep their numbers, so pieces change memory, padding and time, not tokens. `pieces` must divide the prompts.
    `each(rows, rollout)` is called with every piece that is done: its row numbers in the batch, and its rows.
    """
    ids, mask = np.asarray(prompt_ids), np.asarray(prompt_mask)
    n = sampling.samples_per_prompt
    numbers = np.arange(len(ids) * n) if sample_index is None else np.asarray(sample_index)
    if pieces == 1:
        whole = generate(ids, mask, key, sampling, sample_index=sample_index, **options)
        if each is not None:
            each(np.arange(len(numbers)), whole)
        return whole
    parts, order = [], []
    for prompts, width in pieces_by_length(mask, pieces):
        piece = (x[prompts, mask.shape[1] - width :] for x in (ids, mask))
        rows = (prompts[:, None] * n + np.arange(n)).reshape(-1)
        # Waiting here keeps the next piece's cache from being allocated beside this one's.
        part = jax.block_until_ready(generate(*piece, key, sampling, sample_index=numbers[rows], **options))
        if each is not None:
            each(rows, part)
        parts.append(part)
        order.append(rows)
    static = {"prompt_length": mask.shape[1], "pad_id": sampling.pad_token_id, "sharding": parts[0].tokens.sharding}
    return join(parts, np.concatenate(order), **static)
