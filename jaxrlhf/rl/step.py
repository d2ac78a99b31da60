"""The PPO step: every epoch and minibatch on one scored rollout, actor and critic, in one jitted program."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrlhf import keys, objectives
from jaxrlhf.engine import Rollout
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder, join, split_trainable
from jaxrlhf.rl.experience import Experience, advantages_and_returns, experience_metrics, shaped_experience
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.rl.losses import critic_gradients, policy_gradients, ptx_gradients, weights_of_gap
from jaxrlhf.rl.replay import Replayed
from jaxrlhf.sharding import TRAIN_RULES, use
from jaxrlhf.trainers.gradients import apply_gradients, exceeds, frozen_working_copy, take_rows
from jaxrlhf.trainers.guards import Limits
from jaxrlhf.trainers.optimizer import Rates, with_rates
from jaxrlhf.trainers.routers import RouterOptions

PyTree = Any


class PPOState(flax.struct.PyTreeNode):
    """Everything that the update reads and replaces; donated to `ppo_step`.

    With adapters (`actor.lora`, `critic.lora`), only they and the critic's head have optimizer state and an average.
    The critic's fields are None without a critic.
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
    """float32 β of the KL penalty."""
    seed: jax.Array
    """uint32 seed of the run, which with the step and the epoch keys the order of rows in minibatches."""
    actor: Decoder = flax.struct.field(pytree_node=False)
    critic: Decoder | None = flax.struct.field(pytree_node=False)
    actor_optimizer: optax.GradientTransformationExtraArgs = flax.struct.field(pytree_node=False)
    critic_optimizer: optax.GradientTransformationExtraArgs | None = flax.struct.field(pytree_node=False)
    hyperparameters: PPOHyperparameters = flax.struct.field(pytree_node=False)
    mesh: Mesh | None = flax.struct.field(pytree_node=False)
    reference_params: PyTree = None
    """Parameters of a reference that moves (`refreshed`), in the compute dtype; None for one that stays."""
    pending: tuple[Rollout, ...] = ()
    """With async_steps: the rollouts that wait for their update, the oldest first. `ppo_step` does not read them."""
    pending_episodes: tuple[str, ...] = ()
    """With an environment or tools: the outcomes of their episodes (`Played.as_json`)."""
    replay: tuple[Replayed, ...] = ()
    """With replay_steps: the rollouts that later steps train on again, the newest first. `ppo_step` does not read
    them."""
    score_moments: objectives.Moments | None = None
    """Moments of all scores so far, for score_normalization="running"."""
    routers: RouterOptions = flax.struct.field(pytree_node=False, default=RouterOptions())
    """Weights of the losses of routers, of actor and critic."""


class _Trained(NamedTuple):
    """The state of an update: trainable leaves, their optimizer states and the average."""

    actor_params: PyTree
    critic_params: PyTree
    actor_opt_state: PyTree
    critic_opt_state: PyTree
    ema_params: PyTree


class _Frozen(NamedTuple):
    """Working copies of the leaves that are not trained."""

    actor: PyTree
    critic: PyTree


class _Batch(NamedTuple):
    """A minibatch."""

    rows: dict[str, jax.Array]
    """Arrays `[B, …]` of `_training_arrays`."""
    ptx: dict[str, jax.Array] | None
    """Its share of the pretraining text."""
    longest: int | None
    """As `Experience.longest`."""
    measure: Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None
    """As `_Judged.measure`."""


class PPORates(NamedTuple):
    """Numbers of the learning-rate schedules; those of the critic are unused without one."""

    actor: Rates
    critic: Rates


class _Limited(NamedTuple):
    """Limits of the updates of a step."""

    limits: Limits | None
    exploded: jax.Array
    """True if the rollout is beyond a limit, so that no update is made."""


