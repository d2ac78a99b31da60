"""The generate program: reshard, prefill and the decode loop in one compiled call (docs/generation.md)."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf.engine.continuous import continuous_batch
from jaxrlhf.engine.decoding import Requests, Rows, advance, batched, begin, repeat
from jaxrlhf.engine.sampling import SamplingConfig
from jaxrlhf.models import Decoder, GenerationView, generation_view
from jaxrlhf.sharding import GENERATE_RULES, use

PyTree = Any


class Rollout(flax.struct.PyTreeNode):
    """Generated sequences: prompts left-padded in columns 0…P-1, responses from column P on. All arrays `[B, P+N]`."""

    tokens: jax.Array
    """int32; padding holds the sampler's pad id."""
    mask: jax.Array
    """bool: real tokens, of prompt and response."""
    response_mask: jax.Array
    """bool: response tokens that the model sampled, the closing EOS or stop sequence included. An environment's tokens
    between turns are not set here."""
    logprobs: jax.Array
    """float32: the sampler's own log-prob of each response token; 0 elsewhere."""
    prompt_length: int = flax.struct.field(pytree_node=False)
    """P, the same for every row."""
    rewards: jax.Array | None = None
    """float32: rewards of an environment, each at the last token of its turn; None without one."""

    def compact(self) -> "Rollout":
        """Moves each row to the left edge: prompt then response from column 0, right-padded."""
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
            rewards=None if self.rewards is None else shift(self.rewards),
        )


def _fixed_batch(
    module: Decoder, view: GenerationView, requests: Requests, key: jax.Array, sampling: SamplingConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Generates all responses at once: tokens, mask and log-probs `[B·n, N]`."""
    prompt_length, longest = requests.ids.shape[1], sampling.max_new_tokens
    width, copies = prompt_length + longest, sampling.samples_per_prompt
    rows, logprob = begin(module, view, requests, key, sampling, cache_length=width, copies=copies)

    def wide(first: jax.Array, fill: float) -> jax.Array:
        rest = jnp.full((first.shape[0], longest - 1), fill, first.dtype)
        return batched(jnp.concatenate([first[:, None], rest], axis=1))

    def unfinished(carry: tuple) -> jax.Array:
        return ~jnp.all(carry[1].done)

    def body(carry: tuple) -> tuple:
        step, rows, tokens, logprobs = carry
        rows, logprob = advance(module, view, rows, prompt_length + step - 1, key, sampling)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=1)
        return step + 1, rows, write(tokens, rows.token[:, None]), write(logprobs, logprob[:, None])

    carry = (jnp.int32(1), rows, wide(rows.token, sampling.pad_token_id), wide(logprob, 0.0))
    _, rows, tokens, logprobs = jax.lax.while_loop(unfinished, body, carry)
    return tokens, batched(jnp.arange(longest) < rows.length[:, None]), logprobs


@partial(jax.jit, static_argnames=("module", "sampling", "mesh", "slots"))
def generate(
    params: PyTree,
    requests: Requests,
    key: jax.Array,
    *,
    module: Decoder,
    sampling: SamplingConfig,
    mesh: Mesh | None,
    slots: int = 0,
) -> Rollout:
    """The whole program; `HybridEngine.generate` checks its arguments and calls it.

    Args:
        params: The training tree of `module`.
        requests: The prompts.
        key: The run's random key.
        module: The model's module.
        sampling: How tokens are sampled.
        mesh: The mesh of generation.
        slots: Slots of continuous batching; 0: one fixed batch.
    """
    with use(mesh, GENERATE_RULES):
        view = generation_view(params, module, scan_prefill=True)
        run = partial(continuous_batch, slots=slots) if slots else _fixed_batch
        tokens, response, logprobs = run(module, view, requests, key, sampling)
        ids = repeat(jnp.where(requests.mask, requests.ids, sampling.pad_token_id), sampling.samples_per_prompt)
        mask = repeat(requests.mask, sampling.samples_per_prompt)

        def joined(prompt: jax.Array, response: jax.Array) -> jax.Array:
            return batched(jnp.concatenate([prompt, response], axis=1))

        return Rollout(
            tokens=joined(ids, tokens),
            mask=joined(mask, response),
            response_mask=joined(jnp.zeros_like(mask), response),
            logprobs=joined(jnp.zeros(ids.shape, jnp.float32), logprobs),
            prompt_length=ids.shape[1],
        )


@partial(jax.jit, static_argnames=("module", "sampling", "mesh"))
def stream_start(
    params: PyTree,
    requests: Requests,
    key: jax.Array,
    *,
    module: Decoder,
    sampling: SamplingConfig,
    mesh: Mesh | None,
) -> tuple[GenerationView, Rows]:
    """The first half of streaming: the resharded weights, and rows that hold the first token."""
    with use(mesh, GENERATE_RULES):
        view = generation_view(params, module)
        length = requests.ids.shape[1] + sampling.max_new_tokens
        return view, begin(module, view, requests, key, sampling, cache_length=length)[0]


@partial(jax.jit, static_argnames=("module", "sampling", "mesh"), donate_argnames="rows")
def stream_step(
    view: GenerationView,
    rows: Rows,
    column: jax.Array,
    key: jax.Array,
    *,
    module: Decoder,
    sampling: SamplingConfig,
    mesh: Mesh | None,
) -> Rows:
    """The second half of streaming: one more token per row; `column` is the cache column of the last one."""
    with use(mesh, GENERATE_RULES):
        return advance(module, view, rows, column, key, sampling)[0]
