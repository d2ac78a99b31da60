"""The same PPO iteration in plain PyTorch: Hugging Face `generate`, four forward passes, one AdamW step of each model.

It is what one writes with transformers alone, at its fastest: sdpa attention, the fused AdamW, bfloat16 weights and
moments on a GPU (ours keeps float32 masters), dropout off, no recomputation. The weights are ours, read from folders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import numpy as np

from jaxrlhf.errors import InputError
from jaxrlhf.rl.config import PPOConfig

DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")
DROPOUTS += ("resid_pdrop", "embd_pdrop", "attn_pdrop", "embed_dropout", "resid_dropout")
if TYPE_CHECKING:
    import jax
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    Tensors = dict[str, Tensor]
P = ParamSpec("P")
T = TypeVar("T")


def torch_device(platform: str) -> str:
    """Torch's name of JAX's device; InputError when torch cannot use it."""
    import torch

    if platform == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise InputError("peers: JAX runs on an accelerator that torch does not see; install a torch for it")
    return "cuda"


@contextmanager
def memory_permitting(otherwise: Callable[[], None]) -> Iterator[None]:
    """Calls `otherwise` where torch runs out of memory, and goes on after the block."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        otherwise()
        torch.cuda.empty_cache()


def load_model(kind: type[_BaseAutoModelClass], folder: Path, device: str, dtype: str) -> PreTrainedModel:
    """A model of transformers, without dropout. Its embedding of the pad id gets gradients like every other row.

    `kind` is one of transformers' auto classes.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    model = kind.from_pretrained(folder, config=config, **options).to(device).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model


class TorchPeer:
    """Actor, reference, critic and reward model of transformers, and the two optimizers."""

    def __init__(self, actor: Path, reward: Path, config: PPOConfig, device: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.torch, self.device, self.config, self.micro_batches = torch, device, config, 1
        self.actor: Any = load_model(AutoModelForCausalLM, actor, device, dtype)
        self.reference = load_model(AutoModelForCausalLM, actor, device, dtype).requires_grad_(False)
        self.critic = load_model(AutoModelForSequenceClassification, reward, device, dtype)
        self.reward = load_model(AutoModelForSequenceClassification, reward, device, dtype).requires_grad_(False)
        self.optimizers = {
            name: torch.optim.AdamW(
                model.parameters(),
                lr=rate,
                betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
                eps=config.optimizer.adam_epsilon,
                weight_decay=config.optimizer.weight_decay,
                fused=True,
            )
            for name, model, rate in (
                ("actor", self.actor, config.optimizer.learning_rate),
                ("critic", self.critic, config.critic.critic_learning_rate),
            )
        }

    def timed(self, run: Callable[P, T], *args: P.args, **options: P.kwargs) -> tuple[float, T]:
        """(seconds, result) of a call, with the device's queue empty before and after."""
        self._wait()
        begin = time.perf_counter()
        result = run(*args, **options)
        self._wait()
        return time.perf_counter() - begin, result

    def _wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def tokens(self, array: jax.Array | np.ndarray) -> Tensor:
        """int64 token ids on the peer's device."""
        return self.torch.from_numpy(np.array(array)).to(self.device).long()

    def generate(self, prompts: Tensor, compiled: bool = False) -> Tensor:
        """Tokens `[B, P + A]`, sampled at temperature 1 from the whole vocabulary; no response ends early."""
        from transformers import CompileConfig, GenerationConfig

        options: dict[str, Any] = {}
        if compiled:
            how: Any = CompileConfig()
            how._compile_all_devices = True  # otherwise transformers leaves a CPU uncompiled, without a word
            options = {"cache_implementation": "static", "compile_config": how}
        settings = GenerationConfig(
            max_new_tokens=self.config.sampling.max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            **options,
        )
        self.actor.generation_config.eos_token_id = None
        with self.torch.no_grad():
            mask = self.torch.ones_like(prompts)
            tokens = self.actor.generate(input_ids=prompts, attention_mask=mask, generation_config=settings)
        if compiled and not hasattr(self.actor, "_compiled_call"):
            raise RuntimeError("transformers did not compile the model for generation with a static cache")
        length = prompts.shape[1] + self.config.sampling.max_new_tokens
        if tuple(tokens.shape) != (prompts.shape[0], length):
            raise RuntimeError(
                f"the peer generated {tuple(tokens.shape)} instead of {(prompts.shape[0], length)} tokens"
            )
        return tokens

    def _chunks(self, batch: Tensors) -> list[Tensors]:
        parts = {name: x.chunk(self.micro_batches) for name, x in batch.items()}
        return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]

    def _logprobs(self, model: PreTrainedModel, tokens: Tensor) -> Tensor:
        """Log-probs `[B, A]` of the response tokens."""
        start = self.config.data.max_prompt_seq_len
        logits = model(input_ids=tokens, attention_mask=self.torch.ones_like(tokens), use_cache=False).logits
        picked = self.torch.log_softmax(logits[:, start - 1 : -1].float(), dim=-1)
        return picked.gather(-1, tokens[:, start:, None])[..., 0]

    def _values(self, model: PreTrainedModel, tokens: Tensor) -> Tensor:
        """Scalar head `[B, T]` at every token."""
        body, head = getattr(model, model.base_model_prefix), cast("torch.nn.Linear", model.score)
        mask = self.torch.ones_like(tokens)
        hidden = body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return self.torch.nn.functional.linear(hidden.float(), head.weight.float())[..., 0]

    def score(self, tokens: Tensor) -> Tensors:
        """Old and reference log-probs and values `[B, A]`, scores `[B]`."""
        start = self.config.data.max_prompt_seq_len
        done = []
        with self.torch.no_grad():
            for part in self._chunks({"tokens": tokens}):
                tokens_of = part["tokens"]
                done.append(
                    {
                        "tokens": tokens_of,
                        "logprobs": self._logprobs(self.actor, tokens_of),
                        "ref_logprobs": self._logprobs(self.reference, tokens_of),
                        "values": self._values(self.critic, tokens_of)[:, start - 1 : -1],
                        "scores": self._values(self.reward, tokens_of)[:, -1],
                    }
                )
        return {name: self.torch.cat([part[name] for part in done]) for name in done[0]}

    def _advantages(self, e: Tensors) -> tuple[Tensor, Tensor]:
        """Whitened advantages and returns `[B, A]` (generalised advantage estimation)."""
        c, torch = self.config.algorithm, self.torch
        rewards = -c.kl_coef * (e["logprobs"] - e["ref_logprobs"])
        score = e["scores"]
        rewards[:, -1] += score if c.clip_reward is None else score.clamp(-c.clip_reward, c.clip_reward)
        advantages = torch.zeros_like(rewards)
        following = torch.zeros_like(score)
        for t in reversed(range(rewards.shape[1])):
            value_after = e["values"][:, t + 1] if t + 1 < rewards.shape[1] else 0.0
            delta = rewards[:, t] + c.gamma * value_after - e["values"][:, t]
            advantages[:, t] = following = delta + c.gamma * c.lam * following
        returns = advantages + e["values"]
        if c.whiten_advantages:
            advantages = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
        return advantages, returns

    def train(self, experience: Tensors) -> dict[str, float]:
        """One optimizer step of actor and critic; losses and gradient norms under TRL's names."""
        c, torch = self.config.algorithm, self.torch
        with torch.no_grad():
            advantages, returns = self._advantages(experience)
        batch = experience | {"advantages": advantages, "returns": returns}
        count, start = advantages.numel(), self.config.data.max_prompt_seq_len
        policy, value = 0.0, 0.0
        for part in self._chunks(batch):
            ratio = torch.exp(self._logprobs(self.actor, part["tokens"]) - part["logprobs"])
            clipped = ratio.clamp(1 - c.cliprange, 1 + c.cliprange)
            loss = torch.maximum(-part["advantages"] * ratio, -part["advantages"] * clipped).sum() / count
            loss.backward()
            policy = policy + loss.detach()
            values = self._values(self.critic, part["tokens"])[:, start - 1 : -1]
            near = part["values"] + (values - part["values"]).clamp(-c.cliprange_value, c.cliprange_value)
            errors = torch.maximum((values - part["returns"]) ** 2, (near - part["returns"]) ** 2)
            loss = 0.5 * errors.sum() / count
            loss.backward()
            value = value + loss.detach()
        norms, largest = {}, self.config.optimizer.max_grad_norm or float("inf")
        for name, model in (("actor", self.actor), ("critic", self.critic)):
            norms[name] = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()
        return {
            "loss/policy_avg": float(policy),
            "loss/value_avg": float(value),
            "policy/grad_norm": float(norms["actor"]),
            "val/grad_norm": float(norms["critic"]),
        }
