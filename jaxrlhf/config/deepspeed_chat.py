"""DeepSpeed-Chat's flags, as our commands read them: renamed, obsolete with a line of advice, or refused.

A flag that is also a name or alias of one of our settings, with the same meaning, needs no entry here. A config class
names its table in `OTHER_FLAGS`. docs/coming-from-deepspeed-chat.md shows the whole.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxrlhf.config.other_flags import Flag, Line, Say, Script, count, first_of
from jaxrlhf.errors import InputError

PROJECT = "DeepSpeed-Chat"


RATE = ("learning_rate", "actor_learning_rate")
RANK = ("lora_r", "lora_dim", "actor_lora_r", "actor_lora_dim")
CRITIC_RANK = ("critic_lora_r", "critic_lora_dim")
MICRO_ROWS = ("per_device_training_batch_size", "per_device_train_batch_size")


def _has_adapters(line: Line, ranks: Collection[str]) -> bool:
    return first_of(line, ranks) not in (None, ("0",))


def _adapters(own: str, rate: Sequence[str], ranks: Collection[str]) -> Callable[[Line, Say], None]:
    """The rule of adapters: they alone are trained, at the learning rate `own`, 5e-4 in DeepSpeed-Chat's lines."""

    def rule(line: Line, say: Say) -> None:
        words = line.pop(own, None)
        if not _has_adapters(line, ranks) and (words is None or "config" not in line):
            if words is not None:
                say(f"--{own} {' '.join(words)} is ignored: there are no adapters")
            return
        if words is None:
            if "deepspeed" not in line or "config" in line:
                return
            words = ("5e-4",)
        replaced = [line.pop(name) for name in rate if name in line]
        line[rate[0]] = words
        if "deepspeed" in line:
            line.setdefault("lora_alpha", ("1",))
        note = f" instead of {' '.join(replaced[-1])}" if replaced and replaced[-1] != words else ""
        say(f"--{own}: only the adapters are trained, at {rate[0]}={' '.join(words)}{note}, as with only_optimize_lora")

    return rule


def _frozen_bases(line: Line, say: Say) -> None:
    """With adapters, the reference or reward model is the base of the trained model and needs no place of its own."""
    for name, ranks in (("offload_reference_model", RANK), ("offload_reward_model", CRITIC_RANK)):
        if "deepspeed" in line and name in line and _has_adapters(line, ranks):
            del line[name]
            say(f"--{name} is ignored: with adapters, that model is the base of the trained one, kept once")


def _constant(line: Line, say: Say) -> None:
    """In DeepSpeed-Chat, the schedule `constant` has no warm-up; ours has one where warmup_steps says so."""
    if "deepspeed" in line and line.get("lr_scheduler_type") == ("constant",):
        for name in ("num_warmup_steps", "warmup_steps"):
            if line.pop(name, None) is not None:
                say(f"--{name} is ignored: lr_scheduler_type constant has no warm-up; constant_with_warmup has one")


