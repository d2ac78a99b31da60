"""GRPO: several answers to each prompt, each judged by how far its score lies from its group's mean.

Defaults are those of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300, section 4.2 and equation 3), with groups of 8
instead of 64. Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): scale_by_std=False, loss_aggregation="fixed-length",
kl_coef=0.
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
class GRPOOptions(CriticFreeOptions):
    """GRPO"""

    advantage_estimator: str = fixed("grpo")
    gamma: float = fixed(1.0)
    samples_per_prompt: int = like(
        PolicyOptions,
        "samples_per_prompt",
        8,
        help="answers to each prompt, the group that is compared; it divides the rows of a rollout batch",
    )
    learning_rate: float = like(PolicyOptions, "learning_rate", 1e-6)
    kl_in_loss: bool = like(
        PolicyOptions, "kl_in_loss", True, help="the KL penalty is a term of the loss; false: of each answer's score"
    )
    kl_coef: float = like(PolicyOptions, "kl_coef", 0.04)
    kl_estimator: str = like(PolicyOptions, "kl_estimator", "k3")
    loss_aggregation: str = like(
        PolicyOptions,
        "loss_aggregation",
        "sequence-mean",
        help="policy loss over tokens: the mean over answers of their means (the paper's); the mean of all tokens "
        "(DAPO's); or their sum per answer over max_answer_seq_len (Dr. GRPO's)",
    )
    scale_by_std: bool = like(
        PolicyOptions, "scale_by_std", help="divide by the standard deviation of the group; false: Dr. GRPO"
    )


@dataclass(frozen=True)
class GRPOConfig(DataConfig, CriticFreeModelConfig, FolderConfig, GRPOOptions):
    """GRPO."""


def train_grpo(config: GRPOConfig) -> PPOState:
    """Run GRPO; the trained model lies in `config.output_dir` afterwards."""
    return train_ppo(config)
