"""DeepSpeed-Chat's flags, as our commands read them: renamed, obsolete with a line of advice, or refused.

A flag that is also a name or alias of one of our settings, with the same meaning, needs no entry here. A config class
names its table in `OTHER_FLAGS`, and `parse` translates a command line by it. Flags that mean something only together
are translated by a rule of the table. docs/coming-from-deepspeed-chat.md shows the whole.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxrlhf.errors import InputError

Words = tuple[str, ...]
Line = dict[str, Any]
"""The flags of a command line by name, hyphens as underscores, each with the words that follow it (or what a YAML file
would have)."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Flag:
    """A flag of DeepSpeed-Chat."""

    setting: str = ""
    """The setting that it sets; empty where it sets none."""
    advice: str = ""
    """Why it is not needed, or what to use instead."""
    convert: Callable[[str], str | None] = str
    """Turns its value into ours; None refuses the value."""
    remedy: str = ""
    """What to do where the value, or the flag, is refused."""
    value: str = ""
    """Our value for a flag that takes none."""

    @property
    def kind(self) -> str:
        """alias, obsolete or refused."""
        return "alias" if self.setting else "obsolete" if self.advice else "refused"

    def read(self, name: str, words: Words, say: Say) -> Words | None:
        """The words for our setting; None where there is none. Raises InputError for what is refused."""
        converted = [self.convert(word) for word in words or filter(None, [self.value])]
        if self.kind == "refused" or None in converted:
            raise InputError(f"{' '.join((f'--{name}', *words))}: {self.remedy}")
        if self.advice:
            say(f"{' '.join((f'--{name}', *words))} is ignored: {self.advice}")
        return tuple(map(str, converted)) if self.setting else None


@dataclass(frozen=True)
class Script:
    """How one of our commands reads the flags of DeepSpeed-Chat's script for the same purpose."""

    flags: Mapping[str, Flag]
    """Flags that we have under another name or not at all, or whose values differ."""
    marker: str = ""
    """The flag by which a line is recognised as the script's own; the defaults below then hold."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Its defaults that differ from ours, for flags that the line does not give."""
    rules: tuple[Callable[[Line, Say], None], ...] = ()
    """Translate flags that mean something only together."""
    announcement: str = "--{marker}: flags that are not given have DeepSpeed-Chat's defaults, {shown}"
    """Says which defaults are taken."""

    def translate(self, given: Sequence[tuple[str, Words]], names: Mapping[str, str], say: Say) -> Line:
        """Translates a command line.

        Args:
            given: the flags in order; the last of equal ones wins.
            names: our names and aliases, each with the name of its setting.
            say: called with each line of advice.

        Returns:
            The flags for our parser.

        Raises:
            InputError: naming every flag that cannot be honoured.
        """
        line: Line = {}
        for name, words in given:
            line.pop(name, None)
            line[name] = words
        takes_defaults = self.marker in line and "config" not in line
        if takes_defaults:
            self._add_defaults(line, names, say)
        for rule in self.rules:
            rule(line, say)
        if takes_defaults and self.flags[self.marker].kind == "obsolete":
            del line[self.marker]  # announced with the defaults
        translated, errors = {}, []
        for name, words in line.items():
            flag = self.flags.get(name)
            try:
                words = words if flag is None else flag.read(name, words, say)
            except InputError as error:
                errors.append(str(error))
            if words is not None:
                setting = flag.setting if flag else name
                translated.pop(setting, None)
                translated[setting] = words
        if errors:
            raise InputError("\n".join(errors))
        return translated

    def _add_defaults(self, line: Line, names: Mapping[str, str], say: Say) -> None:
        """Adds the script's defaults for settings that the line does not set, by whatever name."""

        def setting_of(name: str) -> str:
            return (name in self.flags and self.flags[name].setting) or names.get(name, name)

        set_already = {setting_of(name) for name in line}
        taken = {name: value for name, value in self.defaults.items() if setting_of(name) not in set_already}
        if "data_mixture" in line:
            taken.pop("data_path", None)
        line |= {name: (value,) for name, value in taken.items()}
        if shown := [f"--{name} {value}" for name, value in taken.items() if "lora" not in name]:
            say(self.announcement.format(marker=self.marker, shown=" ".join(shown)))


def _first(line: Line, names: Collection[str]) -> Words | None:
    """The words of the last of these flags; None where none of them is given."""
    return next((line[name] for name in reversed(line) if name in names), None)


def _count(line: Line, *names: str, default: int | None = None) -> int:
    """The whole number of one of these flags. Raises InputError for something else."""
    words = _first(line, names)
    if words is None:
        if default is None:
            raise InputError(f"--per_device_generation_batch_size requires --{names[0]}")
        return default
    if len(words) != 1 or not words[0].isdecimal() or int(words[0]) < 1:
        raise InputError(f"{names[0]}={' '.join(words) or 'none'} must be a whole number of at least 1")
    return int(words[0])


RATE = ("learning_rate", "actor_learning_rate")
RANK = ("lora_r", "lora_dim", "actor_lora_r", "actor_lora_dim")
CRITIC_RANK = ("critic_lora_r", "critic_lora_dim")


