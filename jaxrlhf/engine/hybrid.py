"""The hybrid engine: parameters stored fully sharded for training, and the jitted program that generates with them.

Generation sees the same arrays through another rule table (jaxrlhf/engine/generation.py). They are resharded once, at
the entry of the program; prefill and decode then run as one compiled loop.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxrlhf.engine.decoding import Requests
from jaxrlhf.engine.episodes import EpisodeBatch
from jaxrlhf.engine.generation import Rollout, generate, stream_start, stream_step
from jaxrlhf.engine.sampling import SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import Model, param_shardings
from jaxrlhf.sharding import (
    GENERATE_RULES,
    generate_mesh,
    make_mesh,
    place,
    place_batch,
    split,
    use,
)

PyTree = Any

__all__ = ["HybridEngine", "Rollout", "generate"]


class HybridEngine:
    """One parameter tree on one mesh, for training and for generation.

    Args:
        model: Its parameters are placed by the training rules.
        mesh: The training mesh; None: all devices on `fsdp`.
        generate_tensor_parallel: Devices that generate together; `generate` reads the parameters through GENERATE_RULES
            on a view of the mesh with groups of this size. None: the `fsdp × tensor` devices of one host.

    Raises:
        InputError: The group does not fit the mesh or the model's heads.
    """

    def __init__(self, model: Model, mesh: Mesh | None = None, generate_tensor_parallel: int | None = None) -> None:
        self.mesh = make_mesh() if mesh is None else mesh
        self.module = model.module
        self.config = model.config
        self.generate_mesh = generate_mesh(self.mesh, model.config.num_heads, generate_tensor_parallel)
        self.params = place(model.params, param_shardings(model.module, self.mesh))

    def _check(self, prompt_ids: ArrayLike, prompt_mask: ArrayLike, sampling: SamplingConfig) -> None:
        if np.shape(prompt_ids) != np.shape(prompt_mask) or np.ndim(prompt_ids) != 2:
            raise InputError(
                f"prompt_ids {np.shape(prompt_ids)} and prompt_mask {np.shape(prompt_mask)} must be two [B, P] arrays"
            )
        mask = np.asarray(prompt_mask).astype(bool)
        bad = np.flatnonzero((mask[:, 1:] < mask[:, :-1]).any(axis=1) | ~mask.any(axis=1))
        if len(bad):
            raise InputError(
                f"prompt_mask row {bad[0]}: prompts must be left-padded and hold at least one token; put the padding "
                "first"
            )
        total = np.shape(prompt_ids)[1] + sampling.max_new_tokens
        if self.config.position != "alibi" and total > self.config.max_positions:
            raise InputError(
                f"prompts of {np.shape(prompt_ids)[1]} tokens + max_new_tokens={sampling.max_new_tokens} exceed the "
                f"model's context of {self.config.max_positions}; shorten the prompts or the responses"
            )

    def _requests(
        self,
        prompt_ids: ArrayLike,
        prompt_mask: ArrayLike,
        sampling: SamplingConfig,
        sample_index: ArrayLike | None,
        temperature: ArrayLike | None,
    ) -> Requests:
        """Checks ids and mask `[B, P]`, sample numbers and temperatures `[B·n]`, and puts them on generation's mesh."""
        self._check(prompt_ids, prompt_mask, sampling)
        prompts, n = np.shape(prompt_ids)[0], sampling.samples_per_prompt
        number = np.arange(prompts * n) if sample_index is None else np.asarray(sample_index)
        if number.shape != (prompts * n,):
            raise InputError(
                f"sample_index has the shape {number.shape}; it numbers the {prompts} × samples_per_prompt={n} "
                f"responses, so it must be [{prompts * n}]"
            )
        if temperature is not None:
            temperature = np.asarray(temperature, np.float32)
            if temperature.shape != (prompts,) or not (np.isfinite(temperature) & (temperature >= 0)).all():
                raise InputError(
                    f"temperature={temperature.tolist()} must hold one number per prompt, [{prompts}], each 0 (greedy) "
                    "or positive"
                )
            temperature = np.repeat(temperature, n)
        arrays = (np.asarray(prompt_ids, np.int32), np.asarray(prompt_mask, bool), number.astype(np.int32), temperature)
        return Requests(*place_batch(arrays, self.generate_mesh, GENERATE_RULES))

    def check_slots(self, slots: int, rows: int) -> int:
        """Returns the slots of continuous batching, 0 if there are at least as many as `rows`: a fixed batch.

        Raises:
            InputError: The groups of generation do not divide slots or rows.
        """
        if slots < 0:
            raise InputError(f"slots={slots} must be 0 (a fixed batch) or positive")
        if not slots or slots >= rows:
            return 0
        with use(self.generate_mesh, GENERATE_RULES):
            groups = split("batch", self.mesh.size)
        for name, size in (("slots", slots), ("responses (prompts × samples_per_prompt)", rows)):
            if size % groups:
                raise InputError(
                    f"{name}={size} must be a multiple of {groups}: generation splits its rows over {groups} groups of "
                    "devices, each with slots and a queue of its own"
                )
        return slots

    def generate(
        self,
        prompt_ids: ArrayLike,
        prompt_mask: ArrayLike,
        key: jax.Array,
        sampling: SamplingConfig,
        *,
        params: PyTree | None = None,
        sample_index: ArrayLike | None = None,
        temperature: ArrayLike | None = None,
        slots: int = 0,
    ) -> Rollout:
        """Generates `sampling.samples_per_prompt` = n responses to each prompt.

        A sample depends on `key`, its number and its prompt, not on the mesh, its batch or `slots`.

        Args:
            prompt_ids: int `[B, P]`, left-padded.
            prompt_mask: `[B, P]`, set for real tokens.
            key: Random key.
            sampling: How tokens are sampled; each distinct value compiles a program.
            params: Replace the engine's own tree (such as those of the PPO state).
            sample_index: int `[B·n]`: number of each sample; None: 0 … B·n-1.
            temperature: `[B]`: replaces the config's per prompt, 0 for greedy, without a new compilation per value.
            slots: Rows that are decoded at a time (continuous batching): a row that is done makes room for the next
                prompt. 0, or as many as there are rows: one fixed batch.

        Returns:
            A rollout of B·n rows, the responses to one prompt side by side.

        Raises:
            InputError: An argument does not fit; the message names it.
        """
        args, options = self._program(prompt_ids, prompt_mask, key, sampling, params, sample_index, temperature, slots)
        return generate(*args, **options)

    def compile(
        self, prompts: tuple[int, int], key: jax.Array, sampling: SamplingConfig, *, params: PyTree, slots: int = 0
    ) -> None:
        """Compiles the program of `generate` for `prompts` = (B, P); JAX keeps it for calls with such prompts.

        Args:
            prompts: Shape of the prompts.
            key: Any random key.
            sampling: As in `generate`.
            params: The parameters, or objects with their shapes and shardings.
            slots: As in `generate`.

        Raises:
            InputError: As `generate`.
        """
        ids, mask = np.zeros(prompts, np.int32), np.ones(prompts, bool)
        args, options = self._program(ids, mask, key, sampling, params, None, None, slots)
        generate.lower(*args, **options).compile()

    def _program(
        self,
        prompt_ids: ArrayLike,
        prompt_mask: ArrayLike,
        key: jax.Array,
        sampling: SamplingConfig,
        params: PyTree,
        sample_index: ArrayLike | None,
        temperature: ArrayLike | None,
        slots: int,
    ) -> tuple[tuple[PyTree, Requests, jax.Array], dict[str, Any]]:
        """Arguments of the generate program, by position and by name; those of this method are as in `generate`."""
        requests = self._requests(prompt_ids, prompt_mask, sampling, sample_index, temperature)
        slots = self.check_slots(slots, len(requests.number))
        options = {"module": self.module, "sampling": sampling, "mesh": self.generate_mesh, "slots": slots}
        return (self.params if params is None else params, requests, key), options

    def episodes(
        self,
        prompt_ids: ArrayLike,
        prompt_mask: ArrayLike,
        key: jax.Array,
        sampling: SamplingConfig,
        *,
        params: PyTree | None = None,
        sample_index: ArrayLike | None = None,
        live: np.ndarray | None = None,
        turn_tokens: int = 0,
    ) -> EpisodeBatch:
        """Begins responses of several turns, with the tokens of an environment between them.

        With one turn per row, the rollout is that of `generate`.

        Args:
            prompt_ids: int `[B, P]`, left-padded.
            prompt_mask: `[B, P]`, set for real tokens.
            key: Random key.
            sampling: As in `generate`; max_new_tokens bounds the response with the environment's tokens.
            params: As in `generate`.
            sample_index: As in `generate`.
            live: bool `[B·n]`: rows to generate; None: all.
            turn_tokens: Longest turn of the model; 0: no bound but max_new_tokens.

        Raises:
            InputError: An argument does not fit; the message names it.
        """
        requests = self._requests(prompt_ids, prompt_mask, sampling, sample_index, None)
        rows = np.shape(prompt_ids)[0] * sampling.samples_per_prompt
        return EpisodeBatch(
            self.params if params is None else params,
            requests,
            np.ones(rows, bool) if live is None else np.asarray(live, bool),
            key,
            {"module": self.module, "sampling": sampling, "mesh": self.generate_mesh},
            turn_tokens,
        )

    def stream(
        self, prompt_ids: ArrayLike, prompt_mask: ArrayLike, key: jax.Array, sampling: SamplingConfig
    ) -> Iterator[np.ndarray]:
        """Yields the next token of every row, int32 `[B]`, as it is sampled, until every row has ended (chat).

        The tokens are those of `generate`; rows that have ended yield `pad_token_id`.
        """
        if sampling.samples_per_prompt > 1:
            raise InputError(
                f"samples_per_prompt={sampling.samples_per_prompt}: a stream has one response per prompt; "
                "repeat the prompts, or use generate"
            )
        requests = self._requests(prompt_ids, prompt_mask, sampling, None, None)
        start = partial(stream_start, module=self.module, sampling=sampling, mesh=self.generate_mesh)
        step = partial(stream_step, module=self.module, sampling=sampling, mesh=self.generate_mesh)
        view, rows = start(self.params, requests, key)
        column = np.shape(prompt_ids)[1]
        while True:
            token, done = np.asarray(rows.token), np.asarray(rows.done).all()
            yield token
            if done:
                return
            rows = step(view, rows, jnp.int32(column), key)
            column += 1
