"""RLHF training for chat models in JAX: supervised fine-tuning, reward model, PPO and DPO on one device mesh."""

import importlib
from typing import Any

_HOME = {
    "HybridEngine": "jaxrlhf.engine",
    "Rollout": "jaxrlhf.engine",
    "SamplingConfig": "jaxrlhf.engine",
    "Experience": "jaxrlhf.ppo",
    "PPOHyperparameters": "jaxrlhf.ppo",
    "PPOState": "jaxrlhf.ppo",
    "ppo_step": "jaxrlhf.ppo",
    "score_rollout": "jaxrlhf.ppo",
    "PPOConfig": "jaxrlhf.trainers.ppo",
    "PPOTrainer": "jaxrlhf.trainers.ppo_trainer",
    "RLHFEngine": "jaxrlhf.trainers.ppo_engine",
    "train_ppo": "jaxrlhf.trainers.ppo",
    "GRPOConfig": "jaxrlhf.trainers.grpo",
    "train_grpo": "jaxrlhf.trainers.grpo",
    "RLOOConfig": "jaxrlhf.trainers.rloo",
    "train_rloo": "jaxrlhf.trainers.rloo",
    "ReinforceConfig": "jaxrlhf.trainers.reinforce",
    "train_reinforce": "jaxrlhf.trainers.reinforce",
    "SFTConfig": "jaxrlhf.trainers.sft",
    "train_sft": "jaxrlhf.trainers.sft",
    "RewardConfig": "jaxrlhf.trainers.reward",
    "train_reward": "jaxrlhf.trainers.reward",
    "DPOConfig": "jaxrlhf.trainers.dpo",
    "train_dpo": "jaxrlhf.trainers.dpo",
    "RLHFConfig": "jaxrlhf.trainers.rlhf",
    "train_rlhf": "jaxrlhf.trainers.rlhf",
    "SampleConfig": "jaxrlhf.trainers.sample",
    "sample": "jaxrlhf.trainers.sample",
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
