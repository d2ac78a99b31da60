"""The hybrid engine: parameters stored fully sharded for training, and the jitted program that generates with them.

Generation sees the same arrays through another rule table. The flip (cast, unstack, reshard) happens once, at the
entry of the program; prefill and decode then run as one compiled loop that stops when every row is done.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    Model,
    decode_step,
    generation_view,
    init_cache,
    param_shardings,
    prefill,
)
from jaxrlhf.sampling import SamplingConfig, sample_token
from jaxrlhf.sharding import (
    GENERATE_RULES,
    check_tensor_parallel,
    constrain,
    default_tensor_parallel,
    generate_mesh,
    make_mesh,
    place,
    place_batch,
    use,
)

PyTree = Any


@flax.struct.dataclass
class Rollout:
    """Generated sequences: prompts left-padded in columns 0…P-1, responses from column P on. All arrays `[B, P+N]`."""

    tokens: jax.Array
    """int32; padding holds the sampler's pad id."""
    mask: jax.Array
    """bool: real tokens, of prompt and response."""
    response_mask: jax.Array
    """bool: response tokens, the closing EOS included."""
    logprobs: jax.Array
    """float32: the sampler's own log-prob of each response token; 0 elsewhere."""
    prompt_length: int = flax.struct.field(pytree_node=False)
    """P, the same for every row."""

    def compact(self) -> "Rollout":
        """The same rows moved to the left edge: prompt then response from column 0, right-padded."""
        start = jnp.argmax(self.mask, axis=1)
        columns = start[:, None] + jnp.arange(self.tokens.shape[1])[None]
        inside = columns < self.tokens.shape[1]

        def shift(x: jax.Array) -> jax.Array:
            return jnp.where(inside, jnp.take_along_axis(x, jnp.minimum(columns, x.shape[1] - 1), axis=1), 0)

        return self.replace(
            tokens=shift(self.tokens),
            mask=shift(self.mask).astype(bool),
            response_mask=shift(self.response_mask).astype(bool),
            logprobs=shift(self.logprobs),
        )


