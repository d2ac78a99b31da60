"""Llama: rotary positions, RMSNorm, SwiGLU, grouped key/value heads."""

from typing import Any

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.rope import rope_from_hf, rope_to_hf
from jaxrlhf.models.hf.mapping import FLAT, Family, HFConfig, Tensor, common_to_hf, linear

_HEADS = "num_attention_heads"


def kv_heads(hf: HFConfig, absent: int) -> int:
    """The number of key/value heads; null means as many as heads."""
    return hf.size("num_key_value_heads", absent if "num_key_value_heads" not in hf.items() else hf.size(_HEADS))


def llama_like_from_hf(
    hf: HFConfig,
    *,
    bos: int | None = 1,
    eos: int | None = 2,
    pad: int | None = None,
    rope: dict[str, object] | None = None,
    **own: object,
) -> DecoderConfig:
    """Reads the options that Llama and its descendants share; `own` holds the fields in which a family differs.

    `bos`, `eos` and `pad` are the defaults of transformers. `rope` holds what the family read itself instead of
    `rope_from_hf(hf)`.
    """
    hidden, heads = hf.size("hidden_size"), hf.size(_HEADS)
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "num_layers": hf.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": hf.size("num_key_value_heads", heads),
        "head_dim": hf.size("head_dim", hidden // heads),
        "intermediate_size": hf.size("intermediate_size"),
        "norm": "rmsnorm",
        "norm_eps": hf.positive("rms_norm_eps", 1e-6),
        "activation": hf.activation("hidden_act", "silu"),
        "gated_mlp": True,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tie_embeddings": hf.take("tie_word_embeddings", False),
        "attention_dropout": hf.rate("attention_dropout", 0.0),
        "initializer_range": hf.take("initializer_range", 0.02),
    }
    rope = rope_from_hf(hf) if rope is None else rope
    fields = {**fields, **rope, **hf.common(bos=bos, eos=eos, pad=pad), **own}
    return DecoderConfig(**fields)


def llama_like_to_hf(c: DecoderConfig) -> dict[str, object]:
    """The inverse of `llama_like_from_hf`."""
    return (
        common_to_hf(c)
        | rope_to_hf(c)
        | {
            "hidden_size": c.hidden_size,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.head_dim,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_positions,
            "rms_norm_eps": c.norm_eps,
            "hidden_act": c.activation,
            "attention_dropout": c.attention_dropout,
            "initializer_range": c.initializer_range,
        }
    )


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.width_and_heads("hidden_size", _HEADS)
    hf.take("pretraining_tp")  # how the matrices were once split: numerics only
    bias = hf.take("attention_bias", False)
    return llama_like_from_hf(
        hf,
        family="llama",
        max_positions=hf.size("max_position_embeddings", 2048),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.take("mlp_bias", False),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return llama_like_to_hf(c) | {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


_L = "model.layers.{i}."

# All but the norms of the layers, in which Llama's descendants differ.
LLAMA_MAPS = (
    Tensor("model.embed_tokens.weight", "embed/embedding"),
    *(
        tensor
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
        for tensor in (
            Tensor(f"{_L}self_attn.{theirs}.weight", f"layers/attn/{ours}/kernel", linear()),
            Tensor(f"{_L}self_attn.{theirs}.bias", f"layers/attn/{ours}/bias", FLAT),
        )
    ),
    Tensor(_L + "self_attn.o_proj.weight", "layers/attn/out/kernel", linear(inputs=2)),
    Tensor(_L + "self_attn.o_proj.bias", "layers/attn/out/bias"),
    *(
        tensor
        for name in ("up", "gate", "down")
        for tensor in (
            Tensor(f"{_L}mlp.{name}_proj.weight", f"layers/mlp/{name}/kernel", linear()),
            Tensor(f"{_L}mlp.{name}_proj.bias", f"layers/mlp/{name}/bias"),
        )
    ),
    Tensor("model.norm.weight", "final_norm/scale"),
)

LLAMA_TENSORS = (
    *LLAMA_MAPS,
    Tensor(_L + "input_layernorm.weight", "layers/attn_norm/scale"),
    Tensor(_L + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
)

QK_NORMS = (
    Tensor(_L + "self_attn.q_norm.weight", "layers/attn/query_norm/scale"),
    Tensor(_L + "self_attn.k_norm.weight", "layers/attn/key_norm/scale"),
)
"""Norms of queries and keys, in the families that have them."""

LLAMA = Family(
    name="llama",
    classes="Llama",
    lm_class="LlamaForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=LLAMA_TENSORS,
)
