"""PPO and its relatives, one declaration each. Commands, reports, checks of settings and the program read them here.

An estimator turns rewards into advantages: `(rewards [B, T], experience, hyperparameters) → (advantages, returns)`,
both float32 `[B, T]`. A user's own needs no change here: `--advantage_estimator file.py:function` names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp

from jaxrlhf import objectives
from jaxrlhf.config.imports import import_function
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from jaxrlhf.rl.experience import Experience
    from jaxrlhf.rl.hyperparameters import PPOHyperparameters

Estimator = Callable[[jax.Array, "Experience", "PPOHyperparameters"], tuple[jax.Array, jax.Array]]

OF_CRITIC = (
    "critic_learning_rate",
    "critic_lr_scheduler_type",
    "critic_warmup_steps",
    "critic_weight_decay",
    "critic_only_steps",
    "critic_lora_r",
    "critic_lora_target_modules",
    "critic_zero_stage",
    "cliprange_value",
    "lam",
)
"""Settings without a meaning where there is no critic."""


@dataclass(frozen=True)
class Algorithm:
    """One way to update a policy from scored rollouts."""

    name: str
    """Command, and name of the trainer in records."""
    title: str
    """Name in reports and model cards."""
    summary: str
    """Its line in `jaxrlhf --help`."""
    estimator: str
    """Value of `advantage_estimator`."""
    advantages: Estimator
    source: str = ""
    """Paper that the defaults and the equation come from."""
    needs_critic: bool = False
    grouped: bool = False
    """Compares the responses to one prompt, so it needs at least two of them."""
    reads_logprobs: bool = False
    """Its estimator reads the policy's log-probs of the experience."""
    unused: tuple[str, ...] = ()
    """Settings that it does not use."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Its own defaults, by flat names, where they differ from PPO's."""


def gae(rewards: jax.Array, e: Experience, h: PPOHyperparameters) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation with the critic's values (Schulman et al. 2016)."""
    if e.values is None:
        raise InputError("advantage_estimator=gae needs the critic's values, and this experience has none")
    return objectives.gae(rewards, e.values, e.response_mask, h.gamma, h.lam)


def grpo(rewards: jax.Array, e: Experience, h: PPOHyperparameters) -> tuple[jax.Array, jax.Array]:
    """A response's total reward against its group's mean, in the group's standard deviations."""
    totals = jnp.sum(rewards, axis=1)
    return _of_rows(objectives.group_advantages(totals, h.samples_per_prompt, h.scale_by_std, e.row_mask), e)


def rloo(rewards: jax.Array, e: Experience, h: PPOHyperparameters) -> tuple[jax.Array, jax.Array]:
    """A response's total reward against the mean of the other responses to the prompt."""
    return _of_rows(objectives.rloo_advantages(jnp.sum(rewards, axis=1), h.samples_per_prompt, e.row_mask), e)


def online_dpo(rewards: jax.Array, e: Experience, h: PPOHyperparameters) -> tuple[jax.Array, jax.Array]:
    """DPO's gradient on the best and the worst response to each prompt, with `kl_coef` as β."""
    if not h.kl_coef:
        raise InputError("kl_coef=0 with advantage_estimator=online_dpo: it is DPO's β, and must be positive")
    if e.logprobs is None:
        raise InputError("advantage_estimator=online_dpo needs the policy's log-probs, and this experience has none")
    log_ratios = objectives.sequence_logprobs(e.logprobs - e.ref_logprobs, e.response_mask)
    advantages = objectives.pair_advantages(e.scores, log_ratios, h.samples_per_prompt, h.kl_coef, e.row_mask)
    return _of_rows(advantages, e)


def reinforce(rewards: jax.Array, e: Experience, h: PPOHyperparameters) -> tuple[jax.Array, jax.Array]:
    """The discounted sum of the rewards from a token on."""
    advantages = objectives.reward_to_go(rewards, e.response_mask, h.gamma)
    return advantages, advantages


def _of_rows(advantages: jax.Array, e: Experience) -> tuple[jax.Array, jax.Array]:
    """Advantages `[B]` on every token of their responses."""
    tokens = jnp.where(e.response_mask, advantages[:, None], 0.0)
    return tokens, tokens


_CRITIC_FREE = {"clip_reward": None, "whiten_advantages": False}
_GROUPS = _CRITIC_FREE | {"samples_per_prompt": 8, "learning_rate": 1e-6, "kl_in_loss": True, "kl_estimator": "k3"}
"""Defaults of GRPO and its variants."""


