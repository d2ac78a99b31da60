"""Activation functions by our names (`ACTIVATIONS` of models/config.py)."""

from collections.abc import Callable

import flax.linen as nn
import jax

Activation = Callable[[jax.Array], jax.Array]


def _gelu(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=False)


def _gelu_new(x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=True)


ACTIVATION_FUNCTIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "gelu": _gelu,
    "gelu_new": _gelu_new,
    "silu": nn.silu,
}
