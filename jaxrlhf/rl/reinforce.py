"""REINFORCE++: one answer to each prompt, PPO's loss, and in the critic's place the spread over the whole batch.

The advantage of a token is the sum of the rewards from it on, the KL penalty of each token included, whitened over the
batch. Hu et al. 2025 (arXiv 2501.03262), whose defaults these are.
"""

from dataclasses import dataclass

from jaxrlhf.config import fixed, like
from jaxrlhf.data import DataConfig
from jaxrlhf.rl import PPOState
from jaxrlhf.rl.config import PolicyOptions
from jaxrlhf.rl.critic_free import CriticFreeModelConfig, CriticFreeOptions
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.trainers.settings import FolderConfig


@dataclass(frozen=True)
class ReinforceOptions(CriticFreeOptions):
    """REINFORCE++"""

    advantage_estimator: str = fixed("reinforce++")
    scale_by_std: bool = fixed(True)
    samples_per_prompt: int = like(
        PolicyOptions, "samples_per_prompt", help="answers to each prompt of a rollout batch, which has fewer then"
    )
    learning_rate: float = like(PolicyOptions, "learning_rate", 5e-7)
    kl_coef: float = like(PolicyOptions, "kl_coef", 0.01)
    clip_reward: float | None = like(PolicyOptions, "clip_reward", 10.0)
    whiten_advantages: bool = like(PolicyOptions, "whiten_advantages", True)


@dataclass(frozen=True)
class ReinforceConfig(DataConfig, CriticFreeModelConfig, FolderConfig, ReinforceOptions):
    """REINFORCE++."""


def train_reinforce(config: ReinforceConfig) -> PPOState:
    """Run REINFORCE++; the trained model lies in `config.output_dir` afterwards."""
    return train_ppo(config)
