"""The PPO train program: scoring rollouts into experience, and one jitted update of actor and critic.

Exactly DESIGN's PPO: per-token KL reward plus the clipped score at the last response token, GAE over the response,
advantages whitened over the global batch, clipped policy and value losses; all epochs and minibatches in one program.
Source: Ouyang et al. 2022 (arXiv 2203.02155), Yao et al. 2023 (arXiv 2308.01320).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrlhf import objectives
from jaxrlhf.engine import Rollout
from jaxrlhf.errors import InputError
from jaxrlhf.gradients import apply_gradients, frozen_working_copy, map_rows, model_gradients
from jaxrlhf.models import Decoder, join, logical_axes, split_trainable, working_copy
from jaxrlhf.sharding import TRAIN_RULES, constrain, on_device, use

PyTree = Any


@dataclass(frozen=True)
class PPOHyperparameters:
    """What the PPO program is compiled for."""

    ppo_epochs: int = 1
    num_mini_batches: int = 1
    micro_batches: int = 1
    """Chunks a minibatch is worked through in (gradient accumulation); changes memory, not results."""
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    clip_reward: float | None = 5.0
    whiten_advantages: bool = True
    temperature: float = 1.0
    """Of the distribution that was sampled from; log-probs are taken at the same one."""
    importance_cap: float | None = None
    """Weigh each token's policy loss by train over sampler probability, at most this; None: no weights."""
    ema_decay: float = 0.992
    seed: int = 0
    """Keys the order of rows in minibatches, with the step and the epoch."""

    def __post_init__(self) -> None:
        for name in ("ppo_epochs", "num_mini_batches", "micro_batches"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("gamma", "lam", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("cliprange", "cliprange_value", "temperature", "importance_cap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name}={getattr(self, name)} must be positive")

    def check_rows(self, rows: int) -> None:
        """Refuse a rollout batch that minibatches and micro-batches do not divide."""
        if rows % (self.num_mini_batches * self.micro_batches):
            raise InputError(
                f"num_mini_batches={self.num_mini_batches} × micro-batches={self.micro_batches} must divide the "
                f"rollout batch of {rows} rows"
            )


@flax.struct.dataclass
class PPOState:
    """Everything the update reads and replaces; donated to `ppo_step`.

    With adapters (`actor.lora`, `critic.lora`), they and the critic's head alone have optimizer state and an average.
    """

    step: jax.Array
    """int32: finished calls of `ppo_step`."""
    actor_params: PyTree
    critic_params: PyTree
    actor_opt_state: PyTree
    critic_opt_state: PyTree
    ema_params: PyTree
    """Moving average of the actor's trainable leaves (`split_trainable`), or None."""
    kl_coef: jax.Array
    """float32 β of the per-token KL reward."""
    actor: Decoder = flax.struct.field(pytree_node=False)
    critic: Decoder = flax.struct.field(pytree_node=False)
    actor_optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    critic_optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    hyperparameters: PPOHyperparameters = flax.struct.field(pytree_node=False)
    mesh: Mesh | None = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Experience:
    """A scored rollout in training layout: prompt then response from column 0, right-padded.

    Index t of a `[B, T]` array belongs to token t: its log-prob given the tokens before it, and the critic's value of
    the state it was chosen in.
    """

    tokens: jax.Array
    mask: jax.Array
    response_mask: jax.Array
    logprobs: jax.Array
    """The actor's log-probs when the rollout was made, from the train program."""
    ref_logprobs: jax.Array
    values: jax.Array
    scores: jax.Array
    """`[B]`: the reward model's score of each sequence, not clipped."""
    sampler_logprobs: jax.Array
    """The generate program's own log-probs, to watch the gap."""
    entropy: jax.Array
    longest: int | None = flax.struct.field(pytree_node=False, default=None)
    """N: no response is longer. The vocabulary head then runs on N columns from each row's first response token on, and
    log-probs and entropies are 0 elsewhere; None: on all columns."""


def actor_logprobs(
    module: Decoder,
    params: PyTree,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: float,
    response_mask: jax.Array | None = None,
    longest: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies `[B, T]`: the one function behind old, new and reference log-probs.

    With `response_mask` and `longest`, only of `longest` columns from a row's first response token on (0 elsewhere).
    """
    window = () if longest is None else (jnp.argmax(response_mask, axis=1), longest)
    return module.apply({"params": params}, tokens, mask, temperature, *window, method="logprobs")


def critic_values(module: Decoder, params: PyTree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """V_t `[B, T]`: the critic's output at t-1, where token t is chosen; column 0 is 0."""
    return jnp.pad(module.apply({"params": params}, tokens, mask)[:, :-1], ((0, 0), (1, 0)))


@partial(jax.jit, static_argnames=("actor", "critic", "reference", "reward", "hyperparameters", "mesh"))
def score_rollout(
    rollout: Rollout,
    actor_params: PyTree,
    critic_params: PyTree,
    reference_params: PyTree,
    reward_params: PyTree,
    *,
    actor: Decoder,
    critic: Decoder,
    reference: Decoder,
    reward: Decoder,
    hyperparameters: PPOHyperparameters,
    mesh: Mesh | None,
) -> Experience:
    """Turn a rollout into experience with the train program's forward passes, in chunks of a micro-batch."""
    h = hyperparameters
    longest = rollout.tokens.shape[1] - rollout.prompt_length

    def passes(module: Decoder, params: PyTree, function: Callable[[PyTree, Rollout], PyTree], rows: Rollout) -> PyTree:
        params = working_copy(on_device(params), logical_axes(module), module, mesh)
        return map_rows(partial(function, params), rows, h.num_mini_batches * h.micro_batches)

    def logprobs_of(module: Decoder, params: PyTree, rows: Rollout) -> tuple[jax.Array, jax.Array]:
        return actor_logprobs(module, params, rows.tokens, rows.mask, h.temperature, rows.response_mask, longest)

    def score_of(params: PyTree, rows: Rollout) -> jax.Array:
        return objectives.score_at_last_token(reward.apply({"params": params}, rows.tokens, rows.mask), rows.mask)

    def value_of(params: PyTree, rows: Rollout) -> jax.Array:
        return critic_values(critic, params, rows.tokens, rows.mask)

    with use(mesh, TRAIN_RULES):
        rows = jax.tree.map(lambda x: constrain(x, "batch", None), rollout.compact())
        logprobs, entropy = passes(actor, actor_params, partial(logprobs_of, actor), rows)
        # One model after the other: what is offloaded is on the devices during its own passes only.
        ref_logprobs, _ = passes(reference, reference_params, partial(logprobs_of, reference), rows)
        scores = passes(reward, reward_params, score_of, rows)
        return Experience(
            tokens=rows.tokens,
            mask=rows.mask,
            response_mask=rows.response_mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=passes(critic, critic_params, value_of, rows),
            scores=scores,
            sampler_logprobs=rows.logprobs,
            entropy=entropy,
            longest=longest,
        )


def advantages_and_returns(
    experience: Experience, kl_coef: jax.Array, h: PPOHyperparameters
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rewards, advantages, returns) `[B, T]`; advantages are whitened over the whole batch, returns are not."""
    e = experience
    rewards = objectives.kl_penalty_rewards(
        e.logprobs, e.ref_logprobs, e.scores, e.response_mask, kl_coef, h.clip_reward
    )
    advantages, returns = objectives.gae(rewards, e.values, e.response_mask, h.gamma, h.lam)
    if h.whiten_advantages:
        advantages = objectives.masked_whiten(advantages, e.response_mask)
    return rewards, advantages, returns


def _experience_metrics(
    e: Experience, rewards: jax.Array, kl_coef: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    mask = e.response_mask
    rows = e.scores.shape[0]
    kl = objectives.masked_sum(e.logprobs - e.ref_logprobs, mask) / rows
    gap = jnp.where(mask, jnp.abs(e.logprobs - e.sampler_logprobs), 0.0)
    return {
        "objective/kl": kl,
        "objective/entropy": -objectives.masked_sum(e.logprobs, mask) / rows,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": objectives.masked_sum(rewards, mask) / rows,
        "objective/scores": jnp.mean(e.scores),
        "objective/scores_std": jnp.std(e.scores),
        "objective/kl_coef": kl_coef,
        "policy/entropy_avg": objectives.masked_mean(e.entropy, mask),
        "val/response_length": jnp.sum(mask) / rows,
        "val/value_avg": objectives.masked_mean(e.values, mask),
        "sampling/logp_difference/mean": objectives.masked_mean(gap, mask),
        "sampling/logp_difference/max": jnp.max(gap),
        "sampling/importance_sampling_ratio/min": jnp.min(jnp.where(mask, weights, jnp.inf)),
        "sampling/importance_sampling_ratio/mean": objectives.masked_mean(weights, mask),
        "sampling/importance_sampling_ratio/max": jnp.max(jnp.where(mask, weights, 0.0)),
    }


def _minibatch_rows(h: PPOHyperparameters, step: jax.Array, rows: int) -> jax.Array:
    """`[epochs · minibatches, rows / minibatches]` row numbers: a permutation per epoch, of (seed, step, epoch)."""
    key = jax.random.fold_in(jax.random.key(h.seed), step)
    if h.num_mini_batches == 1:
        order = jnp.tile(jnp.arange(rows), (h.ppo_epochs, 1))
    else:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(h.ppo_epochs))
        order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys)
    return order.reshape(h.ppo_epochs * h.num_mini_batches, rows // h.num_mini_batches)


@partial(jax.jit, donate_argnums=0)
def ppo_step(state: PPOState, experience: Experience) -> tuple[PPOState, dict[str, jax.Array]]:
    """One PPO iteration on a scored rollout: every epoch and minibatch, actor and critic. `state` is donated.

    Losses are sums over the global minibatch divided by its global count of response tokens, so meshes and
    micro-batches do not change them. Returns the new state and float32 metrics under TRL's names, averaged over the
    updates.
    """
    h, mesh = state.hyperparameters, state.mesh
    rows = experience.scores.shape[0]
    h.check_rows(rows)
    with use(mesh, TRAIN_RULES):
        rewards, advantages, returns = advantages_and_returns(experience, state.kl_coef, h)
        data = {
            "tokens": experience.tokens,
            "mask": experience.mask,
            "response_mask": experience.response_mask,
            "logprobs": experience.logprobs,
            "values": experience.values,
            "advantages": advantages,
            "returns": returns,
        }
        weights = objectives.truncated_importance_weights(
            experience.logprobs, experience.sampler_logprobs, experience.response_mask, h.importance_cap or jnp.inf
        )
        if h.importance_cap is not None:
            data["weights"] = weights

        actor_params, actor_frozen = split_trainable(state.actor_params, state.actor)
        critic_params, critic_frozen = split_trainable(state.critic_params, state.critic)
        frozen = (
            frozen_working_copy(actor_frozen, state.actor, mesh),
            frozen_working_copy(critic_frozen, state.critic, mesh),
        )

        def update(carry: tuple, index: jax.Array) -> tuple[tuple, dict[str, jax.Array]]:
            batch = jax.tree.map(lambda x: constrain(jnp.take(x, index, axis=0), "batch", None), data)
            return _update(state, frozen, carry, batch, experience.longest)

        carry = (
            actor_params,
            critic_params,
            state.actor_opt_state,
            state.critic_opt_state,
            state.ema_params,
        )
        carry, updates = jax.lax.scan(update, carry, _minibatch_rows(h, state.step, rows))
    metrics = _experience_metrics(experience, rewards, state.kl_coef, weights)
    metrics |= jax.tree.map(jnp.mean, updates)
    new = state.replace(
        step=state.step + 1,
        actor_params=join(carry[0], actor_frozen),
        critic_params=join(carry[1], critic_frozen),
        actor_opt_state=carry[2],
        critic_opt_state=carry[3],
        ema_params=carry[4],
    )
    return new, metrics


def _update(
    state: PPOState,
    frozen: tuple[PyTree, PyTree],
    carry: tuple,
    batch: dict[str, jax.Array],
    longest: int | None,
) -> tuple[tuple, dict[str, jax.Array]]:
    """One optimizer step of actor and critic on one minibatch; parameters in `carry` are the trainable ones."""
    h = state.hyperparameters
    actor_frozen, critic_frozen = frozen
    actor_params, critic_params, actor_opt, critic_opt, ema = carry
    tokens_in_batch = jnp.sum(batch["response_mask"])

    def actor_loss(params: PyTree, b: dict[str, jax.Array], _: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = join(params, actor_frozen)
        sequences = b["tokens"], b["mask"], h.temperature, b["response_mask"], longest
        logprobs, _ = actor_logprobs(state.actor, params, *sequences)
        return objectives.policy_loss(
            logprobs,
            b["logprobs"],
            b["advantages"],
            b["response_mask"],
            h.cliprange,
            tokens_in_batch,
            b.get("weights"),
        )

    def critic_loss(params: PyTree, b: dict[str, jax.Array], _: Any) -> tuple[jax.Array, jax.Array]:
        values = critic_values(state.critic, join(params, critic_frozen), b["tokens"], b["mask"])
        return objectives.value_loss(
            values, b["values"], b["returns"], b["response_mask"], h.cliprange_value, tokens_in_batch
        )

    parts, mesh = h.micro_batches, state.mesh
    policy, stats, actor_grads = model_gradients(actor_loss, state.actor, actor_params, batch, parts, mesh)
    value, value_clipfrac, critic_grads = model_gradients(critic_loss, state.critic, critic_params, batch, parts, mesh)
    metrics = {
        "loss/policy_avg": policy,
        "loss/value_avg": value,
        "policy/approxkl_avg": stats["approx_kl"],
        "policy/clipfrac_avg": stats["clipfrac"],
        "val/clipfrac_avg": value_clipfrac,
        "val/ratio": 1 + stats["ratio_shift"],
        "val/ratio_var": objectives.ratio_variance(stats),
        "policy/grad_norm": optax.tree.norm(actor_grads),
        "val/grad_norm": optax.tree.norm(critic_grads),
    }
    actor_params, actor_opt = apply_gradients(
        state.actor_optimizer, state.actor, actor_params, actor_opt, actor_grads, mesh
    )
    critic_params, critic_opt = apply_gradients(
        state.critic_optimizer, state.critic, critic_params, critic_opt, critic_grads, mesh
    )
    if ema is not None:
        ema = jax.tree.map(lambda e, p: h.ema_decay * e + (1 - h.ema_decay) * p, ema, actor_params)
    return (actor_params, critic_params, actor_opt, critic_opt, ema), metrics
