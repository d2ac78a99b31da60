"""Sampling the next token with one random key per row, and the end of a response (docs/generation.md)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxrlhf.config import (
    Derived,
    Gt,
    Le,
    MayChange,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Settings,
    alias,
)
from jaxrlhf.errors import InputError
from jaxrlhf.sharding import platform

_EXCLUDED = -1e30


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """Settings of sampling. Hashable: each distinct value compiles its own generate program."""

    max_new_tokens: Annotated[PositiveInt, alias("max_answer_seq_len", "response_length")] = 256
    """Longest response in tokens, EOS included."""
    temperature: NonNegative = 1.0
    """Sampling temperature, which divides the logits; log-probs are taken at the same one; 0: greedy."""
    top_k: NonNegativeInt = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    eos_token_id: Derived[int | tuple[int, ...] | None] = None
    """A row ends after one of these; None: every response has max_new_tokens tokens."""
    pad_token_id: Derived[int] = 0
    """Fills finished rows; the mask, not this id, says where a response ends."""
    min_new_tokens: Annotated[NonNegativeInt, alias("min_answer_seq_len")] = 0
    """Fewest tokens of a response: EOS is not sampled, and no stop string ends a response, before them."""
    repetition_penalty: Positive = 1.0
    """Divides positive logits of tokens seen in prompt or response, multiplies negative ones; log-probs are taken
    without it; 1: off."""
    stop_sequences: Derived[tuple[tuple[int, ...], ...]] = ()
    """A row ends once its response ends with one of these token sequences, which stays in the response."""
    samples_per_prompt: Annotated[PositiveInt, alias("num_generations", "rloo_k", "n")] = 1
    """Responses to each prompt, from one prefill: the groups of grpo and rloo. Rows are prompt-major, `[B·n, …]`."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response, matched as the tokens that the tokenizer makes of each alone (chat: as text)."""

    def check(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        object.__setattr__(self, "stop_sequences", tuple(tuple(int(i) for i in ids) for ids in self.stop_sequences))
        for name in ("stop_sequences", "stop_strings"):
            if not all(getattr(self, name)):
                raise InputError(f"{name}={list(getattr(self, name))} must hold no empty text or sequence")
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}"
            )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The EOS ids as a tuple; empty for none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def ended(self, response: Sequence[int]) -> bool:
        """True if a finished response ended with EOS or a stop sequence, false if it reached the longest length.

        A stop sequence before min_new_tokens does not count, because it did not end the row.
        """
        ids = tuple(int(i) for i in response)
        if not ids:
            return False
        stopped = any(ids[-len(stop) :] == stop for stop in self.stop_sequences) and len(ids) > self.min_new_tokens
        return ids[-1] in self.eos_ids or stopped

    @property
    def logprob_temperature(self) -> float:
        """The temperature of the distribution whose log-probs are reported and trained; 1 when greedy."""
        return self.temperature or 1.0


