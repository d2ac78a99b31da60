"""Responses that the model in training or its teacher samples to the prompts of rows, in place of the data's."""

import time
from collections.abc import Callable
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
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.rollouts import PiecesConfig, generate_in_pieces
from jaxrlhf.trainers.tokenizers import sampling_for

PyTree = Any
Batch = dict[str, Any]


class OwnResponses(NamedTuple):
    """Batches whose responses are sampled."""

    share: float
    """Share of the batches whose responses the model samples itself."""
    sampling: SamplingConfig
    generation: GenerationConfig
    pieces: PiecesConfig = PiecesConfig()
    teacher: Callable[[Mesh], Model] | None = None
    """Loads the model that samples the responses of the other batches; None: they are the data's."""
    setting: str = ""
    """The setting that asks for it, for messages."""


@partial(jax.jit, static_argnames=("vocab_size", "mesh"))
def rows_of(rollout: Rollout, *, vocab_size: int, mesh: Mesh) -> Batch:
    """The rows of a rollout as `SFTData.batch` has them, on the training mesh: each sampled token is a target.

    A response ends before a token beyond the student's `vocab_size`. A teacher with more rows may sample one.
    """
    with use(mesh, TRAIN_RULES):
        rows = jax.tree.map(lambda x: constrain(x, "batch", None), rollout.compact())
        known = jnp.cumsum(rows.tokens >= vocab_size, axis=1) == 0
        return {
            "input_ids": jnp.where(known, rows.tokens, 0),
            "attention_mask": (rows.mask & known).astype(jnp.int32),
            "loss_mask": (rows.response_mask & known).astype(jnp.int32),
            "row_mask": constrain(jnp.ones(rows.tokens.shape[0], jnp.int32), "batch"),
        }


class OnPolicy:
    """The batches of a run whose responses the model samples itself, or its teacher.

    Who samples a batch, and the samples, are keyed by the number of the batch, so that a resumed run repeats them.
    """

    def __init__(
        self, run: Run, options: OwnResponses, model: Model, mesh: Mesh, tokenizer: Tokenizer, data: Data, seed: int
    ) -> None:
        """Args:
        run: gets messages on what is compiled.
        options: who samples which batches, and how.
        model: the model in training; its parameters are not kept.
        mesh: where it lies.
        tokenizer: says where responses end.
        data: rows with prompts.
        seed: of the run.

        Raises:
            InputError: a row has no prompt.
        """
        check_prompts(data, options.setting)
        self.options, self.mesh, self.data, self.seed = options, mesh, data, seed
        self.sampling, self.vocab_size = sampling_for(tokenizer, options.sampling), model.config.vocab_size
        self._own = self._generator(run, model) if options.share else None
        self._teacher, self._teacher_params = None, None
        if options.teacher is not None:
            teacher = options.teacher(mesh)
            self._teacher, self._teacher_params = self._generator(run, teacher), teacher.params

    def _generator(self, run: Run, model: Model) -> Callable[..., Rollout]:
        """The generate program of a model, whose parameters are an argument."""
        engine = HybridEngine(with_kernels(model, kv_cache_dtype=self.options.generation.kv_cache_dtype), self.mesh)
        engine.params = None
        return Announce(run, "generate program", engine.generate)

    def samples(self, batch: int) -> bool:
        """True for a batch whose responses the model samples."""
        key = keys.stream(self.seed, keys.Stream.ON_POLICY, batch)
        return bool(jax.random.uniform(key) < self.options.share)

    def rows(self, params: PyTree, indices: np.ndarray, batch: int) -> tuple[Batch | None, dict[str, float]]:
        """Samples a response to the prompt of each of these units.

        Args:
            params: of the model.
            indices: unit numbers `[B]`.
            batch: number of the batch.

        Returns:
            Placed rows, or None for a batch with the data's responses; and metrics.
        """
        own = self.samples(batch)
        metrics, generate = {"sampling/on_policy": float(own)}, self._own if own else self._teacher
        if generate is None:
            return None, metrics
        begin, prompts = time.monotonic(), cast(SFTData, self.data).prompt_batch(indices)
        rollout = generate_in_pieces(
            generate,
            prompts["prompt_ids"],
            prompts["prompt_mask"],
            keys.stream(self.seed, keys.Stream.ROLLOUTS, batch),
            self.sampling,
            pieces=self.options.pieces.generation_batches,
            params=params if own else self._teacher_params,
            slots=self.options.generation.generation_slots,
        )
        placed = jax.block_until_ready(rows_of(rollout, vocab_size=self.vocab_size, mesh=self.mesh))
        return placed, metrics | {"timing/generate": time.monotonic() - begin}


def check_prompts(data: Data, setting: str) -> None:
    """Raises InputError for a row without a prompt, where all rows are known."""
    for part, start in zip(data.parts, data.starts, strict=False):
        lengths = np.asarray(part.fetch(np.arange(len(part)), ["prompt_length"])["prompt_length"])
        if len(missing := np.flatnonzero(lengths == 0)):
            place = data.where(int(start + missing[0]))
            raise InputError(f"{setting}: {place} {NO_PROMPT}, or leave {setting.partition('=')[0]} out")