def minibatch_rows(h: PPOHyperparameters, seed: int | jax.Array, step: jax.Array, rows: int) -> jax.Array:
    """Row numbers `[epochs · minibatches, rows / minibatches]`, permuted anew in each epoch of each step."""
    if h.num_mini_batches == 1:
        order = jnp.tile(jnp.arange(rows), (h.ppo_epochs, 1))
    else:
        key = keys.stream(seed, keys.Stream.MINIBATCHES, step)
        of_epochs = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(h.ppo_epochs))
        order = jax.vmap(lambda k: jax.random.permutation(k, rows))(of_epochs)
    return order.reshape(h.updates, rows // h.num_mini_batches)


@partial(jax.jit, donate_argnums=0)
def ppo_step(
    state: PPOState,
    experience: Experience,
    ptx: dict[str, jax.Array] | None = None,
    limits: Limits | None = None,
    rates: PPORates | None = None,
) -> tuple[PPOState, dict[str, jax.Array]]:
    """Runs one iteration on a scored rollout: every epoch and minibatch, actor and critic.

    Losses are sums over the global minibatch divided by its global count of response tokens (or as `loss_aggregation`
    says), so meshes and micro-batches do not change them. An update whose losses or gradients are not finite changes
    nothing; the KL weight and the moments of scores keep their last finite values. Nor does one with a loss or gradient
    norm above its limit, and none of the updates if `objective/kl` is above its own.

    An experience without log-probs is that of the very policy in `state`, which is updated once: the update takes them
    from its own forward pass, so that its ratio is exactly 1, and computes the metrics that need them.

    Args:
        state: donated.
        experience: a scored rollout of B rows.
        ptx: with `ptx_coef`, pretraining text: `input_ids`, `attention_mask` and `loss_mask` `[R, T]`, and
            `segment_ids` `[R, T]` where rows are packed; each minibatch takes its share.
        limits: of `objective/kl` and of metrics of an update.
        rates: numbers of the schedules; default: those that the optimizers were made with.

    Returns:
        The new state, and float32 metrics under TRL's names, averaged over the updates; NaN when no update counted.
        With limits also `guard/spike`, the number of updates above them.

    Raises:
        InputError: when minibatches, micro-batches or groups do not divide the rows, or the experience has no log-probs
            and the algorithm needs them before its update.
    """
    h, mesh = state.hyperparameters, state.mesh
    rows = experience.scores.shape[0]
    h.check_rows(rows)
    if experience.logprobs is None and h.needs_old_logprobs:
        raise InputError(
            f"the experience has no log-probs of the policy. {h.updates} updates on it, a KL penalty in the reward, or "
            f"advantage_estimator={h.advantage_estimator} may need them: score it with the actor"
        )
    with use(mesh, TRAIN_RULES):
        data, metrics, moments, measure = _judged(state, experience)
        actor_params, actor_frozen, actor_read = _parts(state.actor_params, state.actor, mesh)
        critic_params, critic_frozen, critic_read = _parts(state.critic_params, state.critic, mesh)
        frozen = _Frozen(actor_read, critic_read)
        limited = _Limited(limits, exceeds(metrics, limits))
        scheduled = state if rates is None else _scheduled(state, rates)

        def run(trained: _Trained, index: tuple) -> tuple[_Trained, dict[str, Any]]:
            of_ptx = None if ptx is None else take_rows(ptx, index[1])
            batch = _Batch(take_rows(data, index[0]), of_ptx, experience.longest, measure)
            return _update(scheduled, frozen, trained, batch, limited)

        trained = _Trained(actor_params, critic_params, state.actor_opt_state, state.critic_opt_state, state.ema_params)
        index = minibatch_rows(h, state.seed, state.step, rows), _ptx_rows(state, ptx)
        trained, updates = _run_updates(run, trained, index, early_stop=h.early_stop_kl is not None)
    spikes, of_rollout = updates.pop("spike"), updates.pop("rollout")
    metrics |= {name: x[0] for name, x in of_rollout.items()}
    metrics |= _averaged(updates) | ({} if limits is None else {"guard/spike": jnp.sum(spikes)})
    new = state.replace(
        step=state.step + 1,
        actor_params=join(trained.actor_params, actor_frozen),
        critic_params=None if state.critic is None else join(trained.critic_params, critic_frozen),
        actor_opt_state=trained.actor_opt_state,
        critic_opt_state=trained.critic_opt_state,
        ema_params=trained.ema_params,
        kl_coef=_steered_kl_coef(state, metrics["objective/kl"], jnp.sum(experience.row_mask)),
        score_moments=None if moments is None else _finite_or(state.score_moments, moments),
    )
    return new, metrics


class _Judged(NamedTuple):
    """A rollout after rewards and advantages."""

    data: PyTree
    """Arrays `[B, …]` that minibatches are taken from."""
    metrics: dict[str, jax.Array]
    moments: PyTree
    """Moments of the scores so far, with this rollout's; None where scores are not scaled by them."""
    measure: Callable[[jax.Array, jax.Array], dict[str, jax.Array]] | None
    """Computes the metrics from log-probs and entropies `[B, T]`, where only the update knows them."""


def _judged(state: PPOState, experience: Experience) -> _Judged:
    """Computes rewards, advantages, returns and importance weights of a scored rollout."""
    h = state.hyperparameters
    shaped, moments = shaped_experience(experience, h, state.score_moments)
    rewards, advantages, returns = advantages_and_returns(shaped, state.kl_coef, h)
    data = _training_arrays(state, experience, advantages, returns)

    def measure(logprobs: jax.Array, entropy: jax.Array | None) -> dict[str, jax.Array]:
        known = experience.replace(logprobs=logprobs, entropy=entropy)
        weights = weights_of_gap(h, logprobs, experience.sampler_logprobs, experience.response_mask)
        return experience_metrics(known, rewards, returns, state.kl_coef, weights)

    if experience.logprobs is None:
        return _Judged(data, {}, moments, measure)
    return _Judged(data, measure(experience.logprobs, experience.entropy), moments, None)


def _scheduled(state: PPOState, rates: PPORates) -> PPOState:
    """The state with optimizers that take these numbers of their schedules; for use inside of the step."""
    critic = state.critic_optimizer
    return state.replace(
        actor_optimizer=with_rates(state.actor_optimizer, rates.actor),
        critic_optimizer=None if critic is None else with_rates(critic, rates.critic),
    )


def _parts(params: PyTree, module: Decoder | None, mesh: Mesh | None) -> tuple[PyTree, PyTree, PyTree]:
    """A model's trainable leaves, its frozen leaves, and the working copy of the latter; None without a model."""
    if module is None:
        return None, None, None
    trainable, frozen = split_trainable(params, module)
    return trainable, frozen, frozen_working_copy(frozen, module, mesh)


def _training_arrays(state: PPOState, e: Experience, advantages: jax.Array, returns: jax.Array) -> dict[str, jax.Array]:
    """The arrays `[B, …]` that minibatches are taken from."""
    h = state.hyperparameters
    data: dict[str, Any] = {
        "tokens": e.tokens,
        "mask": e.mask,
        "response_mask": e.response_mask,
        "advantages": advantages,
    }
    data |= {"row": jnp.arange(e.scores.shape[0])} if e.logprobs is None else {"logprobs": e.logprobs}
    if state.critic is not None:
        data |= {"values": e.values, "returns": returns}
    if h.kl_in_loss:
        data["ref_logprobs"] = e.ref_logprobs
    if h.importance_cap is not None:
        data["sampler_logprobs"] = e.sampler_logprobs
    return data


def _run_updates(
    run: Callable[[_Trained, tuple], tuple[_Trained, dict[str, Any]]],
    trained: _Trained,
    index: tuple,
    early_stop: bool,
) -> tuple[_Trained, dict[str, Any]]:
    """All updates of a step, one after the other; their metrics `[updates]`."""

    def update(carry: tuple, index: tuple) -> tuple[tuple, dict[str, jax.Array]]:
        trained, stopped = carry
        if not early_stop:
            trained, metrics = run(trained, index)
            return (trained, stopped), metrics
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, trained, index)[1])
        trained, metrics = jax.lax.cond(stopped, lambda t, _: (t, nothing), run, trained, index)
        return (trained, stopped | (metrics["over_kl"] > 0)), metrics

    (trained, _), updates = jax.lax.scan(update, (trained, jnp.zeros((), bool)), index)
    return trained, updates


