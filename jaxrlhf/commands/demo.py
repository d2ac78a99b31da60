"""The demo: all three steps with a small model on the embedded data, then responses before and after PPO."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from jaxrlhf import keys
from jaxrlhf.commands.rlhf import BaseModelsConfig, RLHFConfig, Summary, train_rlhf
from jaxrlhf.config import NonNegativeInt, Settings, settings
from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.data import (
    DataConfig,
    Tokenizer,
    demo_quality,
    encode_prompts,
    load_tokenizer,
    materialize_demo,
    pad_token_id,
)
from jaxrlhf.data.settings import cache_folder
from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.models import load_pretrained
from jaxrlhf.rl.config import CriticConfig, PPOOptions
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.runs import TrackingConfig
from jaxrlhf.runs.console import Console
from jaxrlhf.runs.working_folder import works_locally
from jaxrlhf.trainers.optimizer import OptimizerConfig
from jaxrlhf.trainers.reward import RewardOptions
from jaxrlhf.trainers.settings import FolderConfig, RunConfig, StartConfig
from jaxrlhf.trainers.sft import SFTOptions
from jaxrlhf.trainers.tokenizers import TokenizerConfig, sampling_for

SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
RESPONSE_TOKENS = 32


@dataclass(frozen=True)
class DemoConfig(Settings):
    """The demo run. An earlier demo in output_dir is replaced, unless --resume continues it."""

    HIDDEN = (frozenset(settings(DataConfig)) - {"seed"}) | {"overwrite_output_dir"}

    folder: FolderConfig = FolderConfig("runs/demo")
    tracking: TrackingConfig = TrackingConfig()
    data: DataConfig = DataConfig(
        data_path=("demo",), data_split="2,4,4", max_length=64, max_prompt_seq_len=32, max_eval_samples=0
    )
    samples: NonNegativeInt = 6
    """Held-out questions shown before and after PPO."""


def rlhf_config(config: DemoConfig) -> RLHFConfig:
    common = RunConfig(per_device_train_batch_size=32, per_device_eval_batch_size=100, logging_steps=20)
    adam = OptimizerConfig(warmup_ratio=0.05)
    tokenizer = TokenizerConfig(str(materialize_demo(cache_folder(DataConfig())).tokenizer))
    return RLHFConfig(
        folder=replace(config.folder, overwrite_output_dir=not config.folder.resume),
        tracking=config.tracking,
        data=config.data,
        models=BaseModelsConfig(start=StartConfig("llama", SHAPE), tokenizer=tokenizer),
        sft=SFTOptions(  # a packed row holds two conversations, so a batch has as many as in the other steps
            run=replace(common, max_steps=400, per_device_train_batch_size=16),
            optimizer=replace(adam, learning_rate=2e-3),
        ),
        reward=RewardOptions(run=replace(common, max_steps=300), optimizer=replace(adam, learning_rate=1e-3)),
        ppo=PPOOptions(
            run=replace(common, max_steps=80),
            optimizer=replace(adam, learning_rate=1e-4, lr_scheduler_type="constant"),
            critic=CriticConfig(critic_learning_rate=5e-4),
            sampling=SamplingConfig(RESPONSE_TOKENS),
            algorithm=PPOHyperparameters(
                num_mini_batches=2,
                clip_reward=20.0,  # the demo's reward model spreads its scores over about ±15
                cliprange_value=5.0,
                enable_ema=True,
            ),
        ),
    )


def responses(folder: Path, tokenizer: Tokenizer, questions: list[str], seed: int) -> list[str]:
    """Samples one response per question from the model in `folder`, with keys that do not depend on the model."""
    engine = HybridEngine(load_pretrained(folder))
    prompts = encode_prompts(tokenizer, questions)
    width = 32
    ids = np.full((len(prompts), width), pad_token_id(tokenizer), np.int32)
    mask = np.zeros((len(prompts), width), bool)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = True
    sampling = sampling_for(tokenizer, SamplingConfig(RESPONSE_TOKENS))
    rollout = jax.device_get(engine.generate(ids, mask, keys.stream(seed, keys.Stream.SAMPLES), sampling))
    tokens = [row[real] for row, real in zip(rollout.tokens, rollout.response_mask, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@works_locally
def run_demo(config: DemoConfig) -> Summary:
    """Trains, shows sample conversations before and after PPO, prints where everything is; returns the summary."""
    import json

    paths = materialize_demo(cache_folder(DataConfig()))
    summary = train_rlhf(rlhf_config(config))
    root = Path(config.folder.output_dir)
    tokenizer = load_tokenizer(root / "ppo")
    rows = [json.loads(line) for line in paths.eval.read_text(encoding="utf-8").splitlines()]
    questions = sorted({row["prompt"] for row in rows})
    before, after = (responses(root / name, tokenizer, questions, config.data.seed) for name in ("sft", "ppo"))
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


def closing(root: Path, summary: Summary) -> str:
    s = summary
    total = sum(s["seconds"].values())
    return f"""
SFT loss on held-out responses  {s["sft_eval_loss_before"]:.2f} → {s["sft_eval_loss_after"]:.2f}
reward model, held-out pairs    {s["reward_eval_accuracy"]:.1%} right
reward of sampled responses     {s["ppo_reward_before"]:+.2f} (std {s["ppo_reward_before_std"]:.2f}) \
→ {s["ppo_reward_after"]:+.2f}, KL {s["ppo_kl"]:.1f} nats per response
their true quality (-2 to 5)    {s["demo_quality_before"]:.2f} → {s["demo_quality_after"]:.2f}
time                            {total:.0f} s: {", ".join(f"{k} {v:.0f} s" for k, v in s["seconds"].items())}

models    {root}/sft  {root}/reward  {root}/ppo  (Hugging Face folders)
report    {root}/report.html
chat      jaxrlhf chat --model {root}/ppo"""
