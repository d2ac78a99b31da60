"""RLHF training for chat models in JAX: supervised fine-tuning, reward model, PPO and DPO on one device mesh."""

import importlib
from typing import Any

_HOME = {
    "HybridEngine": "jaxrlhf.engine",
    "Rollout": "jaxrlhf.engine",
    "SamplingConfig": "jaxrlhf.engine",
    "Experience": "jaxrlhf.rl",
    "PPOHyperparameters": "jaxrlhf.rl",
    "PPOState": "jaxrlhf.rl",
    "ppo_step": "jaxrlhf.rl",
    "score_rollout": "jaxrlhf.rl",
    "PPOConfig": "jaxrlhf.rl.run",
    "PPOTrainer": "jaxrlhf.rl.trainer",
    "RLHFEngine": "jaxrlhf.rl.models",
    "train_ppo": "jaxrlhf.rl.run",
    "GRPOConfig": "jaxrlhf.rl.grpo",
    "train_grpo": "jaxrlhf.rl.grpo",
    "RLOOConfig": "jaxrlhf.rl.rloo",
    "train_rloo": "jaxrlhf.rl.rloo",
    "ReinforceConfig": "jaxrlhf.rl.reinforce",
    "train_reinforce": "jaxrlhf.rl.reinforce",
    "SFTConfig": "jaxrlhf.trainers.sft",
    "train_sft": "jaxrlhf.trainers.sft",
    "RewardConfig": "jaxrlhf.trainers.reward",
    "train_reward": "jaxrlhf.trainers.reward",
    "DPOConfig": "jaxrlhf.trainers.dpo",
    "train_dpo": "jaxrlhf.trainers.dpo",
    "RLHFConfig": "jaxrlhf.commands.rlhf",
    "train_rlhf": "jaxrlhf.commands.rlhf",
    "SampleConfig": "jaxrlhf.commands.sample",
    "sample": "jaxrlhf.commands.sample",
    "Rewards": "jaxrlhf.rewards",
    "InputError": "jaxrlhf.errors",
}
_SUBMODULES = ("distributed", "models", "sharding", "kernels", "data", "objectives", "rewards", "trainers")

__all__ = [*_HOME, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import jaxrlhf` stays quick."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"jaxrlhf.{name}")
    raise AttributeError(f"module 'jaxrlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
