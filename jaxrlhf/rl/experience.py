"""Experience: a rollout scored by the models, and the rewards, advantages and returns computed from it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf import objectives
from jaxrlhf.engine import Rollout
from jaxrlhf.engine.sampling import SamplingConfig, ended_rows
from jaxrlhf.models import Decoder, Model, logical_axes, working_copy
from jaxrlhf.rl.algorithms import estimate
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.sharding import TRAIN_RULES, constrain, on_device, use
from jaxrlhf.trainers.gradients import map_rows
from jaxrlhf.trainers.narrowing import worth_cutting

PyTree = Any


class Experience(flax.struct.PyTreeNode):
    """A scored rollout in training layout: prompt then response from column 0, right-padded.

    Index t of a `[B, T]` array belongs to token t: its log-prob given the tokens before it, and the critic's value of
    the state it was chosen in.
    """

    tokens: jax.Array
    mask: jax.Array
    """bool: real tokens, of prompt, response and environment."""
    response_mask: jax.Array
    """bool: tokens that the actor sampled. Only these count in losses, KL, advantages and metrics."""
    logprobs: jax.Array | None
    """The actor's log-probs at the time of the rollout, from the train program; None: the update computes them."""
    ref_logprobs: jax.Array
    values: jax.Array | None
    """The critic's values; None without a critic."""
    scores: jax.Array
    """`[B]`: score of each sequence by the reward model or reward functions, not clipped."""
    sampler_logprobs: jax.Array
    """The generate program's own log-probs, to watch the gap."""
    entropy: jax.Array | None
    """Entropies of the actor's distributions; None without `logprobs`."""
    ended: jax.Array | None = None
    """bool `[B]`: whether the response ended by itself; None: unknown, and not penalised."""
    turn_rewards: jax.Array | None = None
    """Parts of the scores at the last tokens of their turns, from an environment; None: scores stand at the end."""
    longest: int | None = flax.struct.field(pytree_node=False, default=None)
    """Bound N on the length of responses. The vocabulary head then runs on N columns from each row's first response
    token on, and log-probs and entropies are 0 elsewhere; None: it runs on all columns."""

    @property
    def row_mask(self) -> jax.Array:
        """bool `[B]`: rows with a score; the other rows count nowhere."""
        return jnp.any(self.response_mask, axis=1)

    @property
    def known_logprobs(self) -> jax.Array:
        """The actor's log-probs: those of the train program, or where they are not known yet the sampler's."""
        return self.sampler_logprobs if self.logprobs is None else self.logprobs

    def with_scores(self, scores: jax.Array) -> "Experience":
        """The experience with other scores `[B]`. A row whose score is not finite keeps its place, under a mask."""
        known = jnp.isfinite(scores)
        return self.replace(
            scores=jnp.where(known, scores, 0.0).astype(jnp.float32),
            response_mask=self.response_mask & known[:, None],
        )


