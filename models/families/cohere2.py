"""Cohere 2 (Command R7B): attention and MLP from one norm, rotation in layers with a window only, scaled logits."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.layer_types import windows_from_hf, windows_to_hf
from jaxrlhf.models.families.llama import LLAMA_MAPS, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig, Tensor


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hidden, heads = hf.width_and_heads("hidden_size", "num_attention_heads")
    hf.refuse_unless("head_dim", hidden // heads)
    bias, period = hf.take("attention_bias", False), hf.size("sliding_window_pattern", 4)
    windows = windows_from_hf(hf, hf.size_or_none("sliding_window", 4096), lambda i: bool((i + 1) % period))
    rotated = tuple(map(bool, windows or (0,) * hf.size("num_hidden_layers")))
    return llama_like_from_hf(
        hf,
        bos=5,
        eos=255001,
        pad=0,
        family="cohere2",
        max_positions=hf.size("max_position_embeddings", 8192),
        rotary_interleaved=True,
        rotary_layers=None if all(rotated) else rotated,
        norm="layernorm",
        norm_bias=False,
        norm_eps=hf.positive("layer_norm_eps", 1e-5),
        residual="parallel_shared_norm",
        qkv_bias=bias,
        out_bias=bias,
        windows=windows,
        tie_embeddings=hf.take("tie_word_embeddings", True),
        logit_scale=float(hf.take("logit_scale", 0.0625)),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    values = llama_like_to_hf(c) | windows_to_hf(c)
    values["layer_norm_eps"] = values.pop("rms_norm_eps")
    return values | {"attention_bias": c.qkv_bias, "logit_scale": c.logit_scale}


COHERE2 = Family(
    name="cohere2",
    classes="Cohere2",
    lm_class="Cohere2ForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=(*LLAMA_MAPS, Tensor("model.layers.{i}.input_layernorm.weight", "layers/attn_norm/scale")),
)
