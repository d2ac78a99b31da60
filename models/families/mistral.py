"""Mistral: Llama with a sliding attention window."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.llama import LLAMA_TENSORS, kv_heads, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    window = hf.size_or_none("sliding_window", 4096)
    return llama_like_from_hf(
        hf,
        family="mistral",
        num_kv_heads=kv_heads(hf, absent=8),
        max_positions=hf.size("max_position_embeddings", 4096 * 32),
        windows=None if window is None else (window,) * hf.size("num_hidden_layers"),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return llama_like_to_hf(c) | {"sliding_window": c.windows[0] if c.windows else None}


MISTRAL = Family(
    name="mistral",
    classes="Mistral",
    lm_class="MistralForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=LLAMA_TENSORS,
)
