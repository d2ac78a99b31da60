"""Keys of TRL that mean something only together, translated: data, evaluation, schedule, precision, LoRA, rollouts."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from jaxrlhf.config.files import parse_json
from jaxrlhf.config.other_flags import Line, Say, count, words_of
from jaxrlhf.errors import InputError

DATA_KEYS = {
    "datasets": "data_mixture",
    "dataset_name": "data_mixture",
    "dataset_config": "data_mixture",
    "dataset_train_split": "data_mixture",
    "dataset_test_split": "data_mixture",
    "test_split_size": "eval_fraction",
    "dataset_streaming": "streaming",
}
FILES = ("json", "csv", "parquet", "text", "arrow")
"""Builders of `datasets.load_dataset` whose rows lie in data_files."""
PARTS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")


def is_null(value: object) -> bool:
    return isinstance(value, str) and value.lower() in ("null", "~", "")


def _take(line: Line, name: str, default: str | None = None) -> str | None:
    """Takes the one value of a key out of the line."""
    words = words_of(line.pop(name)) if name in line else ()
    if len(words) > 1:
        raise InputError(f"{name} takes one value, found {' '.join(words)}")
    return words[0] if words else default


def _is_on(line: Line, name: str, default: str = "false") -> bool:
    words = words_of(line.get(name, default))
    return not words or words[0].lower() in ("true", "yes", "on", "1")


def _number(line: Line, name: str, default: float | None = None) -> float:
    """The number of a key, which stays in the line."""
    if name not in line and default is not None:
        return default
    words = words_of(line.get(name, ()))
    try:
        (number,) = map(float, words)
    except ValueError:
        raise InputError(f"{name}={' '.join(words) or 'none'} must be a number") from None
    return number


def _mapping(line: Line, name: str) -> dict[str, Any]:
    """Takes a mapping out of the line: that of a YAML file, or JSON in a text."""
    given = value = line.pop(name, None) or {}
    if isinstance(given, tuple | str) and len(words := words_of(given)) == 1:
        with contextlib.suppress(ValueError):
            value = parse_json(words[0])
    if not isinstance(value, Mapping):
        raise InputError(f'{name}={" ".join(words_of(given))}: must be a mapping, such as {{"NAME": VALUE}}')
    return dict(value)


def processes(line: Line, say: Say) -> None:
    """`num_processes` of `trl` counts devices, ours the processes that coordinator_address connects."""
    connected = {"coordinator_address", "process_id"} & set(line) or "JAX_COORDINATOR_ADDRESS" in os.environ
    if not connected and count(line, "num_processes") > 1:
        say(
            f"num_processes={_take(line, 'num_processes')} is ignored: a process uses all devices of its machine; "
            "coordinator_address, num_processes and process_id connect several"
        )


def load_options(line: Line, say: Say) -> None:
    """model_init_kwargs holds options of from_pretrained, which are keys of their own too; a key's former name."""
    if "evaluation_strategy" in line:
        line["eval_strategy"] = line.pop("evaluation_strategy")
    for name, value in _mapping(line, "model_init_kwargs").items():
        line.setdefault("model_revision" if name == "revision" else str(name), value)


