"""Continuous batching inside one compiled loop: a slot that is done gets the next prompt of a queue on the device.

An inner `while_loop` decodes until enough slots are free, an outer one refills them; the cache stays in place in both.
The batch is split into parts, and slots and queue into one group for each. A group refills its own slots from its own
part of the queue, so nothing moves between devices. The conditions of the loops are global.
"""

import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.engine.decoding import Requests, Rows, advance, batched, begin, idle, repeat
from jaxrlhf.engine.sampling import SamplingConfig
from jaxrlhf.models import Decoder, GenerationView
from jaxrlhf.sharding import constrain, split

TURNS = 8
"""Slots are refilled once a TURNS-th of them is free: a prefill of several prompts costs little more than of one."""


class _Work(flax.struct.PyTreeNode):
    """The state of the loops: S slots and the results of N requests, in G groups."""

    rows: Rows
    entry: jax.Array
    """int32 `[S]`: number of a slot's request within its group."""
    taken: jax.Array
    """int32 `[G]`: requests that have had a slot."""
    tokens: jax.Array
    """int32 `[G, N/G, longest]`; -1 where nothing was sampled."""
    logprobs: jax.Array
    """float32 `[G, N/G, longest]`."""

    def record(self, entry: jax.Array, column: jax.Array, token: jax.Array, logprob: jax.Array) -> "_Work":
        """Writes samples `[G, …]` to the columns of their requests; an entry of N/G is no request and is dropped."""
        write = jax.vmap(lambda x, entry, column, new: x.at[entry, column].set(new, mode="drop"))
        return self.replace(
            tokens=write(self.tokens, entry, column, token), logprobs=write(self.logprobs, entry, column, logprob)
        )


def _flat(x: jax.Array) -> jax.Array:
    """`[G, M, …]` → `[G·M, …]`."""
    return batched(x.reshape(-1, *x.shape[2:]))


def _put(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """Writes `new` `[G·R, …]` to the groups' slots `[G, R]` of `old` `[S, …]`; a slot of S/G is none and is dropped.

    A cache `[S, H, L, …]` takes its first columns from a shorter one.
    """
    slots, rows = (x.reshape(slot.shape[0], -1, *x.shape[1:]) for x in (old, new))
    inner = (slice(None), slice(new.shape[2])) if old.ndim > 2 else ()
    x = jax.vmap(lambda o, n, s: o.at[s, *inner].set(n, mode="drop"))(slots, rows, slot).reshape(old.shape)
    return constrain(x, "batch", "kv_heads", *[None] * (x.ndim - 2)) if old.ndim > 2 else batched(x)


def continuous_batch(
    module: Decoder, view: GenerationView, requests: Requests, key: jax.Array, sampling: SamplingConfig, slots: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Generates the responses of N = B·n requests with `slots` rows, a multiple of the parts of the batch.

    Returns tokens int32, mask bool and log-probs float32, each `[N, longest]`.
    """
    (prompts, prompt_length), longest = requests.ids.shape, sampling.max_new_tokens
    copies = sampling.samples_per_prompt
    groups = split("batch", slots)
    held, queued = slots // groups, prompts * copies // groups
    refill = max(1, slots // TURNS // groups)

    def grouped(x: jax.Array) -> jax.Array:
        return batched(x.reshape(groups, -1, *x.shape[1:]))

    queue = requests.replace(ids=repeat(requests.ids, copies), mask=repeat(requests.mask, copies))
    queue = jax.tree.map(grouped, queue)

    def fill(work: _Work) -> _Work:
        free = jax.vmap(lambda done: jnp.nonzero(done, size=refill, fill_value=held)[0])(grouped(work.rows.done))
        entry = work.taken[:, None] + jnp.arange(refill)
        slot = jnp.where(entry < queued, free, held)
        used = slot < held
        chosen = jax.tree.map(lambda x: _flat(jax.vmap(lambda x, i: x[i])(x, jnp.minimum(entry, queued - 1))), queue)
        fresh, logprob = begin(module, view, chosen, key, sampling, cache_length=prompt_length)
        entry = jnp.where(used, entry, queued)
        work = work.replace(
            rows=jax.tree.map(lambda old, new: _put(old, new, slot), work.rows, fresh),
            entry=_put(work.entry, _flat(entry), slot),
            taken=work.taken + jnp.sum(used, axis=1, dtype=jnp.int32),
        )
        return work.record(entry, jnp.zeros_like(entry), grouped(fresh.token), grouped(logprob))

    def step(work: _Work) -> _Work:
        entry = grouped(jnp.where(work.rows.done, queued, work.entry))
        column = prompt_length + jnp.maximum(work.rows.length, 1) - 1
        rows, logprob = advance(module, view, work.rows, column, key, sampling)
        work = work.replace(rows=rows)
        return work.record(entry, grouped(rows.length - 1), grouped(rows.token), grouped(logprob))

    def waiting(work: _Work) -> jax.Array:
        """True if a full refill is possible, or as many of the remaining requests have a free slot as ever can."""
        left = queued - work.taken
        ready = jnp.sum(jnp.minimum(jnp.sum(grouped(work.rows.done), axis=1), left))
        return (ready > 0) & (ready >= jnp.minimum(refill * groups, jnp.sum(jnp.minimum(held, left))))

    def turn(work: _Work) -> _Work:
        return jax.lax.while_loop(lambda w: ~jnp.all(w.rows.done) & ~waiting(w), step, fill(work))

    work = _Work(
        rows=idle(module, requests, sampling, slots),
        entry=batched(jnp.full(slots, queued, jnp.int32)),
        taken=batched(jnp.zeros(groups, jnp.int32)),
        tokens=batched(jnp.full((groups, queued, longest), -1, jnp.int32)),
        logprobs=batched(jnp.zeros((groups, queued, longest), jnp.float32)),
    )
    work = jax.lax.while_loop(lambda w: jnp.any(w.taken < queued) | ~jnp.all(w.rows.done), turn, work)
    tokens = _flat(work.tokens)
    return jnp.where(tokens < 0, sampling.pad_token_id, tokens), tokens >= 0, _flat(work.logprobs)
