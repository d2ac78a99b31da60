"""RLHF training for chat models in JAX: supervised fine-tuning, reward model, PPO and DPO on one device mesh."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxrlhf import (
        data,
        distributed,
        engine,
        kernels,
        models,
        objectives,
        rewards,
        rl,
        sharding,
        trainers,
    )
    from jaxrlhf.commands.rlhf import RLHFConfig, train_rlhf
    from jaxrlhf.commands.sample import SampleConfig, sample
    from jaxrlhf.engine import HybridEngine, Rollout, SamplingConfig
    from jaxrlhf.errors import InputError
    from jaxrlhf.plan.fit import fitted
    from jaxrlhf.rewards import Rewards
    from jaxrlhf.rl.config import GRPOConfig, PPOConfig, ReinforceConfig, RLOOConfig
    from jaxrlhf.rl.experience import Experience, RLModels, score_rollout
    from jaxrlhf.rl.hyperparameters import PPOHyperparameters
    from jaxrlhf.rl.models import RLHFEngine
    from jaxrlhf.rl.run import train_grpo, train_ppo, train_reinforce, train_rloo
    from jaxrlhf.rl.step import PPOState, ppo_step
    from jaxrlhf.rl.trainer import PPOTrainer
    from jaxrlhf.trainers.distill import DistillConfig, train_distill
    from jaxrlhf.trainers.dpo import DPOConfig, train_dpo
    from jaxrlhf.trainers.kto import KTOConfig, train_kto
    from jaxrlhf.trainers.reward import RewardConfig, train_reward
    from jaxrlhf.trainers.sft import SFTConfig, train_sft

_HOME = {
    "jaxrlhf.commands.rlhf": ("RLHFConfig", "train_rlhf"),
    "jaxrlhf.commands.sample": ("SampleConfig", "sample"),
    "jaxrlhf.engine": ("HybridEngine", "Rollout", "SamplingConfig"),
    "jaxrlhf.errors": ("InputError",),
    "jaxrlhf.plan.fit": ("fitted",),
    "jaxrlhf.rewards": ("Rewards",),
    "jaxrlhf.rl.config": ("GRPOConfig", "PPOConfig", "RLOOConfig", "ReinforceConfig"),
    "jaxrlhf.rl.experience": ("Experience", "RLModels", "score_rollout"),
    "jaxrlhf.rl.hyperparameters": ("PPOHyperparameters",),
    "jaxrlhf.rl.models": ("RLHFEngine",),
    "jaxrlhf.rl.run": ("train_grpo", "train_ppo", "train_reinforce", "train_rloo"),
    "jaxrlhf.rl.step": ("PPOState", "ppo_step"),
    "jaxrlhf.rl.trainer": ("PPOTrainer",),
    "jaxrlhf.trainers.dpo": ("DPOConfig", "train_dpo"),
    "jaxrlhf.trainers.distill": ("DistillConfig", "train_distill"),
    "jaxrlhf.trainers.kto": ("KTOConfig", "train_kto"),
    "jaxrlhf.trainers.reward": ("RewardConfig", "train_reward"),
    "jaxrlhf.trainers.sft": ("SFTConfig", "train_sft"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DPOConfig",
    "DistillConfig",
    "Experience",
    "GRPOConfig",
    "HybridEngine",
    "InputError",
    "KTOConfig",
    "PPOConfig",
    "PPOHyperparameters",
    "PPOState",
    "PPOTrainer",
    "RLHFConfig",
    "RLHFEngine",
    "RLModels",
    "RLOOConfig",
    "ReinforceConfig",
    "RewardConfig",
    "Rewards",
    "Rollout",
    "SFTConfig",
    "SampleConfig",
    "SamplingConfig",
    "data",
    "distributed",
    "engine",
    "fitted",
    "kernels",
    "models",
    "objectives",
    "ppo_step",
    "rewards",
    "rl",
    "sample",
    "score_rollout",
    "sharding",
    "train_distill",
    "train_dpo",
    "train_grpo",
    "train_kto",
    "train_ppo",
    "train_reinforce",
    "train_reward",
    "train_rlhf",
    "train_rloo",
    "train_sft",
    "trainers",
]


def __getattr__(name: str) -> object:
    """Imports public names when they are first used, so that `import jaxrlhf` stays quick."""
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    if name in __all__:
        return importlib.import_module(f"jaxrlhf.{name}")
    raise AttributeError(f"module 'jaxrlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
