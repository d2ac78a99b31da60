"""Meaning and healthy values of each metric of a run, for the report and the reference page.

Names are those of metrics.jsonl. `*` stands for a name that the run gives, such as that of a reward function.
"""

import functools
import re
from typing import NamedTuple


class Metric(NamedTuple):
    """One metric, or several that are read together.

    Attributes:
        names: The names, separated by spaces. An evaluation repeats a name with the prefix `eval/`, and a source with
            `eval/SOURCE/`.
        meaning: What is measured, with its unit.
        healthy: What a run that learns looks like, and what to suspect otherwise. Empty where any value is.
    """

    names: str
    meaning: str
    healthy: str = ""


METRICS: dict[str, tuple[Metric, ...]] = {
    "Scores and rewards": (
        Metric(
            "objective/scores objective/scores_std",
            "score of the responses, mean and standard deviation over the batch, not clipped",
            "rises over tens of steps, then flattens; a fall by more than its initial deviation raises an alarm",
        ),
        Metric(
            "objective/equal_groups",
            "GRPO and its relatives: share of the groups in the update whose responses all have one score (TRL's "
            "`frac_reward_zero_std`)",
            "nothing is learned from them; near 1, take other prompts, more samples per prompt or `dynamic_sampling`",
        ),
        Metric(
            "objective/rlhf_reward",
            "sum of the token rewards of a response: score and KL penalty",
            "rises with the score; if only the score rises, the KL takes the gain back",
        ),
        Metric(
            "objective/non_score_reward", "the KL penalty in the reward: −β · `objective/kl`", "small beside the score"
        ),
        Metric("rewards/reward_model", "mean score of the reward model, before its weight", "rises"),
        Metric(
            "rewards/failures",
            "responses without a score, because a reward function failed on them, took too long or ended its process",
            "0; `samples.jsonl` and the console show the failing samples",
        ),
        Metric(
            "rewards/not_applicable",
            "responses for which a reward function returned None: it does not apply to the row",
            "the share of rows that the functions leave out on purpose",
        ),
        Metric(
            "rewards/*/*",
            "mean of a number that a reward function logs by `log_metric`",
            "what the function says",
        ),
        Metric(
            "rewards/*",
            "mean of one reward function, before its weight",
            "rises; one that falls while the sum rises is traded for another",
        ),
        Metric(
            "scores scores_std",
            "evaluation: score of one response to each held-out prompt, with the same random keys each time",
            "rises as `objective/scores` does; a growing gap means that the training prompts are learned by heart",
        ),
        Metric(
            "win_rate",
            "evaluation: share of held-out prompts on which the response scores higher than before training; ties half",
            "starts at 0.5 and rises; above 0.9 read samples, because the policy may exploit the reward",
        ),
    ),
    "KL and policy": (
        Metric(
            "objective/kl",
            "Σ (logp − ref) over a response: KL from the reference in nats; with `reference_free` Σ logp",
            "starts at 0 and grows slowly; above half a nat per token, or three times `kl_target`, raises an alarm, "
            "and so does a clearly negative one, which top_k, top_p or a penalty cause",
        ),
        Metric(
            "kl",
            "evaluation: KL from the reference on held-out prompts, in nats per response; `kto`: its estimate from "
            "mismatched prompts and responses, at least 0",
            "as `objective/kl`",
        ),
        Metric("objective/kl_coef", "weight β of the KL", "constant, or moves towards `kl_target` without a jump"),
        Metric(
            "objective/entropy policy/entropy_avg",
            "entropy: −Σ logp in nats per response; of the distribution in nats per token",
            "falls slowly; near 0 the samples of a prompt are all alike and nothing is explored: raise `kl_coef`, or "
            "lower the learning rate",
        ),
        Metric(
            "policy/approxkl_avg",
            "mean of ½ (logp − logp_old)² over tokens: how far one iteration moves the policy",
            "below about 0.05; larger: lower the learning rate or `ppo_epochs`, or set `early_stop_kl`",
        ),
        Metric(
            "policy/clipfrac_avg val/clipfrac_avg",
            "share of tokens whose clipped term is the larger one, of the policy and of the value loss",
            "0 with one update per rollout, else up to about 0.2; above 0.4 raises an alarm",
        ),
        Metric(
            "val/ratio val/ratio_var",
            "mean and variance of the ratio ρ of new to old probabilities",
            "1 and near 0; a variance above 0.5 raises an alarm",
        ),
        Metric("policy/early_stopped", "updates skipped because `early_stop_kl` was exceeded", "0 in most steps"),
        Metric(
            "sampling/logp_difference/mean sampling/logp_difference/max",
            "absolute gap per token between the sampler's log-probs and the train program's",
            "rounding only: mean near 1e-6 in float32, up to 0.03 in bfloat16; larger values are reported",
        ),
        Metric(
            "sampling/importance_sampling_ratio/min sampling/importance_sampling_ratio/mean "
            "sampling/importance_sampling_ratio/max",
            "train over sampler probability of the tokens, after truncation",
            "mean 1; the extremes near 1",
        ),
    ),
    "Losses": (
        Metric(
            "loss",
            "loss of `sft` (nats per trained token), `reward` or `dpo` (per pair), `kto` (per response), "
            "`distill` (nats per trained token)",
            "falls, steeply at first; `reward` and `dpo` start near 0.69 = log 2. If `eval/loss` rises while it falls, "
            "the rows are learned by heart: train fewer epochs",
        ),
        Metric("perplexity", "evaluation of `sft`: exp(loss)", "falls"),
        Metric(
            "loss/policy_avg",
            "policy loss, mean over the updates of a step",
            "noise around 0; its level says nothing about learning",
        ),
        Metric(
            "loss/value_avg",
            "value loss, mean over the updates of a step",
            "falls in the first steps; ten times an earlier value raises an alarm",
        ),
        Metric("loss/kl_avg loss/entropy_avg", "terms of the policy loss that are on, without their weights"),
        Metric("loss/ptx_avg ptx_loss", "loss on pretraining text, in training and on held-out blocks", "stays level"),
        Metric(
            "val/explained_variance",
            "1 − var(R − V) / var(R) over tokens, of the values before the update",
            "rises towards 1; near 0 the critic knows nothing yet (`critic_only_steps`), below −1 raises an alarm",
        ),
        Metric("val/value_avg", "mean of the critic's values", "follows the mean reward"),
    ),
    "Preference pairs": (
        Metric(
            "accuracy",
            "reward model: share of pairs that it ranks correctly",
            "on held-out pairs above `eval/length_baseline`; 0.65 to 0.8 is usual for human preferences, near 1 for "
            "easy ones",
        ),
        Metric(
            "length_baseline",
            "evaluation: accuracy of a rule that prefers the longer response",
            "well below `eval/accuracy`",
        ),
        Metric(
            "accuracy_similar_length similar_length_pairs",
            "evaluation: accuracy on pairs whose lengths differ by less than 10 %, and the number of those pairs",
            "near `eval/accuracy`; near 0.5, the model only counts words",
        ),
        Metric("margin", "score of the chosen minus score of the rejected response", "above 0, and rises"),
        Metric(
            "mean_chosen_score mean_rejected_score",
            "evaluation: mean scores of the two sides",
            "move apart; their level is arbitrary",
        ),
        Metric(
            "rewards/chosen rewards/rejected",
            "DPO, KTO: mean of β log π/π_ref, the implicit reward; simpo, orpo: of β log π per token",
            "move apart; both may fall, but chosen must stay above rejected",
        ),
        Metric(
            "rewards/margins rewards/accuracies",
            "DPO, KTO: their difference; DPO: share of pairs whose chosen reward is larger",
            "start at 0 and rise; held-out accuracy that stays at 0.5 means that nothing is learned",
        ),
        Metric(
            "nll_loss",
            "`dpo` with `sft`, `cpo` or `orpo`: negative log-prob of the chosen responses, per token",
            "falls; it keeps the chosen responses likely",
        ),
        Metric(
            "logps/chosen logps/rejected",
            "DPO, KTO: mean log π of the responses",
            "a steep fall of chosen: the model forgets good text; raise `beta`, or lower the learning rate",
        ),
    ),
    "Responses": (
        Metric(
            "val/response_length response_length",
            "tokens per response, in training and on held-out prompts",
            "steady; growth to `max_answer_seq_len` or a fall to a few tokens means that the reward pays for length",
        ),
        Metric(
            "sampling/refills sampling/equal_groups",
            "with `dynamic_sampling`: further batches that were sampled; share of the sampled groups with one score "
            "for all",
            "equal groups become more as prompts become too easy; take harder prompts when refills reach the limit",
        ),
        Metric(
            "sampling/on_policy",
            "`distill` with `lmbda` or `seq_kd`: 1 for a batch whose responses the student has sampled, else 0",
            "its mean over the steps is near `lmbda`",
        ),
        Metric(
            "sampling/staleness",
            "with `async_steps` or `replay_steps`: steps between the policy that made a rollout and the one that "
            "trains on it, the mean over the rollouts of the step",
            "`async_steps`, less in the first steps; with replay the mean of 0 to `replay_steps`",
        ),
        Metric("sampling/replays", "with `replay_steps`: earlier rollouts that the step trained on again"),
        Metric(
            "replay/*",
            "the metric of that name in the updates on earlier rollouts",
            "importance ratios near 1, and clip fractions as in the step's own updates; else lower `replay_steps`",
        ),
        Metric(
            "val/eos_rate val/num_eos_tokens eos_rate",
            "share and number of responses that ended by themselves",
            "near 1; if low, raise `max_answer_seq_len`, or set `missing_eos_penalty`",
        ),
    ),
    "Environments and tools": (
        Metric("rewards/environment", "mean sum of the environment's rewards in an episode", "rises"),
        Metric(
            "environment/failures",
            "episodes without a score, because the environment raised, took too long or broke its protocol",
            "0; the console shows the first ones",
        ),
        Metric(
            "environment/truncated",
            "share of the episodes that a limit of turns or tokens ended",
            "small, and falls; else raise `max_turns` or `max_new_tokens`",
        ),
        Metric("environment/turns", "mean turns of the model in an episode"),
        Metric("environment/tokens", "mean tokens of environment and tools in an episode, which are not trained on"),
        Metric(
            "environment/seconds",
            "seconds of a step in which the devices waited for environments",
            "small beside `timing/generate`, which contains it",
        ),
        Metric("environment/tool_calls", "mean tool calls in an episode"),
        Metric(
            "environment/tool_errors",
            "tool calls of a batch that could not be read, or failed",
            "falls towards 0; if it stays high, train on examples of tool calls first",
        ),
        Metric("environment/info/*", "mean of the last value of a number in the environment's `info`"),
    ),
    "Optimizer": (
        Metric("learning_rate lr", "learning rate of the step", "follows the schedule"),
        Metric(
            "grad_norm policy/grad_norm val/grad_norm policy/ptx_grad_norm",
            "norm of the gradient before clipping",
            "steady after the warm-up; spikes above ten times its level: lower the learning rate",
        ),
        Metric(
            "guard/skipped_updates",
            "updates skipped because a value was not finite",
            "0; several in a row stop the run",
        ),
        Metric(
            "guard/spike",
            "with `on_spike`: updates skipped because a loss, a gradient norm or the KL was far above its last values",
            "0; several in a row stop the run",
        ),
        Metric(
            "guard/rollbacks guard/left_out_batches guard/rolled_back_from",
            "rollbacks and batches left out so far, and the step of the spike, at the step that the run went back to",
        ),
        Metric("guard/unscored", "1 if no response of the step had a score", "0"),
        Metric("epoch episode", "passes over the training rows; responses sampled so far"),
    ),
    "Experts": (
        Metric(
            "moe/load_balancing_loss val/moe/load_balancing_loss",
            "load-balancing loss of the routers, of the actor or model and of the critic",
            "near the number of experts per token, which even use gives",
        ),
        Metric("moe/z_loss val/moe/z_loss", "mean of (log Σ exp of the router's logits)²", "does not grow"),
        Metric(
            "moe/expert_share_max moe/expert_share_min val/moe/expert_share_max val/moe/expert_share_min",
            "largest and smallest share of one expert in the choices of its layer",
            "a smallest share of 0 is an expert that nothing trains: raise `router_aux_loss_coef`",
        ),
    ),
    "Data": (
        Metric("data/*/share", "share of the training rows that came from this source so far", "the source's `weight`"),
    ),
    "Speed and memory": (
        Metric(
            "timing/step timing/train",
            "seconds of a step; of its update",
            "constant after the first steps, which compile",
        ),
        Metric(
            "timing/generate timing/score", "seconds of sampling and of scoring", "sampling is the largest part of PPO"
        ),
        Metric(
            "timing/replay",
            "seconds of scoring and training on earlier rollouts",
            "`sampling/replays` times `timing/score` + `timing/train`",
        ),
        Metric("timing/deterministic_check", "seconds of a `deterministic_check`", "about those of a training step"),
        Metric(
            "timing/reward_functions",
            "seconds spent waiting for reward functions after everything else of the scoring",
            "near 0: they run beside the devices",
        ),
        Metric(
            "perf/tokens_per_second perf/sequences_per_second",
            "trained tokens, or rollout rows, per second of the whole step",
            "constant; compare runs by it",
        ),
        Metric("perf/padding", "share of positions without a token", "below 0.3; else pack, or group by length"),
        Metric("perf/peak_memory_gib", "largest memory use of a device so far", "below the device's memory"),
        Metric(
            "system/cpu_percent system/memory_gib system/device_memory_gib",
            "trackers only: processor time in percent of one core; memory in use on the host and on the fullest device",
        ),
    ),
}
"""The metrics by group."""


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], Metric]]:
    """Patterns of names, exact ones first."""
    found = [(name, metric) for metrics in METRICS.values() for metric in metrics for name in metric.names.split()]
    found.sort(key=lambda item: "*" in item[0])
    return [(re.compile(re.escape(name).replace(r"\*", ".+")), metric) for name, metric in found]


def describe(name: str) -> Metric | None:
    """Returns the description of a metric of metrics.jsonl, or None for an unknown one.

    `eval/loss` and `eval/SOURCE/loss` have the description of `loss`.
    """
    names = [name]
    if name.startswith("eval/"):
        parts = name.split("/")[1:]
        names = ["/".join(parts[i:]) for i in range(len(parts))]
    return next((metric for known in names for pattern, metric in _patterns() if pattern.fullmatch(known)), None)
