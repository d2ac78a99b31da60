"""TRL's YAML files and flags, as our commands read them: renamed, converted, without effect here, or refused.

A key that is also a name or alias of one of our settings, with the same meaning, needs no entry here. Settings are read
as TRL's where one of them has a name that only TRL has; keys that are not given then have TRL's defaults. `trl_rules`
translates keys that mean something only together. docs/coming-from-trl.md describes it.
"""

from collections.abc import Callable, Collection, Mapping

from jaxrlhf.config import trl_rules as rules
from jaxrlhf.config.other_flags import Flag, Line, Say, Script
from jaxrlhf.config.trl_rules import DATA_KEYS, is_null
from jaxrlhf.errors import InputError

SHARED = ("deepspeed", "local_rank")
"""Flags of DeepSpeed-Chat too, which do not tell whose settings they are."""


def names_of_trl(script: Script, given: Collection[str], names: Collection[str]) -> list[str]:
    """The names among `given` that only TRL has.

    Args:
        script: the table of the trainer.
        given: names of settings.
        names: our names and aliases.
    """
    plain = [_plain(script, name, names) for name in given]
    return [name for name in plain if name in script.flags and name not in names and name not in SHARED]


def _plain(script: Script, name: str, names: Collection[str]) -> str:
    """A name with underscores, and without the no_ that turns one of TRL's flags off."""
    name = name.replace("-", "_")
    positive = name.removeprefix("no_")
    return positive if positive in script.flags and name not in (*script.flags, *names) else name


def check_not_mixed(
    script: Script, file: str, in_file: Collection[str], flags: Collection[str], names: Collection[str]
) -> None:
    """Raises InputError for flags that only TRL has beside a YAML file of ours: they would change its defaults."""
    mixed = names_of_trl(script, flags, names)
    if in_file and mixed and not names_of_trl(script, in_file, names):
        ours = [script.flags[name].setting for name in mixed if script.flags[name].setting]
        instead = f"write {', '.join(f'--{name}' for name in ours)} instead" if ours else "leave it out"
        raise InputError(
            f"{', '.join(f'--{name}' for name in mixed)}: only TRL has this name, and {file} has none of TRL's. With "
            f"both, the file would be read with TRL's defaults. {instead[0].upper()}{instead[1:]}; or, if the file is "
            f"TRL's, put it there"
        )


def translate(script: Script, given: Mapping[str, object], names: Mapping[str, str], say: Say) -> Line | None:
    """Translates TRL's keys into ours.

    Args:
        script: the table of the trainer.
        given: keys with what a YAML file has for them, or the words of a flag.
        names: our names and aliases, each with the name of its setting.
        say: called with each line of advice.

    Returns:
        Our keys, or None where no key is TRL's alone.

    Raises:
        InputError: naming every key that cannot be honoured.
    """
    if not names_of_trl(script, given, names):
        return None
    off = {name for name in given if _plain(script, name, names) != name.replace("-", "_")}
    given = {_plain(script, name, names): ("false",) if name in off else value for name, value in given.items()}
    bare = {name: ("true",) for name, value in given.items() if value == () and name in script.flags}
    if "max_length" in script.defaults and is_null(given.get("max_length")):
        raise InputError(
            "max_length=null: rows have a bound here; write the length of the longest, as `jaxrlhf data` has it"
        )
    kept = [(name, value) for name, value in (given | bare).items() if not is_null(value)]
    try:
        return script.translate(kept, names, say, own=True)
    except InputError as error:  # name what is unknown too
        unknown = [name for name in given if name not in names and name not in script.flags]
        raise InputError("\n".join([str(error), *(f"unknown setting {name}" for name in unknown)])) from error


def one_of(**values: str | None) -> Callable[[str], str | None]:
    """Converts these words, and refuses others."""
    return lambda word: values.get(word.lower())


def renamed(**names: str) -> dict[str, Flag]:
    return {name: Flag(setting) for name, setting in names.items()}


def advised(advice: str, *names: str, quiet: Collection[str] = ("false", "none", "no")) -> dict[str, Flag]:
    return {name: Flag(advice=advice, quiet=tuple(quiet)) for name in names}


def refused(remedy: str, *names: str, quiet: Collection[str] = ("false",)) -> dict[str, Flag]:
    """Refused unless the value is one that changes nothing."""
    return {name: Flag(remedy=remedy, quiet=tuple(quiet)) for name in names}


