"""The decode state of a running generation: how rows begin and how they advance by one token."""

import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.engine.sampling import SamplingConfig, ends_with_stop, is_eos, sample_token
from jaxrlhf.kernels import Cache
from jaxrlhf.models import Decoder, GenerationView, decode_step, init_cache, prefill
from jaxrlhf.sharding import constrain


class Requests(flax.struct.PyTreeNode):
    """The prompts of a generation, and what is specific to each sample."""

    ids: jax.Array
    """int32 `[B, P]`, left-padded."""
    mask: jax.Array
    """bool `[B, P]`."""
    number: jax.Array
    """int32 `[B·n]`: the sample's own number, from which its random keys derive."""
    temperature: jax.Array | None = None
    """float32 `[B·n]`; None: that of the SamplingConfig."""


class Rows(flax.struct.PyTreeNode):
    """The state of each row in the decode loop."""

    length: jax.Array
    """int32 `[B]`: response tokens sampled so far."""
    token: jax.Array
    """int32 `[B]`: the last one, or padding if the row was done before."""
    done: jax.Array
    """bool `[B]`."""
    start: jax.Array
    """int32 `[B]`: the prompt's first cache column."""
    number: jax.Array
    """As in Requests."""
    temperature: jax.Array | None
    """As in Requests."""
    seen: jax.Array | None
    """bool `[B, V]`: tokens of prompt and response; None without a repetition penalty."""
    tail: jax.Array | None
    """int32 `[B, K]`: the last response tokens, -1 before the first; None without stop sequences."""
    caches: tuple[Cache, ...]
    """The key/value cache of each layer."""


def row_keys(key: jax.Array, sample_index: jax.Array) -> jax.Array:
    """Derives one key per row `[B]` from the run's key and the sample's own number, int `[B]`."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sample_index)


def batched(x: jax.Array) -> jax.Array:
    """Pins `x` `[B, …]` to the batch axes."""
    return constrain(x, "batch", *([None] * (x.ndim - 1)))


def repeat(x: jax.Array, copies: int) -> jax.Array:
    """Repeats each row of `[B, …]`: `[B·copies, …]`, the copies of a row side by side."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], copies, *x.shape[1:])).reshape(-1, *x.shape[1:])


