"""The models of a PPO run, built by one function for real arrays and for abstract ones.

`RLHFEngine` builds with arrays. `jaxrlhf plan` builds the same run of `jax.ShapeDtypeStruct`s, on devices that need not
be present, so its sizes are those of the engine.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxrlhf import keys, objectives
from jaxrlhf.engine import Rollout
from jaxrlhf.models import (
    Decoder,
    LoRAConfig,
    Model,
    base_leaves,
    cast_matrices,
    frozen_copy,
    frozen_stage,
    join,
    param_shapes,
    param_shardings,
    split_trainable,
)
from jaxrlhf.models.lora import lora_module
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.experience import RLModels
from jaxrlhf.rl.replay import EMPTY, Replayed, replays
from jaxrlhf.rl.step import PPORates, PPOState
from jaxrlhf.sharding import batch_sharding, offloaded, optimizer_shardings, place, replicated
from jaxrlhf.trainers.gradients import init_optimizer
from jaxrlhf.trainers.lora import LoRAOptions, with_adapters
from jaxrlhf.trainers.optimizer import make_optimizer, make_rates
from jaxrlhf.trainers.settings import batch_devices

PyTree = Any


class Arrays:
    """Operations of the build, on real arrays."""

    def adapted(self, model: Model, options: LoRAOptions, key: jax.Array, rank: int, targets: Sequence[str]) -> Model:
        """The model with fresh adapters, unchanged at rank 0; see `with_adapters`."""
        return with_adapters(model, options, key, rank, tuple(targets))

    def place(self, tree: PyTree, shardings: PyTree) -> PyTree:
        """The tree in its place."""
        return place(tree, shardings)

    def frozen_copy(self, params: PyTree, shardings: PyTree, dtype: DTypeLike, offload: bool) -> PyTree:
        """Copy for a model that is only read, in host memory with `offload`."""
        return frozen_copy(params, offloaded(shardings) if offload else shardings, dtype)

    def optimizer_state(
        self, optimizer: optax.GradientTransformation, module: Decoder, trainable: PyTree, mesh: Mesh, offload: bool
    ) -> PyTree:
        """State of an optimizer before its first step, its moments in host memory with `offload`."""
        return init_optimizer(optimizer, module, trainable, mesh, offload=offload)

    def copy(self, tree: PyTree) -> PyTree:
        """The tree in arrays of its own."""
        return jax.tree.map(jnp.copy, tree)


class AbstractArrays(Arrays):
    """The same operations on `jax.ShapeDtypeStruct`s. Offloaded arrays keep the shardings of their devices."""

    def adapted(self, model: Model, options: LoRAOptions, key: jax.Array, rank: int, targets: Sequence[str]) -> Model:
        if not rank:
            return model
        config = LoRAConfig(rank, options.lora_alpha, options.lora_dropout, tuple(targets))
        module = lora_module(model.module, config)
        trainable, frozen = split_trainable(param_shapes(module), module)
        return Model(module, join(trainable, _cast(frozen, module.dtype)), model.config)

    def place(self, tree: PyTree, shardings: PyTree) -> PyTree:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def frozen_copy(self, params: PyTree, shardings: PyTree, dtype: DTypeLike, offload: bool) -> PyTree:
        return self.place(_cast(params, dtype), shardings)

    def optimizer_state(
        self, optimizer: optax.GradientTransformation, module: Decoder, trainable: PyTree, mesh: Mesh, offload: bool
    ) -> PyTree:
        lies = jax.tree.map(lambda x: x.sharding, trainable)
        shardings = optimizer_shardings(optimizer, trainable, lies, mesh)
        return self.place(jax.eval_shape(optimizer.init, trainable), shardings)

    def copy(self, tree: PyTree) -> PyTree:
        return tree


REAL, ABSTRACT = Arrays(), AbstractArrays()


def _cast(tree: PyTree, dtype: DTypeLike) -> PyTree:
    return jax.eval_shape(lambda params: cast_matrices(params, dtype), tree)


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """A model that is only read: the reference or the reward model.

    Without adapters it is a copy. With them it shares the frozen base of the model that is trained, and holds only the
    base's leaves that training changes (a scalar head).
    """

    module: Decoder
    own: PyTree
    """Parameters that it holds; the others are shared."""
    trained: Decoder
    """The model whose start it is."""

    def params(self, trained_params: PyTree) -> PyTree:
        """All its parameters, given the current ones of the model that is trained."""
        return join(self.own, split_trainable(trained_params, self.trained)[1])


@dataclass(frozen=True, eq=False)
class FrozenModels:
    """The models of a run that are only read."""

    reference: FrozenModel | None
    """None without a reference; without parameters where the state has them, because they move."""
    reward: FrozenModel | None
    """None when nothing but reward functions scores."""

    def with_trained(self, state: PPOState) -> RLModels:
        """All models with the parameters that scoring reads: the state's, and those of the frozen models."""
        critic = None if state.critic is None else model_of(state.critic, state.critic_params)
        reward = None
        if self.reward is not None:
            base = None if critic is None else critic.params
            reward = model_of(self.reward.module, self.reward.own if base is None else self.reward.params(base))
        reference = None
        if self.reference is not None:
            moving = state.reference_params
            params = self.reference.params(state.actor_params) if moving is None else moving
            reference = model_of(self.reference.module, params)
        return RLModels(
            actor=model_of(state.actor, state.actor_params),
            reference=reference,
            critic=critic,
            reward=reward,
        )


