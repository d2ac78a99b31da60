"""TRL's keys of the trainers that sample: PPO, GRPO and its variants, RLOO, online DPO (`jaxrlhf.config.trl`)."""

from jaxrlhf.config import trl_rules as rules
from jaxrlhf.config.other_flags import Flag, Script
from jaxrlhf.config.trl import advised, one_of, refused, renamed, script

GENERATED = (
    advised(
        "the hybrid engine generates with the weights that are trained; nothing to set up",
        *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url"),
        *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_max_model_length"),
        *("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "use_transformers_paged", "cache_implementation"),
        *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
        *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap"),
        *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "use_bias_correction_kl"),
        quiet=("false",),
    )
    | advised("nothing drops out", "disable_dropout", quiet=("true", "false"))
    | advised(
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
    | advised("evaluations have one response per prompt", "num_generations_eval")
    | refused("responses are free text; leave it out", "vllm_structured_outputs_regex")
    | refused("write the options as keys: temperature, top_p, top_k, repetition_penalty", "generation_kwargs", "min_p")
    | refused("write max_turns, which is one more: it counts the last turn too", "max_tool_calling_iterations")
    | refused("write environment: path/to/file.py:Class", "environment_factory")
    | renamed(
        sync_ref_model="reference_sync_steps",
        ref_model_sync_steps="reference_sync_steps",
        ref_model_mixup_alpha="reference_mixup",
    )
    | renamed(num_completions_to_print="num_sample_rows")
)
GROUPS = (
    GENERATED
    | renamed(
        beta="kl_coef",
        epsilon="cliprange",
        epsilon_high="cliprange_high",
        num_iterations="ppo_epochs",
        max_completion_length="max_new_tokens",
        reward_funcs="reward_functions",
        steps_per_generation="num_mini_batches",
        generation_batch_size="num_mini_batches",
    )
    | refused(
        "truncated responses are trained on; missing_eos_penalty lowers their score", "mask_truncated_completions"
    )
)

OF_PROMPTS = {"max_prompt_seq_len": "512"}  # TRL cuts no prompt; the longest one and its response must fit the context


PPO = script(
    GENERATED
    | renamed(stop_token_id="eos_token_ids")
    | {
        "vf_coef": Flag(advice="the critic has its own optimizer, and Adam's step does not depend on the loss's scale"),
        "stop_token": Flag(quiet=("eos",), remedy="a response ends at EOS; write stop_token: eos, or stop_token_id"),
        "local_rollout_forward_batch_size": Flag(
            advice="generation_batches divides a rollout, gradient_accumulation_steps the scoring"
        ),
    }
    | advised(
        "it follows from the batch sizes",
        *("num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size"),
        "mini_batch_size",
    )
    | refused("the base of adapters is the reference; leave it out", "model_adapter_name", "ref_adapter_name"),
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
OF_GRPO = (
    GROUPS
    | {
        "scale_rewards": Flag(
            "scale_by_std",
            convert=one_of(group="true", true="true", none="false", false="false"),
            remedy="write group or none: advantages are scaled within a group, or not at all",
        ),
        "delta": Flag("dual_clip"),
        "multi_objective_aggregation": Flag(quiet=("sum_then_normalize",), remedy="write sum_then_normalize"),
        "top_entropy_quantile": Flag(quiet=("1", "1.0"), remedy="all tokens are trained on; write 1.0"),
    }
    | refused("entropy_coef is constant; write false", "use_adaptive_entropy")
    | advised(
        "another option would use it",
        *("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_k_neg"),
        *("vespo_lambda_pos", "vespo_lambda_neg"),
    )
    | refused("leave it out: no sequence is left out of the loss", "off_policy_mask_threshold")
)


def above_one(word: str) -> str | None:
    """TRL's upper bound of a ratio as what it is above 1."""
    value = float(word)
    return f"{value - 1:g}" if value > 1 else None


AGGREGATIONS = {"dapo": "token-mean", "bnpo": "token-mean", "grpo": "sequence-mean", "dr_grpo": "fixed-length"}


def grpo(flags: dict[str, Flag], remedy: str, *loss_types: str, **defaults: str) -> Script:
    """The keys of TRL's GRPO for one of our commands.

    Args:
        flags: its own, beside those of all variants.
        remedy: advice on another `loss_type`.
        loss_types: TRL's losses that it has.
        defaults: TRL's defaults. What makes a variant has none here, so that it keeps its own values.
    """
    aggregation = one_of(**{name: AGGREGATIONS[name] for name in loss_types})
    own = {"loss_type": Flag("loss_aggregation", convert=aggregation, remedy=remedy)}
    shared = {"learning_rate": "1e-6", "beta": "0", "num_generations": "8", "max_completion_length": "512"}
    return script(
        OF_GRPO | own | flags,
        OF_PROMPTS | shared | defaults,
        rules.adapters("refused"),
        rules.rollouts_of_groups,
        rules.rewards_of_groups,
    )


GRPO = grpo({}, "write dapo, bnpo, grpo or dr_grpo; for cispo run `jaxrlhf cispo`", *AGGREGATIONS, loss_type="dapo")
DAPO = grpo({}, "write dapo, or run `jaxrlhf grpo`", "dapo")
DR_GRPO = grpo({}, "write dr_grpo, or run `jaxrlhf grpo`", "dr_grpo")
GSPO = grpo(
    {
        "importance_sampling_level": Flag(
            "ratio_level", convert=one_of(sequence="sequence"), remedy="write sequence, or run `jaxrlhf grpo`"
        )
    },
    "write dapo, bnpo, grpo or dr_grpo, or run another command",
    *AGGREGATIONS,
)
CISPO = grpo(
    {
        "loss_type": Flag(
            "policy_loss", convert=one_of(cispo="cispo"), remedy="write cispo, or run `jaxrlhf grpo` for other losses"
        ),
        "epsilon_high": Flag("cliprange_high", convert=above_one, remedy="must be above 1: it is the largest ratio"),
    }
    | advised("the ratio has an upper bound alone, epsilon_high", "epsilon", "delta"),
    "",
)
ONLINE_DPO = script(
    GENERATED
    | renamed(max_length="max_prompt_seq_len", beta="kl_coef")
    | {"loss_type": Flag(quiet=("sigmoid",), remedy="the loss is DPO's; write loss_type: sigmoid")},
    {
        "learning_rate": "5e-7",
        "max_new_tokens": "64",
        "max_length": "512",
        "temperature": "0.9",
    },
    rules.adapters("refused"),
    rules.rollouts_of_pairs,
)
RLOO = script(
    GROUPS | renamed(normalize_advantages="whiten_advantages", reward_clip_range="clip_reward"),
    OF_PROMPTS | {"learning_rate": "1e-6", "beta": "0.05", "num_generations": "2", "max_completion_length": "512"},
    rules.adapters("refused"),
    rules.rollouts_of_groups,
    rules.rewards_of_groups,
)
OF_ALGORITHMS = {"grpo": GRPO, "dapo": DAPO, "dr_grpo": DR_GRPO, "gspo": GSPO, "cispo": CISPO}
OF_ALGORITHMS |= {"rloo": RLOO, "online_dpo": ONLINE_DPO}
"""TRL's keys by our algorithm."""
