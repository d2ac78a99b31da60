"""Drawing the next token: temperature, top-k, nucleus, minimum length, with one random key per row."""

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
    """EOS cannot be drawn before this many tokens."""

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name, ok, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or positive"),
            ("top_k", self.top_k >= 0, "0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
        ):
            if not ok:
                raise InputError(f"sampling: {name}={getattr(self, name)} must be {allowed}")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def logprob_temperature(self) -> float:
        """The temperature of the distribution whose log-probs are reported and trained; 1 when greedy."""
        return self.temperature or 1.0


def truncate_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Apply top-k, then top-p, to float32 logits `[B, V]`: excluded entries become -1e30. Ties at the edge stay."""
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


def sample_token(
    logits: jax.Array, row_keys: jax.Array, step: jax.Array | int, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """One token per row and its log-prob: int32 `[B]`, float32 `[B]`, from logits `[B, V]`.

    Row b's draw depends on its own key and `step` only. The log-prob is that of the tempered distribution before top-k
    and top-p, the quantity the train program computes.
    """
    logits = logits.astype(jnp.float32)
    scaled = logits / config.logprob_temperature
    allowed = scaled
    if config.min_new_tokens and config.eos_ids:
        is_eos = jnp.isin(jnp.arange(logits.shape[-1]), jnp.asarray(config.eos_ids))
        allowed = jnp.where(is_eos & (step < config.min_new_tokens), _EXCLUDED, scaled)
    if config.temperature == 0:
        tokens = jnp.argmax(allowed, axis=-1)
    else:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, step)
        tokens = jax.vmap(jax.random.categorical)(keys, truncate_logits(allowed, config))
    picked = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), picked - jax.nn.logsumexp(scaled, axis=-1)
