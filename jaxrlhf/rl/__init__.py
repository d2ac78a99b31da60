"""The train program of PPO and its relatives: rollouts scored into experience, and one jitted update of the models.

PPO exactly as DESIGN has it: per-token KL reward plus the clipped score at the last response token, GAE over the
response, advantages whitened over the global batch, clipped policy and value losses; all epochs and minibatches in one
program. GRPO, RLOO and REINFORCE++ are the same program with other advantages and no critic.
Source: Ouyang et al. 2022 (arXiv 2203.02155), Yao et al. 2023 (arXiv 2308.01320).
"""

from jaxrlhf.rl.algorithms import ALGORITHMS, Algorithm
from jaxrlhf.rl.experience import (
    Experience,
    RLModels,
    actor_logprobs,
    advantages_and_returns,
    critic_values,
    score_rollout,
    shaped_scores,
)
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.rl.step import PPOState, ppo_step

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Experience",
    "PPOHyperparameters",
    "PPOState",
    "RLModels",
    "actor_logprobs",
    "advantages_and_returns",
    "critic_values",
    "ppo_step",
    "score_rollout",
    "shaped_scores",
]
