"""Responses that the model in training samples to the prompts of its rows, in place of the data's responses."""

import time
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf import keys
from jaxrlhf.data import Data, Tokenizer
from jaxrlhf.data.steps import NO_PROMPT, SFTData
from jaxrlhf.engine import GenerationConfig, HybridEngine, Rollout, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import Model, with_kernels
from jaxrlhf.runs import Run
from jaxrlhf.sharding import TRAIN_RULES, constrain, use
from jaxrlhf.trainers.loop import Announce
from jaxrlhf.trainers.tokenizers import sampling_for

PyTree = Any
Batch = dict[str, Any]


class OwnResponses(NamedTuple):
    """Batches whose responses the model samples itself."""

    share: float
    """Their share of all batches."""
    sampling: SamplingConfig
    generation: GenerationConfig


@partial(jax.jit, static_argnames="mesh")
def rows_of(rollout: Rollout, *, mesh: Mesh) -> Batch:
    """The rows of a rollout as `SFTData.batch` has them, on the training mesh: each sampled token is a target."""
    with use(mesh, TRAIN_RULES):
        rows = jax.tree.map(lambda x: constrain(x, "batch", None), rollout.compact())
        return {
            "input_ids": rows.tokens,
            "attention_mask": rows.mask.astype(jnp.int32),
            "loss_mask": rows.response_mask.astype(jnp.int32),
            "row_mask": constrain(jnp.ones(rows.tokens.shape[0], jnp.int32), "batch"),
        }


class OnPolicy:
    """The steps of a run that train on the model's own responses.

    The choice of these steps and their samples are keyed by the number of the batch, so that a resumed run repeats
    them.
    """

    def __init__(
        self, run: Run, options: OwnResponses, model: Model, mesh: Mesh, tokenizer: Tokenizer, data: Data, seed: int
    ) -> None:
        """Args:
        run: gets messages on what is compiled.
        options: the share of these steps, and their sampling.
        model: the model in training; its parameters are not kept.
        mesh: where it lies.
        tokenizer: says where responses end.
        data: rows with prompts.
        seed: of the run.

        Raises:
            InputError: a row has no prompt.
        """
        check_prompts(data, options.share)
        self.options, self.mesh, self.data, self.seed = options, mesh, data, seed
        self.sampling = sampling_for(tokenizer, options.sampling)
        sampled = with_kernels(model, kv_cache_dtype=options.generation.kv_cache_dtype)
        self.engine = HybridEngine(sampled, mesh)
        self.engine.params = None  # the state has them
        self._generate = Announce(run, "generate program", self.engine.generate)

    def samples(self, batch: int) -> bool:
        """True for a batch whose responses the model samples."""
        key = keys.stream(self.seed, keys.Stream.ON_POLICY, batch)
        return bool(jax.random.uniform(key) < self.options.share)

    def rows(self, params: PyTree, indices: np.ndarray, batch: int) -> tuple[Batch, dict[str, float]]:
        """Samples a response to the prompt of each of these units.

        Args:
            params: of the model.
            indices: unit numbers `[B]`.
            batch: number of the batch.

        Returns:
            Placed rows, and metrics.
        """
        begin, prompts = time.monotonic(), cast(SFTData, self.data).prompt_batch(indices)
        key = keys.stream(self.seed, keys.Stream.ROLLOUTS, batch)
        slots = self.options.generation.generation_slots
        rollout = self._generate(
            prompts["prompt_ids"], prompts["prompt_mask"], key, self.sampling, params=params, slots=slots
        )
        placed = jax.block_until_ready(rows_of(rollout, mesh=self.mesh))
        return placed, {"timing/generate": time.monotonic() - begin}


def check_prompts(data: Data, share: float) -> None:
    """Raises InputError for a row without a prompt, where all rows are known."""
    for part, start in zip(data.parts, data.starts, strict=False):
        lengths = np.asarray(part.fetch(np.arange(len(part)), ["prompt_length"])["prompt_length"])
        if len(missing := np.flatnonzero(lengths == 0)):
            place = data.where(int(start + missing[0]))
            raise InputError(f"lmbda={share}: {place} {NO_PROMPT}, or leave lmbda at 0")
