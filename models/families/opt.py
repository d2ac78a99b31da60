"""OPT: learned positions offset by 2, pre- or post-norm (350m), optional projections around narrower embeddings."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.mapping import FLAT, Family, HFConfig, Tensor, common_to_hf, linear


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hidden, heads = hf.width_and_heads("hidden_size", "num_attention_heads")
    pre_norm = hf.take("do_layer_norm_before", True)
    no_final_norm = hf.take("_remove_final_layer_norm", False)
    bias = hf.take("enable_bias", True)
    hf.refuse_unless("layer_norm_elementwise_affine", True)
    hf.refuse_unless("layerdrop", 0.0)
    hf.take("activation_dropout")  # in published configs; transformers' OPT never applies it
    embed = hf.size("word_embed_proj_dim", hidden)
    return DecoderConfig(
        family="opt",
        hidden_size=hidden,
        num_layers=hf.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=hf.size("ffn_dim"),
        max_positions=hf.size("max_position_embeddings"),
        position_offset=2,
        embed_size=0 if embed == hidden else embed,
        norm_placement="pre" if pre_norm else "post",
        final_norm=pre_norm and not no_final_norm,
        activation=hf.activation("activation_function", "relu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=hf.take("tie_word_embeddings", True),
        embed_dropout=0.0,
        attention_dropout=hf.rate("attention_dropout", 0.0),
        residual_dropout=hf.rate("dropout", 0.1),
        initializer_range=hf.take("init_std", 0.02),
        **hf.common(bos=2, eos=2, pad=1),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return common_to_hf(c) | {
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "ffn_dim": c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "word_embed_proj_dim": c.embedding_size,
        "do_layer_norm_before": c.norm_placement == "pre",
        "_remove_final_layer_norm": c.norm_placement == "pre" and not c.final_norm,
        "activation_function": c.activation,
        "enable_bias": c.mlp_bias,
        "layer_norm_elementwise_affine": True,
        "attention_dropout": c.attention_dropout,
        "dropout": c.residual_dropout,
        "layerdrop": 0.0,
        "init_std": c.initializer_range,
    }


_L = "model.decoder.layers.{i}."

OPT = Family(
    name="opt",
    classes="OPT",
    lm_class="OPTForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=(
        Tensor("model.decoder.embed_tokens.weight", "embed/embedding"),
        Tensor("model.decoder.embed_positions.weight", "embed_positions/embedding"),
        Tensor("model.decoder.project_in.weight", "project_in/kernel", linear()),
        Tensor("model.decoder.project_out.weight", "project_out/kernel", linear()),
        *(
            tensor
            for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
            for tensor in (
                Tensor(f"{_L}self_attn.{theirs}.weight", f"layers/attn/{ours}/kernel", linear()),
                Tensor(f"{_L}self_attn.{theirs}.bias", f"layers/attn/{ours}/bias", FLAT),
            )
        ),
        Tensor(_L + "self_attn.out_proj.weight", "layers/attn/out/kernel", linear(inputs=2)),
        Tensor(_L + "self_attn.out_proj.bias", "layers/attn/out/bias"),
        Tensor(_L + "self_attn_layer_norm.weight", "layers/attn_norm/scale"),
        Tensor(_L + "self_attn_layer_norm.bias", "layers/attn_norm/bias"),
        Tensor(_L + "fc1.weight", "layers/mlp/up/kernel", linear()),
        Tensor(_L + "fc1.bias", "layers/mlp/up/bias"),
        Tensor(_L + "fc2.weight", "layers/mlp/down/kernel", linear()),
        Tensor(_L + "fc2.bias", "layers/mlp/down/bias"),
        Tensor(_L + "final_layer_norm.weight", "layers/mlp_norm/scale"),
        Tensor(_L + "final_layer_norm.bias", "layers/mlp_norm/bias"),
        Tensor("model.decoder.final_layer_norm.weight", "final_norm/scale"),
        Tensor("model.decoder.final_layer_norm.bias", "final_norm/bias"),
    ),
)
