"""Step 1: supervised fine-tuning on prompt + chosen response."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from jaxrlhf import objectives
from jaxrlhf.config import field
from jaxrlhf.data import DataConfig, load_data, load_tokenizer
from jaxrlhf.models import Decoder
from jaxrlhf.trainers.loop import fit
from jaxrlhf.trainers.lora import LoRAOptions, with_adapters
from jaxrlhf.trainers.settings import (
    FolderConfig,
    ModelConfig,
    TrainingConfig,
    check_context,
    load_model,
    open_run,
    with_special_tokens,
)
from jaxrlhf.trainers.supervised import Batch, Objective, TrainState, supervised_task

HEADLINE = ("loss", "grad_norm", "learning_rate", "perf/tokens_per_second")


@dataclass(frozen=True)
class SFTOptions(LoRAOptions, TrainingConfig):
    """Supervised fine-tuning."""

    completion_only_loss: bool = field(True, "loss on the response only; false: on the whole sequence")


@dataclass(frozen=True)
class SFTConfig(DataConfig, ModelConfig, FolderConfig, SFTOptions):
    """Step 1 alone."""


def token_count(batch: Batch) -> jax.Array:
    return batch["loss_mask"].sum()


def sft_loss(
    module: Decoder, params: Any, rows: Batch, count: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean negative log-prob of the target tokens, in nats."""
    logprobs, _ = module.apply(
        {"params": params},
        rows["input_ids"],
        rows["attention_mask"],
        method="logprobs",
        rngs=None if key is None else {"dropout": key},
    )
    return objectives.sft_loss(logprobs, rows["loss_mask"], count), {}


def sft_sums(module: Decoder, params: Any, batch: Batch) -> dict[str, jax.Array]:
    count = token_count(batch)
    loss, _ = sft_loss(module, params, batch, count, None)
    return {"nll": loss * count, "tokens": count}


def sft_figures(totals: dict[str, float]) -> dict[str, float]:
    loss = totals["nll"] / max(totals["tokens"], 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def train_sft(config: SFTConfig) -> TrainState:
    """Run step 1; the trained model lies in `config.output_dir` afterwards."""
    with open_run(config, HEADLINE) as run:
        mesh = config.make_mesh()
        tokenizer = load_tokenizer(config.tokenizer_source)
        model = load_model(config, "lm", mesh, len(tokenizer), remat=config.gradient_checkpointing)
        model = with_adapters(with_special_tokens(model, tokenizer), config, jax.random.key(config.seed))
        check_context(model.config, config.max_length, "max_length")
        task, state = supervised_task(
            "sft",
            run,
            config,
            model,
            tokenizer,
            load_data(config, tokenizer, "sft"),
            mesh,
            objective=Objective(token_count, sft_loss),
            measure=sft_sums,
            summarise=sft_figures,
            batch_options={"completion_only_loss": config.completion_only_loss},
        )
        return fit(run, config, task, state)
