"""Token log-probs and entropy straight from hidden states, without ever holding the full `[B, T, V]` logits."""

import jax
import jax.numpy as jnp

from jaxrlhf.kernels.attention import NEGATIVE


def project_logits(hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, vocab_size: int) -> jax.Array:
    """Float32 logits `[..., V_padded]` of hidden `[..., D]` and weight `[V_padded, D]`; padded columns get -1e30."""
    logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if weight.shape[0] != vocab_size:
        logits = jnp.where(jnp.arange(weight.shape[0]) < vocab_size, logits, NEGATIVE)
    return logits


def token_logprobs(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    vocab_size: int,
    bias: jax.Array | None = None,
    temperature: float = 1.0,
    chunk: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden · weightᵀ / temperature)[label] and the entropy of that distribution, per token.

    hidden `[B, T, D]`; weight `[V_padded, D]`, of which the first `vocab_size` rows are real; labels `[B, T]` int.
    Works through `chunk` positions at a time and recomputes each chunk's logits in the backward pass, so peak extra
    memory is `B · chunk · V` floats. Returns two float32 arrays `[B, T]`.
    """
    batch, length, width = hidden.shape

    @jax.checkpoint
    def one_chunk(hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = project_logits(hidden, weight, bias, vocab_size) / temperature
        log_z = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        shifted = logits - log_z[..., None]
        entropy = -jnp.sum(jnp.exp(shifted) * jnp.where(shifted > NEGATIVE / 2, shifted, 0.0), axis=-1)
        return picked - log_z, entropy

    if length <= chunk:
        return one_chunk(hidden, labels)
    count = -(-length // chunk)
    padding = count * chunk - length
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, count, chunk, width).swapaxes(0, 1)
    labels = jnp.pad(labels, ((0, 0), (0, padding))).reshape(batch, count, chunk).swapaxes(0, 1)
    logprobs, entropy = jax.lax.map(lambda xs: one_chunk(*xs), (hidden, labels))
    return tuple(x.swapaxes(0, 1).reshape(batch, count * chunk)[:, :length] for x in (logprobs, entropy))
