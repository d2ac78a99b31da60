"""GPT-Neo: learned positions, unscaled attention, local windows alternating with global layers."""

from typing import Any

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor, common_to_hf, linear


def _kinds(types: list[Any], layers: int) -> list[str]:
    """The kind of each layer; more than `layers` or none of them when `types` is malformed."""
    kinds: list[str] = []
    for group in types:
        match group:
            case [[*names], int(times)] if times <= layers and all(isinstance(name, str) for name in names):
                kinds += names * times
            case _:
                return []
    return kinds


def _windows_from_hf(hf: HFConfig, layers: int) -> tuple[int, ...] | None:
    window = hf.size("window_size", 256)
    types = hf.take("attention_types", [[["global", "local"], 12]])
    kinds = _kinds(types, layers)
    if kinds:
        hf.refuse_unless("attention_layers", kinds)  # the same list, written out
    if len(kinds) != layers or set(kinds) - {"global", "local"}:
        raise hf.refuse("attention_types", types, f"it must name {layers} layers, each 'global' or 'local'")
    return tuple(window if kind == "local" else 0 for kind in kinds) if "local" in kinds else None


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hidden, heads = hf.width_and_heads("hidden_size", "num_heads")
    for name in ("rotary", "rotary_dim", "rotary_pct", "rotary_emb_base"):
        if value := hf.take(name):
            raise hf.refuse(name, value, "this is GPT-J in its first form; load a copy whose model_type is gptj")
    for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):
        hf.take(f"summary_{name}")  # of heads that these models do not have
    hf.take("classifier_dropout")  # of the token classification head
    layers = hf.size("num_layers")
    return DecoderConfig(
        family="gpt_neo",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=hf.size("intermediate_size", 4 * hidden),
        max_positions=hf.size("max_position_embeddings", 2048),
        norm_eps=hf.positive("layer_norm_epsilon", 1e-5),
        activation=hf.activation("activation_function", "gelu_new"),
        qkv_bias=False,
        attention_scale=1.0,
        windows=_windows_from_hf(hf, layers),
        tie_embeddings=hf.take("tie_word_embeddings", True),
        embed_dropout=hf.rate("embed_dropout", 0.0),
        attention_dropout=hf.rate("attention_dropout", 0.0),
        residual_dropout=hf.rate("resid_dropout", 0.0),
        initializer_range=hf.take("initializer_range", 0.02),
        **hf.common(bos=50256, eos=50256),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    windows = c.windows or (0,) * c.num_layers
    kinds = ["local" if window else "global" for window in windows]
    return common_to_hf(c) | {
        "hidden_size": c.hidden_size,
        "num_layers": c.num_layers,
        "num_heads": c.num_heads,
        "intermediate_size": None if c.intermediate_size == 4 * c.hidden_size else c.intermediate_size,
        "max_position_embeddings": c.max_positions,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": c.activation,
        "attention_types": [[kinds, 1]],
        "attention_layers": kinds,
        "window_size": max(windows) or 256,
        "embed_dropout": c.embed_dropout,
        "attention_dropout": c.attention_dropout,
        "resid_dropout": c.residual_dropout,
        "initializer_range": c.initializer_range,
    }


_H = "transformer.h.{i}."
_A = _H + "attn.attention."

GPT_NEO = Family(
    name="gpt_neo",
    classes="GPTNeo",
    lm_class="GPTNeoForCausalLM",
    prefix="transformer",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    aliases={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    tensors=(
        Tensor("transformer.wte.weight", "embed/embedding"),
        Tensor("transformer.wpe.weight", "embed_positions/embedding"),
        Tensor(_H + "ln_1.weight", "layers/attn_norm/scale"),
        Tensor(_H + "ln_1.bias", "layers/attn_norm/bias"),
        Tensor(_A + "q_proj.weight", "layers/attn/query/kernel", linear()),
        Tensor(_A + "k_proj.weight", "layers/attn/key/kernel", linear()),
        Tensor(_A + "v_proj.weight", "layers/attn/value/kernel", linear()),
        Tensor(_A + "out_proj.weight", "layers/attn/out/kernel", linear(inputs=2)),
        Tensor(_A + "out_proj.bias", "layers/attn/out/bias"),
        Tensor(_H + "ln_2.weight", "layers/mlp_norm/scale"),
        Tensor(_H + "ln_2.bias", "layers/mlp_norm/bias"),
        Tensor(_H + "mlp.c_fc.weight", "layers/mlp/up/kernel", linear()),
        Tensor(_H + "mlp.c_fc.bias", "layers/mlp/up/bias"),
        Tensor(_H + "mlp.c_proj.weight", "layers/mlp/down/kernel", linear()),
        Tensor(_H + "mlp.c_proj.bias", "layers/mlp/down/bias"),
        Tensor("transformer.ln_f.weight", "final_norm/scale"),
        Tensor("transformer.ln_f.bias", "final_norm/bias"),
    ),
)
