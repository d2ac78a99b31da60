"""SmolLM3: Llama with some layers that do not rotate queries and keys."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.layer_types import windows_from_hf, windows_to_hf
from jaxrlhf.models.families.llama import LLAMA_TENSORS, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.families.rope import rope_from_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig


def _rotary_layers(hf: HFConfig) -> tuple[bool, ...]:
    """Reads `no_rope_layers`, in which 1 means that a layer rotates."""
    layers, interval = hf.size("num_hidden_layers"), hf.size("no_rope_layer_interval", 4)
    marks = hf.take("no_rope_layers")
    if marks is None:
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(marks, list) or len(marks) < layers or any(mark not in (0, 1) for mark in marks):
        raise hf.refuse("no_rope_layers", marks, f"it must be a list of at least {layers} numbers, each 0 or 1")
    return tuple(map(bool, marks[:layers]))


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.take("attention_bias", False)
    rotated = _rotary_layers(hf)
    window = hf.size_or_none("sliding_window", None)
    window = window if hf.take("use_sliding_window", False) else None
    return llama_like_from_hf(
        hf,
        bos=128000,
        eos=128001,
        pad=128004,
        rope=rope_from_hf(hf, default_base=2e6),
        family="smollm3",
        num_kv_heads=hf.size("num_key_value_heads", 4),
        max_positions=hf.size("max_position_embeddings", 32768),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.take("mlp_bias", False),
        tie_embeddings=hf.take("tie_word_embeddings", True),
        rotary_layers=None if all(rotated) else rotated,
        windows=windows_from_hf(hf, window, lambda i: window is not None and not rotated[i]),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    rotated = c.rotary_layers or (True,) * c.num_layers
    return (
        llama_like_to_hf(c)
        | windows_to_hf(c)
        | {
            "attention_bias": c.qkv_bias,
            "mlp_bias": c.mlp_bias,
            "no_rope_layers": [int(x) for x in rotated],
            "use_sliding_window": c.windows is not None,
        }
    )


SMOLLM3 = Family(
    name="smollm3",
    classes="SmolLM3",
    lm_class="SmolLM3ForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=LLAMA_TENSORS,
)