@dataclass(frozen=True)
class GenerationConfig(Settings):
    """The form in which the generate program holds its rows."""

    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Type of cached keys and values: int8 and fp8 (float8_e4m3fn) with a scale per head and token take half the memory
    and traffic of bfloat16 and round what attention reads; auto: the compute dtype."""
    generation_slots: MayChange[NonNegativeInt] = 0
    """Continuous batching: responses in progress at a time; one that ends makes room for the next prompt. 0: all at
    once."""


def largest(x: jax.Array) -> jax.Array:
    """Index of the largest entry of each row of `x` `[B, V]`, the first of equals: int32 `[B]`.

    A CPU compares XLA's pairs of value and index one at a time. Two plain reductions take a tenth of that there.
    Elsewhere one pass, fused with what computes `x`, reads less.
    """
    if platform() != "cpu":
        return jnp.argmax(x, axis=1).astype(jnp.int32)
    columns = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    first = jnp.min(jnp.where(x == jnp.max(x, axis=1, keepdims=True), columns, x.shape[1]), axis=1)
    return jnp.minimum(first, x.shape[1] - 1)


def _entry(x: jax.Array, column: jax.Array) -> jax.Array:
    """`x[b, column[b]]` of `x` `[B, V]`: `[B]`."""
    return jnp.take_along_axis(x, column[:, None], axis=1)[:, 0]


def sample_truncated(
    logits: jax.Array, noise: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array
) -> jax.Array:
    """Samples among the tokens that top-k leaves, then top-p: int32 `[B]`. Ties at an edge stay.

    A sample is the largest of the logits plus Gumbel noise. If truncation excludes that token, it excludes every token
    that is not likelier, so the search goes on among the likelier ones, with the same noise. The result is the largest
    of the tokens that truncation leaves, although their edge is never searched for. With top_p = 0.9 most rows find
    it at once; a sort or a bisection would cost several times as much as the noise.

    Args:
        logits: float32 `[B, V]`.
        noise: float32 `[B, V]`, from the Gumbel distribution.
        top_k: Number of tokens to keep, one for all rows or `[B]`; 0: all.
        top_p: Probability that the kept tokens reach, one for all rows or `[B]`; 1: all.
    """

    def search(logits: jax.Array) -> jax.Array:
        limits = []  # a token stays if the weights of all likelier ones sum to less than the limit
        if not isinstance(top_k, int) or top_k > 0:
            limits.append((jnp.ones_like(logits), jnp.where(jnp.asarray(top_k) > 0, top_k, jnp.inf)))
        if not isinstance(top_p, float) or top_p < 1:
            limits.append((jax.nn.softmax(logits, axis=1), jnp.where(jnp.asarray(top_p) < 1, top_p, jnp.inf)))
        noisy = logits + noise

        def excluded(token: jax.Array) -> jax.Array:
            likelier = logits > _entry(logits, token)[:, None]
            sums = [(jnp.sum(jnp.where(likelier, weights, 0.0), axis=1), most) for weights, most in limits]
            beyond = jnp.any(jnp.stack([total >= most for total, most in sums]), axis=0)
            return beyond & jnp.any(likelier, axis=1)  # the likeliest token stays, also with top_p = 0

        def among_likelier(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            token, out = carry
            likelier = logits > _entry(logits, token)[:, None]
            token = jnp.where(out, largest(jnp.where(likelier, noisy, -jnp.inf)), token)
            return token, out & excluded(token)

        first = largest(noisy)
        return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), among_likelier, (first, excluded(first)))[0]

    def truncated(logits: jax.Array) -> jax.Array:
        # Top-p counts probabilities among the top k, so the edge of top-k is needed where both are set.
        both = (top_k > 0) & (top_p < 1)
        return search(_if_any(both, lambda x: _keep_top_k(x, top_k), logits))

    return _if_any((top_k > 0) | (top_p < 1), truncated, logits, lambda x: largest(x + noise))


def _if_any(
    wanted: bool | jax.Array,
    change: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    otherwise: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """`change(x)` if anything is wanted, else `otherwise(x)`."""
    if isinstance(wanted, bool):
        return change(x) if wanted else otherwise(x)
    return jax.lax.cond(jnp.any(wanted), change, otherwise, x)


def _keep_top_k(logits: jax.Array, top_k: int | jax.Array) -> jax.Array:
    """Logits `[B, V]` with -1e30 outside the top k, one for all rows or `[B]`; 0: all.

    The edge is found by bisection over the bits of a float, which takes 32 passes. A sort takes far longer: 60 times
    on a CPU, for 50,000 tokens.
    """
    most = jnp.where(jnp.asarray(top_k) > 0, top_k, logits.shape[1])
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)  # integers in the order of the floats

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.sum(order > middle[:, None], axis=1, dtype=jnp.int32) < most
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    edge, _ = jax.lax.fori_loop(0, 32, halve, (order.min(axis=1), order.max(axis=1)))
    return jnp.where(order < edge[:, None], _EXCLUDED, logits)


def is_eos(tokens: jax.Array, config: SamplingConfig) -> jax.Array:
    """Marks the tokens that are one of the EOS ids: bool, in the shape of `tokens`."""
    if not config.eos_ids:
        return jnp.zeros(tokens.shape, bool)
    return jnp.isin(tokens, jnp.asarray(config.eos_ids))


def ends_with_stop(tail: jax.Array, config: SamplingConfig) -> jax.Array:
    """Marks the rows whose last tokens are a stop sequence: bool `[B]`.

    Args:
        tail: int32 `[B, K]`, the last tokens of each response, -1 before its beginning. K is at least the length of the
            longest stop sequence.
        config: With at least one stop sequence.
    """
    found = [jnp.all(tail[:, -len(ids) :] == jnp.asarray(ids), axis=1) for ids in config.stop_sequences]
    return jnp.any(jnp.stack(found), axis=0)


def ended_rows(tokens: jax.Array, response_mask: jax.Array, config: SamplingConfig) -> jax.Array:
    """Computes `SamplingConfig.ended` of each row: bool `[B]`.

    Args:
        tokens: int `[B, T]`.
        response_mask: `[B, T]`; the tokens before a hole (an environment's tokens) are those of an earlier turn.
        config: EOS ids, stop sequences and min_new_tokens.
    """
    length = jnp.sum(response_mask, axis=1)
    last = jnp.max(jnp.where(response_mask, jnp.arange(response_mask.shape[1]), -1), axis=1)
    longest = max(map(len, config.stop_sequences), default=1)
    columns = last[:, None] + 1 - longest + jnp.arange(longest)
    there = jnp.take_along_axis(response_mask, jnp.maximum(columns, 0), axis=1).astype(bool) & (columns >= 0)
    there = jnp.flip(jax.lax.cummin(jnp.flip(there, axis=1).astype(jnp.int32), axis=1), axis=1) > 0
    tail = jnp.where(there, jnp.take_along_axis(tokens, jnp.maximum(columns, 0), axis=1), -1)
    ended = is_eos(tail[:, -1], config) & (length > 0)
    if config.stop_sequences:
        ended |= ends_with_stop(tail, config) & (length > config.min_new_tokens)
    return ended


def penalize(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """Applies the repetition penalty to logits `[B, V]` of tokens that are set in `seen`, bool `[B, V]`.

    Source: Keskar et al. 2019 (arXiv 1909.05858), in the form of transformers.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_token(
    logits: jax.Array,
    row_keys: jax.Array,
    step: jax.Array | int,
    config: SamplingConfig,
    *,
    seen: jax.Array | None = None,
    temperature: jax.Array | None = None,
    truncation: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row.

    A row's sample depends only on its own key and its `step`. The log-prob is that of the tempered distribution before
    penalty, minimum length, top-k and top-p, because the train program computes the same quantity.

    Args:
        logits: `[B, V]`.
        row_keys: Random key of each row, `[B]`.
        step: Number of the token within the response, int scalar or `[B]`.
        config: Temperature, top-k, top-p and the other options.
        seen: bool `[B, V]`: tokens that the repetition penalty applies to.
        temperature: `[B]`, replaces the config's; 0 makes its row greedy.
        truncation: top_k and top_p, `[B]` each, replace the config's.

    Returns:
        Tokens int32 `[B]`, and their log-probs float32 `[B]`.
    """
    logits = logits.astype(jnp.float32)
    if temperature is None:
        divisor = config.logprob_temperature
    else:
        divisor = jnp.where(temperature > 0, temperature, 1.0).astype(jnp.float32)[:, None]
    scaled = logits / divisor
    allowed = scaled if seen is None else penalize(logits, seen, config.repetition_penalty) / divisor
    step = jnp.broadcast_to(step, logits.shape[:1])
    if config.min_new_tokens and config.eos_ids:
        forbidden = is_eos(jnp.arange(logits.shape[-1]), config) & (step < config.min_new_tokens)[:, None]
        allowed = jnp.where(forbidden, _EXCLUDED, allowed)
    if temperature is None and config.temperature == 0:
        tokens = largest(allowed)
    else:
        keys = jax.vmap(jax.random.fold_in)(row_keys, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        tokens = sample_truncated(allowed, noise, *(truncation or (config.top_k, config.top_p)))
        if temperature is not None:
            tokens = jnp.where(temperature > 0, tokens, largest(allowed))
    return tokens, _entry(scaled, tokens) - jax.nn.logsumexp(scaled, axis=-1)