def model_of(module: Decoder, params: PyTree) -> Model:
    """A module with its parameters."""
    return Model(module=module, params=params, config=module.config)


def updates_of(config: PPOConfig, iterations: int) -> tuple[int, int]:
    """Optimizer steps of (actor, critic) in a run of `iterations`; at least 1."""
    h = config.algorithm
    updates = max(1, (iterations + replays(iterations, config.rollout.reuses)) * h.updates)
    return max(1, updates - h.critic_only_steps * h.updates), updates


def rates_of(config: PPOConfig, iterations: int) -> PPORates:
    """Numbers of the schedules of (actor, critic) in a run of `iterations`."""
    of_actor, of_critic = updates_of(config, iterations)
    critic = config.critic.optimizer(config.optimizer)
    return PPORates(make_rates(config.optimizer, of_actor), make_rates(critic, of_critic))


def build_models(
    config: PPOConfig,
    mesh: Mesh,
    actor: Model,
    critic: Model | None,
    reward: Model | None,
    iterations: int,
    arrays: Arrays = REAL,
) -> tuple[PPOState, FrozenModels]:
    """Adapters, frozen copies, optimizers and the first state of a run.

    Args:
        config: Settings of the run.
        mesh: Mesh that everything lies on.
        actor: Model to train, without adapters; `module.zero_stage` decides where it lies.
        critic: Model to train as the critic, or None without one.
        reward: Reward model, or None. With a critic its parameters are those that the critic starts from.
        iterations: Iterations of the run, which learning-rate schedules span.
        arrays: Operations on real or abstract arrays.
    """
    seed, lora, of_critic, frozen = config.data.seed, config.lora, config.critic, config.frozen
    key = keys.stream(seed, keys.Stream.ADAPTERS)
    trained = arrays.adapted(actor, lora, key, lora.lora_r, lora.lora_target_modules)
    trained = _placed(arrays, trained, mesh)
    reference, moving = None, None
    if not frozen.reference_free:
        reference = _frozen(
            config, mesh, arrays, actor.module, trained, frozen.reference_zero_stage, frozen.offload_reference_model
        )
        if frozen.reference_sync_steps:
            reference, moving = dataclasses.replace(reference, own=None), reference.own
    value = critic
    if critic is not None:
        key = keys.stream(seed, keys.Stream.CRITIC_ADAPTERS)
        value = arrays.adapted(critic, lora, key, of_critic.critic_lora_r, of_critic.critic_lora_target_modules)
        value = _placed(arrays, value, mesh)
    frozen_reward = None
    start = critic if critic is not None else reward
    if reward is not None and start is not None and config.rewards.reward_model_weight:
        live = reward if value is None else value  # the critic starts as the reward model
        frozen_reward = _frozen(
            config, mesh, arrays, start.module, live, frozen.reward_zero_stage, frozen.offload_reward_model
        )
    state = _first_state(config, mesh, arrays, trained, value, iterations)
    return state.replace(reference_params=moving), FrozenModels(reference, frozen_reward)


def _placed(arrays: Arrays, model: Model, mesh: Mesh) -> Model:
    return dataclasses.replace(model, params=arrays.place(model.params, param_shardings(model.module, mesh)))