RULED = {
    "model_init_kwargs": "dtype",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_strategy",
    "save_strategy": "save_steps",
    "lr_scheduler_kwargs": "min_lr_ratio",
    "torch_dtype": "dtype",
    "bf16": "dtype",
    "use_peft": "lora_r",
    "use_rslora": "lora_alpha",
}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "paged_adamw_32bit", "paged_adamw")

EVERY_TRAINER = (
    renamed(
        **DATA_KEYS,
        **RULED,
        activation_checkpointing="gradient_checkpointing",
        max_seq_length="max_length",
        max_prompt_length="max_prompt_seq_len",
        chat_template_path="chat_template",
        eos_token="eos_token_ids",
        dataset_text_field="text_field",
    )
    | {
        "optim": Flag(quiet=OPTIMIZERS, remedy="the optimizer is AdamW; write adamw_torch"),
        "fp16": Flag(quiet=("false",), remedy="there is no loss scaling; write bf16: true, or dtype: float32"),
        "train_sampling_strategy": Flag(
            quiet=("random", "group_by_length"), remedy="rows are shuffled; write train_sampling_strategy: random"
        ),
        "metric_for_best_model": Flag(
            quiet=("loss", "eval_loss"), remedy="the best is by the step's own metric; leave it out, or write loss"
        ),
        "greater_is_better": Flag(quiet=("false", "true")),
        "model_revision": Flag(
            quiet=("main",), remedy="download the revision, and name its folder as model_name_or_path"
        ),
        "label_smoothing_factor": Flag(quiet=("0", "0.0"), remedy="there is no label smoothing here; write 0"),
    }
    | refused(
        "there is no quantised training; write false, and use_peft: true to save memory", "load_in_8bit", "load_in_4bit"
    )
    | refused("DoRA is not there; write use_dora: false", "use_dora")
    | refused(
        "adapters stand on linear maps that lora_target_modules names; leave it out",
        "lora_target_parameters",
        "lora_modules_to_save",
    )
    | refused("leave it out: it changes the updates", "neftune_noise_alpha", "optim_args", "optim_target_modules")
    | refused("rows are prepared always; leave it out", "dataset_kwargs")
    | advised("the families of docs/models.md run without code of the model's", "trust_remote_code")
    | advised(
        "kernels are chosen for the device; attention_implementation names others", "attn_implementation", "use_kernels"
    )
    | advised(
        "the data of a run is read with dataset_num_proc processes, and prepared once",
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_in_order"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("remove_unused_columns", "label_names", "length_column_name", "pad_to_multiple_of", "padding_free"),
        *("shuffle_dataset", "data_seed", "ignore_data_skip", "eval_packing"),
        quiet=("true", "false", "0"),
    )
    | advised("packing is by best fit, with attention within each example", "packing_strategy", quiet=("bfd",))
    | advised("padding is masked, whatever the token", "pad_token")
    | advised(
        "a longer row loses the beginning of its prompt, as with keep_end; long_prompts: drop leaves it out",
        "truncation_mode",
        quiet=("keep_end",),
    )
    | advised(
        "mesh_data, mesh_fsdp, mesh_tensor and zero_stage place the run on the devices",
        *("fsdp", "fsdp_config", "deepspeed", "accelerator_config", "parallelism_config", "ds3_gather_for_generation"),
        "accelerate_config",
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout"),
        *("ddp_static_graph", "local_rank", "ignore_bias_buffers", "average_tokens_across_devices", "world_size"),
        quiet=("false", "true"),
    )
    | advised(
        "XLA compiles the whole step",
        *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"),
        *("tf32", "torch_empty_cache_steps", "use_cache", "use_cpu", "bf16_full_eval", "fp16_full_eval"),
        *("cast_lm_head_to_fp32", "full_determinism", "enable_jit_checkpoint", "use_liger_loss", "use_liger"),
        quiet=("false", "true"),
    )
    | advised(
        "remat_policy and offload_optimizer save memory, and `jaxrlhf plan` says which are needed",
        *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "activation_offloading"),
        *("auto_find_batch_size", "skip_memory_metrics"),
        quiet=("false", "true"),
    )
    | advised("upload output_dir with `hf upload`", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy")
    | advised(
        "upload output_dir with `hf upload`", "hub_private_repo", "hub_always_push", "hub_revision", "trackio_space_id"
    )
    | advised(
        "report_to and project choose where records go", "trackio_bucket_id", "trackio_static_space_id", "logging_dir"
    )
    | advised(
        "metrics.jsonl has every step; logging_steps counts the console's",
        *("logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level"),
        *("log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "include_tokens_per_second", "debug"),
        quiet=("steps", "true", "false", "passive", "warning", "no", ""),
    )
    | advised(
        "an evaluation takes all its rows, before the first step too",
        *("eval_delay", "eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches", "batch_eval_metrics"),
        *("eval_use_gather_object", "include_for_metrics", "prediction_loss_only", "do_train", "do_eval", "do_predict"),
        quiet=("true", "false", "0"),
    )
    | advised(
        "a checkpoint holds what a resume needs",
        *("save_only_model", "save_on_each_node", "restore_callback_states_from_checkpoint", "save_safetensors"),
        quiet=("true", "false"),
    )
    | advised("set environment variables in the shell", "env")
    | advised(
        "load_in_4bit alone would use it", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"
    )
    | advised("the step decides it", "lora_task_type", quiet=("causal_lm", "seq_cls"))
)
SYNCED_REFERENCE = refused("the reference stays as it is; write sync_ref_model: false", "sync_ref_model") | advised(
    "sync_ref_model alone would use it", "ref_model_mixup_alpha", "ref_model_sync_steps"
)
PRECOMPUTED = advised("per_device_eval_batch_size rows are scored at once", "precompute_ref_batch_size")
SUPERVISED_RULES = (rules.load_options, rules.processes, rules.data, rules.evaluation, rules.saving)
SUPERVISED_RULES += (rules.schedule, rules.precision)
DEFAULTS = {
    "num_train_epochs": "3",
    "adam_beta2": "0.999",
    "lr_scheduler_type": "linear",
    "gradient_checkpointing": "true",
}
OF_ROWS = {"max_length": "1024", "packing": "false"}


def script(flags: dict[str, Flag], defaults: dict[str, str], *rules: Callable[[Line, Say], None]) -> Script:
    return Script(
        project="TRL",
        flags=EVERY_TRAINER | flags,
        as_keys=True,
        defaults=DEFAULTS | defaults,
        rules=(*SUPERVISED_RULES, *rules),
    )


SFT = script(
    renamed(completion_only_loss="train_on", assistant_only_loss="train_on")
    | {"loss_type": Flag(quiet=("nll", "chunked_nll"), remedy="the loss is nll; write loss_type: nll")},
    OF_ROWS | {"learning_rate": "2e-5"},
    rules.adapters("applied"),
    rules.trained_tokens,
)
REWARD = script(
    {},
    OF_ROWS | {"learning_rate": "1e-4", "disable_dropout": "true"},
    rules.adapters("applied"),
)
DPO = script(
    refused("leave it out: the loss would differ", "ld_alpha", "use_weighting")
    | {"f_divergence_type": Flag(quiet=("reverse_kl",), remedy="the divergence is reverse_kl; leave it out")}
    | advised("another loss would use it", "f_alpha_divergence_coef", "discopop_tau")
    | SYNCED_REFERENCE
    | PRECOMPUTED
    | advised("dpo never drops out", "disable_dropout", quiet=("true",)),
    OF_ROWS | {"learning_rate": "1e-6", "beta": "0.1"},
    rules.adapters("off"),
)
KTO = script(
    refused("kto compares rows with others of the data; write streaming: false", "streaming")
    | SYNCED_REFERENCE
    | PRECOMPUTED
    | advised("kto never drops out", "disable_dropout", quiet=("true",)),
    {"max_length": "1024", "learning_rate": "1e-6"},
    rules.adapters("off"),
)
GKD = script(
    renamed(teacher_model_init_kwargs="dtype")
    | advised(
        "the loss is on the last response, as in TRL; train_on chooses others",
        *("completion_only_loss", "assistant_only_loss"),
        quiet=("true", "false"),
    )
    | advised("the loss is the divergence", "loss_type", quiet=("nll", "chunked_nll")),
    OF_ROWS
    | {"learning_rate": "2e-5", "disable_dropout": "true", "train_on": "last"}
    | {"lmbda": "0.5", "beta": "0.5", "max_new_tokens": "128", "temperature": "0.9"},
    rules.adapters("applied"),
    rules.teaching,
)
