"""Settings of step 3, PPO: its models, the options of its section in a three-step run, and both together."""

from dataclasses import dataclass

from jaxrlhf.config import field
from jaxrlhf.data import DataConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import KERNEL_OPTIONS
from jaxrlhf.ppo import PPOHyperparameters
from jaxrlhf.sampling import SamplingConfig
from jaxrlhf.trainers.lora import LoRAOptions
from jaxrlhf.trainers.settings import FolderConfig, TrainingConfig, TrainingMeshConfig


@dataclass(frozen=True)
class PPOModelConfig(TrainingMeshConfig):
    """The models, the device mesh and the precision."""

    actor_model_name_or_path: str | None = field(
        None, "supervised model to train; also the reference", aliases=("model_name_or_path", "sft_model_path")
    )
    critic_model_name_or_path: str | None = field(
        None,
        "reward model; also the critic's starting point",
        aliases=("reward_model_name_or_path", "reward_model_path"),
    )
    tokenizer_name_or_path: str | None = field(None, "tokenizer folder or hub name; default: that of the actor")


@dataclass(frozen=True)
class PPOOptions(LoRAOptions, TrainingConfig):
    """PPO. A rollout batch has per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches rows per
    device; max_steps counts rollout batches."""

    learning_rate: float = field(9.65e-6, "peak learning rate of the actor", aliases=("actor_learning_rate",))
    critic_learning_rate: float = field(5e-6, "peak learning rate of the critic")
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
    kl_coef: float = field(0.1, "weight of the per-token KL penalty in the reward")
    cliprange: float = field(0.2, "clipping of the policy ratio")
    cliprange_value: float = field(0.2, "clipping of the value update")
    gamma: float = field(1.0, "discount")
    lam: float = field(0.95, "lambda of generalised advantage estimation")
    clip_reward: float | None = field(5.0, "bound on the reward model's score; none: unbounded")
    whiten_advantages: bool = field(True, "scale advantages to zero mean and unit variance over the batch")
    enable_ema: bool = field(False, "keep a moving average of the actor and export it to output_dir/ema")
    ema_decay: float = field(0.992, "decay of that average per optimizer step")
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hyperparameters(seed=0)  # both refuse bad values by name
        self.sampling(None, 0)
        if self.critic_lora_r < 0:
            raise InputError(f"critic_lora_r={self.critic_lora_r} must be 0 (no adapters) or more")
        if self.lora_dropout:
            raise InputError(f"lora_dropout={self.lora_dropout}: ppo never drops out; leave it at 0")
        if self.generation_batches < 1:
            raise InputError(f"generation_batches={self.generation_batches} must be at least 1")
        if self.kl_coef < 0:
            raise InputError(f"kl_coef={self.kl_coef} must be 0 or more")
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

    def hyperparameters(self, seed: int) -> PPOHyperparameters:
        same = ("ppo_epochs", "num_mini_batches", "gamma", "lam", "cliprange", "cliprange_value", "clip_reward")
        same += ("whiten_advantages", "temperature", "ema_decay")
        values = {name: getattr(self, name) for name in same}
        values["importance_cap"] = self.importance_sampling_cap if self.importance_sampling_correction else None
        return PPOHyperparameters(micro_batches=self.gradient_accumulation_steps, seed=seed, **values)

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
        )

    def rollout_rows(self, devices: int) -> int:
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches * devices
        self.check_pieces(rows)
        return rows

    def check_pieces(self, rows: int) -> None:
        """Refuse a rollout batch that generation_batches does not divide."""
        if rows % self.generation_batches:
            raise InputError(
                f"generation_batches={self.generation_batches} must divide the rollout batch of {rows} rows"
            )


@dataclass(frozen=True)
class PPOConfig(DataConfig, PPOModelConfig, FolderConfig, PPOOptions):
    """Step 3 alone."""