def _rollouts(line: Line, say: Say) -> None:
    """Rows of a rollout and of an update.

    DeepSpeed-Chat generates N = generation_batches batches of G = per_device_generation_batch_size rows, then trains on
    micro-batches of B rows and updates after every A = gradient_accumulation_steps of them, across rollouts too. Here a
    rollout holds whole updates, is generated in pieces of G rows, and each pass over it makes num_mini_batches updates.
    """
    if "per_device_generation_batch_size" not in line:
        return _test_mode(line, say, 1)
    if "num_mini_batches" in line:
        raise InputError("num_mini_batches follows from per_device_generation_batch_size; leave one of them out")
    if first_of(line, MICRO_ROWS) is None:
        raise InputError(f"--per_device_generation_batch_size requires --{MICRO_ROWS[0]}")
    piece, micro = count(line, "per_device_generation_batch_size"), count(line, *MICRO_ROWS)
    update = micro * count(line, "gradient_accumulation_steps")
    rollout = piece * count(line, "generation_batches")
    passes = count(line, "ppo_epochs", "num_ppo_epochs")
    rows = max(rollout, update)
    if piece % micro:
        raise InputError(
            f"per_device_generation_batch_size={piece} must be a multiple of per_device_training_batch_size={micro}"
        )
    if rows % rollout or rows % update or (update > rollout and passes > 1):
        raise InputError(
            f"{rollout} rows are generated (per_device_generation_batch_size={piece} × generation_batches) and "
            f"{update} make an update (per_device_training_batch_size={micro} × gradient_accumulation_steps): one must "
            "be a multiple of the other; with ppo_epochs above 1, the first of the second"
        )
    del line["per_device_generation_batch_size"]
    line |= {"generation_batches": (str(rows // piece),), "num_mini_batches": (str(rows // update),)}
    _test_mode(line, say, rows // piece)


def _test_mode(line: Line, say: Say, batches: int) -> None:
    """enable_test_mode ends the run after test_stop_step generated batches; a rollout holds `batches` of them."""
    stop = line.pop("test_stop_step", None)
    if line.pop("enable_test_mode", None) is not None:
        if stop in (None, ("0",)):
            line["num_train_epochs"] = ("1",)
        else:
            line["max_steps"] = (str(-(-count({"test_stop_step": stop}, "test_stop_step") // batches)),)
    elif stop is not None:
        say(f"--test_stop_step {' '.join(stop)} is ignored: it needs --enable_test_mode")


def _pretraining(line: Line, say: Say) -> None:
    """The pretraining text is a data set and its config; without one, its coefficient means nothing."""
    config = line.pop("unsupervised_dataset_config_name", None)
    name: Any = first_of(line, ("unsupervised_dataset_name", "ptx_data_path"))
    if config is not None:
        if name is None:
            raise InputError("unsupervised_dataset_config_name requires unsupervised_dataset_name")
        line.pop("unsupervised_dataset_name", None)
        line["ptx_data_path"] = (f"{name[0]}:{config[0]}",) if name and config else ()
    if "deepspeed" not in line:
        return
    if name is not None and not {"unsup_coef", "ptx_coef"} & set(line):
        line["unsup_coef"] = ("27.8",)
    elif name is None and line.pop("unsup_coef", None) is not None:
        say("--unsup_coef is ignored: without --unsupervised_dataset_name there is no text that it weighs")


def _answers(line: Line, say: Say) -> None:
    """print_answers_interval says how often print_answers prints."""
    if "print_answers_interval" in line:
        line.pop("print_answers", None)


def _sft_only(line: Line, say: Say) -> None:
    """Data for this step alone: sources of a mixture that give all their rows to it."""
    only = line.pop("sft_only_data_path", ())
    if only:
        if "data_mixture" in line:
            raise InputError("sft_only_data_path and data_mixture exclude each other: add the data to the mixture")
        shared = [path for word in line.pop("data_path", ()) for path in word.split(",") if path]
        line["data_mixture"] = [{"path": path} for path in shared] + [{"path": path, "steps": ["sft"]} for path in only]


def _compared(line: Line, say: Say) -> None:
    """prompt_eval.py names its two models by flags of their own."""
    names = ("model_name_or_path_baseline", "model_name_or_path_finetune")
    models = tuple(word for name in names for word in line.pop(name, ()))
    if models:
        line["models"] = models


def _words(**values: str | None) -> Callable[[str], str | None]:
    """Converts some words, and keeps the others."""
    return lambda word: values.get(word, word)


def _only(*allowed: str) -> Callable[[str], str | None]:
    """Keeps these words, and refuses the others."""
    return lambda word: word if word in allowed else None


def _zero(result: str) -> Callable[[str], str | None]:
    """Turns zero into `result`, and refuses other values."""
    return lambda word: result if word.replace(".", "", 1).strip("0") == "" and "0" in word else None


def _opt(word: str) -> str:
    """A size of OPT, such as 1.3b, as the model's name on the hub."""
    return f"facebook/opt-{word}" if word[-1:] in "mb" and word[:-1].replace(".", "", 1).isdecimal() else word


EVERY_STEP = {
    "deepspeed": Flag(
        advice="the devices need no launcher; without --config, flags that are not given have DeepSpeed-Chat's defaults"
    ),
    "local_rank": Flag(advice="one process drives all devices of a machine"),
    "deepscale": Flag(advice="it has no effect in DeepSpeed-Chat either"),
    "deepspeed_config": Flag(remedy="DeepSpeed's config files are not read; use --zero_stage, --offload and --dtype"),
    "deepscale_config": Flag(remedy="DeepSpeed's config files are not read; use --zero_stage, --offload and --dtype"),
    "data_output_path": Flag("data_cache_dir"),
    "dtype": Flag(
        "dtype",
        convert=_words(bf16="bfloat16", fp16=None),
        remedy="there is no loss scaling, which fp16 needs; use bf16, the default on accelerators",
    ),
    "lr_scheduler_type": Flag(
        "lr_scheduler_type",
        convert=_words(constant_with_warmup="constant", cosine_with_restarts="cosine", polynomial=None),
        remedy="polynomial is linear with --min_lr_ratio 1e-7 / learning_rate",
    ),
    "only_optimize_lora": Flag(advice="with adapters, nothing else is trained"),
    "compute_fp32_loss": Flag(advice="losses are always computed in float32"),
    "enable_tensorboard": Flag(advice="TensorBoard is on by default; --report_to names trackers"),
    "tensorboard_path": Flag(advice="the files lie in output_dir"),
    "add_eot_token": Flag(advice="each response ends with the tokenizer's EOS; --eos_token_ids names other tokens"),
}
SUPERVISED = EVERY_STEP | {
    "dropout": Flag(
        "disable_dropout", convert=_zero("true"), remedy="give 0 for none, or leave it out for the model's own rates"
    ),
    "lora_learning_rate": Flag("learning_rate"),
}
PRINT_LOSS = {"print_loss": Flag("logging_steps", value="1")}
PADDING = {"num_padding_at_beginning": Flag(advice="padding is masked wherever it stands")}
NO_DROPOUT = Flag(advice="ppo never drops out", convert=_zero("0"), remedy="leave it out, or give 0")
DEFAULTS = {
    "data_path": "Dahoas/rm-static",
    "data_split": "2,4,4",
    "seed": "1234",
    "per_device_train_batch_size": "16",
    "per_device_eval_batch_size": "16",
    "learning_rate": "1e-3",
}
RULES = (_adapters("lora_learning_rate", RATE, RANK), _constant)

SFT = Script(
    PROJECT,
    flags=SUPERVISED
    | PRINT_LOSS
    | {
        "sft_only_data_path": Flag("data_mixture"),
        "eot_token": Flag(
            advice="each response ends with the tokenizer's EOS; --eos_token_ids names other tokens",
            convert=_only("<|endoftext|>"),
            remedy="save a tokenizer that has the token; name it with --tokenizer_name_or_path and --resize_vocabulary",
        ),
    },
    marker="deepspeed",
    defaults=DEFAULTS | {"packing": "false"},
    rules=(*RULES, _sft_only),
)
REWARD = Script(
    PROJECT,
    flags=SUPERVISED
    | PADDING
    | {
        "eval_interval": Flag("eval_steps"),
        "eval_iters": Flag(advice="--max_eval_samples counts the rows of an evaluation"),
    },
    marker="deepspeed",
    defaults=DEFAULTS | {"learning_rate": "5e-5"},
    rules=RULES,
)
DPO = Script(
    PROJECT,
    flags=SUPERVISED
    | PRINT_LOSS
    | PADDING  # one of its scripts has this flag, which its parser lacks
    | {"offload_reference_model": Flag(advice="the reference is kept in the compute dtype and split over the devices")},
    marker="deepspeed",
    defaults=DEFAULTS,
    rules=RULES,
)
PPO = Script(
    PROJECT,
    flags=EVERY_STEP
    | PADDING
    | {
        "actor_zero_stage": Flag("zero_stage"),
        "actor_weight_decay": Flag("weight_decay"),
        "actor_gradient_checkpointing": Flag("gradient_checkpointing"),
        "critic_gradient_checkpointing": Flag("gradient_checkpointing"),
        "actor_dropout": NO_DROPOUT,
        "critic_dropout": NO_DROPOUT,
        "actor_lora_learning_rate": Flag("learning_rate"),
        "critic_lora_learning_rate": Flag("critic_learning_rate"),
        "per_device_training_batch_size": Flag("per_device_train_batch_size"),
        "per_device_generation_batch_size": Flag("generation_batches"),
        "inference_tp_size": Flag("generate_tensor_parallel"),
        "unsupervised_dataset_config_name": Flag("ptx_data_path"),
        "preprocessing_num_workers": Flag("dataset_num_proc"),
        "print_answers": Flag("sample_steps", value="1"),
        "print_answers_interval": Flag("sample_steps"),
        "enable_test_mode": Flag("max_steps"),
        "test_stop_step": Flag("max_steps"),
        "enable_hybrid_engine": Flag(advice="generation and training always share one actor"),
        "unpin_actor_parameters": Flag(advice="no memory is pinned; generation_batches bounds the key/value cache"),
        "release_inference_cache": Flag(advice="the key/value cache is freed after each rollout"),
        "tp_gather_partition_size": Flag(advice="parameters are resharded once per rollout, not in groups of layers"),
        "enable_mixed_precision_lora": Flag(advice="the frozen base is gathered in the compute dtype, not quantized"),
        "align_overflow": Flag(advice="there is no loss scaling that could overflow"),
    },
    marker="deepspeed",
    defaults={
        **{name: DEFAULTS[name] for name in ("data_path", "data_split")},
        "per_device_generation_batch_size": "16",
        "per_device_training_batch_size": "16",
        "num_warmup_steps": "100",
    },
    rules=(
        _adapters("actor_lora_learning_rate", RATE, RANK),
        _adapters("critic_lora_learning_rate", ("critic_learning_rate",), CRITIC_RANK),
        _frozen_bases,
        _constant,
        _rollouts,
        _pretraining,
        _answers,
    ),
)
RLHF = Script(
    PROJECT,
    flags={
        "actor_model": Flag("actor_model_name_or_path", convert=_opt),
        "reward_model": Flag("reward_model_name_or_path", convert=_opt),
        "actor_zero_stage": Flag("zero_stage"),
        "deployment_type": Flag(
            remedy="scripts/train.py --deployment-type chooses the recipe; or name it, as in --config "
            "examples/deepspeed_chat/opt-1.3b-node.yaml"
        ),
    },
)
CHAT = Script(PROJECT, flags={"path": Flag("model")}, marker="path", defaults={"max_new_tokens": "128"})
NO_BEAMS = Flag(advice="responses are greedy or sampled", convert=_only("1"), remedy="there is no beam search")
EVAL = Script(
    PROJECT,
    flags=PADDING
    | {
        "model_name_or_path_baseline": Flag("models"),
        "model_name_or_path_finetune": Flag("models"),
        "num_return_sequences": Flag("samples_per_prompt"),
        "num_beams": NO_BEAMS,
        "num_beam_groups": NO_BEAMS,
        "penalty_alpha": Flag(remedy="there is no contrastive search; leave it out, as prompt_eval.py is greedy too"),
        "language": Flag(advice="the built-in prompts are English; --prompts or --data_path names others"),
        "add_eot_token": EVERY_STEP["add_eot_token"],
    },
    marker="model_name_or_path_baseline",
    defaults={"max_new_tokens": "100"},
    rules=(_compared,),
)
