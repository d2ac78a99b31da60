"""What GRPO, RLOO and REINFORCE++ share as commands of their own: PPO's settings without those of a critic."""

from dataclasses import dataclass

from jaxrlhf.config import field, fixed, like
from jaxrlhf.rl.config import PolicyOptions, PPOModelConfig
from jaxrlhf.trainers.settings import TrainingMeshConfig


@dataclass(frozen=True)
class CriticFreeModelConfig(TrainingMeshConfig):
    """The models, the device mesh and the precision."""

    actor_model_name_or_path: str | None = like(PPOModelConfig, "actor_model_name_or_path")
    reward_model_name_or_path: str | None = field(
        None,
        "reward model that scores the answers, by itself or beside reward_functions",
        aliases=("critic_model_name_or_path", "reward_model_path"),
    )
    tokenizer_name_or_path: str | None = like(PPOModelConfig, "tokenizer_name_or_path")

    @property
    def critic_model_name_or_path(self) -> str | None:
        """The reward model, by the name that PPO's settings give it."""
        return self.reward_model_name_or_path


@dataclass(frozen=True)
class CriticFreeOptions(PolicyOptions):
    """Policy gradients without a critic."""

    critic_learning_rate: float = fixed(5e-6)
    critic_lr_scheduler_type: str | None = fixed(None)
    critic_warmup_steps: int | None = fixed(None)
    critic_weight_decay: float | None = fixed(None)
    critic_only_steps: int = fixed(0)
    critic_lora_r: int = fixed(0)
    critic_lora_target_modules: tuple[str, ...] = fixed(())
    critic_zero_stage: int | None = fixed(None)
    cliprange_value: float = fixed(0.2)
    lam: float = fixed(0.95)
    reward_zero_stage: int | None = like(
        PolicyOptions,
        "reward_zero_stage",
        help="of the reward model, likewise; default: that of the actor",
    )
    clip_reward: float | None = like(PolicyOptions, "clip_reward", None)
    whiten_advantages: bool = like(PolicyOptions, "whiten_advantages", False)
