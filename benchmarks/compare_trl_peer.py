"""One run of TRL's PPOTrainer for compare_trl.py, by the interpreter of TRL's own environment.

Run with the path of a job (`compare_trl_side.main`).
"""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BEGIN = time.perf_counter()

import numpy as np  # noqa: E402 - the clock of the set-up runs
import torch  # noqa: E402
from compare_trl_side import Turns, main, quality  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402


class FunctionAsRewardModel(torch.nn.Module):
    """A function of the texts where TRL wants a reward model: a backbone, and a `score` head on its hidden states.

    The backbone hands the token ids on, -1 for what is masked; the head gives every position the score of its row.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        super().__init__()
        self.tokenizer, self.prompt_length = tokenizer, prompt_length
        self.iterations: list[dict[str, float]] = []

    def backbone(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        ids = torch.where(attention_mask.bool(), input_ids, -1)
        return SimpleNamespace(hidden_states=(ids[..., None],))

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden[..., 0].numpy()
        prompts, answers = rows[:, : self.prompt_length], rows[:, self.prompt_length :]
        texts = (
            self.tokenizer.batch_decode([row[row >= 0] for row in part], skip_special_tokens=True)
            for part in (prompts, answers)
        )
        scores = quality(*texts)
        self.iterations.append(
            {
                "score": float(np.mean(scores)),
                "length": float((answers >= 0).sum(1).mean()),
                "eos_rate": float((answers == self.tokenizer.eos_token_id).any(1).mean()),
            }
        )
        return torch.tensor(scores)[:, None, None].expand(*rows.shape, 1)


class Logs(TrainerCallback):
    """TRL's own metrics."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.records.append(dict(logs))


class Prompts:
    """The prompts in the given order, where TRL has a loader that shuffles; asking for a batch begins an iteration."""

    def __init__(self, ids: torch.Tensor, turns: Turns) -> None:
        self.ids, self.turns = ids, turns

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.ids:
            self.turns.begin()
            yield {"input_ids": batch}


def configuration(s: dict[str, Any], folder: Path, seed: int) -> PPOConfig:
    return PPOConfig(
        output_dir=str(folder),
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        total_episodes=s["iterations"] * s["batch"],
        per_device_train_batch_size=s["batch"],  # cut by num_mini_batches
        gradient_accumulation_steps=1,
        num_mini_batches=s["mini_batches"],
        local_rollout_forward_batch_size=s["batch"],
        num_ppo_epochs=s["epochs"],
        learning_rate=s["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=s["adam_beta1"],
        adam_beta2=s["adam_beta2"],
        adam_epsilon=s["adam_epsilon"],
        vf_coef=1.0,
        response_length=s["answer_length"],
        stop_token="eos",
        temperature=s["temperature"],
        missing_eos_penalty=s["missing_eos_penalty"],
        kl_coef=s["kl_coef"],
        kl_estimator="k1",
        whiten_rewards=False,
        cliprange=s["cliprange"],
        cliprange_value=s["cliprange_value"],
        gamma=s["gamma"],
        lam=s["lam"],
    )


def run(job: dict[str, Any], turns: Turns) -> dict[str, Any]:
    s, actor = job["settings"], job["actor"]
    tokenizer = AutoTokenizer.from_pretrained(actor)
    ids = torch.from_numpy(np.load(job["prompts"])["ids"]).long()  # TRL masks what is the pad id
    models = {name: AutoModelForCausalLM.from_pretrained(actor) for name in ("model", "ref_model")}
    models["value_model"] = AutoModelForSequenceClassification.from_pretrained(job["value"])
    if {model.dtype for model in models.values()} != {torch.float32}:
        raise SystemExit("the models are not float32")
    models["model"].generation_config.pad_token_id = tokenizer.pad_token_id
    reward, logs = FunctionAsRewardModel(tokenizer, ids.shape[-1]), Logs()
    trainer = PPOTrainer(
        args=configuration(s, Path(job["result"]).parent / "trl", job["seed"]),
        processing_class=tokenizer,
        train_dataset=[{"input_ids": row} for row in ids.flatten(0, 1)],
        eval_dataset=[],
        data_collator=lambda rows: {"input_ids": torch.stack([row["input_ids"] for row in rows])},
        reward_model=reward,
        callbacks=[logs],
        **models,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.dataloader = Prompts(ids, turns)
    setup = time.perf_counter() - BEGIN
    trainer.train()
    turns.end()
    check(reward.iterations, logs.records, s["missing_eos_penalty"])
    models["model"].save_pretrained(job["trained"])
    tokenizer.save_pretrained(job["trained"])
    curves = {name: [row[name] for row in reward.iterations] for name in ("score", "length", "eos_rate")}
    return {
        "curves": curves | {"kl": [log["objective/kl"] for log in logs.records]},
        "setup_seconds": setup,
        "threads": torch.get_num_threads(),
    }


def check(iterations: list[dict[str, float]], logs: list[dict[str, float]], penalty: float) -> None:
    """Fail unless TRL logs the scores that the function gave, less the penalty: it read them where it was meant to."""
    expected = [row["score"] - penalty * (1 - row["eos_rate"]) for row in iterations]
    np.testing.assert_allclose([log["objective/scores"] for log in logs], expected, atol=1e-4)


if __name__ == "__main__":
    main(run)
