"""The models of a PPO run on one mesh, and the state that training replaces."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import keys, objectives
from jaxrlhf.data import Tokenizer
from jaxrlhf.distributed import is_primary
from jaxrlhf.engine import HybridEngine
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Decoder,
    Model,
    base_leaves,
    frozen_copy,
    join,
    load_pretrained,
    merged,
    param_shardings,
    split_trainable,
    with_head,
    with_kernels,
)
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.experience import RLModels
from jaxrlhf.rl.step import PPOState
from jaxrlhf.sharding import offloaded, place, replicated
from jaxrlhf.trainers.gradients import init_optimizer
from jaxrlhf.trainers.lora import with_adapters
from jaxrlhf.trainers.optimizer import make_optimizer, make_schedule
from jaxrlhf.trainers.settings import check_context, with_special_tokens

PyTree = Any


def _without_base(params: PyTree, module: Decoder) -> PyTree:
    """What a frozen copy must hold of its own: everything, or with adapters only what training changes in the base."""
    return base_leaves(split_trainable(params, module)[0]) if module.lora else params


def _with_base(own: PyTree, params: PyTree, module: Decoder) -> PyTree:
    """The inverse: what the copy lacks is the frozen part of the current `params`."""
    return join(own, split_trainable(params, module)[1])


def _own(model: Model, zero_stage: int) -> Model:
    """The model with arrays of its own: the step donates them, while a caller may keep theirs, or share a body."""
    module = model.module.clone(zero_stage=zero_stage)
    return model.replace(module=module, params=jax.tree.map(jnp.copy, model.params))


class RLHFEngine:
    """Actor, reference, critic and reward model on one mesh, and the initial state of PPO.

    The reference is a frozen copy of the actor. The critic starts as the reward model, or without one as the actor
    under a new head; algorithms without a critic have none. Reward functions need no reward model; with
    reward_model_weight=0 it only serves as the critic's start. With LoRA there are no copies: the frozen base of the
    actor is the reference, that of the critic, under a head of its own, the reward model. Adapters that a given Model
    brings are merged first.

    `state` is for loops of one's own (`PPOTrainer`); everything here takes the state as an argument.
    """

    def __init__(
        self,
        actor_model_name_or_path: str | Model,
        critic_model_name_or_path: str | Model | None,
        tokenizer: Tokenizer,
        num_total_iters: int,
        config: PPOConfig | None = None,
    ) -> None:
        self.config = config = PPOConfig() if config is None else config
        self.tokenizer = tokenizer
        self.mesh = config.mesh.make_mesh()
        self.hyperparameters = config.hyperparameters(config.data.seed)
        actor, reward, critic = self._load(actor_model_name_or_path, critic_model_name_or_path)
        base, seed = actor.module, config.data.seed
        actor = with_adapters(actor, config.lora, keys.stream(seed, keys.Stream.ADAPTERS))
        self.actor = HybridEngine(actor, self.mesh, config.rollout.generate_tensor_parallel or None)
        actor, self.actor.params = actor.replace(params=self.actor.params), None  # the state has them from here on
        frozen = config.frozen
        self.reference, self._reference = self._frozen(
            base, actor, frozen.reference_zero_stage, frozen.offload_reference_model
        )
        if critic is not None:
            base = critic.module
            targets = config.critic.critic_lora_target_modules
            critic = with_adapters(
                critic, config.lora, keys.stream(seed, keys.Stream.CRITIC_ADAPTERS), config.critic.critic_lora_r, targets
            )
            critic = critic.replace(params=place(critic.params, param_shardings(critic.module, self.mesh)))
        self.reward: Decoder | None = None
        self._reward: PyTree = None
        if reward is not None and config.rewards.reward_model_weight:
            live = reward if critic is None else critic  # the critic starts as the reward model
            base = reward.module if critic is None else base
            self.reward, self._reward = self._frozen(
                base, live, frozen.reward_zero_stage, frozen.offload_reward_model
            )
        self.state = self._initial_state(actor, critic, num_total_iters)

    def _initial_state(self, actor: Model, critic: Model | None, num_total_iters: int) -> PPOState:
        config, h = self.config, self.hyperparameters
        per_iteration = h.ppo_epochs * h.num_mini_batches
        updates = max(1, num_total_iters * per_iteration)
        of_actor = max(1, updates - h.critic_only_steps * per_iteration)
        self.schedule = make_schedule(config.optimizer, of_actor)
        start = partial(init_optimizer, mesh=self.mesh, offload=config.run.offload_optimizer)
        trainable, _ = split_trainable(actor.params, actor.module)
        optimizer, critic_optimizer, critic_opt_state = make_optimizer(config.optimizer, of_actor, trainable), None, None
        if critic is not None:
            own, _ = split_trainable(critic.params, critic.module)
            critic_optimizer = make_optimizer(config.critic.optimizer(config.optimizer), updates, own)
            critic_opt_state = start(critic_optimizer, critic.module, own)
        on_all = partial(jax.device_put, device=replicated(self.mesh))  # as the step returns it: one compilation
        running = h.score_normalization == "running"
        return PPOState(
            step=on_all(jnp.int32(0)),
            actor_params=actor.params,
            critic_params=None if critic is None else critic.params,
            actor_opt_state=start(optimizer, actor.module, trainable),
            critic_opt_state=critic_opt_state,
            ema_params=jax.tree.map(jnp.copy, trainable) if h.enable_ema else None,
            kl_coef=on_all(jnp.float32(h.kl_coef)),
            score_moments=on_all(objectives.Moments.empty()) if running else None,
            actor=actor.module,
            critic=None if critic is None else critic.module,
            actor_optimizer=optimizer,
            critic_optimizer=critic_optimizer,
            hyperparameters=h,
            mesh=self.mesh,
        )

    def _load(self, actor: str | Model, reward: str | Model | None) -> tuple[Model, Model | None, Model | None]:
        """Actor, reward model and critic before adapters; the critic is the reward model itself where there is one."""
        config, kernels = self.config, self.config.compute.kernels | {
            "kv_cache_dtype": self.config.generation.kv_cache_dtype
        }
        load = partial(
            load_pretrained,
            mesh=self.mesh,
            dtype=config.mesh.compute_dtype,
            remat=config.run.remat,
            progress=is_primary(),
        )
        stage = config.compute.zero_stage
        critic_stage = stage if config.critic.critic_zero_stage is None else config.critic.critic_zero_stage
        actor = _own(actor, stage) if isinstance(actor, Model) else load(actor, zero_stage=stage)
        if isinstance(reward, Model):
            reward = _own(reward, critic_stage)
        elif reward is not None:
            reward = load(reward, head="scalar", new_head=False, zero_stage=critic_stage)
        elif not config.rewards.reward_functions:
            raise InputError("reward_model_name_or_path: nothing scores responses; name a reward model, or reward_functions")
        critic = reward if self.hyperparameters.has_critic else None
        if self.hyperparameters.has_critic and reward is None:
            key = keys.stream(config.data.seed, keys.Stream.CRITIC_HEAD)
            critic = _own(with_head(merged(actor), "scalar", key), critic_stage)
        scalar = critic if reward is None else reward
        if scalar is not None and actor.config.vocab_size != scalar.config.vocab_size:
            raise InputError(
                f"the actor has a vocabulary of {actor.config.vocab_size} tokens and the reward model one of "
                f"{scalar.config.vocab_size}; both must read the same tokens: train them with the same tokenizer"
            )
        longest = config.data.max_prompt_seq_len + config.sampling.max_new_tokens
        for model, name in ((actor, "actor"), (scalar, "reward model")):
            if model is not None:
                check_context(model.config, longest, f"max_prompt_seq_len + max_new_tokens for the {name}")
        same = critic is reward
        actor = merged(with_special_tokens(with_kernels(actor, **kernels), self.tokenizer))
        reward = None if reward is None else merged(with_kernels(reward, **kernels))
        if critic is not None:
            critic = reward if same else with_kernels(critic, **kernels)
        return actor, reward, critic

    def _frozen(self, base: Decoder, trained: Model, stage: int | None, offload: bool) -> tuple[Decoder, PyTree]:
        """A model that is only read, and what it must hold of its own: a copy, or what adapters do not leave alone."""
        stage = base.zero_stage if stage is None else stage
        if trained.module.lora is None:  # below stage 3 a model without optimizer state is whole on every device
            base = base.clone(zero_stage=3 if stage == 3 else 0)
        shardings = param_shardings(trained.module.clone(zero_stage=base.zero_stage), self.mesh)
        shardings = _without_base(shardings, trained.module)
        shardings = offloaded(shardings) if offload else shardings
        own = _without_base(trained.params, trained.module)
        return base, frozen_copy(own, shardings, self.config.mesh.compute_dtype)

    def models(self, state: PPOState) -> RLModels:
        """All models with the parameters that scoring reads: the state's, and those of the frozen models."""
        reference = _with_base(self._reference, state.actor_params, state.actor)
        reward = self._reward
        if self.reward is not None and state.critic is not None:
            reward = _with_base(self._reward, state.critic_params, state.critic)
        return RLModels(
            actor=_model(state.actor, state.actor_params),
            reference=_model(self.reference, reference),
            critic=None if state.critic is None else _model(state.critic, state.critic_params),
            reward=None if self.reward is None else _model(self.reward, reward),
        )

    def actor_model(self, state: PPOState | None = None, ema: bool = False) -> Model:
        """The trained actor (or its moving average) of a state as a Model that `save_pretrained` takes."""
        state = self.state if state is None else state
        params = state.actor_params
        if ema:
            params = join(state.ema_params, split_trainable(params, state.actor)[1])
        return _model(state.actor, params)

    def critic_model(self, state: PPOState | None = None) -> Model:
        """The trained critic of a state. Raises InputError when the algorithm has none."""
        state = self.state if state is None else state
        if state.critic is None:
            raise InputError(f"advantage_estimator={self.hyperparameters.advantage_estimator} has no critic")
        return _model(state.critic, state.critic_params)


def _model(module: Decoder, params: PyTree) -> Model:
    return Model(module=module, params=params, config=module.config)
