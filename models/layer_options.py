"""Options that may differ between the layers of one decoder, and the attention options of a configuration."""

import flax.struct
import jax
import jax.numpy as jnp

from jaxrlhf.models.attend import AttentionOptions
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.rotary import ropes


class LayerOptions(flax.struct.PyTreeNode):
    """Options that may differ between layers: plain numbers when unrolled, `[L]` arrays when scanned."""

    scale: jax.Array | float
    window: jax.Array | int
    rope: jax.Array | int | None = None
    """Index of the layer's kind among `ropes`; None if all layers are of one kind."""


def layer_options(config: DecoderConfig) -> list[LayerOptions]:
    """Returns the options of each layer, in order."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    windows = config.windows or (0,) * config.num_layers
    kinds, indices = ropes(config)
    return [
        LayerOptions(
            scale=scale / (i + 1 if config.scale_by_inverse_layer else 1),
            window=windows[i],
            rope=indices[i] if len(kinds) > 1 else None,
        )
        for i in range(config.num_layers)
    ]


def alibi_slopes(num_heads: int) -> jax.Array:
    """ALiBi slopes `[H]` float32 (Press et al. 2021, arXiv 2108.12409, with its rule for other head counts)."""
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return jnp.asarray(slopes, jnp.float32)


def attends_alike(config: DecoderConfig) -> bool:
    """True if scale and window are the same in all layers, so that kernels can have them as plain numbers."""
    return len({(float(x.scale), int(x.window)) for x in layer_options(config)}) == 1


def attention_options(config: DecoderConfig, options: LayerOptions, implementation: str) -> AttentionOptions:
    """Returns how a layer with `options` attends."""
    slopes = alibi_slopes(config.num_heads) if config.position == "alibi" else None
    return AttentionOptions(options.scale, options.window, slopes, implementation, config.attention_softcap)
