"""The hot paths beside their plain references: attention, and token log-probs from hidden states."""

from jaxrlhf.kernels.attention import attention, attention_mask
from jaxrlhf.kernels.choice import IMPLEMENTATIONS, choose
from jaxrlhf.kernels.decode_attention import decode_attention
from jaxrlhf.kernels.flash_attention import flash_attention
from jaxrlhf.kernels.head_attention import head_attention
from jaxrlhf.kernels.logprobs import project_logits, token_logprobs

__all__ = [
    "IMPLEMENTATIONS",
    "attention",
    "attention_mask",
    "choose",
    "decode_attention",
    "flash_attention",
    "head_attention",
    "project_logits",
    "token_logprobs",
]