def _steered_kl_coef(state: PPOState, kl: jax.Array, samples: jax.Array) -> jax.Array:
    """The weight of the KL penalty for the next step."""
    h = state.hyperparameters
    if h.kl_target is None:
        return state.kl_coef
    steered = objectives.adaptive_kl_coef(state.kl_coef, kl, h.kl_target, h.kl_horizon, samples)
    # The policy stands still while the critic alone is trained.
    steered = jnp.where(state.step < h.critic_only_steps, state.kl_coef, steered)
    return _finite_or(state.kl_coef, steered)


def _finite_or(old: PyTree, new: PyTree) -> PyTree:
    """`new` where all of it is finite, else `old`."""
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]))
    return jax.tree.map(partial(jnp.where, finite), new, old)


def _ptx_rows(state: PPOState, ptx: dict[str, jax.Array] | None) -> jax.Array | None:
    """The rows of pretraining text of each update; None where the step trains on none."""
    h = state.hyperparameters
    if (ptx is None) != (h.ptx_coef == 0):
        raise InputError(f"ptx_coef={h.ptx_coef} requires a batch of pretraining text; without one it must be 0")
    if ptx is None:
        return None
    rows = ptx["input_ids"].shape[0]
    if rows % (h.num_mini_batches * h.micro_batches):
        raise InputError(
            f"num_mini_batches={h.num_mini_batches} × micro-batches={h.micro_batches} must divide the {rows} rows of "
            "pretraining text"
        )
    return minibatch_rows(h, state.seed, state.step, rows)


