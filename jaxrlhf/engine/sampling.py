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

_EXCLUDED = -1e30


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How responses are sampled. Hashable: each distinct value compiles its own generate program."""

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
    """How the generate program holds its rows."""

    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Type of cached keys and values: int8 and fp8 (float8_e4m3fn) with a scale per head and token take half the memory
    and traffic of bfloat16 and round what attention reads; auto: the compute dtype."""
    generation_slots: MayChange[NonNegativeInt] = 0
    """Continuous batching: responses in progress at a time; one that ends makes room for the next prompt. 0: all at
    once."""


def truncate_logits(logits: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Applies top-k, then top-p, to float32 logits `[B, V]`: excluded entries become -1e30. Ties at the edge stay.

    Args:
        logits: `[B, V]`.
        top_k: Number of tokens to keep, one for all rows or `[B]`; 0: all.
        top_p: Probability that the kept tokens reach, one for all rows or `[B]`; 1: all.
    """

    def to_top_k(logits: jax.Array) -> jax.Array:
        most = jnp.where(jnp.asarray(top_k) > 0, top_k, logits.shape[-1])
        return _keep_largest(logits, jnp.ones_like(logits), most)

    def to_top_p(logits: jax.Array) -> jax.Array:
        most = jnp.where(jnp.asarray(top_p) < 1, top_p, 2.0)
        return _keep_largest(logits, jax.nn.softmax(logits, axis=-1), most)

    return _where_any(top_p < 1, to_top_p, _where_any(top_k > 0, to_top_k, logits))


def _where_any(wanted: bool | jax.Array, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`change(x)` if anything is wanted, else `x`."""
    if isinstance(wanted, bool):
        return change(x) if wanted else x
    return jax.lax.cond(jnp.any(wanted), change, lambda x: x, x)


def _keep_largest(logits: jax.Array, weights: jax.Array, most: jax.Array) -> jax.Array:
    """Keeps each entry of `logits` `[B, V]` above which the `weights` sum to less than `most`, one or `[B]`.

    The smallest such logit is found by bisection over the bits of a float, which takes 32 passes. A sort takes far
    longer: 60 times on a CPU, for 50,000 tokens.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)  # integers in the order of the floats

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.sum(jnp.where(order > middle[:, None], weights, 0.0), axis=-1) < most
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    edge, _ = jax.lax.fori_loop(0, 32, halve, (order.min(axis=-1), order.max(axis=-1)))
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
        response_mask: `[B, T]`; each row's response is one contiguous span.
        config: EOS ids, stop sequences and min_new_tokens.
    """
    length = jnp.sum(response_mask, axis=1)
    after = jnp.where(length > 0, jnp.argmax(response_mask, axis=1) + length, 0)
    longest = max(map(len, config.stop_sequences), default=1)
    columns = after[:, None] - longest + jnp.arange(longest)
    there = jnp.arange(longest) >= longest - length[:, None]
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
        tokens = jnp.argmax(allowed, axis=-1)
    else:
        keys = jax.vmap(jax.random.fold_in)(row_keys, step)
        tokens = jax.vmap(jax.random.categorical)(
            keys, truncate_logits(allowed, *(truncation or (config.top_k, config.top_p)))
        )
        if temperature is not None:
            tokens = jnp.where(temperature > 0, tokens, jnp.argmax(allowed, axis=-1))
    picked = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), picked - jax.nn.logsumexp(scaled, axis=-1)
