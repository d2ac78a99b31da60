"""OLMo 2 and 3: norms of what attention and MLP produce, one norm over all heads' queries and one over all keys.

OLMo 3 adds windows on three of four layers; rope scaling applies to the fourth.
"""

from typing import Any

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.layer_types import ropes_from_hf, ropes_to_hf, windows_from_hf, windows_to_hf
from jaxrlhf.models.families.llama import LLAMA_MAPS, QK_NORMS, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor


def _olmo_like(hf: HFConfig, **own: Any) -> DecoderConfig:
    bias = hf.take("attention_bias", False)
    return llama_like_from_hf(
        hf,
        bos=None,
        eos=50279,
        pad=1,
        max_positions=hf.size("max_position_embeddings", 2048),
        norm_eps=hf.positive("rms_norm_eps", 1e-5),
        norm_placement="branch",
        qk_norm=True,
        qk_norm_joint=True,
        qkv_bias=bias,
        out_bias=bias,
        **own,
    )


def olmo2_from_hf(hf: HFConfig) -> DecoderConfig:
    return _olmo_like(hf, family="olmo2")


def olmo3_from_hf(hf: HFConfig) -> DecoderConfig:
    return _olmo_like(
        hf,
        family="olmo3",
        windows=windows_from_hf(hf, hf.size_or_none("sliding_window", 4096), lambda i: (i + 1) % 4 != 0),
        rope=ropes_from_hf(hf, base=5e5, local_base=5e5),
    )


def olmo2_to_hf(c: DecoderConfig) -> dict[str, object]:
    return llama_like_to_hf(c) | {"attention_bias": c.qkv_bias}


_L = "model.layers.{i}."

OLMO2_TENSORS = (
    *LLAMA_MAPS,
    *QK_NORMS,
    Tensor(_L + "post_attention_layernorm.weight", "layers/attn_out_norm/scale"),
    Tensor(_L + "post_feedforward_layernorm.weight", "layers/mlp_out_norm/scale"),
)

OLMO2 = Family(
    name="olmo2",
    classes="Olmo2",
    lm_class="Olmo2ForCausalLM",
    prefix="model",
    config_from_hf=olmo2_from_hf,
    config_to_hf=olmo2_to_hf,
    tensors=OLMO2_TENSORS,
)

OLMO3 = Family(
    name="olmo3",
    classes="Olmo3",
    lm_class="Olmo3ForCausalLM",
    prefix="model",
    config_from_hf=olmo3_from_hf,
    config_to_hf=lambda c: olmo2_to_hf(c) | windows_to_hf(c) | ropes_to_hf(c),
    tensors=OLMO2_TENSORS,
)