def data(line: Line, say: Say) -> None:
    """The data set, or the mixture, becomes a data_mixture; without evaluation, few rows are held out for the ends."""
    evaluates = words_of(line.get("eval_strategy", "no"))[0].lower() not in ("no", "false")
    given = {name: line.pop(name) for name in DATA_KEYS if name in line}
    if own := [name for name in ("data_path", "data_mixture") if name in line]:
        if given:
            say(f"{', '.join(given)}: ignored, {own[0]} names the data")
        return
    if _is_on(given, "dataset_streaming"):
        line["streaming"] = "true"
    if not evaluates and "eval_fraction" not in line:
        line["eval_fraction"] = "0.01"
        say(
            "eval_strategy is no: a run still evaluates before its first and after its last step, on the data's own "
            "split, or on 1 % of the prompts (eval_fraction), which are not trained on"
        )
    if "datasets" in given:
        sources = _mixture(given["datasets"], evaluates, given)
        if evaluates and "test_split_size" in given:
            line["eval_fraction"] = given["test_split_size"]
        if any("weight" in source for source in sources):
            say("fraction becomes weight: the sources are mixed by it, and a small one begins again within an epoch")
    elif "dataset_name" in given:
        path = ":".join(_take(given, name) or "" for name in ("dataset_name", "dataset_config") if name in given)
        test = f"{path}@{_take(given, 'dataset_test_split', 'test')}"
        sources = [_source(path, _take(given, "dataset_train_split", "train"), test if evaluates else "own")]
    else:
        return
    line["data_mixture"] = sources
    if not {"prompt_template", "chat_template", "chat_template_path"} & set(line):
        say("a prompt that is text is rendered as a user's message; prompt_template: raw leaves it as it is, as in TRL")


def _mixture(entries: object, evaluates: bool, given: Line) -> list[dict[str, Any]]:
    """The sources of `datasets`."""
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) and "path" in e for e in entries):
        raise InputError("datasets: must be a list of mappings with a path")
    evaluation = "held_out" if evaluates and "test_split_size" in given else "own"
    sources: list[dict[str, Any]] = []
    for entry in entries:
        if unknown := sorted(set(entry) - set(PARTS)):
            raise InputError(f"datasets: {entry['path']}: unknown key {unknown[0]}; the keys are {', '.join(PARTS)}")
        values = {name: value for name, value in entry.items() if not is_null(value)}
        files, path = values.get("data_files"), str(values["path"])
        if files is None and "data_dir" in values:
            raise InputError(f"datasets: {path}: data_dir is not read; write the folder as path, or its files")
        if files is not None and (path not in FILES or isinstance(files, Mapping)):
            raise InputError(f"datasets: {path}: data_files is read with path: json, csv, parquet or text, as a list")
        paths = words_of(files) if files is not None else (f"{path}:{values['name']}" if "name" in values else path,)
        for place in paths:
            source = _source(place, values.get("split", "train"), evaluation)
            if "columns" in values:
                source["fields"] = {name: name for name in values["columns"]}
            if "fraction" in values:
                source["weight"] = values["fraction"]
            sources.append(source)
    places = [source["path"] for source in sources]
    for number, source in enumerate(sources, start=1):
        if places.count(source["path"]) > 1:
            source["name"] = f"{source['path'].rpartition('/')[2]}-{number}"
    return sources


def _source(path: str, split: str | None, evaluation: str) -> dict[str, Any]:
    if split and "[" in split:
        raise InputError(f"split {split} of {path}: slices are not read; max_train_samples uses a part of the rows")
    chosen = {} if split in (None, "train") else {"split": split}
    return {"path": path, **chosen, "evaluation": evaluation}


def evaluation(line: Line, say: Say) -> None:
    """eval_strategy says whether eval_steps counts; eval_steps is logging_steps where it is not given."""
    strategy = (_take(line, "eval_strategy") or "no").lower()
    if strategy == "steps":
        steps = _number(line, "eval_steps", _number(line, "logging_steps", 10))
        line["eval_steps"] = _whole("eval_steps", steps)
    elif strategy in ("no", "false"):
        if "eval_steps" in line:
            say(f"eval_steps={_take(line, 'eval_steps')} is ignored: eval_strategy is no")
    else:
        raise InputError(f"eval_strategy={strategy}: not by epochs; write eval_strategy: steps and eval_steps")


def saving(line: Line, say: Say) -> None:
    strategy = (_take(line, "save_strategy") or "steps").lower()
    if strategy == "steps":
        line["save_steps"] = _whole("save_steps", _number(line, "save_steps", 500))
    elif strategy in ("no", "false"):
        line["save_steps"] = "0"
    else:
        raise InputError(
            f"save_strategy={strategy}: checkpoints are counted in steps; write save_strategy: steps and save_steps; "
            "load_best_model_at_end keeps the best one"
        )