def _seen(ids: jax.Array, mask: jax.Array, vocab: int) -> jax.Array:
    """bool `[B, vocab]`: the tokens of each prompt without its padding."""

    def row(ids: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.zeros(vocab, bool).at[jnp.where(mask, ids, vocab)].set(True, mode="drop")

    return batched(jax.vmap(row)(ids, mask))


def stop_tail(rows: int, sampling: SamplingConfig) -> jax.Array | None:
    """Creates `Rows.tail` for rows without response tokens."""
    longest = max(map(len, sampling.stop_sequences), default=0)
    return batched(jnp.full((rows, longest), -1, jnp.int32)) if longest else None


class Given(flax.struct.PyTreeNode):
    """Next tokens that are not sampled: those of an environment."""

    where: jax.Array
    """bool `[B]`: rows with such a token."""
    token: jax.Array
    """int32 `[B]`."""


def sample_rows(
    rows: Rows, logits: jax.Array, key: jax.Array, sampling: SamplingConfig, given: Given | None = None
) -> tuple[Rows, jax.Array]:
    """Samples the next token of every live row from logits `[B, V]`: new rows, and log-probs `[B]` (0 if done).

    A given token takes the place of a sample. It has the log-prob 0, and only the longest length ends its row.
    """
    keys = row_keys(key, rows.number)
    token, logprob = sample_token(logits, keys, rows.length, sampling, seen=rows.seen, temperature=rows.temperature)
    live = ~rows.done
    sampled = live
    if given is not None:
        token, sampled = jnp.where(given.where, given.token, token), live & ~given.where
    token = jnp.where(live, token, sampling.pad_token_id)
    length = rows.length + live
    ended = (is_eos(token, sampling) & sampled) | (length >= sampling.max_new_tokens)
    seen, tail = rows.seen, rows.tail
    if seen is not None:
        seen = jax.vmap(lambda row, token: row.at[token].set(True))(seen, token)
    if tail is not None:
        tail = jnp.concatenate([tail[:, 1:], token[:, None]], axis=1)
        if given is not None:
            tail = jnp.where(given.where[:, None], -1, tail)
        ended |= ends_with_stop(tail, sampling) & (length > sampling.min_new_tokens)
    rows = rows.replace(length=length, token=token, done=rows.done | ended, seen=seen, tail=tail)
    return rows, jnp.where(sampled, logprob, 0.0)


def begin(
    module: Decoder,
    view: GenerationView,
    requests: Requests,
    key: jax.Array,
    sampling: SamplingConfig,
    *,
    cache_length: int,
    copies: int = 1,
) -> tuple[Rows, jax.Array]:
    """Runs the prefill of B prompts, and samples the first token of `copies` responses to each.

    Args:
        module: The model's module.
        view: Its parameters for generation.
        requests: The prompts.
        key: The run's random key.
        sampling: How tokens are sampled.
        cache_length: Columns of the caches.
        copies: Responses per prompt, n.

    Returns:
        The rows, and the log-probs of their tokens, float32 `[B·copies]`.
    """
    size, prompt_length = requests.ids.shape
    caches = init_cache(module, size, prompt_length)
    longest = prompt_length + sampling.max_new_tokens
    logits, caches = prefill(module, view, requests.ids, requests.mask, caches, longest=longest)
    start = prompt_length - jnp.sum(requests.mask, axis=1, dtype=jnp.int32)
    seen = None if sampling.repetition_penalty == 1 else _seen(requests.ids, requests.mask, logits.shape[-1])
    if copies > 1:
        logits, start, seen = jax.tree.map(lambda x: repeat(x, copies), (logits, start, seen))

    def widen(x: jax.Array) -> jax.Array:
        others = [(0, 0)] * (x.ndim - 3)
        x = jnp.pad(repeat(x, copies), ((0, 0), (0, 0), (0, cache_length - prompt_length), *others))
        return constrain(x, "batch", "kv_heads", *[None] * (x.ndim - 2))

    rows = Rows(
        length=jnp.zeros_like(start),
        token=jnp.zeros_like(start),
        done=jnp.zeros(start.shape, bool),
        start=start,
        number=requests.number,
        temperature=requests.temperature,
        seen=seen,
        tail=stop_tail(size * copies, sampling),
        caches=jax.tree.map(widen, caches),
    )
    return sample_rows(rows, logits, key, sampling)


def idle(module: Decoder, requests: Requests, sampling: SamplingConfig, size: int) -> Rows:
    """Creates `size` rows that are done already, with room for a prompt and the longest response to it."""
    vocab = module.config.padded_vocab_size
    nothing = batched(jnp.zeros(size, jnp.int32))
    return Rows(
        length=nothing,
        token=nothing,
        done=batched(jnp.ones(size, bool)),
        start=nothing,
        number=nothing,
        temperature=None if requests.temperature is None else batched(jnp.ones(size, jnp.float32)),
        seen=None if sampling.repetition_penalty == 1 else batched(jnp.zeros((size, vocab), bool)),
        tail=stop_tail(size, sampling),
        caches=init_cache(module, size, requests.ids.shape[1] + sampling.max_new_tokens),
    )


def advance(
    module: Decoder,
    view: GenerationView,
    rows: Rows,
    column: jax.Array,
    key: jax.Array,
    sampling: SamplingConfig,
    given: Given | None = None,
) -> tuple[Rows, jax.Array]:
    """Runs the model over each row's last token, and samples the next.

    Args:
        module: The model's module.
        view: Its parameters for generation.
        rows: The state; its caches are updated in place under jit.
        column: Cache column of the last token, int scalar or `[B]`.
        key: The run's random key.
        sampling: How tokens are sampled.
        given: Tokens in the place of samples.

    Returns:
        The rows, and the log-probs of their new tokens, float32 `[B]`.
    """
    logits, caches = decode_step(module, view, rows.token, column, rows.start, rows.caches)
    return sample_rows(rows.replace(caches=caches), logits, key, sampling, given)
