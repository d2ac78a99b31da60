"""The hot paths beside their plain references: attention, and token log-probs from hidden states."""

from jaxrlhf.kernels.attention import attention, attention_mask
from jaxrlhf.kernels.logprobs import project_logits, token_logprobs

__all__ = ["attention", "attention_mask", "project_logits", "token_logprobs"]