def _whole(name: str, steps: float) -> str:
    if 0 < steps < 1:
        raise InputError(f"{name}={steps:g}: a share of all steps is not read; write a number of steps")
    return f"{steps:g}" if steps != int(steps) else str(int(steps))


def schedule(line: Line, say: Say) -> None:
    """Shapes of the learning rate; warmup_steps below 1 is a share of all steps."""
    kind = _take(line, "lr_scheduler_type", "linear")
    options = _mapping(line, "lr_scheduler_kwargs")
    if kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        floor, rate = options.pop("min_lr", None), options.pop("min_lr_rate", None)
        if floor is None and rate is None:
            raise InputError(f"lr_scheduler_type={kind}: lr_scheduler_kwargs must have min_lr_rate or min_lr")
        line["min_lr_ratio"] = str(rate if floor is None else float(floor) / _number(line, "learning_rate"))
        kind = "cosine"
    if kind == "constant" and {"warmup_steps", "warmup_ratio"} & set(line):
        for name in {"warmup_steps", "warmup_ratio"} & set(line):
            say(f"{name}={_take(line, name)} is ignored: the schedule is constant; constant_with_warmup has a warm-up")
    shapes = {"constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine", "constant": "constant"}
    if kind not in shapes or options:
        shown = f"lr_scheduler_type={kind}" + "".join(f" {name}={value}" for name, value in options.items())
        raise InputError(f"{shown}: write linear, cosine, cosine_with_min_lr, constant or constant_with_warmup")
    line["lr_scheduler_type"] = shapes[kind]
    if 0 < (steps := _number(line, "warmup_steps", 0)) < 1:
        line["warmup_ratio"] = str(steps)
        del line["warmup_steps"]


def precision(line: Line, say: Say) -> None:
    """The compute dtype is bfloat16 where bf16 is true or the weights are to be bfloat16; bf16: false is float32."""
    weights, other = _take(line, "dtype"), _take(line, "torch_dtype")
    weights = weights or other
    if _is_on(line, "fp16") or weights in ("float16", "fp16"):
        raise InputError("fp16: there is no loss scaling; write bf16: true, or dtype: float32")
    line.pop("fp16", None)
    mixed = _take(line, "bf16")
    if weights == "bfloat16" or (mixed or "").lower() == "true":
        line["dtype"] = "bfloat16"
    elif mixed is not None:
        line["dtype"] = "float32"
    if weights == "bfloat16":
        say(f"dtype={weights}: the arithmetic is in it; master weights stay float32")


def adapters(dropout: str) -> Callable[[Line, Say], None]:
    """The rule of LoRA, which use_peft turns on. `dropout`: applied, off (as in TRL), or refused."""

    def rule(line: Line, say: Say) -> None:
        uses, scaled = _is_on(line, "use_peft"), _is_on(line, "use_rslora")
        line.pop("use_peft", None)
        line.pop("use_rslora", None)
        names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        if not uses:
            if ignored := [name for name in names if line.pop(name, None) is not None]:
                say(f"{', '.join(ignored)}: ignored without use_peft: true")
            return
        rank, alpha = count(line, "lora_r", default=16), _number(line, "lora_alpha", 32)
        line["lora_r"] = str(rank)
        line["lora_alpha"] = f"{alpha * math.sqrt(rank) if scaled else alpha:g}"
        explicit = "lora_dropout" in line
        rate = _take(line, "lora_dropout", "0.05") or "0"
        if dropout == "applied":
            line["lora_dropout"] = rate
        elif dropout == "refused" and explicit and float(rate):
            raise InputError(f"lora_dropout={rate}: this command never drops out; write lora_dropout: 0")
        elif dropout == "refused" and not explicit:
            say("lora_dropout is 0, not TRL's 0.05: this command never drops out")
        if "lora_target_modules" not in line:
            say("lora_target_modules: all of attention and MLP by default, where PEFT takes few; name them for PEFT's")

    return rule