def _has_adapters(line: Line, ranks: Collection[str]) -> bool:
    return _first(line, ranks) not in (None, ("0",))


def _adapters(own: str, rate: Sequence[str], ranks: Collection[str]) -> Callable[[Line, Say], None]:
    """The rule of adapters: they alone are trained, at the learning rate `own`."""

    def rule(line: Line, say: Say) -> None:
        words = line.pop(own, None)
        if words is None or not _has_adapters(line, ranks):
            return
        replaced = [line.pop(name) for name in rate if name in line]
        line[rate[0]] = words
        if "deepspeed" in line:
            line.setdefault("lora_alpha", ("1",))
        note = f" instead of {' '.join(replaced[-1])}" if replaced else ""
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
        return _test_mode(line, 1)
    piece = _count(line, "per_device_generation_batch_size")
    micro = _count(line, "per_device_training_batch_size", "per_device_train_batch_size")
    update = micro * _count(line, "gradient_accumulation_steps", default=1)
    rollout = piece * _count(line, "generation_batches", default=1)
    passes = _count(line, "ppo_epochs", "num_ppo_epochs", default=1)
    rows = max(rollout, update)
    if piece % micro:
        raise InputError(
            f"per_device_generation_batch_size={piece} must be a multiple of per_device_training_batch_size={micro}"
        )
    if rows % rollout or rows % update or (update > rollout and passes > 1):
        raise InputError(
            f"{rollout} rows are generated (per_device_generation_batch_size={piece} × generation_batches) and {update} "
            f"make an update (per_device_training_batch_size={micro} × gradient_accumulation_steps): one must be a "
            "multiple of the other; with ppo_epochs above 1, the first of the second"
        )
    del line["per_device_generation_batch_size"]
    line |= {"generation_batches": (str(rows // piece),), "num_mini_batches": (str(rows // update),)}
    _test_mode(line, rows // piece)


def _test_mode(line: Line, batches: int) -> None:
    """enable_test_mode ends the run after test_stop_step generated batches; a rollout holds `batches` of them."""
    stop = line.pop("test_stop_step", None)
    if line.pop("enable_test_mode", None) is not None:
        if stop in (None, ("0",)):
            line["num_train_epochs"] = ("1",)
        else:
            line["max_steps"] = (str(-(-_count({"test_stop_step": stop}, "test_stop_step") // batches)),)


def _pretraining(line: Line, say: Say) -> None:
    """The pretraining text is a data set and its config; without one, its coefficient means nothing."""
    config = line.pop("unsupervised_dataset_config_name", None)
    name = _first(line, ("unsupervised_dataset_name", "ptx_data_path"))
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
    "deepspeed": Flag(advice="the devices need no launcher"),
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
        remedy="write linear, with --min_lr_ratio as 1e-7 / learning_rate: the same schedule",
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
NO_DROPOUT = Flag(advice="ppo never drops out", convert=_zero("0"), remedy="ppo never drops out; leave it out")
DEFAULTS = {
    "data_path": "Dahoas/rm-static",
    "data_split": "2,4,4",
    "seed": "1234",
    "per_device_train_batch_size": "16",
    "per_device_eval_batch_size": "16",
    "learning_rate": "1e-3",
    "lora_learning_rate": "5e-4",
}
RULES = (_adapters("lora_learning_rate", RATE, RANK), _constant)

SFT = Script(
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
DPO = Script(flags=SUPERVISED | PRINT_LOSS | PADDING, marker="deepspeed", defaults=DEFAULTS, rules=RULES)
PPO = Script(
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
        "actor_lora_learning_rate": "5e-4",
        "critic_lora_learning_rate": "5e-4",
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
    flags={
        "actor_model": Flag("actor_model_name_or_path", convert=_opt),
        "reward_model": Flag("reward_model_name_or_path", convert=_opt),
        "actor_zero_stage": Flag("zero_stage"),
        "deployment_type": Flag(
            remedy="scripts/train.py --deployment-type chooses the recipe; or name it, as in --config "
            "examples/deepspeed_chat/opt-1.3b-node.yaml"
        ),
    }
)
CHAT = Script(flags={"path": Flag("model")}, marker="path", defaults={"max_new_tokens": "128"})
EVAL = Script(
    flags=PADDING
    | {
        "model_name_or_path_baseline": Flag("models"),
        "model_name_or_path_finetune": Flag("models"),
        "num_return_sequences": Flag("samples_per_prompt"),
        "num_beams": Flag(
            advice="responses are sampled, or greedy",
            convert=_only("1"),
            remedy="there is no beam search; leave it out",
        ),
        "num_beam_groups": Flag(
            advice="responses are sampled, or greedy",
            convert=_only("1"),
            remedy="there is no beam search; leave it out",
        ),
        "penalty_alpha": Flag(remedy="there is no contrastive search; leave it out, as prompt_eval.py is greedy too"),
        "language": Flag(advice="--data_path names the prompts, in any language"),
        "add_eot_token": EVERY_STEP["add_eot_token"],
    },
    marker="model_name_or_path_baseline",
    defaults={"max_new_tokens": "100"},
    rules=(_compared,),
)
