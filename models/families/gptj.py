"""GPT-J and CodeGen: neighbouring pairs rotated, attention and MLP from one norm, a bias on the output head."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor, common_to_hf, linear, linear_grouped

# CodeGen was trained on this many model-parallel partitions, and its fused QKV matrix still lies in their order.
_CODEGEN_PARTITIONS = 4


def _from_hf(hf: HFConfig, family: str, bos: int, eos: int) -> DecoderConfig:
    hidden, heads = hf.width_and_heads("n_embd", "n_head")
    hf.refuse_unless("rotary", True)
    hf.refuse_unless("scale_attn_weights", True)
    for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        hf.take(f"summary_{name}")  # of heads that these models do not have
    hf.take("n_ctx")
    rotated = hf.nullable("rotary_dim", 64)
    if not isinstance(rotated, int) or not 2 <= rotated <= hidden // heads or rotated % 2:
        raise hf.refuse("rotary_dim", rotated, f"it must be even and between 2 and {hidden // heads}, the head size")
    return DecoderConfig(
        family=family,
        hidden_size=hidden,
        num_layers=hf.size("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=hf.size("n_inner", 4 * hidden),
        max_positions=hf.size("n_positions", 2048),
        position="rotary",
        rotary_dim=rotated,
        rotary_interleaved=True,
        norm_eps=hf.positive("layer_norm_epsilon", 1e-5),
        residual="parallel_shared_norm",
        activation=hf.activation("activation_function", "gelu_new"),
        qkv_bias=False,
        out_bias=False,
        tie_embeddings=hf.take("tie_word_embeddings", False),
        lm_head_bias=True,
        embed_dropout=hf.rate("embd_pdrop", 0.0),
        attention_dropout=hf.rate("attn_pdrop", 0.0),
        residual_dropout=hf.rate("resid_pdrop", 0.0),
        initializer_range=hf.take("initializer_range", 0.02),
        **hf.common(bos=bos, eos=eos),
    )


def gptj_from_hf(hf: HFConfig) -> DecoderConfig:
    return _from_hf(hf, "gptj", bos=50256, eos=50256)


def codegen_from_hf(hf: HFConfig) -> DecoderConfig:
    config = _from_hf(hf, "codegen", bos=50256, eos=50256)
    if config.num_heads % _CODEGEN_PARTITIONS:
        raise hf.refuse("n_head", config.num_heads, f"it must be a multiple of {_CODEGEN_PARTITIONS}")
    return config


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return common_to_hf(c) | {
        "n_embd": c.hidden_size,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_inner": None if c.intermediate_size == 4 * c.hidden_size else c.intermediate_size,
        "n_positions": c.max_positions,
        "rotary_dim": c.rotary_dim,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": c.activation,
        "embd_pdrop": c.embed_dropout,
        "attn_pdrop": c.attention_dropout,
        "resid_pdrop": c.residual_dropout,
        "initializer_range": c.initializer_range,
    }


_H = "transformer.h.{i}."
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def _tensors(*query_key_value: Tensor) -> tuple[Tensor, ...]:
    return (
        Tensor("transformer.wte.weight", "embed/embedding"),
        Tensor(_H + "ln_1.weight", "layers/attn_norm/scale"),
        Tensor(_H + "ln_1.bias", "layers/attn_norm/bias"),
        *query_key_value,
        Tensor(_H + "attn.out_proj.weight", "layers/attn/out/kernel", linear(inputs=2)),
        Tensor(_H + "mlp.fc_in.weight", "layers/mlp/up/kernel", linear()),
        Tensor(_H + "mlp.fc_in.bias", "layers/mlp/up/bias"),
        Tensor(_H + "mlp.fc_out.weight", "layers/mlp/down/kernel", linear()),
        Tensor(_H + "mlp.fc_out.bias", "layers/mlp/down/bias"),
        Tensor("transformer.ln_f.weight", "final_norm/scale"),
        Tensor("transformer.ln_f.bias", "final_norm/bias"),
    )


GPTJ = Family(
    name="gptj",
    classes="GPTJ",
    lm_class="GPTJForCausalLM",
    prefix="transformer",
    config_from_hf=gptj_from_hf,
    config_to_hf=config_to_hf,
    aliases=_ALIASES,
    tensors=_tensors(
        Tensor(_H + "attn.q_proj.weight", "layers/attn/query/kernel", linear()),
        Tensor(_H + "attn.k_proj.weight", "layers/attn/key/kernel", linear()),
        Tensor(_H + "attn.v_proj.weight", "layers/attn/value/kernel", linear()),
    ),
)

CODEGEN = Family(
    name="codegen",
    classes="CodeGen",
    lm_class="CodeGenForCausalLM",
    prefix="transformer",
    config_from_hf=codegen_from_hf,
    config_to_hf=config_to_hf,
    aliases=_ALIASES,
    tensors=_tensors(
        Tensor(
            _H + "attn.qkv_proj.weight",
            ("layers/attn/query/kernel", "layers/attn/value/kernel", "layers/attn/key/kernel"),
            linear_grouped(_CODEGEN_PARTITIONS),
        ),
    ),
)