def trained_tokens(line: Line, say: Say) -> None:
    """SFT's loss is on completions, on assistant messages, or on all tokens."""
    completion, assistant = (_take(line, name) for name in ("completion_only_loss", "assistant_only_loss"))
    if "train_on" in line:
        return
    if (assistant or "").lower() != "true":
        if (completion or "").lower() == "false":
            line["train_on"] = "everything"
        else:
            say(
                "the loss of conversations is on assistant messages (train_on: all), as with assistant_only_loss; "
                "TRL's default is train_on: everything"
            )


def rollouts_of_ppo(line: Line, say: Say) -> None:
    """TRL cuts a rollout of per_device_train_batch_size × gradient_accumulation_steps rows into num_mini_batches."""
    micro, pieces = count(line, "per_device_train_batch_size", default=8), count(line, "gradient_accumulation_steps")
    updates = count(line, "num_mini_batches")
    if micro * pieces % updates:
        raise InputError(
            f"num_mini_batches={updates} must divide the {micro * pieces} rows of a rollout "
            "(per_device_train_batch_size × gradient_accumulation_steps)"
        )
    if updates > 1:
        share = micro * pieces // updates  # rows of an update
        line["per_device_train_batch_size"] = str(min(micro, share) if share % min(micro, share) == 0 else share)
        line["gradient_accumulation_steps"] = str(share // int(line["per_device_train_batch_size"]))
    moving_reference(line, updates * count(line, "num_ppo_epochs", default=4))
    if "max_grad_norm" in line:
        say(f"max_grad_norm={_take(line, 'max_grad_norm')} is ignored: TRL's PPO clips no gradients")
    line["max_grad_norm"] = "0"
    if "critic_learning_rate" not in line:
        line["critic_learning_rate"] = f"{_number(line, 'learning_rate'):g}"


def rollouts_of_groups(line: Line, say: Say) -> None:
    """A rollout has per_device_train_batch_size × steps_per_generation rows; TRL's max_steps counts updates."""
    if "generation_batch_size" in line:
        raise InputError(
            f"generation_batch_size={_take(line, 'generation_batch_size')}: write steps_per_generation, which is "
            "generation_batch_size / (per_device_train_batch_size × devices)"
        )
    pieces, passes = count(line, "gradient_accumulation_steps"), count(line, "num_iterations")
    steps = count(line, "steps_per_generation", default=pieces)
    line.pop("steps_per_generation", None)
    if steps % pieces:
        raise InputError(
            f"steps_per_generation={steps} must be a multiple of gradient_accumulation_steps={pieces}: a rollout holds "
            "whole updates"
        )
    line["num_mini_batches"] = str(steps // pieces)
    updates = steps // pieces * passes
    moving_reference(line, updates)
    no_reference(line, say)
    for name in ("max_steps", "eval_steps", "save_steps", "logging_steps", "warmup_steps"):
        if updates > 1 and (number := _number(line, name, -1)) > 0:
            line[name] = str(math.ceil(number / updates))
            say(f"{name}={number:g} updates are {line[name]} steps here: a rollout makes {updates} updates")


TRL_REWARDS = {
    "accuracy_reward": "trl.rewards:accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards:reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards:think_format_reward",
    "get_soft_overlong_punishment": (
        "trl.rewards:get_soft_overlong_punishment:max_completion_len=1280:soft_punish_cache=256"
    ),
}
"""The names that TRL's script knows, with the numbers that it takes."""


def moving_reference(line: Line, updates: int) -> None:
    """A reference that moves; TRL counts updates, of which a step makes several."""
    on = _is_on(line, "sync_ref_model")
    steps, mixup = _number(line, "ref_model_sync_steps", 512), _number(line, "ref_model_mixup_alpha", 0.6)
    for name in ("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"):
        line.pop(name, None)
    if on:
        line |= {"reference_sync_steps": str(max(1, round(steps / updates))), "reference_mixup": f"{mixup:g}"}


OF_A_REFERENCE = (
    *("reference_free", "reference_sync_steps", "reference_zero_stage", "offload_reference_model"),
    "kl_target",
)


def no_reference(line: Line, say: Say) -> None:
    """TRL loads no reference where β is 0."""
    beta = [name for name in line if name in ("beta", "kl_coef")][-1:]  # a flag of ours comes after the file's key
    if beta and _number(line, beta[0]) == 0 and not any(name in line for name in OF_A_REFERENCE):
        line["reference_free"] = "true"
        say(f"{beta[0]} is 0: no reference is kept, as in TRL; reference_free: false keeps one, to report the KL")


def rewards_of_groups(line: Line, say: Say) -> None:
    """Rewards by name, and bounds on them."""
    named = line.pop("reward_funcs", ())
    functions = []
    for name in words_of(named):
        if name in TRL_REWARDS:
            functions.append(TRL_REWARDS[name])
            continue
        if "." not in name and ":" not in name:
            raise InputError(f"reward_funcs={name}: write reward_functions, such as number_match or file.py:function")
        functions.append(name if ":" in name or name.endswith(".py") else ":".join(name.rsplit(".", 1)))
    if functions:
        line["reward_functions"] = functions
        weights = words_of(line.get("reward_weights", ()))
        if "reward_model_name_or_path" in line and len(weights) == len(functions) + 1:  # TRL's model is the first
            line |= {"reward_model_weight": weights[0], "reward_weights": list(weights[1:])}
    bounds = words_of(line.pop("reward_clip_range", ()))
    if bounds:
        low, high = map(float, bounds if len(bounds) == 2 else (0, 1))
        if low != -high:
            raise InputError(f"reward_clip_range={' '.join(bounds)}: must be [-x, x], which is clip_reward: x")
        line["clip_reward"] = f"{high:g}"


def rollouts_of_pairs(line: Line, say: Say) -> None:
    """TRL's online DPO counts prompts, each with two responses, and bounds a prompt with its response."""
    if len(words_of(line.get("beta", "0.1"))) > 1:
        raise InputError(f"beta={' '.join(words_of(line['beta']))}: one β for all epochs; write a single number")
    rows, copies = count(line, "per_device_train_batch_size", default=8), 2
    line["per_device_train_batch_size"] = str(copies * rows)
    say(f"per_device_train_batch_size={rows} prompts are {copies * rows} rows here: each has {copies} responses")
    longest, response = count(line, "max_length"), count(line, "max_new_tokens")
    if "max_prompt_seq_len" in line:
        line.pop("max_length", None)
    elif longest <= response:
        raise InputError(f"max_length={longest} must be above max_new_tokens={response}: it bounds both together")
    else:
        line["max_length"] = str(longest - response)


def teaching(line: Line, say: Say) -> None:
    """GKD's sampling, and the options of its teacher."""
    options = _mapping(line, "teacher_model_init_kwargs")
    if set(options) - {"dtype", "torch_dtype", "attn_implementation", "use_cache"}:
        raise InputError(f"teacher_model_init_kwargs={options}: the teacher is read in the run's dtype; leave it out")
    if not _number(line, "lmbda") and not _is_on(line, "seq_kd"):
        unused = [name for name in ("max_new_tokens", "temperature") if line.pop(name, None) is not None]
        say(f"{', '.join(unused)}: ignored with lmbda: 0, which samples nothing")
    if "teacher_top_k" not in line:
        say("teacher_top_k: the loss distinguishes the teacher's 64 likeliest tokens; 0 takes all, as TRL")
