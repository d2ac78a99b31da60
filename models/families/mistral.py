"""Mistral: Llama with a sliding attention window."""

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.layer_types import one_window_from_hf, one_window_to_hf
from jaxrlhf.models.families.llama import LLAMA_TENSORS, kv_heads, llama_like_from_hf, llama_like_to_hf
from jaxrlhf.models.hf.mapping import Family, HFConfig


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    return llama_like_from_hf(
        hf,
        family="mistral",
        num_kv_heads=kv_heads(hf, absent=8),
        max_positions=hf.size("max_position_embeddings", 4096 * 32),
        windows=one_window_from_hf(hf, 4096),
    )


def config_to_hf(c: DecoderConfig) -> dict[str, object]:
    return llama_like_to_hf(c) | one_window_to_hf(c)


MISTRAL = Family(
    name="mistral",
    classes="Mistral",
    lm_class="MistralForCausalLM",
    prefix="model",
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    tensors=LLAMA_TENSORS,
)
