"""The demo: all three steps with a small model on the embedded data, then answers before and after PPO side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf.commands.rlhf import RLHFConfig, train_rlhf
from jaxrlhf.config import field
from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.data import (
    demo_quality,
    encode_prompt,
    load_tokenizer,
    materialize_demo,
    pad_token_id,
)
from jaxrlhf.data.loading import cache_folder
from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.models import load_pretrained
from jaxrlhf.rl.config import PPOOptions
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.reward import RewardOptions
from jaxrlhf.trainers.sft import SFTOptions

SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class DemoConfig:
    """The demo run."""

    output_dir: str = field("runs/demo", "folder of the run; an earlier demo in it is replaced")
    resume: bool = field(False, "continue an interrupted demo instead")
    seed: int = field(42, "seed of everything")
    samples: int = field(6, "held-out questions shown before and after PPO")


def rlhf_config(config: DemoConfig) -> RLHFConfig:
    common = {"per_device_eval_batch_size": 100, "logging_steps": 20, "warmup_ratio": 0.05}
    return RLHFConfig(
        output_dir=config.output_dir,
        resume=config.resume,
        overwrite_output_dir=not config.resume,
        data_path=("demo",),
        model_type="llama",
        config_overrides=SHAPE,
        tokenizer_name_or_path=str(materialize_demo(cache_folder_of(config)).tokenizer),
        max_length=64,
        max_prompt_seq_len=32,
        seed=config.seed,
        sft=SFTOptions(max_steps=400, per_device_train_batch_size=32, learning_rate=2e-3, **common),
        reward=RewardOptions(max_steps=300, per_device_train_batch_size=32, learning_rate=1e-3, **common),
        ppo=PPOOptions(
            max_steps=80,
            per_device_train_batch_size=32,
            num_mini_batches=2,
            learning_rate=1e-4,
            critic_learning_rate=5e-4,
            lr_scheduler_type="constant",
            clip_reward=20.0,  # the demo's reward model spreads its scores over about ±15
            cliprange_value=5.0,
            max_answer_seq_len=ANSWER_TOKENS,
            enable_ema=True,
            **common,
        ),
    )


def cache_folder_of(config: DemoConfig) -> Path:
    return cache_folder(RLHFConfig(seed=config.seed))


def answers(folder: Path, tokenizer: Any, questions: list[str], seed: int) -> list[str]:
    """One sampled answer per question from the model in `folder`, with keys that do not depend on the model."""
    engine = HybridEngine(load_pretrained(folder))
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    width = 32
    ids = np.full((len(prompts), width), pad_token_id(tokenizer), np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = True
    sampling = SamplingConfig(ANSWER_TOKENS, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_token_id(tokenizer))
    rollout = jax.device_get(engine.generate(ids, mask, jax.random.key(seed), sampling))
    tokens = [row[real] for row, real in zip(rollout.tokens, rollout.response_mask, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Train, show sample conversations before and after PPO, say where everything is; returns the summary."""
    import json

    paths = materialize_demo(cache_folder_of(config))
    summary = train_rlhf(rlhf_config(config))
    root = Path(config.output_dir)
    tokenizer = load_tokenizer(root / "ppo")
    rows = [json.loads(line) for line in paths.eval.read_text(encoding="utf-8").splitlines()]
    questions = sorted({row["prompt"] for row in rows})
    before, after = (answers(root / name, tokenizer, questions, config.seed) for name in ("sft", "ppo"))
    quality = [
        float(np.mean([demo_quality(q, a) for q, a in zip(questions, side, strict=True)])) for side in (before, after)
    ]
    summary |= {"demo_quality_before": quality[0], "demo_quality_after": quality[1]}
    write_json_atomic(root / "summary.json", summary)
    step = max(1, len(questions) // max(config.samples, 1))
    shown = list(zip(questions, before, after, strict=True))[::step][: config.samples]
    Console().table("held-out questions", ("question", "after SFT", "after PPO"), shown)
    print(closing(root, summary), flush=True)
    return summary


def closing(root: Path, summary: dict[str, Any]) -> str:
    s = summary
    total = sum(s["seconds"].values())
    return f"""
SFT loss on held-out answers    {s["sft_eval_loss_before"]:.2f} → {s["sft_eval_loss_after"]:.2f}
reward model, held-out pairs    {s["reward_eval_accuracy"]:.1%} right
reward of sampled answers       {s["ppo_reward_before"]:+.2f} (std {s["ppo_reward_before_std"]:.2f}) \
→ {s["ppo_reward_after"]:+.2f}, KL {s["ppo_kl"]:.1f} nats per answer
their true quality (-2 to 5)    {s["demo_quality_before"]:.2f} → {s["demo_quality_after"]:.2f}
time                            {total:.0f} s: {", ".join(f"{k} {v:.0f} s" for k, v in s["seconds"].items())}

models    {root}/sft  {root}/reward  {root}/ppo  (Hugging Face folders)
report    {root}/report.html
chat      jaxrlhf chat --model {root}/ppo"""