def _frozen(
    config: PPOConfig, mesh: Mesh, arrays: Arrays, base: Decoder, trained: Model, stage: int | None, offload: bool
) -> FrozenModel:
    """The frozen start of a model whose module is `base` without adapters."""
    module = trained.module
    base = base.clone(zero_stage=frozen_stage(module, stage))
    shardings = _own(param_shardings(module.clone(zero_stage=base.zero_stage), mesh), module)
    own = arrays.frozen_copy(_own(trained.params, module), shardings, config.mesh.compute_dtype, offload)
    return FrozenModel(base, own, module)


def _own(params: PyTree, trained: Decoder) -> PyTree:
    """Leaves that a frozen copy holds: all, or with adapters those of the base that training changes."""
    return base_leaves(split_trainable(params, trained)[0]) if trained.lora else params


def _first_state(
    config: PPOConfig, mesh: Mesh, arrays: Arrays, actor: Model, critic: Model | None, iterations: int
) -> PPOState:
    of_actor, of_critic = updates_of(config, iterations)
    hyperparameters = config.hyperparameters()
    trainable, _ = split_trainable(actor.params, actor.module)
    optimizer, critic_optimizer, critic_state = make_optimizer(config.optimizer, of_actor, trainable), None, None
    if critic is not None:
        of_value, _ = split_trainable(critic.params, critic.module)
        critic_optimizer = make_optimizer(config.critic.optimizer(config.optimizer), of_critic, of_value)
        critic_state = arrays.optimizer_state(
            critic_optimizer, critic.module, of_value, mesh, config.run.offload_optimizer
        )

    def on_all(tree: PyTree) -> PyTree:
        """Scalars as the step returns them, so that it compiles once."""
        return arrays.place(tree, jax.tree.map(lambda _: replicated(mesh), tree))

    running = hyperparameters.score_normalization == "running"
    return PPOState(
        step=on_all(jnp.int32(0)),
        actor_params=actor.params,
        critic_params=None if critic is None else critic.params,
        actor_opt_state=arrays.optimizer_state(optimizer, actor.module, trainable, mesh, config.run.offload_optimizer),
        critic_opt_state=critic_state,
        ema_params=arrays.copy(trainable) if hyperparameters.enable_ema else None,
        kl_coef=on_all(jnp.float32(hyperparameters.kl_coef)),
        seed=on_all(jnp.uint32(config.data.seed & 0xFFFFFFFF)),
        pending=tuple(_rollout(config, mesh, arrays) for _ in range(config.rollout.async_steps)),
        pending_episodes=("",) * config.rollout.async_steps if config.environments.used else (),
        replay=_replay(config, mesh, arrays),
        score_moments=on_all(objectives.Moments.empty()) if running else None,
        actor=actor.module,
        critic=None if critic is None else critic.module,
        actor_optimizer=optimizer,
        critic_optimizer=critic_optimizer,
        hyperparameters=hyperparameters,
        mesh=mesh,
        routers=config.routers,
    )


def _rollout(config: PPOConfig, mesh: Mesh, arrays: Arrays) -> Rollout:
    """Place of a rollout that waits for its update, or that is kept for later ones."""
    rows = config.rows_per_device * batch_devices(mesh)
    shape = (rows, config.data.max_prompt_seq_len + config.sampling.max_new_tokens)

    def place(dtype: DTypeLike) -> jax.Array:
        return arrays.place(jnp.zeros(shape, dtype), batch_sharding(mesh, shape))

    rewards = place(jnp.float32) if config.environments.used else None
    arrays_of = (place(jnp.int32), place(bool), place(bool), place(jnp.float32))
    return Rollout(*arrays_of, config.data.max_prompt_seq_len, rewards)


def _replay(config: PPOConfig, mesh: Mesh, arrays: Arrays) -> tuple[Replayed, ...]:
    """Places of the rollouts that are kept for later steps."""

    def place() -> Replayed:
        rollout = _rollout(config, mesh, arrays)
        scores = jnp.zeros(rollout.tokens.shape[0], jnp.float32)
        placed = arrays.place(scores, batch_sharding(mesh, scores.shape))
        numbers = (arrays.place(jnp.int32(n), replicated(mesh)) for n in (EMPTY, 0))
        return Replayed(rollout, placed, *numbers)

    return tuple(place() for _ in range(config.rollout.reuses))
