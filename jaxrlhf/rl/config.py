"""Settings of step 3: PPO and its relatives."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from jaxrlhf.config import (
    Fraction,
    Lasting,
    MayChange,
    NonNegative,
    NonNegativeInt,
    PathName,
    Settings,
    alias,
    check_needs,
    deepspeed_chat,
    default_of,
    trl_rollouts,
)
from jaxrlhf.engine import GenerationConfig, SamplingConfig
from jaxrlhf.environments import EnvironmentConfig
from jaxrlhf.errors import InputError
from jaxrlhf.rewards import RewardsConfig
from jaxrlhf.rl.algorithms import ALGORITHMS, OF_CRITIC, Algorithm
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.trainers.optimizer import OptimizerConfig, Schedule
from jaxrlhf.trainers.rollouts import PiecesConfig
from jaxrlhf.trainers.settings import SharedConfig, StepOptions
from jaxrlhf.trainers.tokenizers import TokenizerConfig

ZeroStage = MayChange[Literal[0, 1, 2, 3] | None]


@dataclass(frozen=True)
class PPOModels(Settings, may_change=True):
    """The models."""

    actor_model_name_or_path: PathName[Annotated[str | None, alias("model_name_or_path", "sft_model_path")]] = None
    """Supervised model to train; also the reference."""
    reward_model_name_or_path: PathName[
        Annotated[str | None, alias("critic_model_name_or_path", "reward_model_path")]
    ] = None
    """Reward model; also the critic's starting point. Optional with reward_functions: the critic then starts as the
    actor under a new head."""
    tokenizer: TokenizerConfig = TokenizerConfig()


@dataclass(frozen=True)
class CriticConfig(Settings):
    """The critic, where it is not trained as the actor is."""

    critic_learning_rate: NonNegative = 5e-6
    """Peak learning rate of the critic."""
    critic_lr_scheduler_type: Schedule | None = None
    """lr_scheduler_type of the critic; default: the actor's."""
    critic_warmup_steps: NonNegativeInt | None = None
    """warmup_steps of the critic; default: the actor's."""
    critic_weight_decay: NonNegative | None = None
    """weight_decay of the critic; default: the actor's."""
    critic_lora_r: Annotated[NonNegativeInt, alias("critic_lora_dim")] = 0
    """Rank of the critic's LoRA adapters, with the actor's lora_alpha; the frozen base serves as the reward model;
    0 trains all parameters."""
    critic_lora_target_modules: Annotated[tuple[str, ...], alias("critic_lora_module_name")] = ()
    """lora_target_modules of the critic."""
    critic_zero_stage: ZeroStage = None
    """zero_stage of the critic; default: the actor's."""

    def optimizer(self, actor: OptimizerConfig) -> OptimizerConfig:
        """The critic's own settings where they are given, else the actor's."""
        own = {f.name: getattr(self, f"critic_{f.name}", None) for f in dataclasses.fields(actor)}
        return dataclasses.replace(actor, **{name: value for name, value in own.items() if value is not None})


@dataclass(frozen=True)
class FrozenConfig(Settings, may_change=True):
    """The reference and the reward model, which are only read."""

    reference_zero_stage: ZeroStage = None
    """ZeRO stage of the reference: 3 splits it, below it is whole on every device; default: the actor's."""
    reward_zero_stage: ZeroStage = None
    """ZeRO stage of the reward model; default: the critic's."""
    reference_sync_steps: Lasting[NonNegativeInt] = 0
    """Steps after which the reference moves to the policy, again and again; 0: it stays."""
    reference_mixup: Lasting[Fraction] = 1.0
    """Weight of the policy in a reference that moves; the rest is the old one."""
    reference_free: Lasting[bool] = False
    """Keep no reference: the log-ratio of the KL penalty is the log-prob, which makes it an entropy bonus, and with
    kl_coef=0 one model less is kept and read."""
    offload_reference_model: bool = False
    """Keep the reference in host memory while it is not scoring."""
    offload_reward_model: bool = False
    """Keep the reward model in host memory while it is not scoring."""


