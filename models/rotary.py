"""Rotary position embedding: frequencies (with the rope scaling variants) and the rotation."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.config import DecoderConfig

ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Each supported `rope_type` with its parameters, in Hugging Face's names."""


def rope_scaling(config: DecoderConfig) -> dict[str, float | str]:
    """The rope parameters of a configuration by name; empty for plain rotary positions."""
    return dict(config.rope_scaling or ())


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """Computes the frequencies, float32 `[rotated_dim / 2]`.

    `rope_type` linear divides them by the factor, llama3 divides the low ones with a smooth transition. Source: Su et
    al. 2021 (arXiv 2104.09864); Llama 3.1's published scaling rule.
    """
    dim = config.rotated_dim
    frequencies = 1.0 / config.rotary_base ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = rope_scaling(config)
    kind = scaling.get("rope_type")
    if kind == "linear":
        frequencies = frequencies / float(scaling["factor"])
    elif kind == "llama3":
        factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        context = float(scaling["original_max_position_embeddings"])
        wavelengths = 2 * np.pi / frequencies
        smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / factor + smooth * frequencies
    return frequencies.astype(np.float32)


def _dynamic_frequencies(config: DecoderConfig, lengths: jax.Array) -> jax.Array:
    """The base grows with each sequence's length beyond `max_positions` (NTK-aware scaling).

    `lengths` is int `[B, 1]`, or `[B, T]` for packed rows; the result is `[B, 1, 1 or T, rotated_dim / 2]`. The length
    is that of the sequence itself, so that a sequence does not depend on its neighbours (transformers takes the longest
    of the batch). Keys of a sequence decoded past `max_positions` stay rotated under the earlier, smaller bases, as in
    transformers.
    """
    dim, factor = config.rotated_dim, float(rope_scaling(config)["factor"])
    length = jnp.maximum(lengths, config.max_positions)[:, None, :, None]
    growth = (factor * length / config.max_positions - (factor - 1)) ** (dim / (dim - 2))
    return (config.rotary_base * growth) ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotation(
    config: DecoderConfig, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes cos and sin, float32 `[B, 1, T, rotated_dim / 2]`.

    Args:
        config: The decoder's configuration.
        positions: int `[B, T]`.
        lengths: int `[B, T]`: length of each column's sequence in packed rows; None: each row is one sequence.
    """
    if rope_scaling(config).get("rope_type") == "dynamic":
        lengths = positions.max(-1, keepdims=True) + 1 if lengths is None else lengths
        frequencies = _dynamic_frequencies(config, lengths)
    else:
        frequencies = inverse_frequencies(config)
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotates the leading features of `x`; the rest pass through.

    Args:
        x: Queries or keys, `[B, H, T, D]`.
        cos: Float32 `[B, 1, T, rotated_dim / 2]`; twice this many features are rotated.
        sin: Like `cos`.
        interleaved: Pairs are neighbours (GPT-J) instead of the two halves (Llama, GPT-NeoX).
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    parts = (first * cos - second * sin, second * cos + first * sin)
    turned = jnp.stack(parts, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
