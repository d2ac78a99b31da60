"""Rotary position embedding: frequencies (with the rope scaling variants) and the rotation."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """`[rotated_dim / 2]` float32 frequencies; `rope_type` linear divides them, llama3 divides the low ones smoothly.

    Source: Su et al. 2021 (arXiv 2104.09864); Llama 3.1's published scaling rule.
    """
    dim = config.rotated_dim
    frequencies = 1.0 / config.rotary_base ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = dict(config.rope_scaling or ())
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        frequencies = frequencies / float(scaling["factor"])
    elif kind == "llama3":
        factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
        context = float(scaling["original_max_position_embeddings"])
        wavelengths = 2 * np.pi / frequencies
        smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / factor + smooth * frequencies
    elif kind != "default":
        raise InputError(f"{config.family} config: rope_type {kind!r} is not supported (default, linear, llama3 are)")
    return frequencies.astype(np.float32)


def rotation(config: DecoderConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 `[B, 1, T, rotated_dim / 2]`, for integer positions `[B, T]`."""
    angles = positions[:, None, :, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotate the leading `2 · cos.shape[-1]` features of `x` `[B, H, T, D]`; the rest pass through."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    parts = (first * cos - second * sin, second * cos + first * sin)
    turned = jnp.stack(parts, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(parts, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