def _averaged(updates: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics `[updates]` averaged over the finite ones, and how many were skipped or left out."""
    counted, over_kl = updates.pop("counted"), updates.pop("over_kl")
    skipped = updates.pop("skipped")
    count = jnp.sum(counted)
    means = {name: jnp.sum(jnp.where(counted > 0, x, 0.0)) / count for name, x in updates.items()}
    stopped = counted.shape[0] - jnp.sum(counted - over_kl + skipped)
    return means | {"policy/early_stopped": stopped, "guard/skipped_updates": jnp.sum(skipped)}


def _update(
    state: PPOState, frozen: _Frozen, trained: _Trained, minibatch: _Batch, limited: _Limited
) -> tuple[_Trained, dict[str, Any]]:
    """One optimizer step of actor and critic on one minibatch. The metrics say whether it counts and was made.

    `rollout` among them are those of the experience that only the update knows.
    """
    h, mesh = state.hyperparameters, state.mesh
    batch, ptx = minibatch.rows, minibatch.ptx
    if h.loss_aggregation != "token-mean":
        weights = objectives.loss_weights(batch["response_mask"], h.loss_aggregation, h.response_length)
        batch = batch | {"token_weights": weights}
    metrics, actor_grads, known = policy_gradients(state, frozen.actor, trained.actor_params, batch, minibatch.longest)
    of_rollout = {} if minibatch.measure is None else minibatch.measure(*known)
    if ptx is not None:
        metrics["loss/ptx_avg"], ptx_grads = ptx_gradients(state, frozen.actor, trained.actor_params, ptx)
        metrics["policy/ptx_grad_norm"] = optax.tree.norm(ptx_grads)
        actor_grads = jax.tree.map(jnp.add, actor_grads, ptx_grads)
    metrics["policy/grad_norm"] = optax.tree.norm(actor_grads)
    critic_grads = None
    if state.critic is not None:
        of_critic, critic_grads = critic_gradients(state, state.critic, frozen.critic, trained.critic_params, batch)
        metrics |= of_critic

    finite = jnp.all(jnp.isfinite(jnp.stack(list(metrics.values()))))
    within = jnp.ones((), bool) if h.early_stop_kl is None else metrics["policy/approxkl_avg"] <= h.early_stop_kl
    spike = finite & (limited.exploded | exceeds(metrics | of_rollout, limited.limits))
    made = finite & within & ~spike
    actor_made = made & (state.step >= h.critic_only_steps)
    actor_params, actor_opt = apply_gradients(
        state.actor_optimizer,
        state.actor,
        trained.actor_params,
        trained.actor_opt_state,
        actor_grads,
        mesh,
        actor_made,
    )
    critic_params, critic_opt = trained.critic_params, trained.critic_opt_state
    if state.critic is not None and state.critic_optimizer is not None:
        critic_params, critic_opt = apply_gradients(
            state.critic_optimizer, state.critic, critic_params, critic_opt, critic_grads, mesh, made
        )
    ema = trained.ema_params
    if ema is not None:
        decay = jnp.where(state.step < h.ema_start_step, 0.0, h.ema_decay)
        decay = jnp.where(actor_made, decay, 1.0)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, actor_params)
    metrics |= {"counted": finite, "skipped": ~finite, "over_kl": finite & ~within, "spike": spike}
    metrics |= {"rollout": of_rollout}
    metrics = jax.tree.map(lambda x: x.astype(jnp.float32), metrics)
    return _Trained(actor_params, critic_params, actor_opt, critic_opt, ema), metrics
