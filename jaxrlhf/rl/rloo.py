"""RLOO: several answers to each prompt, each judged against the mean score of the others.

Ahmadian et al. 2024 (arXiv 2402.14740): a whole answer is one action, so the KL penalty is a part of its score and its
log-prob is a sum over tokens, nothing is clipped or whitened, and one update is made on what was sampled. Summed over
one fixed length: that is the same direction at a scale that Adam does not feel.
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
class RLOOOptions(CriticFreeOptions):
    """RLOO"""

    advantage_estimator: str = fixed("rloo")
    gamma: float = fixed(1.0)
    scale_by_std: bool = fixed(True)
    samples_per_prompt: int = like(
        PolicyOptions,
        "samples_per_prompt",
        4,
        help="answers to each prompt, each compared with the others; it divides the rows of a rollout batch",
    )
    learning_rate: float = like(PolicyOptions, "learning_rate", 1e-6)
    kl_coef: float = like(PolicyOptions, "kl_coef", 0.05)
    loss_aggregation: str = like(
        PolicyOptions,
        "loss_aggregation",
        "fixed-length",
        help="policy loss over tokens: their sum per answer over max_answer_seq_len (the paper's, up to that factor); "
        "the mean of all tokens; or the mean over answers of their means",
    )


@dataclass(frozen=True)
class RLOOConfig(DataConfig, CriticFreeModelConfig, FolderConfig, RLOOOptions):
    """RLOO."""


def train_rloo(config: RLOOConfig) -> PPOState:
    """Run RLOO; the trained model lies in `config.output_dir` afterwards."""
    return train_ppo(config)
