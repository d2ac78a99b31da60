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
    plain = [name.replace("-", "_") for name in given]
    return [name for name in plain if name in script.flags and name not in names and name not in SHARED]


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
    given = {name.replace("-", "_"): value for name, value in given.items()}
    if not names_of_trl(script, given, names):
        return None
    bare = {name: ("true",) for name, value in given.items() if value == () and name in script.flags}
    kept = [(name, value) for name, value in (given | bare).items() if not is_null(value)]
    try:
        return script.translate(kept, names, say, own=True)
    except InputError as error:  # name what is unknown too
        unknown = [name for name in given if name not in names and name not in script.flags]
        raise InputError("\n".join([str(error), *(f"unknown setting {name}" for name in unknown)])) from error


def _as(**values: str | None) -> Callable[[str], str | None]:
    """Converts these words, and refuses others."""
    return lambda word: values.get(word.lower())


def _renamed(**names: str) -> dict[str, Flag]:
    return {name: Flag(setting) for name, setting in names.items()}


def _advised(advice: str, *names: str, quiet: Collection[str] = ("false", "none", "no")) -> dict[str, Flag]:
    return {name: Flag(advice=advice, quiet=tuple(quiet)) for name in names}


def _refused(remedy: str, *names: str, quiet: Collection[str] = ("false",)) -> dict[str, Flag]:
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
    _renamed(
        **DATA_KEYS,
        **RULED,
        activation_checkpointing="gradient_checkpointing",
        max_seq_length="max_length",
        max_prompt_length="max_prompt_seq_len",
        chat_template_path="chat_template",
        dataset_text_field="text_field",
    )
    | {
        "optim": Flag(quiet=OPTIMIZERS, remedy="the optimizer is AdamW; write adamw_torch"),
        "fp16": Flag(quiet=("false",), remedy="there is no loss scaling; write bf16: true, or dtype: float32"),
        "truncation_mode": Flag(quiet=("keep_start",), remedy="rows are cut at their end; write keep_start"),
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
    | _refused(
        "there is no quantised training; write false, and use_peft: true to save memory", "load_in_8bit", "load_in_4bit"
    )
    | _refused("DoRA is not there; write use_dora: false", "use_dora")
    | _refused(
        "adapters stand on linear maps that lora_target_modules names; leave it out",
        "lora_target_parameters",
        "lora_modules_to_save",
    )
    | _refused("leave it out: it changes the updates", "neftune_noise_alpha", "optim_args", "optim_target_modules")
    | _refused("rows are prepared always; leave it out", "dataset_kwargs")
    | _refused("name the token's id as eos_token_ids", "eos_token")
    | _advised("the families of docs/models.md run without code of the model's", "trust_remote_code")
    | _advised(
        "kernels are chosen for the device; attention_implementation names others", "attn_implementation", "use_kernels"
    )
    | _advised(
        "the data of a run is read with dataset_num_proc processes, and prepared once",
        *("dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_in_order"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("remove_unused_columns", "label_names", "length_column_name", "pad_to_multiple_of", "padding_free"),
        *("shuffle_dataset", "data_seed", "ignore_data_skip", "eval_packing"),
        quiet=("true", "false", "0"),
    )
    | _advised("packing is by best fit, with attention within each example", "packing_strategy", quiet=("bfd",))
    | _advised("padding is masked, whatever the token", "pad_token")
    | _advised(
        "mesh_data, mesh_fsdp, mesh_tensor and zero_stage place the run on the devices",
        *("fsdp", "fsdp_config", "deepspeed", "accelerator_config", "parallelism_config", "ds3_gather_for_generation"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout"),
        *("ddp_static_graph", "local_rank", "ignore_bias_buffers", "average_tokens_across_devices", "world_size"),
        quiet=("false", "true"),
    )
    | _advised(
        "XLA compiles the whole step",
        *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"),
        *("tf32", "torch_empty_cache_steps", "use_cache", "use_cpu", "bf16_full_eval", "fp16_full_eval"),
        *("cast_lm_head_to_fp32", "full_determinism", "enable_jit_checkpoint", "use_liger_loss", "use_liger"),
        quiet=("false", "true"),
    )
    | _advised(
        "remat_policy and offload_optimizer save memory, and `jaxrlhf plan` says which are needed",
        *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "activation_offloading"),
        *("auto_find_batch_size", "skip_memory_metrics"),
        quiet=("false", "true"),
    )
    | _advised("upload output_dir with `hf upload`", "push_to_hub", "hub_model_id", "hub_token", "hub_strategy")
    | _advised(
        "upload output_dir with `hf upload`", "hub_private_repo", "hub_always_push", "hub_revision", "trackio_space_id"
    )
    | _advised(
        "report_to and project choose where records go", "trackio_bucket_id", "trackio_static_space_id", "logging_dir"
    )
    | _advised(
        "metrics.jsonl has every step; logging_steps counts the console's",
        *("logging_strategy", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "log_level"),
        *("log_level_replica", "disable_tqdm", "include_num_input_tokens_seen", "include_tokens_per_second", "debug"),
        quiet=("steps", "true", "false", "passive", "warning", "no", ""),
    )
    | _advised(
        "an evaluation takes all its rows, before the first step too",
        *("eval_delay", "eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches", "batch_eval_metrics"),
        *("eval_use_gather_object", "include_for_metrics", "prediction_loss_only", "do_train", "do_eval", "do_predict"),
        quiet=("true", "false", "0"),
    )
    | _advised(
        "a checkpoint holds what a resume needs",
        *("save_only_model", "save_on_each_node", "restore_callback_states_from_checkpoint", "save_safetensors"),
        quiet=("true", "false"),
    )
    | _advised("set environment variables in the shell", "env")
    | _advised(
        "load_in_4bit alone would use it", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"
    )
    | _advised("the step decides it", "lora_task_type", quiet=("causal_lm", "seq_cls"))
)
SYNCED_REFERENCE = _refused("the reference stays as it is; write sync_ref_model: false", "sync_ref_model") | _advised(
    "sync_ref_model alone would use it", "ref_model_mixup_alpha", "ref_model_sync_steps"
)
PRECOMPUTED = _advised("per_device_eval_batch_size rows are scored at once", "precompute_ref_batch_size")
GENERATED = (
    _advised(
        "the hybrid engine generates with the weights that are trained; nothing to set up",
        *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url"),
        *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_max_model_length"),
        *("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "use_transformers_paged", "cache_implementation"),
        *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
        *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap"),
        *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "use_bias_correction_kl"),
        quiet=("false",),
    )
    | _advised("nothing drops out", "disable_dropout", quiet=("true", "false"))
    | _advised(
        "sample_steps and num_sample_rows print tables of responses",
        *(
            "log_completions",
            "log_unique_prompts",
            "log_multimodal",
            "log_completions_hub_repo",
            "num_sample_generations",
        ),
        quiet=("false", "true"),
    )
    | _advised("evaluations have one response per prompt", "num_generations_eval")
    | _refused("responses are free text; leave it out", "vllm_structured_outputs_regex", "chat_template_kwargs")
    | _refused("write the options as keys: temperature, top_p, top_k, repetition_penalty", "generation_kwargs", "min_p")
    | _refused("write max_turns, which is one more: it counts the last turn too", "max_tool_calling_iterations")
    | _refused("write environment: path/to/file.py:Class", "environment_factory")
    | _renamed(
        sync_ref_model="reference_sync_steps",
        ref_model_sync_steps="reference_sync_steps",
        ref_model_mixup_alpha="reference_mixup",
    )
    | _renamed(num_completions_to_print="num_sample_rows")
)
GROUPS = (
    GENERATED
    | _renamed(
        beta="kl_coef",
        epsilon="cliprange",
        epsilon_high="cliprange_high",
        num_iterations="ppo_epochs",
        max_completion_length="max_new_tokens",
        reward_funcs="reward_functions",
        steps_per_generation="num_mini_batches",
        generation_batch_size="num_mini_batches",
    )
    | _refused(
        "truncated responses are trained on; missing_eos_penalty lowers their score", "mask_truncated_completions"
    )
)

SUPERVISED_RULES = (rules.load_options, rules.data, rules.evaluation, rules.saving, rules.schedule, rules.precision)
DEFAULTS = {
    "num_train_epochs": "3",
    "adam_beta2": "0.999",
    "lr_scheduler_type": "linear",
    "gradient_checkpointing": "true",
}
OF_ROWS = {"max_length": "1024", "packing": "false"}
OF_PROMPTS = {"max_prompt_seq_len": "512"}  # TRL cuts no prompt; the longest one and its response must fit the context


def _script(flags: dict[str, Flag], defaults: dict[str, str], *rules: Callable[[Line, Say], None]) -> Script:
    return Script(
        project="TRL",
        flags=EVERY_TRAINER | flags,
        as_keys=True,
        defaults=DEFAULTS | defaults,
        rules=(*SUPERVISED_RULES, *rules),
    )


SFT = _script(
    _renamed(completion_only_loss="train_on", assistant_only_loss="train_on")
    | {"loss_type": Flag(quiet=("nll", "chunked_nll"), remedy="the loss is nll; write loss_type: nll")},
    OF_ROWS | {"learning_rate": "2e-5"},
    rules.adapters("applied"),
    rules.trained_tokens,
)
REWARD = _script(
    {},
    OF_ROWS | {"learning_rate": "1e-4", "disable_dropout": "true"},
    rules.adapters("applied"),
)
DPO = _script(
    _refused("leave it out: the loss would differ", "ld_alpha", "use_weighting")
    | {"f_divergence_type": Flag(quiet=("reverse_kl",), remedy="the divergence is reverse_kl; leave it out")}
    | _advised("another loss would use it", "f_alpha_divergence_coef", "discopop_tau")
    | SYNCED_REFERENCE
    | PRECOMPUTED
    | _advised("dpo never drops out", "disable_dropout", quiet=("true",)),
    OF_ROWS | {"learning_rate": "1e-6", "beta": "0.1"},
    rules.adapters("off"),
)
KTO = _script(
    _refused("kto compares rows with others of the data; write streaming: false", "streaming")
    | SYNCED_REFERENCE
    | PRECOMPUTED
    | _advised("kto never drops out", "disable_dropout", quiet=("true",)),
    {"max_length": "1024", "learning_rate": "1e-6"},
    rules.adapters("off"),
)
PPO = _script(
    GENERATED
    | _renamed(stop_token_id="eos_token_ids")
    | {
        "vf_coef": Flag(advice="the critic has its own optimizer, and Adam's step does not depend on the loss's scale"),
        "stop_token": Flag(quiet=("eos",), remedy="a response ends at EOS; write stop_token: eos, or stop_token_id"),
        "local_rollout_forward_batch_size": Flag(
            advice="generation_batches divides a rollout, gradient_accumulation_steps the scoring"
        ),
    }
    | _advised(
        "it follows from the batch sizes",
        *("num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size"),
        "mini_batch_size",
    )
    | _refused("the base of adapters is the reference; leave it out", "model_adapter_name", "ref_adapter_name"),
    OF_PROMPTS
    | {
        "learning_rate": "3e-6",
        "num_ppo_epochs": "4",
        "kl_coef": "0.05",
        "temperature": "0.7",
        "response_length": "53",
        "clip_reward": "none",
    },
    rules.adapters("off"),
    rules.rollouts_of_ppo,
)
GRPO = _script(
    GROUPS
    | {
        "loss_type": Flag(
            "loss_aggregation",
            convert=_as(dapo="token-mean", bnpo="token-mean", grpo="sequence-mean", dr_grpo="fixed-length"),
            remedy="write dapo, bnpo, grpo or dr_grpo; for cispo run `jaxrlhf cispo`",
        ),
        "scale_rewards": Flag(
            "scale_by_std",
            convert=_as(group="true", true="true", none="false", false="false"),
            remedy="write group or none: advantages are scaled within a group, or not at all",
        ),
        "delta": Flag("dual_clip"),
        "multi_objective_aggregation": Flag(quiet=("sum_then_normalize",), remedy="write sum_then_normalize"),
        "top_entropy_quantile": Flag(quiet=("1", "1.0"), remedy="all tokens are trained on; write 1.0"),
    }
    | _refused("entropy_coef is constant; write false", "use_adaptive_entropy")
    | _advised(
        "another option would use it",
        *("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_k_neg"),
        *("vespo_lambda_pos", "vespo_lambda_neg"),
    )
    | _refused("leave it out: no sequence is left out of the loss", "off_policy_mask_threshold"),
    OF_PROMPTS
    | {
        "learning_rate": "1e-6",
        "beta": "0",
        "loss_type": "dapo",
        "num_generations": "8",
        "max_completion_length": "512",
    },
    rules.adapters("refused"),
    rules.rollouts_of_groups,
    rules.rewards_of_groups,
)
RLOO = _script(
    GROUPS | _renamed(normalize_advantages="whiten_advantages", reward_clip_range="clip_reward"),
    OF_PROMPTS | {"learning_rate": "1e-6", "beta": "0.05", "num_generations": "2", "max_completion_length": "512"},
    rules.adapters("refused"),
    rules.rollouts_of_groups,
    rules.rewards_of_groups,
)
