"""One run of our PPO for compare_trl.py, through the library's own loop: `generate_experience`, then `train_rlhf`.

Run with the path of a job (`compare_trl_side.main`). The critic's start is written for the peer to read.
"""

import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()

import numpy as np  # noqa: E402 - the clock of the set-up runs
from compare_trl_side import Turns, main  # noqa: E402

import jaxrlhf  # noqa: E402
from jaxrlhf.data import load_tokenizer  # noqa: E402

REWARD = Path(__file__).resolve().with_name("compare_trl_side.py")
CURVES = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "length": "val/response_length",
    "eos_rate": "val/eos_rate",
}
PHASES = ("generate", "score", "reward_functions", "train")


def configuration(s: dict[str, Any], prompt_length: int, seed: int) -> jaxrlhf.PPOConfig:
    return jaxrlhf.PPOConfig.create(
        seed=seed,
        dtype="float32",
        reward_functions=(f"{REWARD}:quality",),
        max_prompt_seq_len=prompt_length,
        per_device_train_batch_size=s["batch"] // s["mini_batches"],
        num_mini_batches=s["mini_batches"],
        ppo_epochs=s["epochs"],
        learning_rate=s["learning_rate"],
        critic_learning_rate=s["learning_rate"],  # TRL has one optimizer for both
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,  # TRL's PPO does not clip gradients
        adam_beta1=s["adam_beta1"],
        adam_beta2=s["adam_beta2"],
        adam_epsilon=s["adam_epsilon"],
        max_answer_seq_len=s["answer_length"],
        temperature=s["temperature"],
        missing_eos_penalty=s["missing_eos_penalty"],
        clip_reward=None,
        kl_coef=s["kl_coef"],
        cliprange=s["cliprange"],
        cliprange_value=s["cliprange_value"],
        gamma=s["gamma"],
        lam=s["lam"],
    )


def run(job: dict[str, Any], turns: Turns) -> dict[str, Any]:
    s, prompts = job["settings"], np.load(job["prompts"])
    config = configuration(s, prompts["ids"].shape[-1], job["seed"])
    tokenizer = load_tokenizer(job["actor"])
    engine = jaxrlhf.RLHFEngine(job["actor"], None, tokenizer, s["iterations"], config)
    trainer = jaxrlhf.PPOTrainer(engine=engine, config=config)
    wait(trainer.prepare(prompts["ids"].shape[-1]))  # in the set-up, and not behind the peer's turns
    setup = time.perf_counter() - BEGIN
    jaxrlhf.models.save_pretrained(engine.critic_model(), job["value"], tokenizer)
    records = []
    for ids, mask in zip(prompts["ids"], prompts["mask"], strict=True):
        turns.begin()
        trainer.train_rlhf(trainer.generate_experience({"prompt_ids": ids, "prompt_mask": mask}))
        records.append(trainer.metrics | trainer.timing)
    turns.end()
    jaxrlhf.models.save_pretrained(engine.actor_model(), job["trained"], tokenizer)
    return {
        "curves": {name: [record[metric] for record in records] for name, metric in CURVES.items()},
        "phases": {name: [record[f"timing/{name}"] for record in records] for name in PHASES},
        "setup_seconds": setup,
    }


if __name__ == "__main__":
    main(run)
