"""A rollout batch generated in pieces of prompts of similar length, one after the other, and put together again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import ArrayLike

from jaxrlhf.config import PositiveInt, Settings
from jaxrlhf.data import length_bucket
from jaxrlhf.engine import Rollout, SamplingConfig
from jaxrlhf.errors import InputError


@dataclass(frozen=True)
class PiecesConfig(Settings, may_change=True):
    """Rollout batches in pieces."""

    generation_batches: PositiveInt = 1
    """Pieces that a rollout batch is generated in, each of prompts of similar length: less memory for the key/value
    cache and less padding, same responses."""

    def check_pieces(self, prompts: int) -> None:
        """Refuses a rollout batch of `prompts` prompts that generation_batches does not divide."""
        if prompts % self.generation_batches:
            raise InputError(
                f"generation_batches={self.generation_batches} must divide the {prompts} prompts of a rollout batch"
            )


def pieces_by_length(prompt_mask: np.ndarray, pieces: int) -> list[tuple[np.ndarray, int]]:
    """Returns (row numbers, prompt width) of each of `pieces` equal pieces, shortest prompts first."""
    lengths = np.asarray(prompt_mask).sum(axis=1)
    parts = np.split(np.argsort(lengths, kind="stable"), pieces)
    return [(rows, length_bucket(int(lengths[rows].max()), np.shape(prompt_mask)[1])) for rows in parts]


@partial(jax.jit, static_argnames=("prompt_length", "pad_id", "sharding"))
def join(parts: list[Rollout], order: jax.Array, *, prompt_length: int, pad_id: int, sharding: Sharding) -> Rollout:
    """Joins `parts` into one rollout with prompts of `prompt_length` columns; `order` holds their row numbers."""
    place = jnp.argsort(order)
    fill: Any = (pad_id, False, False, 0.0)
    fills = Rollout(*fill, prompt_length=prompt_length, rewards=None if parts[0].rewards is None else 0.0)  # type: ignore

    def joined(fill: float, *xs: jax.Array) -> jax.Array:
        wide = [
            jnp.pad(x, ((0, 0), (prompt_length - part.prompt_length, 0)), constant_values=fill)
            for x, part in zip(xs, parts, strict=True)
        ]
        return jax.lax.with_sharding_constraint(jnp.take(jnp.concatenate(wide), place, axis=0), sharding)

    return jax.tree.map(joined, fills, *(part.replace(prompt_length=prompt_length) for part in parts))


def generate_in_pieces(
    generate: Callable[..., Rollout],
    prompt_ids: ArrayLike,
    prompt_mask: ArrayLike,
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    pieces: int,
    sample_index: ArrayLike | None = None,
    each: Callable[[np.ndarray, Rollout], None] | None = None,
    **options: object,
) -> Rollout:
    """Generates a batch in pieces, with the cache of one piece at a time.

    Samples keep their numbers, so pieces change memory, padding and time, not tokens.

    Args:
        generate: `HybridEngine.generate`.
        prompt_ids: `[B, P]`, left-padded.
        prompt_mask: bool `[B, P]`.
        key: of the rollout.
        sampling: n = samples_per_prompt responses to each prompt.
        pieces: divides the B prompts.
        sample_index: numbers `[B·n]` of the samples; default 0 … B·n-1.
        each: called with the row numbers and the rollout of every piece once it is generated.
        options: further arguments of `generate`.

    Returns:
        The rollout of all B·n rows, in the order of the prompts.
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
