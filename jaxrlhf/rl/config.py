"""Settings of step 3, PPO: its models, the options of its section in a three-step run, and both together."""

import dataclasses
import math
from dataclasses import dataclass

from jaxrlhf.config import field
from jaxrlhf.data import DataConfig
from jaxrlhf.engine import SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import KERNEL_OPTIONS
from jaxrlhf.objectives import AGGREGATIONS, KL_ESTIMATES
from jaxrlhf.rewards import RewardFunctionOptions
from jaxrlhf.rl import ESTIMATORS, PPOHyperparameters
from jaxrlhf.rl.hyperparameters import SCORE_NORMALIZATIONS
from jaxrlhf.trainers.lora import LoRAOptions
from jaxrlhf.trainers.optimizer import SCHEDULES, OptimizerConfig
from jaxrlhf.trainers.settings import FolderConfig, TrainingConfig, TrainingMeshConfig, check_needs, named_as


@dataclass(frozen=True)
class PPOModelConfig(TrainingMeshConfig):
    """The models, the device mesh and the precision."""

    actor_model_name_or_path: str | None = field(
        None, "supervised model to train; also the reference", aliases=("model_name_or_path", "sft_model_path")
    )
    critic_model_name_or_path: str | None = field(
        None,
        "reward model; also the critic's starting point. With reward_functions it may be left out: the critic, if any, "
        "then starts as the actor under a new head",
        aliases=("reward_model_name_or_path", "reward_model_path"),
    )
    tokenizer_name_or_path: str | None = field(None, "tokenizer folder or hub name; default: that of the actor")


_OF_CRITIC = ("critic_learning_rate", "critic_lr_scheduler_type", "critic_warmup_steps", "critic_weight_decay")
_OF_CRITIC += ("critic_only_steps", "critic_lora_r", "critic_lora_target_modules", "critic_zero_stage")
_OF_CRITIC += ("cliprange_value", "lam")
UNUSED = {
    "gae": ("scale_by_std",),
    "grpo": (*_OF_CRITIC, "gamma"),
    "rloo": (*_OF_CRITIC, "gamma", "scale_by_std"),
    "reinforce++": (*_OF_CRITIC, "scale_by_std"),
}
"""By estimator of advantages, the options that mean nothing to it."""
NEEDS = {
    "kl_horizon": "kl_target",
    "length_penalty_start": "length_penalty",
    "importance_sampling_cap": "importance_sampling_correction",
    "ema_decay": "enable_ema",
    "ema_start_step": "enable_ema",
    "ptx_field": "ptx_coef",
    "ptx_block_size": "ptx_coef",
    "per_device_ptx_batch_size": "ptx_coef",
    "reward_model_weight": "reward_functions",
    "critic_lora_target_modules": "critic_lora_r",
}
"""Options that mean nothing without another one."""