@dataclass(frozen=True)
class RolloutConfig(PiecesConfig, may_change=True):
    """Settings of rollouts, and of the samples that are shown."""

    total_episodes: NonNegativeInt = 0
    """Responses of the run, rounded up to whole rollout batches, in place of num_train_epochs and max_steps; 0: those
    decide."""
    dynamic_sampling: Lasting[NonNegativeInt] = 0
    """Further batches of prompts that a step may sample to replace groups whose responses all have one score, from
    which nothing is learned (DAPO); 0: none."""
    async_steps: Lasting[NonNegativeInt] = 0
    """Steps that a rollout is made before its update, so that reward functions work while the models train on earlier
    ones; 0: none."""
    replay_steps: Lasting[NonNegativeInt] = 0
    """Number of the following steps that train on a rollout again; 0: a rollout is used in one step only."""
    per_device_score_batch_size: NonNegativeInt = 0
    """Rows per device that are scored at once: scoring keeps no activations, so more fit than in training. 0:
    per_device_train_batch_size, with which the first update's ratio is exactly 1; with another, 1 within rounding."""
    generation_devices: NonNegativeInt = 0
    """Devices that only generate, while the others train, with async_steps; 0: all devices do both in turns."""
    generate_tensor_parallel: NonNegativeInt = 0
    """Devices that one copy of the actor is split over when it generates: mesh_tensor times a divisor of mesh_fsdp;
    0: those of one host."""
    sample_steps: NonNegativeInt = 20
    """Steps between printed tables of prompts, responses and scores; 0: none."""
    num_sample_rows: NonNegativeInt = 4
    """Rows of the tables of sample_steps."""

    @property
    def reuses(self) -> int:
        """Later steps that train on a rollout again."""
        return max(0, self.replay_steps - self.async_steps)


@dataclass(frozen=True)
class PtxConfig(Settings):
    """Pretraining text for mixture training, with ptx_coef."""

    ptx_data_path: PathName[Annotated[tuple[str, ...], alias("unsupervised_dataset_name")]] = ()
    """Pretraining text: .txt files, or data as in data_path."""
    ptx_field: str = "text"
    """Column with the text of ptx_data_path."""
    ptx_block_size: NonNegativeInt = 0
    """Tokens of a block that the text is packed into; 0: longest prompt + longest response."""
    per_device_ptx_batch_size: NonNegativeInt = 0
    """Blocks per device of one micro-batch; 0: per_device_train_batch_size."""

    def check(self) -> None:
        if self.ptx_block_size == 1:
            raise InputError("ptx_block_size=1 must be 0 (default) or at least 2")


NEEDS = {
    "kl_horizon": "kl_target",
    "length_penalty_start": "length_penalty",
    "importance_sampling_mode": "importance_sampling_correction",
    "importance_sampling_floor": "importance_sampling_correction",
    "importance_sampling_cap": "importance_sampling_correction",
    "async_steps": "importance_sampling_correction",
    "replay_steps": "importance_sampling_correction",
    "generation_devices": "async_steps",
    "ema_decay": "enable_ema",
    "ema_start_step": "enable_ema",
    "ptx_field": "ptx_coef",
    "ptx_block_size": "ptx_coef",
    "per_device_ptx_batch_size": "ptx_coef",
    "critic_lora_target_modules": "critic_lora_r",
    "kl_target": "kl_coef",
    "reference_mixup": "reference_sync_steps",
    "ptx_coef": "ptx_data_path",
    "ptx_data_path": "ptx_coef",
}
"""Options that require another one."""


