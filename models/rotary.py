"""Rotary position embedding: frequencies (with the rope scaling variants) and the rotation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.models.config import DecoderConfig


class RopeType(NamedTuple):
    """The parameters of a `rope_type`, in Hugging Face's names."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = {
    "default": RopeType(),
    "linear": RopeType(("factor",)),
    "dynamic": RopeType(("factor",)),
    "llama3": RopeType(("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)),
    "yarn": RopeType(
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": RopeType(("short_factor", "long_factor", _ORIGINAL), ("factor", "attention_factor")),
}
"""Each supported `rope_type`."""


@dataclass(frozen=True)
class Rope:
    """The rotation of one kind of layers."""

    dim: int
    """Features of each head that are rotated."""
    base: float
    max_positions: int
    scaling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Rope parameters by name; empty for plain rotary positions."""

    @property
    def kind(self) -> str:
        """One of ROPE_TYPES."""
        return str(self.scaling.get("rope_type", "default"))

    def number(self, name: str, default: float | None = None) -> float:
        """A parameter; `default` if it is absent or null."""
        value = self.scaling.get(name)
        return float(default if value is None and default is not None else value)  # pyright: ignore[reportArgumentType]


def ropes(config: DecoderConfig) -> tuple[tuple[Rope | None, ...], tuple[int, ...]]:
    """Returns the kinds of rotation of a model's layers (None: not rotated), and the index of each layer's kind."""
    windows = config.windows or (0,) * config.num_layers
    rotated = config.rotary_layers or (True,) * config.num_layers
    dim, longest = config.rotated_dim, config.max_positions
    general = Rope(dim, config.rotary_base, longest, dict(config.rope_scaling or ()))
    local = general if config.local_rotary_base is None else Rope(dim, config.local_rotary_base, longest)
    layers = [(local if window else general) if on else None for window, on in zip(windows, rotated, strict=True)]
    kinds = tuple(dict.fromkeys(layers))
    return kinds, tuple(kinds.index(kind) for kind in layers)


def _llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Divides the low frequencies by the factor, with a smooth transition. Source: Llama 3.1's published rule."""
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((rope.number(_ORIGINAL) / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / rope.number("factor") + smooth * frequencies


def _yarn(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Divides frequencies that turn seldom within the original context by the factor, and keeps those that turn often.

    Source: Peng et al. 2023 (arXiv 2309.00071), section 3.2.
    """

    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.number(_ORIGINAL) / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dimension(rope.number("beta_fast", 32.0) or 32.0), dimension(rope.number("beta_slow", 1.0) or 1.0)
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(len(frequencies)) - low) / (high - low or 1e-3), 0.0, 1.0)
    return ramp * frequencies / rope.number("factor") + (1 - ramp) * frequencies


def inverse_frequencies(rope: Rope, *, long: bool = False) -> np.ndarray:
    """Computes the frequencies, float32 `[dim / 2]`. Source: Su et al. 2021 (arXiv 2104.09864).

    Args:
        rope: Its scaling may be any of ROPE_TYPES; `dynamic` frequencies are those of sequences within the context.
        long: Uses the long factors of `longrope` (Ding et al. 2024, arXiv 2402.13753) instead of the short ones.
    """
    frequencies = 1.0 / rope.base ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.number("factor")
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, frequencies)
    elif rope.kind == "longrope":
        frequencies = frequencies / np.asarray(rope.scaling["long_factor" if long else "short_factor"], np.float64)
    return frequencies.astype(np.float32)


def attention_factor(rope: Rope) -> float:
    """Factor on cos and sin, which `yarn` and `longrope` have so that attention stays as sharp in long contexts."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    given = rope.scaling.get("attention_factor")
    if given is not None:
        return float(given)
    factor = rope.number("factor", rope.max_positions / rope.number(_ORIGINAL))
    if factor <= 1:
        return 1.0
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(rope.number(_ORIGINAL)))
    scales = [float(rope.scaling.get(name) or 0.0) for name in ("mscale", "mscale_all_dim")]
    above, below = scales if all(scales) else (1.0, 0.0)
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


def _dynamic_frequencies(rope: Rope, lengths: jax.Array) -> jax.Array:
    """The base grows with each sequence's length beyond `max_positions` (NTK-aware scaling).

    `lengths` is int `[B, 1]`, or `[B, T]` for packed rows; the result is `[B, 1, 1 or T, dim / 2]`. The length is that
    of the sequence itself, so that a sequence does not depend on its neighbours (transformers takes the longest of the
    batch). Keys of a sequence decoded past `max_positions` stay rotated under the earlier, smaller bases, as in
    transformers.
    """
    dim, factor = rope.dim, rope.number("factor")
    length = jnp.maximum(lengths, rope.max_positions)[:, None, :, None]
    growth = (factor * length / rope.max_positions - (factor - 1)) ** (dim / (dim - 2))
    return (rope.base * growth) ** -(jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def _longrope_frequencies(rope: Rope, lengths: jax.Array, longest: int | None) -> jax.Array | np.ndarray:
    """The long factors apply to sequences beyond the original context, the short ones to others.

    As in `_dynamic_frequencies` the length is each sequence's own. Generation knows only how long a sequence may
    become, and its cached keys cannot be rotated anew: there `longest` decides for all rows.
    """
    original = rope.number(_ORIGINAL)
    short, long = inverse_frequencies(rope), inverse_frequencies(rope, long=True)
    if longest is not None:
        return long if longest > original else short
    return jnp.where((lengths > original)[:, None, :, None], long, short)


def _rotation_of(
    rope: Rope | None, width: int, positions: jax.Array, lengths: jax.Array | None, longest: int | None
) -> tuple[jax.Array, jax.Array]:
    shape = (positions.shape[0], 1, positions.shape[1], width)
    if rope is None:
        return jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    lengths = positions.max(-1, keepdims=True) + 1 if lengths is None else lengths
    if rope.kind == "dynamic":
        frequencies = _dynamic_frequencies(rope, lengths)
    elif rope.kind == "longrope":
        frequencies = _longrope_frequencies(rope, lengths, longest)
    else:
        frequencies = inverse_frequencies(rope)
    angles = positions[:, None, :, None].astype(jnp.float32) * frequencies
    cos, sin, factor = jnp.cos(angles), jnp.sin(angles), attention_factor(rope)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotation(
    config: DecoderConfig, positions: jax.Array, lengths: jax.Array | None = None, longest: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes cos and sin, float32 `[B, 1, T, rotated_dim / 2]`.

    If layers differ, the result has a leading axis of their kinds, in the order of `ropes`.

    Args:
        config: The decoder's configuration.
        positions: int `[B, T]`.
        lengths: int `[B, T]`: length of each column's sequence in packed rows; None: each row is one sequence.
        longest: Longest sequence that generation may produce; None: the sequences are whole.
    """
    kinds, _ = ropes(config)
    parts = [_rotation_of(kind, config.rotated_dim // 2, positions, lengths, longest) for kind in kinds]
    if len(parts) == 1:
        return parts[0]
    cos, sin = (jnp.stack(xs) for xs in zip(*parts, strict=True))
    return cos, sin


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