@dataclass(frozen=True)
class PolicyOptions(LoRAOptions, RewardFunctionOptions, TrainingConfig):
    """Rollouts and updates

    A rollout batch has per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches rows per device;
    max_steps counts rollout batches.
    """

    advantage_estimator: str = field(
        "gae",
        "where advantages come from: gae (PPO, with a critic), or without one grpo, rloo (responses to one prompt "
        "compared) or reinforce++",
        choices=ESTIMATORS,
    )
    samples_per_prompt: int = field(
        1,
        "responses to each prompt of a rollout batch, which then has fewer prompts; the groups of grpo and rloo",
        aliases=("num_generations", "rloo_k"),
    )

    learning_rate: float = field(9.65e-6, "peak learning rate of the actor", aliases=("actor_learning_rate",))
    critic_learning_rate: float = field(5e-6, "peak learning rate of the critic")
    critic_lr_scheduler_type: str | None = field(
        None, "lr_scheduler_type of the critic; default: that of the actor", choices=SCHEDULES
    )
    critic_warmup_steps: int | None = field(None, "warmup_steps of the critic; default: as the actor")
    critic_weight_decay: float | None = field(None, "weight_decay of the critic; default: that of the actor")
    critic_only_steps: int = field(
        0, "steps at the start that train the critic alone, until its values mean something", aliases=("critic_warmup",)
    )
    lora_r: int = field(
        0,
        "rank of the actor's LoRA adapters; its base is frozen then, and serves as the reference too; 0: train all",
        aliases=("lora_dim", "actor_lora_r", "actor_lora_dim"),
    )
    lora_target_modules: tuple[str, ...] = field(
        (),
        "linear maps of the actor that get adapters: names such as q_proj or c_attn, patterns such as attn/query, or "
        "all-linear; default: all of attention and MLP",
        aliases=("lora_module_name", "actor_lora_module_name"),
    )
    critic_lora_r: int = field(
        0,
        "rank of the critic's LoRA adapters, with the actor's lora_alpha; its base serves as the reward model too; "
        "0: train all",
        aliases=("critic_lora_dim",),
    )
    critic_lora_target_modules: tuple[str, ...] = field(
        (), "as lora_target_modules, for the critic", aliases=("critic_lora_module_name",)
    )
    max_answer_seq_len: int = field(256, "longest response in tokens", aliases=("response_length",))
    min_answer_seq_len: int = field(
        0, "EOS cannot be drawn, and no stop string ends an answer, before this many tokens"
    )
    temperature: float = field(1.0, "sampling temperature; log-probs are taken at the same one")
    top_k: int = field(0, "sample among the k most likely tokens; 0: all")
    top_p: float = field(1.0, "sample among the most likely tokens that hold this probability")
    repetition_penalty: float = field(
        1.0,
        "divides positive logits of tokens that prompt or answer already hold, and multiplies negative ones; log-probs "
        "are taken without it; 1: off",
    )
    stop_strings: tuple[str, ...] = field(
        (),
        "an answer ends after one of these texts too, matched as the tokens that the tokenizer makes of it alone; a "
        "list in the config file keeps commas and spaces",
    )
    generation_batches: int = field(
        1,
        "pieces that a rollout batch is generated in, one after the other, each of prompts of similar length: less "
        "memory for the key/value cache and less padding, same answers",
    )
    generation_slots: int = field(
        0,
        "continuous batching: answers in work at a time; one that is done makes room for the next prompt. 0: all at "
        "once",
    )
    ppo_epochs: int = field(1, "passes over each rollout batch", aliases=("num_ppo_epochs",))
    num_mini_batches: int = field(1, "optimizer steps per pass")
    kl_coef: float = field(0.1, "weight of the KL penalty, at the start with kl_target", aliases=("init_kl_coef",))
    kl_estimator: str = field(
        "k1", "estimate of the KL per token: k1 = log-ratio d, k2 = d²/2, k3 = exp(-d) - 1 + d", choices=KL_ESTIMATES
    )
    kl_in_loss: bool = field(False, "the KL penalty is a term of the policy loss instead of one of the reward")
    kl_target: float | None = field(
        None, "nats per answer that the KL penalty's weight is steered towards after each step; none: it stays"
    )
    kl_horizon: float = field(10000.0, "answers over which the steered weight may change by about 20 %")
    early_stop_kl: float | None = field(
        None,
        "leave out a step's remaining updates once the mean KL between the policy and itself at the step's start "
        "exceeds this, in nats per token; none: never",
    )
    cliprange: float = field(0.2, "clipping of the policy ratio")
    cliprange_high: float | None = field(None, "clipping of the ratio above 1; default: as below")
    dual_clip: float | None = field(
        None, "bound on the ratio of tokens with negative advantage, above 1; none: unbounded"
    )
    cliprange_value: float = field(0.2, "clipping of the value update")
    entropy_coef: float = field(0.0, "weight of the policy's entropy per token as a bonus in its loss")
    loss_aggregation: str = field(
        "token-mean",
        "policy loss over tokens: their mean; the mean over answers of their means; or their sum per answer over "
        "max_answer_seq_len",
        choices=AGGREGATIONS,
    )
    gamma: float = field(1.0, "discount")
    lam: float = field(0.95, "lambda of generalised advantage estimation")
    clip_reward: float | None = field(5.0, "bound on the score of an answer; none: unbounded")
    score_normalization: str = field(
        "none",
        "scores, before they are clipped, less their mean and over their standard deviation: of the batch, or running "
        "over all batches",
        choices=SCORE_NORMALIZATIONS,
    )
    missing_eos_penalty: float = field(0.0, "taken off the score of an answer that did not end by itself")
    length_penalty: float = field(0.0, "taken off the score for each token beyond length_penalty_start")
    length_penalty_start: int = field(0, "tokens of an answer that cost nothing")
    whiten_rewards: bool = field(False, "scale rewards per token to unit variance over the batch")
    whiten_advantages: bool = field(True, "scale advantages to zero mean and unit variance over the batch")
    scale_by_std: bool = field(True, "grpo: divide advantages by the standard deviation of their group")
    ptx_coef: float = field(
        0.0,
        "weight of the loss on pretraining text, in nats per token, in the same update as the policy's (InstructGPT: "
        "27.8); 0: none",
        aliases=("unsup_coef",),
    )
    ptx_data_path: tuple[str, ...] = field(
        (), "pretraining text for ptx_coef: .txt files, or data as in data_path", aliases=("unsupervised_dataset_name",)
    )
    ptx_field: str = field("text", "name of the field with the text")
    ptx_block_size: int = field(0, "tokens of a block that the text is packed into; 0: longest prompt + longest answer")
    per_device_ptx_batch_size: int = field(0, "blocks per device of one micro-batch; 0: per_device_train_batch_size")
    enable_ema: bool = field(False, "keep a moving average of the actor and export it to output_dir/ema")
    ema_decay: float = field(0.992, "decay of that average per optimizer step")
    ema_start_step: int = field(0, "steps before which the average is a copy of the actor")
    critic_zero_stage: int | None = field(None, "zero_stage of the critic; default: that of the actor")
    reference_zero_stage: int | None = field(
        None, "of the reference: 3 splits it, below it is whole on every device; default: that of the actor"
    )
    reward_zero_stage: int | None = field(None, "of the reward model, likewise; default: that of the critic")
    offload_reference_model: bool = field(False, "keep the reference in host memory while it is not scoring")
    offload_reward_model: bool = field(False, "keep the reward model in host memory while it is not scoring")
    generate_tensor_parallel: int = field(
        0,
        "devices that one copy of the actor is split over when it generates: mesh_tensor times a divisor of mesh_fsdp; "
        "0: those of one host",
    )
    kv_cache_dtype: str = field(
        "auto",
        "how generation holds keys and values: int8 or fp8 (float8_e4m3fn) with a scale per head and token take half "
        "the memory and traffic of bfloat16 and round what attention reads; auto: the compute dtype",
        choices=KERNEL_OPTIONS["kv_cache_dtype"],
    )
    importance_sampling_correction: bool = field(
        False, "weigh each token's policy loss by train over sampler probability, for the gap between both programs"
    )
    importance_sampling_cap: float = field(2.0, "largest such weight")
    sample_steps: int = field(20, "steps between printed tables of prompts, responses and scores; 0: none")
    num_sample_rows: int = field(4, "rows of those tables")

    @property
    def adapter_ranks(self) -> tuple[int, ...]:
        return self.lora_r, self.critic_lora_r

    def __post_init__(self) -> None:
        super().__post_init__()
        # These refuse bad values under their own names for them.
        with named_as({"response_length": "max_answer_seq_len", "importance_cap": "importance_sampling_cap"}):
            self.hyperparameters(seed=0)
        with named_as({"max_new_tokens": "max_answer_seq_len", "min_new_tokens": "min_answer_seq_len"}):
            self.sampling(None, 0)
        with named_as({f.name: f"critic_{f.name}" for f in dataclasses.fields(OptimizerConfig)}):
            self.critic_optimizer()
        self._check_ptx()
        check_needs(self, NEEDS)
        if self.critic_lora_r < 0:
            raise InputError(f"critic_lora_r={self.critic_lora_r} must be 0 (no adapters) or more")
        if self.lora_dropout:
            raise InputError(f"lora_dropout={self.lora_dropout}: ppo never drops out; leave it at 0")
        if self.generation_batches < 1:
            raise InputError(f"generation_batches={self.generation_batches} must be at least 1")
        if not 0 <= self.kl_coef < math.inf or (self.kl_target is not None and self.kl_coef == 0):
            least = "above 0 with kl_target, which scales it" if self.kl_target is not None else "a number, 0 or more"
            raise InputError(f"kl_coef={self.kl_coef} must be {least}")
        defaults = {f.name: f.default for f in dataclasses.fields(PolicyOptions)}
        for name in UNUSED[self.advantage_estimator]:
            if getattr(self, name) != defaults[name]:
                why = "has no critic" if name in _OF_CRITIC else "makes no use of it"
                raise InputError(
                    f"{name}={getattr(self, name)} with advantage_estimator={self.advantage_estimator}, which {why}; "
                    "leave one of them out"
                )
        for name, model, shared in (
            ("reference", "actor", self.lora_r),
            ("reward", "critic", self.critic_lora_r),
        ):
            if shared and getattr(self, f"offload_{name}_model"):
                raise InputError(
                    f"offload_{name}_model: with LoRA the {name} model is the {model}'s own base, so there is nothing "
                    "to offload; leave it out"
                )
            if shared and getattr(self, f"{name}_zero_stage") is not None:
                raise InputError(
                    f"{name}_zero_stage: with LoRA the {name} model is the {model}'s own base and lies as that does; "
                    "leave it out"
                )
        for name in ("critic_zero_stage", "reference_zero_stage", "reward_zero_stage"):
            if getattr(self, name) not in (None, 0, 1, 2, 3):
                raise InputError(f"{name}={getattr(self, name)} must be 0, 1, 2 or 3")
        if self.generate_tensor_parallel < 0:
            raise InputError(f"generate_tensor_parallel={self.generate_tensor_parallel} must be 0 (choose) or more")
        for name in ("sample_steps", "num_sample_rows", "generation_slots"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")

    def _check_ptx(self) -> None:
        if bool(self.ptx_coef) != bool(self.ptx_data_path):
            raise InputError(
                f"ptx_coef={self.ptx_coef} and ptx_data_path={list(self.ptx_data_path)}: mixture training needs both a "
                "weight and text; give both, or neither"
            )
        for name, least in (("ptx_block_size", 2), ("per_device_ptx_batch_size", 1)):
            if getattr(self, name) and getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be 0 (default) or at least {least}")

    def hyperparameters(self, seed: int) -> PPOHyperparameters:
        names = {f.name for f in dataclasses.fields(PPOHyperparameters)} - {"seed"}
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        values["importance_cap"] = self.importance_sampling_cap if self.importance_sampling_correction else None
        values["response_length"] = self.max_answer_seq_len
        return PPOHyperparameters(micro_batches=self.gradient_accumulation_steps, seed=seed, **values)

    def critic_optimizer(self) -> OptimizerConfig:
        """The critic's own settings where they are given, else the actor's."""
        names = {f.name: getattr(self, f.name) for f in dataclasses.fields(OptimizerConfig)}
        own = {name: getattr(self, f"critic_{name}", None) for name in names}
        return OptimizerConfig(**(names | {name: value for name, value in own.items() if value is not None}))

    def sampling(
        self, eos_token_id: int | None, pad_id: int, stop_sequences: tuple[tuple[int, ...], ...] = ()
    ) -> SamplingConfig:
        return SamplingConfig(
            max_new_tokens=self.max_answer_seq_len,
            min_new_tokens=self.min_answer_seq_len,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            eos_token_id=eos_token_id,
            pad_token_id=pad_id,
            repetition_penalty=self.repetition_penalty,
            stop_sequences=stop_sequences,
            samples_per_prompt=self.samples_per_prompt,
        )

    def rollout_rows(self, devices: int) -> int:
        """Rows of a rollout batch, all samples counted; InputError where groups or pieces do not divide them."""
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches * devices
        self.hyperparameters(seed=0).check_rows(rows)
        self.check_pieces(rows // self.samples_per_prompt)
        return rows

    def ptx_rows(self, devices: int) -> int:
        """Blocks of pretraining text of a step."""
        rows = self.per_device_ptx_batch_size or self.per_device_train_batch_size
        return rows * self.gradient_accumulation_steps * self.num_mini_batches * devices

    def check_pieces(self, prompts: int) -> None:
        """Refuse a rollout batch that generation_batches does not divide."""
        if prompts % self.generation_batches:
            raise InputError(
                f"generation_batches={self.generation_batches} must divide the {prompts} prompts of a rollout batch"
            )


@dataclass(frozen=True)
class PPOOptions(PolicyOptions):
    """PPO"""


@dataclass(frozen=True)
class PPOConfig(DataConfig, PPOModelConfig, FolderConfig, PPOOptions):
    """Step 3 alone."""
