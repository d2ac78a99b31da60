"""TRL's PPOTrainer as a peer: whole iterations, one per call of its `train`."""

import contextlib
import io
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from jaxrlhf.bench.peers import load_model
from jaxrlhf.errors import InputError
from jaxrlhf.rl.config import PPOConfig

NO_TOKEN = -1  # as pad and EOS id: no token of a prompt or answer is either, so every answer has its full length


def trl_ppo() -> tuple[type, type]:
    """TRL's trainer and its configuration, where this version has them; InputError where it has none."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError as error:
        raise InputError(
            f"peers: the installed trl has no usable trl.experimental.ppo ({error}); install trl 1.x, or leave trl out"
        ) from error
    return PPOTrainer, PPOConfig


class TrlPeer:
    """Four models of transformers in TRL's trainer, for batches of the given prompts."""

    def __init__(
        self,
        folders: tuple[Path, Path],
        config: PPOConfig,
        prompts: np.ndarray,
        device: str,
        dtype: str,
        micro_batches: int,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PrinterCallback

        trainer_class, config_class = trl_ppo()
        rows = len(prompts)
        folder = Path(folders[0]).parent / "trl"
        arguments = config_class(
            output_dir=str(folder),
            use_cpu=device == "cpu",
            bf16=False,  # the weights are in the dtype of the run already
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            lr_scheduler_type="constant",
            learning_rate=config.optimizer.learning_rate,
            adam_beta1=config.optimizer.adam_beta1,
            adam_beta2=config.optimizer.adam_beta2,
            per_device_train_batch_size=rows // micro_batches,
            gradient_accumulation_steps=micro_batches,
            local_rollout_forward_batch_size=rows // micro_batches,
            total_episodes=rows,
            num_ppo_epochs=1,
            num_mini_batches=1,
            num_sample_generations=0,
            response_length=config.sampling.max_new_tokens,
            temperature=1.0,
            kl_coef=config.algorithm.kl_coef,
            cliprange=config.algorithm.cliprange,
            cliprange_value=config.algorithm.cliprange_value,
            gamma=config.algorithm.gamma,
            lam=config.algorithm.lam,
        )
        kinds = {"model": AutoModelForCausalLM, "ref_model": AutoModelForCausalLM}
        kinds |= dict.fromkeys(("reward_model", "value_model"), AutoModelForSequenceClassification)
        models = {
            name: load_model(kind, folders[kind is AutoModelForSequenceClassification], device, dtype)
            for name, kind in kinds.items()
        }
        for model in models.values():
            if getattr(model, "generation_config", None) is None:
                cast(Any, model).generation_config = SimpleNamespace()
        self.trainer = trainer_class(
            args=arguments,
            processing_class=SimpleNamespace(pad_token_id=NO_TOKEN, eos_token_id=NO_TOKEN),
            train_dataset=[{"input_ids": row} for row in torch.tensor(prompts).long()],
            eval_dataset=[],
            data_collator=lambda items: {"input_ids": torch.stack([item["input_ids"] for item in items])},
            **models,
        )
        self.trainer.remove_callback(PrinterCallback)

    def iteration(self) -> float:
        """Seconds of one iteration; TRL reads its metrics at the end, so the device is done by then."""
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer.train()
        return time.perf_counter() - begin
