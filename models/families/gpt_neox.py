"""GPT-NeoX and Pythia: partial rotary positions, parallel residual with two norms (or sequential), interleaved QKV."""

from typing import Any

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.rope import rope_from_hf, rope_to_hf
from jaxrlhf.models.hf.mapping import (
    SCORE,
    Family,
    HFConfig,
    Tensor,
    bias_interleaved,
    common_to_hf,
    linear,
    linear_grouped,
)

_SHARE = "partial_rotary_factor"


def _rope_from_hf(hf: HFConfig, head_dim: int) -> tuple[dict[str, Any], int]:
    """Reads the rotary options and the number of rotated features.

    transformers 4.45 to 4.57 write `partial_rotary_factor` and `rope_theta` beside `rotary_pct` and `rotary_emb_base`,
    and read only the latter two.
    """
    rope = rope_from_hf(hf, extra=(_SHARE,), base_name="rotary_emb_base")
    hf.same("rope_theta", "rotary_emb_base", rope["rotary_base"])
    inside, older = rope.pop(_SHARE), hf.take("rotary_pct", 0.25)
    share = older if inside is None else inside
    hf.check_number("rotary_pct", share, positive=True)
    rotated = int(head_dim * share)
    if not 2 <= rotated <= head_dim:
        raise hf.refuse("rotary_pct", share, f"it rotates {rotated} of {head_dim} features")
    if inside is not None:
        hf.same("rotary_pct", f"rope_parameters.{_SHARE}", share)
    hf.same(_SHARE, "rotary_pct", share)
    return rope, rotated


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hidden, heads = hf.width_and_heads("hidden_size", "num_attention_heads")
    hf.refuse_unless("attention_probs_dropout_prob", 0)  # older names in published configs, which
    hf.refuse_unless("hidden_dropout_prob", 0)  # transformers does not read
    hf.take("classifier_dropout")  # of the token classification head
    bias = hf.take("attention_bias", True)
    rope, rotated = _rope_from_hf(hf, hidden // heads)
    dropout = hf.rate("hidden_dropout", 0.0)
    return DecoderConfig(
        family="gpt_neox",
        hidden_size=hidden,
        num_layers=hf.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=hf.size("intermediate_size"),
        max_positions=hf.size("max_position_embeddings", 2048),
        rotary_dim=rotated,
        norm_eps=hf.positive("layer_norm_eps", 1e-5),
        residual="parallel" if hf.take("use_parallel_residual", True) else "sequential",
        activation=hf.activation("hidden_act", "gelu"),
        qkv_bias=bias,
        out_bias=bias,
        tie_embeddings=hf.take("tie_word_embeddings", False),
        embed_dropout=dropout,
        attention_dropout=hf.rate("attention_dropout", 0.0),
        residual_dropout=dropout,
        initializer_range=hf.take("initializer_range", 0.02),
        **rope,
        **hf.common(bos=0, eos=2),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return (
        common_to_hf(c)
        | rope_to_hf(c, base_name="rotary_emb_base", share_name="rotary_pct")
        | {
            "hidden_size": c.hidden_size,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_positions,
            "layer_norm_eps": c.norm_eps,
            "use_parallel_residual": c.residual == "parallel",
            "hidden_act": c.activation,
            "attention_bias": c.qkv_bias,
            "attention_dropout": c.attention_dropout,
            "hidden_dropout": c.residual_dropout,
            "initializer_range": c.initializer_range,
        }
    )


_L = "gpt_neox.layers.{i}."
_QKV = ("layers/attn/query/", "layers/attn/key/", "layers/attn/value/")

GPT_NEOX = Family(
    name="gpt_neox",
    classes="GPTNeoX",
    lm_class="GPTNeoXForCausalLM",
    prefix="gpt_neox",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=(
        Tensor("gpt_neox.embed_in.weight", "embed/embedding"),
        Tensor(_L + "input_layernorm.weight", "layers/attn_norm/scale"),
        Tensor(_L + "input_layernorm.bias", "layers/attn_norm/bias"),
        Tensor(_L + "attention.query_key_value.weight", tuple(p + "kernel" for p in _QKV), linear_grouped()),
        Tensor(_L + "attention.query_key_value.bias", tuple(p + "bias" for p in _QKV), bias_interleaved()),
        Tensor(_L + "attention.dense.weight", "layers/attn/out/kernel", linear(inputs=2)),
        Tensor(_L + "attention.dense.bias", "layers/attn/out/bias"),
        Tensor(_L + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        Tensor(_L + "post_attention_layernorm.bias", "layers/mlp_norm/bias"),
        Tensor(_L + "mlp.dense_h_to_4h.weight", "layers/mlp/up/kernel", linear()),
        Tensor(_L + "mlp.dense_h_to_4h.bias", "layers/mlp/up/bias"),
        Tensor(_L + "mlp.dense_4h_to_h.weight", "layers/mlp/down/kernel", linear()),
        Tensor(_L + "mlp.dense_4h_to_h.bias", "layers/mlp/down/bias"),
        Tensor("gpt_neox.final_layer_norm.weight", "final_norm/scale"),
        Tensor("gpt_neox.final_layer_norm.bias", "final_norm/bias"),
    ),
    # Published files say embed_out; transformers 5 reads both names.
    heads=(Tensor("embed_out.weight", "lm_head/kernel", aliases=("lm_head.weight",)), SCORE),
)