def actor_logprobs(
    module: Decoder,
    params: PyTree,
    tokens: jax.Array,
    mask: jax.Array,
    temperature: float,
    response_mask: jax.Array | None = None,
    longest: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes log-probs and entropies `[B, T]`: the one function behind old, new and reference log-probs.

    With `response_mask` and `longest`, only `longest` columns from a row's first response token on are computed; the
    others are 0.
    """
    window = ()
    if longest is not None and response_mask is not None:
        window = (jnp.argmax(response_mask, axis=1), longest)
    result: Any = module.apply(
        {"params": params}, tokens, mask, temperature, *window, contiguous=True, method="logprobs"
    )
    return result


def critic_values(module: Decoder, params: PyTree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes V_t `[B, T]`: the critic's output at t-1, where token t is chosen; column 0 is 0."""
    values: Any = module.apply({"params": params}, tokens, mask, contiguous=True)
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


class RLModels(flax.struct.PyTreeNode):
    """The models of a run, each with the parameters to read."""

    actor: Model | None
    reference: Model | None
    critic: Model | None = None
    reward: Model | None = None


@partial(jax.jit, static_argnames=("hyperparameters", "mesh", "sampling"))
def score_rollout(
    rollout: Rollout,
    models: RLModels,
    *,
    hyperparameters: PPOHyperparameters,
    mesh: Mesh | None,
    sampling: SamplingConfig | None = None,
) -> Experience:
    """Turns a rollout into experience with the train program's forward passes, in chunks of rows.

    Args:
        rollout: prompts and responses, `[B, P+N]`.
        models: without an actor there are no log-probs and entropies, and without a critic no values; without a
            reference its log-probs are 0; without a reward model scores are 0 until `Experience.with_scores`.
        hyperparameters: temperature and chunks.
        mesh: where the models lie.
        sampling: says which responses ended by themselves; None: not known.
    """
    h = hyperparameters
    longest = rollout.tokens.shape[1] - rollout.prompt_length
    chunks = h.score_batches or h.num_mini_batches * h.micro_batches

    def passes(model: Model, function: Callable[[Decoder, PyTree, Rollout], PyTree], rows: Rollout) -> PyTree:
        params = working_copy(on_device(model.params), logical_axes(model.module), model.module, mesh)
        mask = worth_cutting(rows.mask, model.config)
        return map_rows(partial(function, model.module, params), rows, chunks, mask)

    def logprobs_of(module: Decoder, params: PyTree, rows: Rollout) -> tuple[jax.Array, jax.Array]:
        return actor_logprobs(module, params, rows.tokens, rows.mask, h.temperature, rows.response_mask, longest)

    def score_of(module: Decoder, params: PyTree, rows: Rollout) -> jax.Array:
        values: Any = module.apply({"params": params}, rows.tokens, rows.mask, contiguous=True)
        return objectives.score_at_last_token(values, rows.mask)

    def value_of(module: Decoder, params: PyTree, rows: Rollout) -> jax.Array:
        return critic_values(module, params, rows.tokens, rows.mask)

    with use(mesh, TRAIN_RULES):
        rows = jax.tree.map(lambda x: constrain(x, "batch", None), rollout.compact())
        logprobs, entropy = None, None
        if models.actor is not None:
            logprobs, entropy = passes(models.actor, logprobs_of, rows)
        # One model after the other: what is offloaded is on the devices during its own passes only.
        ref_logprobs = jnp.zeros(rows.tokens.shape, jnp.float32)
        if models.reference is not None:
            ref_logprobs, _ = passes(models.reference, logprobs_of, rows)
        scores = jnp.zeros(rows.tokens.shape[0], jnp.float32)
        if models.reward is not None:
            scores = passes(models.reward, score_of, rows)
        return Experience(
            tokens=rows.tokens,
            mask=rows.mask,
            response_mask=rows.response_mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=None if models.critic is None else passes(models.critic, value_of, rows),
            scores=scores,
            sampler_logprobs=rows.logprobs,
            entropy=entropy,
            ended=None if sampling is None else ended_rows(rows.tokens, rows.response_mask, sampling),
            turn_rewards=rows.rewards,
            longest=longest,
        )


def shaped_scores(
    e: Experience, h: PPOHyperparameters, moments: objectives.Moments | None
) -> tuple[jax.Array, objectives.Moments | None]:
    """Returns scores `[B]` less penalties and normalised, and the moments with this batch added."""
    shaped, moments = shaped_experience(e, h, moments)
    return shaped.scores, moments


def shaped_experience(
    e: Experience, h: PPOHyperparameters, moments: objectives.Moments | None
) -> tuple[Experience, objectives.Moments | None]:
    """Returns the experience with scores less penalties and normalised, and the moments with this batch added.

    Rewards of turns get the unit of the scores that they are parts of.
    """
    ended = jnp.ones(e.scores.shape, bool) if e.ended is None else e.ended
    lengths = jnp.sum(e.response_mask, axis=1)
    scores, parts = e.scores, e.turn_rewards
    scores = objectives.penalised_scores(scores, lengths, ended, h.missing_eos_penalty, *h.length_costs)
    if moments is not None:
        moments = objectives.add_moments(moments, scores, e.row_mask)
    if h.score_normalization != "none":
        of_batch = objectives.add_moments(objectives.Moments.empty(), scores, e.row_mask)
        chosen = of_batch if moments is None or h.score_normalization == "batch" else moments
        scores = objectives.standardised(scores, chosen)
        if parts is not None:
            parts = objectives.standardised(parts, chosen._replace(mean=jnp.zeros_like(chosen.mean)))
    return e.replace(scores=scores, turn_rewards=parts), moments


def advantages_and_returns(
    experience: Experience, kl_coef: jax.Array, h: PPOHyperparameters
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes (rewards, advantages, returns) `[B, T]` from scores as they are (`shaped_experience`).

    Advantages are whitened over the whole batch, returns are not; without a critic returns are not used.
    """
    e, mask = experience, experience.response_mask
    coef = 0.0 if h.kl_in_loss or e.logprobs is None else kl_coef
    rewards = objectives.kl_penalty_rewards(
        e.known_logprobs, e.ref_logprobs, e.scores, mask, coef, h.clip_reward, h.kl_estimator, e.turn_rewards
    )
    if h.whiten_rewards:
        rewards = objectives.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = estimate(rewards, e, h)
    if h.whiten_advantages:
        advantages = objectives.masked_whiten(advantages, mask)
    return rewards, advantages, returns


def experience_metrics(
    e: Experience, rewards: jax.Array, returns: jax.Array, kl_coef: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    """Metrics of an iteration's experience, under TRL's names; sums per row are averaged over scored rows."""
    mask, row_mask, logprobs = e.response_mask, e.row_mask, e.known_logprobs
    rows = jnp.sum(row_mask)
    kl = objectives.masked_sum(logprobs - e.ref_logprobs, mask) / rows
    gap = jnp.where(mask, jnp.abs(logprobs - e.sampler_logprobs), 0.0)
    scores = objectives.masked_mean(e.scores, row_mask)
    metrics = {
        "objective/kl": kl,
        "objective/entropy": -objectives.masked_sum(logprobs, mask) / rows,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": objectives.masked_sum(rewards, mask) / rows,
        "objective/scores": scores,
        "objective/scores_std": jnp.sqrt(objectives.masked_mean(jnp.square(e.scores - scores), row_mask)),
        "objective/kl_coef": kl_coef,
        "val/response_length": jnp.sum(mask) / rows,
        "sampling/logp_difference/mean": objectives.masked_mean(gap, mask),
        "sampling/logp_difference/max": jnp.max(gap),
        "sampling/importance_sampling_ratio/min": jnp.min(jnp.where(mask, weights, jnp.inf)),
        "sampling/importance_sampling_ratio/mean": objectives.masked_mean(weights, mask),
        "sampling/importance_sampling_ratio/max": jnp.max(jnp.where(mask, weights, 0.0)),
    }
    if e.entropy is not None:
        metrics["policy/entropy_avg"] = objectives.masked_mean(e.entropy, mask)
    if e.values is not None:
        spread = objectives.masked_variance(returns, mask)
        unexplained = objectives.masked_variance(returns - e.values, mask)
        metrics["val/value_avg"] = objectives.masked_mean(e.values, mask)
        metrics["val/explained_variance"] = 1 - unexplained / jnp.maximum(spread, jnp.finfo(jnp.float32).tiny)
    if e.ended is not None:
        metrics["val/eos_rate"] = objectives.masked_mean(e.ended, row_mask)
    return metrics
