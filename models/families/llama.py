"""Llama: rotary positions, RMSNorm, SwiGLU, grouped key/value heads."""

from typing import Any

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.mapping import FLAT, Family, HFConfig, Tensor, common_to_hf, linear


def rope_from_hf(hf: HFConfig) -> dict[str, Any]:
    """rotary_base and rope_scaling from either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    parameters = dict(hf.take("rope_parameters", None) or hf.take("rope_scaling", None) or {})
    hf.take("rope_scaling")
    base = parameters.pop("rope_theta", None) or hf.take("rope_theta", 10000.0)
    hf.take("rope_theta")
    kind = parameters.pop("rope_type", None) or parameters.pop("type", "default")
    parameters.pop("type", None)
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in known:
        raise InputError(f"{hf.where}: rope_type {kind!r} is not supported (one of {sorted(known)})")
    if set(parameters) != set(known[kind]):
        raise InputError(
            f"{hf.where}: rope_type {kind!r} takes {sorted(known[kind])}, but the config has {sorted(parameters)}"
        )
    scaling = None if kind == "default" else tuple(sorted((parameters | {"rope_type": kind}).items()))
    return {"position": "rotary", "rotary_base": float(base), "rope_scaling": scaling}


def rope_to_hf(c: DecoderConfig) -> dict[str, Any]:
    parameters = dict(c.rope_scaling or (("rope_type", "default"),))
    return {"rope_parameters": parameters | {"rope_theta": c.rotary_base}}


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hidden, heads = hf.size("hidden_size"), hf.size("num_attention_heads")
    bias = hf.take("attention_bias", False)
    hf.take("pretraining_tp")  # how the matrices were once split: numerics only
    return DecoderConfig(
        family="llama",
        hidden_size=hidden,
        num_layers=hf.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=hf.size("num_key_value_heads", heads),
        head_dim=hf.size("head_dim", hidden // heads),
        intermediate_size=hf.size("intermediate_size"),
        max_positions=hf.size("max_position_embeddings", 2048),
        norm="rmsnorm",
        norm_eps=hf.take("rms_norm_eps", 1e-6),
        activation=hf.activation("hidden_act", "silu"),
        gated_mlp=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.take("mlp_bias", False),
        tie_embeddings=hf.take("tie_word_embeddings", False),
        attention_dropout=hf.take("attention_dropout", 0.0),
        initializer_range=hf.take("initializer_range", 0.02),
        **rope_from_hf(hf),
        **hf.common(bos=1, eos=2),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, Any]:
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
            "attention_bias": c.qkv_bias,
            "mlp_bias": c.mlp_bias,
            "attention_dropout": c.attention_dropout,
            "initializer_range": c.initializer_range,
        }
    )


_L = "model.layers.{i}."

LLAMA_TENSORS = (
    Tensor("model.embed_tokens.weight", "embed/embedding"),
    Tensor(_L + "input_layernorm.weight", "layers/attn_norm/scale"),
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
    Tensor(_L + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
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

LLAMA = Family(
    name="llama",
    classes="Llama",
    lm_class="LlamaForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=LLAMA_TENSORS,
    inert_tensors=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
