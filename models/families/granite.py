"""Granite: Llama with factors on embeddings, attention scores, residual branches and logits."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.llama import LLAMA_TENSORS, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.take("attention_bias", False)
    divisor = hf.take("logits_scaling", 1.0)
    if not divisor > 0:
        raise hf.refuse("logits_scaling", divisor, "it must be positive")
    return llama_like_from_hf(
        hf,
        family="granite",
        max_positions=hf.size("max_position_embeddings", 2048),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.take("mlp_bias", False),
        embed_scale=float(hf.take("embedding_multiplier", 1.0)),
        attention_scale=float(hf.take("attention_multiplier", 1.0)),
        residual_scale=float(hf.take("residual_multiplier", 1.0)),
        logit_scale=1 / divisor,
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return llama_like_to_hf(c) | {
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "embedding_multiplier": c.embed_scale,
        "attention_multiplier": c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
        "residual_multiplier": c.residual_scale,
        # 15 digits: the inverse of an inverse is the number that the config had.
        "logits_scaling": float(f"{1 / c.logit_scale:.15g}"),
    }


GRANITE = Family(
    name="granite",
    classes="Granite",
    lm_class="GraniteForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=LLAMA_TENSORS,
)
