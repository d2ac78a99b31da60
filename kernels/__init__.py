"""The hot paths beside their plain references: attention, and token log-probs from hidden states."""

from jaxrlhf.kernels.attention import attention, attention_mask
from jaxrlhf.kernels.choice import IMPLEMENTATIONS, KERNELS, LIBRARIES, choose, log_once
from jaxrlhf.kernels.decode_attention import append_attention, decode_attention
from jaxrlhf.kernels.flash_attention import flash_attention, varies
from jaxrlhf.kernels.head_attention import head_attention
from jaxrlhf.kernels.kv_cache import KV_CACHE_DTYPES, Cache, entries, write_columns
from jaxrlhf.kernels.live_blocks import live_attention
from jaxrlhf.kernels.logprobs import HeadPlacement, gathered_blocks, logprob_blocks, project_logits, token_logprobs
from jaxrlhf.kernels.products import cpu_product, outputs_first_product
from jaxrlhf.kernels.slices import slice_bits_on_cpu

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "KV_CACHE_DTYPES",
    "LIBRARIES",
    "Cache",
    "HeadPlacement",
    "append_attention",
    "attention",
    "attention_mask",
    "choose",
    "cpu_product",
    "decode_attention",
    "entries",
    "flash_attention",
    "gathered_blocks",
    "head_attention",
    "live_attention",
    "log_once",
    "logprob_blocks",
    "outputs_first_product",
    "project_logits",
    "token_logprobs",
    "varies",
    "write_columns",
]

slice_bits_on_cpu()
