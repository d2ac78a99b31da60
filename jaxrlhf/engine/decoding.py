"""The rows of a running generation: what the decode loop carries for each, how they begin and how they advance."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.engine.sampling import SamplingConfig, ends_with_stop, is_eos, sample_token
from jaxrlhf.models import Decoder, GenerationView, decode_step, init_cache, prefill
from jaxrlhf.sharding import constrain

PyTree = Any


@flax.struct.dataclass
class Requests:
    """What is to be answered."""

    ids: jax.Array
    """int32 `[B, P]`, left-padded."""
    mask: jax.Array
    """bool `[B, P]`."""
    number: jax.Array
    """int32 `[B·n]`: the sample's own number, which keys its draws."""
    temperature: jax.Array | None
    """float32 `[B·n]`, or None: that of the SamplingConfig."""


@flax.struct.dataclass
class Rows:
    """What the decode loop carries per row."""

    length: jax.Array
    """int32 `[B]`: response tokens drawn so far."""
    token: jax.Array
    """int32 `[B]`: the last one, or padding where the row was done before."""
    done: jax.Array
    start: jax.Array
    """int32 `[B]`: the prompt's first cache column."""
    number: jax.Array
    temperature: jax.Array | None
    seen: jax.Array | None
    """bool `[B, V]`: tokens of prompt and response, with a repetition penalty only."""
    tail: jax.Array | None
    """int32 `[B, K]`: the last response tokens, -1 before the first; with stop sequences only."""
    caches: PyTree


def row_keys(key: jax.Array, sample_index: jax.Array) -> jax.Array:
    """One key per row, a function of the run's key and the sample's own number only."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sample_index)


def batched(x: jax.Array) -> jax.Array:
    return constrain(x, "batch", *([None] * (x.ndim - 1)))


def repeat(x: jax.Array, copies: int) -> jax.Array:
    """`[B, …]` → `[B·copies, …]`, the copies of a row beside each other."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], copies, *x.shape[1:])).reshape(-1, *x.shape[1:])


def _seen(ids: jax.Array, mask: jax.Array, vocab: int) -> jax.Array:
    """bool `[B, vocab]`: the tokens of each prompt, padding aside."""

    def row(ids: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.zeros(vocab, bool).at[jnp.where(mask, ids, vocab)].set(True, mode="drop")

    return batched(jax.vmap(row)(ids, mask))


def stop_tail(rows: int, sampling: SamplingConfig) -> jax.Array | None:
    longest = max(map(len, sampling.stop_sequences), default=0)
    return batched(jnp.full((rows, longest), -1, jnp.int32)) if longest else None


def draw(rows: Rows, logits: jax.Array, key: jax.Array, sampling: SamplingConfig) -> tuple[Rows, jax.Array]:
    """Every live row's next token, from logits `[B, V]`: the rows after it, and its log-prob `[B]` (0 where done)."""
    keys = row_keys(key, rows.number)
    token, logprob = sample_token(logits, keys, rows.length, sampling, seen=rows.seen, temperature=rows.temperature)
    live = ~rows.done
    token = jnp.where(live, token, sampling.pad_token_id)
    length = rows.length + live
    ended = is_eos(token, sampling) | (length >= sampling.max_new_tokens)
    seen, tail = rows.seen, rows.tail
    if seen is not None:
        seen = jax.vmap(lambda row, token: row.at[token].set(True))(seen, token)
    if tail is not None:
        tail = jnp.concatenate([tail[:, 1:], token[:, None]], axis=1)
        ended |= ends_with_stop(tail, sampling) & (length > sampling.min_new_tokens)
    rows = rows.replace(length=length, token=token, done=rows.done | ended, seen=seen, tail=tail)
    return rows, jnp.where(live, logprob, 0.0)


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
    """Prefill B prompts and draw the first token of `copies` responses to each: rows and log-probs `[B·copies]`."""
    size, prompt_length = requests.ids.shape
    caches = init_cache(module, size, prompt_length)
    logits, caches = prefill(module, view, requests.ids, requests.mask, caches)
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
    return draw(rows, logits, key, sampling)


def idle(module: Decoder, requests: Requests, sampling: SamplingConfig, size: int) -> Rows:
    """`size` rows that are done before they began, with room for a prompt and the longest response to it."""
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
) -> tuple[Rows, jax.Array]:
    """Feed each row's last token, written at cache `column` (one, or `[B]`), and draw the next: rows, log-probs."""
    logits, caches = decode_step(module, view, rows.token, column, rows.start, rows.caches)
    return draw(rows.replace(caches=caches), logits, key, sampling)