@dataclass(frozen=True)
class PPOOptions(StepOptions):
    """Rollouts and updates

    A rollout batch has per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches rows per device;
    max_steps counts rollout batches.
    """

    algorithm: PPOHyperparameters = PPOHyperparameters()
    sampling: SamplingConfig = SamplingConfig()
    rewards: RewardsConfig = RewardsConfig()
    environments: EnvironmentConfig = EnvironmentConfig()
    critic: CriticConfig = CriticConfig()
    rollout: RolloutConfig = RolloutConfig()
    generation: GenerationConfig = GenerationConfig()
    frozen: FrozenConfig = FrozenConfig()
    ptx: PtxConfig = PtxConfig()

    def check(self) -> None:
        check_needs(self, NEEDS)
        if not self.critic.critic_lora_r:
            super().check()
        if self.lora.lora_dropout:
            raise InputError(f"lora_dropout={self.lora.lora_dropout}: ppo never drops out; leave it at 0")
        if self.sampling.temperature == 0:
            raise InputError("temperature=0 samples the same response always; ppo needs a temperature above 0")
        if self.rollout.total_episodes and self.run.max_steps != -1:
            raise InputError(
                f"total_episodes={self.rollout.total_episodes} and max_steps={self.run.max_steps} exclude each other: "
                "leave one of them out"
            )
        if self.rollout.per_device_score_batch_size and self.rows_per_device % self.score_rows:
            raise InputError(
                f"per_device_score_batch_size={self.score_rows} must divide the {self.rows_per_device} rows per device "
                "of a rollout batch"
            )
        self.environments.check_slots(self.generation.generation_slots, "use generation_batches")
        self._check_async()
        self._check_replay()
        self.hyperparameters().check_groups()
        if self.rollout.dynamic_sampling and self.sampling.samples_per_prompt == 1:
            raise InputError(
                f"dynamic_sampling={self.rollout.dynamic_sampling} compares the responses to one prompt, so it needs "
                "samples_per_prompt of at least 2; raise that, or leave dynamic_sampling out"
            )
        algorithm = self.algorithm.algorithm
        for name in algorithm.unused:
            if self.value(name) != default_of(type(self), name):
                why = "which has no critic" if name in OF_CRITIC else "which does not use it"
                raise InputError(
                    f"{name}={self.value(name)} with advantage_estimator={algorithm.estimator}, {why}; leave one of "
                    "them out"
                )
        self._check_shared_bases()
        self._check_reference()

    def _check_async(self) -> None:
        """Refuses what rollouts that wait for their update cannot be combined with."""
        steps = self.rollout.async_steps
        if steps and self.run.guard.on_spike == "rollback":
            raise InputError(
                f"async_steps={steps} with on_spike=rollback: rollouts that wait belong to the policy before the "
                "rollback; take on_spike=skip, or leave async_steps out"
            )

    def _check_replay(self) -> None:
        """Refuses what a replay of rollouts cannot be combined with."""
        steps, ahead = self.rollout.replay_steps, self.rollout.async_steps
        if steps and self.algorithm.has_critic:
            raise InputError(
                f"replay_steps={steps} with advantage_estimator={self.algorithm.advantage_estimator}: nothing corrects "
                "a critic's returns for another policy's samples; take an algorithm without a critic, such as grpo"
            )
        if steps and ahead >= steps:
            raise InputError(
                f"async_steps={ahead} must be below replay_steps={steps}: a rollout is already {ahead} steps old when "
                "it is first trained on, so no later step may use it again; raise replay_steps, or leave it out"
            )

    def _check_shared_bases(self) -> None:
        """Refuses settings of a frozen model that is the base of an adapted one."""
        for frozen, trained, rank in (
            ("reference", "actor", self.lora.lora_r),
            ("reward", "critic", self.critic.critic_lora_r),
        ):
            for name in (f"offload_{frozen}_model", f"{frozen}_zero_stage"):
                if rank and self.value(name) not in (None, False):
                    raise InputError(
                        f"{name}={self.value(name)}: with LoRA the {frozen} model is the {trained}'s base; leave it out"
                    )

    def _check_reference(self) -> None:
        """Refuses settings that contradict a reference that moves, or is not there."""
        sync, free = self.frozen.reference_sync_steps, self.frozen.reference_free
        if sync and self.lora.lora_r:
            raise InputError(
                f"reference_sync_steps={sync} with lora_r={self.lora.lora_r}: the adapters' base is the reference, and "
                "stays; leave one of them out"
            )
        if sync and self.frozen.offload_reference_model:
            raise InputError(
                f"reference_sync_steps={sync} with offload_reference_model: a reference that moves is part of the "
                "state on the devices; leave one of them out"
            )
        if not free:
            return
        for name, wrong in (
            ("reference_sync_steps", sync),
            ("offload_reference_model", self.frozen.offload_reference_model),
            ("reference_zero_stage", self.frozen.reference_zero_stage is not None),
            ("kl_target", self.algorithm.kl_target is not None),
            ("kl_in_loss", self.algorithm.kl_in_loss and self.algorithm.kl_coef),
        ):
            if wrong:
                raise InputError(
                    f"reference_free with {name}={self.value(name)}: there is no reference; leave one of them out"
                )
        if self.algorithm.kl_coef and self.algorithm.kl_estimator != "k1":
            raise InputError(
                f"reference_free with kl_estimator={self.algorithm.kl_estimator}: without a reference the penalty is "
                "k1 of the log-prob; leave one of them out, or set kl_coef to 0"
            )

    @property
    def rows_per_device(self) -> int:
        """Rows of a rollout batch per device, all samples counted."""
        run = self.run
        return run.per_device_train_batch_size * run.gradient_accumulation_steps * self.algorithm.num_mini_batches

    @property
    def score_rows(self) -> int:
        """Rows per device that are scored at once."""
        return self.rollout.per_device_score_batch_size or self.run.per_device_train_batch_size

    @property
    def scores_policy(self) -> bool:
        """True if scoring computes the policy's log-probs, False if the update does.

        A rollout that has waited is scored, because another policy has sampled it.
        """
        return self.algorithm.needs_old_logprobs or self.rollout.async_steps > 0

    def hyperparameters(self) -> PPOHyperparameters:
        """The algorithm with the values that it takes from sampling and run: the program's static argument."""
        own = self.rollout.per_device_score_batch_size
        return dataclasses.replace(
            self.algorithm,
            micro_batches=self.run.gradient_accumulation_steps,
            score_batches=self.rows_per_device // own if own else None,
            samples_per_prompt=self.sampling.samples_per_prompt,
            temperature=self.sampling.temperature,
            response_length=self.sampling.max_new_tokens,
        )

    def rollout_rows(self, devices: int) -> int:
        """Rows of a rollout batch, all samples counted. Raises InputError where groups or pieces do not divide them."""
        rows = self.rows_per_device * devices
        self.hyperparameters().check_rows(rows)
        self.rollout.check_pieces(rows // self.sampling.samples_per_prompt)
        return rows

    def total_steps(self, prompts: Callable[[], int], rows: int) -> int:
        """Rollout batches of the run, of `rows` rows each; `prompts` counts the prompts where an epoch decides."""
        if self.rollout.total_episodes:
            return -(-self.rollout.total_episodes // rows)
        return self.run.total_steps(lambda: prompts() * self.sampling.samples_per_prompt, rows)

    def ptx_rows(self, devices: int) -> int:
        """Blocks of pretraining text of a step."""
        rows = self.ptx.per_device_ptx_batch_size or self.run.per_device_train_batch_size
        return rows * self.run.gradient_accumulation_steps * self.algorithm.num_mini_batches * devices


@dataclass(frozen=True)
class PPOConfig(PPOOptions, SharedConfig):
    """Step 3 alone."""

    HIDDEN = frozenset({"train_on", "pair_rule", "pair_margin"})
    OTHER_FLAGS = deepspeed_chat.PPO
    TRL_KEYS = trl_rollouts.PPO

    models: PPOModels = PPOModels()

    def check(self) -> None:
        super().check()
        if self.data.streaming and self.rollout.dynamic_sampling:
            raise InputError(
                f"dynamic_sampling={self.rollout.dynamic_sampling} and streaming exclude each other: refills take "
                "prompts from behind the run's own, which a stream would read up to each time; give dynamic_sampling=0 "
                "or leave streaming out"
            )


def config_class(algorithm: Algorithm) -> type[PPOConfig]:
    """The settings of an algorithm: PPO's with its own defaults, and without what it does not use."""
    start = PPOConfig.create(advantage_estimator=algorithm.estimator, **algorithm.defaults)
    parts = [(f.name, f.type, dataclasses.field(default=getattr(start, f.name))) for f in dataclasses.fields(start)]
    hidden = PPOConfig.HIDDEN | {*algorithm.unused, "advantage_estimator"}
    keys = trl_rollouts.OF_ALGORITHMS.get(algorithm.name)
    names = {"HIDDEN": hidden, "TRL_KEYS": keys, "__doc__": f"{algorithm.title}.", "__module__": __name__}
    name = {"reinforce++": "Reinforce"}.get(algorithm.name, algorithm.title.replace(". ", ""))
    return dataclasses.make_dataclass(f"{name}Config", parts, bases=(PPOConfig,), namespace=names, frozen=True)


CONFIGS: dict[str, type[PPOConfig]] = {
    name: PPOConfig if name == "ppo" else config_class(algorithm) for name, algorithm in ALGORITHMS.items()
}
"""Settings of each algorithm, by name."""

if TYPE_CHECKING:
    GRPOConfig = RLOOConfig = ReinforceConfig = PPOConfig
else:
    GRPOConfig, RLOOConfig, ReinforceConfig = (CONFIGS[name] for name in ("grpo", "rloo", "reinforce++"))
