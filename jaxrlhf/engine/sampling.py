"""Sampling the next token with one random key per row, and the end of a response (docs/generation.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrlhf.errors import InputError

_EXCLUDED = -1e30


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. Hashable: each distinct value compiles its own generate program."""

    max_new_tokens: int = 256
    """Longest response, EOS included."""
    temperature: float = 1.0
    """Divides the logits; 0 means greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p."""
    eos_token_id: int | tuple[int, ...] | None = None
    """A row ends after one of these; None: every response has max_new_tokens tokens."""
    pad_token_id: int = 0
    """Fills finished rows; the mask, not this id, says where a response ends."""
    min_new_tokens: int = 0
    """EOS cannot be drawn, and no stop sequence ends a row, before this many tokens."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen in prompt or response are divided by it where positive, else multiplied; 1 is off."""
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    """A row ends once its response ends with one of these token sequences, which stays in the response."""
    samples_per_prompt: int = 1
    """n responses per prompt from one prefill; the rollout's rows are prompt-major, `[B·n, …]`."""

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        object.__setattr__(self, "stop_sequences", tuple(tuple(int(i) for i in ids) for ids in self.stop_sequences))
        for name, ok, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or positive"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "positive (1 is off)"),
            ("stop_sequences", all(self.stop_sequences), "free of empty sequences"),
            ("samples_per_prompt", self.samples_per_prompt >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
        ):
            if not ok:
                raise InputError(f"sampling: {name}={getattr(self, name)} must be {allowed}")

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


def truncate_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Applies top-k, then top-p, to float32 logits `[B, V]`: excluded entries become -1e30. Ties at the edge stay."""
    if 0 < config.top_k < logits.shape[-1]:
        edge = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < edge, _EXCLUDED, logits)
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        edge = jnp.min(jnp.where(before < config.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < edge, _EXCLUDED, logits)
    return logits


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
        tokens = jax.vmap(jax.random.categorical)(keys, truncate_logits(allowed, config))
        if temperature is not None:
            tokens = jnp.where(temperature > 0, tokens, jnp.argmax(allowed, axis=-1))
    picked = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), picked - jax.nn.logsumexp(scaled, axis=-1)