def _variant(
    name: str, title: str, summary: str, source: str, unused: tuple[str, ...] = (), **defaults: object
) -> Algorithm:
    """A variant of GRPO: the same advantages with other settings, and no KL penalty."""
    return Algorithm(
        name=name,
        title=title,
        summary=f"step 3 by {title}: {summary}",
        estimator=name,
        advantages=grpo,
        source=source,
        grouped=True,
        unused=(*OF_CRITIC, "gamma", *unused),
        defaults=_GROUPS | {"kl_coef": 0.0} | defaults,
    )


ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            name="ppo",
            title="PPO",
            summary="step 3: PPO",
            estimator="gae",
            advantages=gae,
            source="Ouyang et al. 2022 (arXiv 2203.02155), Yao et al. 2023 (arXiv 2308.01320)",
            needs_critic=True,
            unused=("scale_by_std", "dynamic_sampling"),
        ),
        Algorithm(
            name="grpo",
            title="GRPO",
            summary="step 3 by GRPO: groups of responses compared, no critic",
            estimator="grpo",
            advantages=grpo,
            # Groups of 8 instead of 64.
            source="Shao et al. 2024 (arXiv 2402.03300), section 4.2 and equation 3",
            grouped=True,
            unused=(*OF_CRITIC, "gamma"),
            defaults=_GROUPS | {"kl_coef": 0.04, "loss_aggregation": "sequence-mean"},
        ),
        _variant(
            "dapo",
            "DAPO",
            "GRPO with clip-higher, token mean and groups that differ",
            "Yu et al. 2025 (arXiv 2503.14476)",
            cliprange_high=0.28,
            loss_aggregation="token-mean",
            dynamic_sampling=4,
        ),
        _variant(
            "dr_grpo",
            "Dr. GRPO",
            "GRPO without its biases of length and difficulty",
            "Liu et al. 2025 (arXiv 2503.20783)",
            scale_by_std=False,
            loss_aggregation="fixed-length",
        ),
        _variant(
            "gspo",
            "GSPO",
            "GRPO with one ratio per response",
            "Zheng et al. 2025 (arXiv 2507.18071), section 5.1",
            ratio_level="sequence",
            loss_aggregation="sequence-mean",
            cliprange=3e-4,
            cliprange_high=4e-4,
        ),
        _variant(
            "cispo",
            "CISPO",
            "GRPO with bounded ratios as constant weights",
            "MiniMax 2025 (arXiv 2506.13585)",
            unused=("cliprange", "dual_clip"),
            policy_loss="cispo",
            cliprange_high=4.0,
            loss_aggregation="token-mean",
        ),
        Algorithm(
            name="rloo",
            title="RLOO",
            summary="step 3 by RLOO: each response against the others to its prompt, no critic",
            estimator="rloo",
            advantages=rloo,
            # A whole response is one action there. Summed over one fixed length: the same direction at a scale that
            # Adam does not feel.
            source="Ahmadian et al. 2024 (arXiv 2402.14740)",
            grouped=True,
            unused=(*OF_CRITIC, "gamma", "scale_by_std"),
            defaults=_CRITIC_FREE
            | {
                "samples_per_prompt": 4,
                "learning_rate": 1e-6,
                "kl_coef": 0.05,
                "loss_aggregation": "fixed-length",
            },
        ),
        Algorithm(
            name="online_dpo",
            title="online DPO",
            summary="step 3 by online DPO: the best response to a prompt against the worst, no critic",
            estimator="online_dpo",
            advantages=online_dpo,
            # A response is one action, as for RLOO. β and learning rate as TRL.
            source="Guo et al. 2024 (arXiv 2402.04792)",
            grouped=True,
            reads_logprobs=True,
            unused=(
                *OF_CRITIC,
                *("gamma", "scale_by_std", "clip_reward", "whiten_rewards"),
                *("kl_estimator", "kl_in_loss", "kl_target", "kl_horizon"),
            ),
            defaults={
                "samples_per_prompt": 2,
                "learning_rate": 5e-7,
                "kl_coef": 0.1,
                "whiten_advantages": False,
                "loss_aggregation": "fixed-length",
            },
        ),
        Algorithm(
            name="reinforce++",
            title="REINFORCE++",
            summary="step 3 by REINFORCE++: one response per prompt, no critic",
            estimator="reinforce++",
            advantages=reinforce,
            source="Hu et al. 2025 (arXiv 2501.03262)",
            unused=(*OF_CRITIC, "scale_by_std", "dynamic_sampling"),
            defaults={"learning_rate": 5e-7, "kl_coef": 0.01, "clip_reward": 10.0, "whiten_advantages": True},
        ),
    )
}


@functools.cache
def find_algorithm(estimator: str) -> Algorithm:
    """Returns the algorithm of an `advantage_estimator`.

    Args:
        estimator: a declared one, or `file.py:function` or `package.module:function` of the user's own. A function with
            the attribute `needs_critic = True` gets the critic's values.

    Raises:
        InputError: for an unknown name, or a function that cannot be imported.
    """
    known = {algorithm.estimator: algorithm for algorithm in ALGORITHMS.values()}
    if estimator in known:
        return known[estimator]
    if ":" not in estimator:
        raise InputError(
            f"advantage_estimator={estimator!r} must be one of {', '.join(known)}, or file.py:function of your own"
        )
    function = import_function(estimator, "advantage_estimator")
    needs_critic = bool(getattr(function, "needs_critic", False))
    return Algorithm(
        name="ppo",
        title=f"{getattr(function, '__name__', estimator)} ({estimator})",
        summary="",
        estimator=estimator,
        advantages=cast(Estimator, function),
        needs_critic=needs_critic,
        reads_logprobs=True,
        unused=() if needs_critic else OF_CRITIC,
    )


def estimate(rewards: jax.Array, e: Experience, h: PPOHyperparameters) -> tuple[jax.Array, jax.Array]:
    """Returns (advantages, returns) `[B, T]` of the algorithm. Raises InputError when an estimator's shapes differ."""
    result = find_algorithm(h.advantage_estimator).advantages(rewards, e, h)
    shapes = [jnp.shape(x) for x in result] if isinstance(result, tuple) else [jnp.shape(result)]
    if shapes != [rewards.shape] * 2:
        raise InputError(
            f"advantage_estimator={h.advantage_estimator} must return (advantages, returns), both of the shape of "
            f"rewards, {rewards.shape}; found {', '.join(map(str, shapes))}"
        )
    return result
