"""Gemma, Gemma 2 and the text models of Gemma 3: norms by 1 + weight, scaled embeddings, a tanh-approximated GELU.

Gemma 2 adds norms of what attention and MLP produce, soft-caps and alternating windows; Gemma 3 normed queries and keys
instead of soft-caps, and a rope base of its own for layers with a window.
"""

from typing import Any

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.layer_types import ropes_from_hf, ropes_to_hf, windows_from_hf, windows_to_hf
from jaxrlhf.models.families.llama import LLAMA_MAPS, LLAMA_TENSORS, QK_NORMS, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor

_TANH = "gelu_pytorch_tanh"
_LOCAL_BASE = "rope_local_base_freq"


def _gemma_like(hf: HFConfig, kv_heads: int, **own: Any) -> DecoderConfig:
    if hf.take("use_bidirectional_attention"):
        raise hf.refuse("use_bidirectional_attention", True, "only causal models are")
    bias = hf.take("attention_bias", False)
    return llama_like_from_hf(
        hf,
        bos=2,
        eos=1,
        pad=0,
        num_kv_heads=hf.size("num_key_value_heads", kv_heads),
        head_dim=hf.size("head_dim", 256),
        norm_plus_one=True,
        embed_scale_sqrt=True,
        qkv_bias=bias,
        out_bias=bias,
        tie_embeddings=hf.take("tie_word_embeddings", True),
        **own,
    )


def _sandwiched(hf: HFConfig, *, period: int, final_softcap: float | None, **own: Any) -> DecoderConfig:
    """Gemma 2 and 3: every `period`-th layer sees everything, the others a window."""
    window = hf.size_or_none("sliding_window", 4096)
    return _gemma_like(
        hf,
        kv_heads=4,
        norm_placement="sandwich",
        attention_scale=hf.size("query_pre_attn_scalar", 256) ** -0.5,
        activation=hf.activation("hidden_activation", _TANH),
        logit_softcap=hf.positive_or_none("final_logit_softcapping", final_softcap),
        windows=windows_from_hf(hf, window, lambda i: bool((i + 1) % period)),
        **own,
    )


def gemma_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.refuse_unless("hidden_activation", _TANH)
    activation = hf.activation("hidden_act", _TANH)
    return _gemma_like(
        hf,
        kv_heads=16,
        family="gemma",
        max_positions=hf.size("max_position_embeddings", 8192),
        activation="gelu_new" if activation == "gelu" else activation,  # the first releases said gelu, and meant tanh
    )


def gemma2_from_hf(hf: HFConfig) -> DecoderConfig:
    return _sandwiched(
        hf,
        period=2,
        final_softcap=30.0,
        family="gemma2",
        max_positions=hf.size("max_position_embeddings", 8192),
        attention_softcap=hf.positive_or_none("attn_logit_softcapping", 50.0),
    )


def gemma3_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.refuse_unless("attn_logit_softcapping", None)  # transformers does not apply it
    period = hf.size("sliding_window_pattern", 6)
    hf.take("_sliding_window_pattern")  # what transformers 5 writes beside the layer_types that it made
    return _sandwiched(
        hf,
        period=period,
        final_softcap=None,
        family="gemma3_text",
        max_positions=hf.size("max_position_embeddings", 131072),
        qk_norm=True,
        rope=ropes_from_hf(hf, base=1e6, local_base=1e4, local_name=_LOCAL_BASE),
    )


def _activation_to_hf(c: DecoderConfig) -> str:
    return _TANH if c.activation == "gelu_new" else c.activation


def gemma_to_hf(c: DecoderConfig) -> dict[str, object]:
    return llama_like_to_hf(c) | {"hidden_act": _activation_to_hf(c), "attention_bias": c.qkv_bias}


def gemma2_to_hf(c: DecoderConfig) -> dict[str, object]:
    values = gemma_to_hf(c) | windows_to_hf(c)
    values["hidden_activation"] = values.pop("hidden_act")
    scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
    values["query_pre_attn_scalar"] = round(scale**-2)
    return values | {"attn_logit_softcapping": c.attention_softcap, "final_logit_softcapping": c.logit_softcap}


_L = "model.layers.{i}."

GEMMA2_TENSORS = (
    *LLAMA_MAPS,
    Tensor(_L + "input_layernorm.weight", "layers/attn_norm/scale"),
    Tensor(_L + "post_attention_layernorm.weight", "layers/attn_out_norm/scale"),
    Tensor(_L + "pre_feedforward_layernorm.weight", "layers/mlp_norm/scale"),
    Tensor(_L + "post_feedforward_layernorm.weight", "layers/mlp_out_norm/scale"),
)

GEMMA = Family(
    name="gemma",
    classes="Gemma",
    lm_class="GemmaForCausalLM",
    prefix="model",
    config_from_hf=gemma_from_hf,
    config_to_hf=gemma_to_hf,
    rewritten=frozenset({"hidden_act"}),  # 4.48 to 4.57 take the gelu of the first releases at its word
    tensors=LLAMA_TENSORS,
)

GEMMA2 = Family(
    name="gemma2",
    classes="Gemma2",
    lm_class="Gemma2ForCausalLM",
    prefix="model",
    config_from_hf=gemma2_from_hf,
    config_to_hf=gemma2_to_hf,
    tensors=GEMMA2_TENSORS,
)

GEMMA3 = Family(
    name="gemma3_text",
    classes="Gemma3Text",
    lm_class="Gemma3ForCausalLM",
    prefix="model",
    config_from_hf=gemma3_from_hf,
    config_to_hf=lambda c: gemma2_to_hf(c) | ropes_to_hf(c, local_name=_LOCAL_BASE),
    tensors=(*GEMMA2_TENSORS, *QK_NORMS),
)