def row_keys(key: jax.Array, sample_index: jax.Array) -> jax.Array:
    """One key per row, a function of the run's key and the sample's own number only."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sample_index)


def is_eos(tokens: jax.Array, sampling: SamplingConfig) -> jax.Array:
    if not sampling.eos_ids:
        return jnp.zeros(tokens.shape, bool)
    return jnp.isin(tokens, jnp.asarray(sampling.eos_ids))


@partial(jax.jit, static_argnames=("module", "sampling", "mesh"))
def generate(
    params: PyTree,
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    sample_index: jax.Array,
    key: jax.Array,
    *,
    module: Decoder,
    sampling: SamplingConfig,
    mesh: Mesh | None,
) -> Rollout:
    """The generate program: flip, prefill and the decode loop. See `HybridEngine.generate` for shapes."""
    with use(mesh, GENERATE_RULES):
        view = generation_view(params, module)
        rows, prompt_length = prompt_ids.shape
        length = prompt_length + sampling.max_new_tokens
        prompt_mask = prompt_mask.astype(bool)
        start = prompt_length - jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)
        keys = row_keys(key, sample_index)

        caches = init_cache(module, rows, length)
        logits, caches = prefill(module, view, prompt_ids, prompt_mask, caches)
        token, logprob = sample_token(logits, keys, 0, sampling)

        def wide(x: jax.Array, first: jax.Array, fill: Any) -> jax.Array:
            rest = jnp.full((rows, sampling.max_new_tokens - 1), fill, x.dtype)
            return constrain(jnp.concatenate([x, first[:, None].astype(x.dtype), rest], axis=1), "batch", None)

        tokens = wide(jnp.where(prompt_mask, prompt_ids, sampling.pad_token_id), token, sampling.pad_token_id)
        response = wide(jnp.zeros_like(prompt_mask), jnp.ones_like(token), False)
        logprobs = wide(jnp.zeros(prompt_ids.shape, jnp.float32), logprob, 0.0)

        def unfinished(carry: tuple) -> jax.Array:
            step, _, done, *_ = carry
            return (step < sampling.max_new_tokens) & ~jnp.all(done)

        def body(carry: tuple) -> tuple:
            step, token, done, tokens, response, logprobs, caches = carry
            column = prompt_length + step
            logits, caches = decode_step(module, view, token, column - 1, start, caches)
            token, logprob = sample_token(logits, keys, step, sampling)
            token = jnp.where(done, sampling.pad_token_id, token)
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=column, axis=1)
            tokens = write(tokens, token[:, None])
            response = write(response, ~done[:, None])
            logprobs = write(logprobs, jnp.where(done, 0.0, logprob)[:, None])
            return step + 1, token, done | is_eos(token, sampling), tokens, response, logprobs, caches

        carry = (jnp.int32(1), token, is_eos(token, sampling), tokens, response, logprobs, caches)
        _, _, _, tokens, response, logprobs, _ = jax.lax.while_loop(unfinished, body, carry)
        mask = jnp.concatenate([prompt_mask, response[:, prompt_length:]], axis=1)
    return Rollout(tokens=tokens, mask=mask, response_mask=response, logprobs=logprobs, prompt_length=prompt_length)


@partial(jax.jit, static_argnames=("module", "sampling", "mesh"))
def _stream_start(params, prompt_ids, prompt_mask, key, *, module, sampling, mesh):
    with use(mesh, GENERATE_RULES):
        view = generation_view(params, module)
        caches = init_cache(module, prompt_ids.shape[0], prompt_ids.shape[1] + sampling.max_new_tokens)
        logits, caches = prefill(module, view, prompt_ids, prompt_mask, caches)
        token, _ = sample_token(logits, row_keys(key, jnp.arange(prompt_ids.shape[0])), 0, sampling)
        return view, token, caches


@partial(jax.jit, static_argnames=("module", "sampling", "mesh"), donate_argnames=("caches",))
def _stream_step(view, token, column, start, step, key, caches, *, module, sampling, mesh):
    with use(mesh, GENERATE_RULES):
        logits, caches = decode_step(module, view, token, column, start, caches)
        token, _ = sample_token(logits, row_keys(key, jnp.arange(token.shape[0])), step, sampling)
        return token, caches


class HybridEngine:
    """One parameter tree on one mesh, for training and for generation.

    `params` lie by the training rules; `generate` reads them through GENERATE_RULES on a view of this mesh, split over
    groups of `generate_tensor_parallel` devices (default: the `fsdp × tensor` devices of one host).
    """

    def __init__(self, model: Model, mesh: Mesh | None = None, generate_tensor_parallel: int | None = None) -> None:
        self.mesh = make_mesh() if mesh is None else mesh
        self.module = model.module
        self.config = model.config
        group = generate_tensor_parallel or default_tensor_parallel(self.mesh, model.config.num_heads)
        check_tensor_parallel(group, model.config.num_heads)
        self.generate_mesh = generate_mesh(self.mesh, group)
        self.params = place(model.params, param_shardings(model.module, self.mesh))

    def _check(self, prompt_ids: Any, prompt_mask: Any, sampling: SamplingConfig) -> None:
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
                f"model's context of {self.config.max_positions}; shorten the prompts or the answers"
            )

    def generate(
        self,
        prompt_ids: Any,
        prompt_mask: Any,
        key: jax.Array,
        sampling: SamplingConfig,
        *,
        params: PyTree | None = None,
        sample_index: Any = None,
    ) -> Rollout:
        """Generate one response per row of left-padded prompts `[B, P]`.

        `sample_index` `[B]` numbers the samples (default 0…B-1): a sample depends on `key`, its number and its prompt,
        not on the mesh or the batch it is in. `params` replaces the engine's own tree (the PPO state's, say).
        """
        self._check(prompt_ids, prompt_mask, sampling)
        if sample_index is None:
            sample_index = np.arange(np.shape(prompt_ids)[0], dtype=np.int32)
        batch = (np.asarray(prompt_ids, np.int32), np.asarray(prompt_mask, bool), np.asarray(sample_index, np.int32))
        batch = place_batch(batch, self.generate_mesh, GENERATE_RULES)
        params = self.params if params is None else params
        static = {"module": self.module, "sampling": sampling, "mesh": self.generate_mesh}
        return generate(params, *batch, key, **static)

    def stream(
        self, prompt_ids: Any, prompt_mask: Any, key: jax.Array, sampling: SamplingConfig
    ) -> Iterator[np.ndarray]:
        """Yield the next token of every row `[B]` as it is drawn, until every row has ended (chat).

        The same draws as `generate`; rows that have ended go on yielding `pad_token_id`.
        """
        self._check(prompt_ids, prompt_mask, sampling)
        ids, mask = place_batch(
            (np.asarray(prompt_ids, np.int32), np.asarray(prompt_mask, bool)), self.generate_mesh, GENERATE_RULES
        )
        static = {"module": self.module, "sampling": sampling, "mesh": self.generate_mesh}
        view, token, caches = _stream_start(self.params, ids, mask, key, **static)
        start = ids.shape[1] - jnp.sum(mask, axis=1, dtype=jnp.int32)
        done = np.zeros(ids.shape[0], bool)
        for step in range(1, sampling.max_new_tokens + 1):
            drawn = np.where(done, sampling.pad_token_id, np.asarray(token))
            yield drawn
            done |= np.isin(drawn, sampling.eos_ids)
            if done.all() or step == sampling.max_new_tokens:
                return
            column = jnp.int32(ids.shape[1] + step - 1)
            token, caches = _stream_step(
                view, jnp.asarray(drawn), column, start, jnp.int32(step), key, caches, **static
            )
