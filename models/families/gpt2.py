"""GPT-2: learned positions, pre-norm, Conv1D weights, fused QKV."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor, bias_fused, common_to_hf, conv1d, conv1d_fused


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hidden, heads = hf.width_and_heads("n_embd", "n_head")
    hf.take("n_ctx")
    hf.take("reorder_and_upcast_attn")  # only numerics: scores and softmax are float32 here in any case
    for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        hf.take(f"summary_{name}")  # of GPT2DoubleHeadsModel
    return DecoderConfig(
        family="gpt2",
        hidden_size=hidden,
        num_layers=hf.size("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=hf.size("n_inner", 4 * hidden),
        max_positions=hf.size("n_positions"),
        norm_eps=hf.positive("layer_norm_epsilon", 1e-5),
        activation=hf.activation("activation_function", "gelu_new"),
        attention_scale=None if hf.take("scale_attn_weights", True) else 1.0,
        scale_by_inverse_layer=hf.take("scale_attn_by_inverse_layer_idx", False),
        tie_embeddings=hf.take("tie_word_embeddings", True),
        embed_dropout=hf.rate("embd_pdrop", 0.1),
        attention_dropout=hf.rate("attn_pdrop", 0.1),
        residual_dropout=hf.rate("resid_pdrop", 0.1),
        initializer_range=hf.take("initializer_range", 0.02),
        **hf.common(bos=50256, eos=50256),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return common_to_hf(c) | {
        "n_embd": c.hidden_size,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": None if c.intermediate_size == 4 * c.hidden_size else c.intermediate_size,
        "n_positions": c.max_positions,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": c.activation,
        "scale_attn_weights": c.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": c.scale_by_inverse_layer,
        "embd_pdrop": c.embed_dropout,
        "attn_pdrop": c.attention_dropout,
        "resid_pdrop": c.residual_dropout,
        "initializer_range": c.initializer_range,
    }


_H = "transformer.h.{i}."
_QKV = ("layers/attn/query/", "layers/attn/key/", "layers/attn/value/")

GPT2 = Family(
    name="gpt2",
    classes="GPT2",
    lm_class="GPT2LMHeadModel",
    prefix="transformer",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    tensors=(
        Tensor("transformer.wte.weight", "embed/embedding"),
        Tensor("transformer.wpe.weight", "embed_positions/embedding"),
        Tensor(_H + "ln_1.weight", "layers/attn_norm/scale"),
        Tensor(_H + "ln_1.bias", "layers/attn_norm/bias"),
        Tensor(_H + "attn.c_attn.weight", tuple(p + "kernel" for p in _QKV), conv1d_fused()),
        Tensor(_H + "attn.c_attn.bias", tuple(p + "bias" for p in _QKV), bias_fused()),
        Tensor(_H + "attn.c_proj.weight", "layers/attn/out/kernel", conv1d(inputs=2)),
        Tensor(_H + "attn.c_proj.bias", "layers/attn/out/bias"),
        Tensor(_H + "ln_2.weight", "layers/mlp_norm/scale"),
        Tensor(_H + "ln_2.bias", "layers/mlp_norm/bias"),
        Tensor(_H + "mlp.c_fc.weight", "layers/mlp/up/kernel", conv1d()),
        Tensor(_H + "mlp.c_fc.bias", "layers/mlp/up/bias"),
        Tensor(_H + "mlp.c_proj.weight", "layers/mlp/down/kernel", conv1d()),
        Tensor(_H + "mlp.c_proj.bias", "layers/mlp/down/bias"),
        Tensor("transformer.ln_f.weight", "final_norm/scale"),
        Tensor("transformer.ln_f.bias", "final_norm/bias"),
    ),
)
