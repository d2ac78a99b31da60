"""BLOOM: ALiBi, a norm on the embeddings, QKV fused head by head."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor, bias_interleaved, common_to_hf, linear, linear_grouped


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hidden, heads = hf.width_and_heads("hidden_size", "n_head")
    hf.refuse_unless("n_inner", 4 * hidden)
    for name in ("pretraining_tp", "slow_but_exact", "attention_softmax_in_fp32"):
        hf.take(name)  # numerics: how partial sums were once split and rounded
    for name in ("bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add", "skip_bias_add_qkv"):
        hf.take(name)  # fused kernels of the original training code
    hf.take("offset_alibi")  # in published configs; transformers does not read it
    return DecoderConfig(
        family="bloom",
        hidden_size=hidden,
        num_layers=hf.size("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        max_positions=hf.size("seq_length", 2048),
        position="alibi",
        embed_norm=True,
        norm_eps=hf.positive("layer_norm_epsilon", 1e-5),
        residual_from_norm=hf.take("apply_residual_connection_post_layernorm", False),
        activation="gelu_new",
        tie_embeddings=hf.take("tie_word_embeddings", True),
        attention_dropout=hf.rate("attention_dropout", 0.0),
        residual_dropout=hf.rate("hidden_dropout", 0.0),
        initializer_range=hf.take("initializer_range", 0.02),
        **hf.common(bos=1, eos=2),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return common_to_hf(c) | {
        "hidden_size": c.hidden_size,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "seq_length": c.max_positions,
        "layer_norm_epsilon": c.norm_eps,
        "apply_residual_connection_post_layernorm": c.residual_from_norm,
        "attention_dropout": c.attention_dropout,
        "hidden_dropout": c.residual_dropout,
        "initializer_range": c.initializer_range,
    }


_H = "transformer.h.{i}."
_QKV = ("layers/attn/query/", "layers/attn/key/", "layers/attn/value/")

BLOOM = Family(
    name="bloom",
    classes="Bloom",
    lm_class="BloomForCausalLM",
    prefix="transformer",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    tensors=(
        Tensor("transformer.word_embeddings.weight", "embed/embedding"),
        Tensor("transformer.word_embeddings_layernorm.weight", "embed_norm/scale"),
        Tensor("transformer.word_embeddings_layernorm.bias", "embed_norm/bias"),
        Tensor(_H + "input_layernorm.weight", "layers/attn_norm/scale"),
        Tensor(_H + "input_layernorm.bias", "layers/attn_norm/bias"),
        Tensor(_H + "self_attention.query_key_value.weight", tuple(p + "kernel" for p in _QKV), linear_grouped()),
        Tensor(_H + "self_attention.query_key_value.bias", tuple(p + "bias" for p in _QKV), bias_interleaved()),
        Tensor(_H + "self_attention.dense.weight", "layers/attn/out/kernel", linear(inputs=2)),
        Tensor(_H + "self_attention.dense.bias", "layers/attn/out/bias"),
        Tensor(_H + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
        Tensor(_H + "post_attention_layernorm.bias", "layers/mlp_norm/bias"),
        Tensor(_H + "mlp.dense_h_to_4h.weight", "layers/mlp/up/kernel", linear()),
        Tensor(_H + "mlp.dense_h_to_4h.bias", "layers/mlp/up/bias"),
        Tensor(_H + "mlp.dense_4h_to_h.weight", "layers/mlp/down/kernel", linear()),
        Tensor(_H + "mlp.dense_4h_to_h.bias", "layers/mlp/down/bias"),
        Tensor("transformer.ln_f.weight", "final_norm/scale"),
        Tensor("transformer.ln_f.bias", "final_norm/bias"),
    ),
)
