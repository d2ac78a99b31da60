"""Qwen2 (biases on query, key and value) and Qwen3 (normed queries and keys): Llama with windows on chosen layers."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.llama import LLAMA_TENSORS, kv_heads, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _windows_from_hf(hf: HFConfig) -> tuple[int, ...] | None:
    hf.refuse_unless("use_mrope", False)
    window = hf.size_or_none("sliding_window", 4096) if hf.take("use_sliding_window", False) else None
    layers, first = hf.size("num_hidden_layers"), hf.take("max_window_layers", 28)
    hf.take("sliding_window")
    types = hf.take("layer_types")
    if types is None:
        types = [_FULL if window is None or i < first else _SLIDING for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (_FULL, _SLIDING) for kind in types):
        raise hf.refuse("layer_types", types, f"it must name {layers} layers, each {_FULL!r} or {_SLIDING!r}")
    if window is None and _SLIDING in types:
        raise hf.refuse("layer_types", types, "it needs use_sliding_window=True and a sliding_window")
    if window is None or _SLIDING not in types:
        return None
    return tuple(0 if kind == _FULL else window for kind in types)


def _windows_to_hf(c: DecoderConfig) -> dict[str, object]:
    if c.windows is None:  # `sliding_window` and `max_window_layers` then have no effect
        return {"layer_types": [_FULL] * c.num_layers, "use_sliding_window": False}
    return {
        "layer_types": [_SLIDING if window else _FULL for window in c.windows],
        "use_sliding_window": True,
        "sliding_window": max(c.windows),
        "max_window_layers": next(i for i, window in enumerate(c.windows) if window),
    }


def qwen2_from_hf(hf: HFConfig) -> DecoderConfig:
    return llama_like_from_hf(
        hf,
        family="qwen2",
        bos=None,
        eos=None,
        num_kv_heads=kv_heads(hf, absent=32),
        max_positions=hf.size("max_position_embeddings", 32768),
        qkv_bias=True,
        windows=_windows_from_hf(hf),
    )


def qwen3_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.take("attention_bias", False)
    return llama_like_from_hf(
        hf,
        family="qwen3",
        bos=None,
        eos=None,
        num_kv_heads=kv_heads(hf, absent=32),
        head_dim=hf.size("head_dim", 128),
        max_positions=hf.size("max_position_embeddings", 32768),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=_windows_from_hf(hf),
    )


QWEN2 = Family(
    name="qwen2",
    classes="Qwen2",
    lm_class="Qwen2ForCausalLM",
    prefix="model",
    config_from_hf=qwen2_from_hf,
    config_to_hf=lambda c: llama_like_to_hf(c) | _windows_to_hf(c),
    tensors=LLAMA_TENSORS,
)

QWEN3 = Family(
    name="qwen3",
    classes="Qwen3",
    lm_class="Qwen3ForCausalLM",
    prefix="model",
    config_from_hf=qwen3_from_hf,
    config_to_hf=lambda c: llama_like_to_hf(c) | _windows_to_hf(c) | {"attention_bias": c.qkv_bias},
    tensors=(
        *LLAMA_TENSORS,
        Tensor("model.layers.{i}.self_attn.q_norm.weight", "layers/attn/query_norm/scale"),
        Tensor("model.layers.{i}.self_attn.k_norm.weight", "layers/attn/key_norm/scale"),
    ),
)
