"""The models of a PPO run on one mesh, and the state that training replaces."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import objectives
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
from jaxrlhf.rl import PPOState
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.sharding import offloaded, place, replicated
from jaxrlhf.trainers.gradients import init_optimizer
from jaxrlhf.trainers.lora import with_adapters
from jaxrlhf.trainers.optimizer import make_optimizer, make_schedule
from jaxrlhf.trainers.settings import check_context, kernel_options, with_special_tokens

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
    """Actor, reference, critic and reward model on one mesh, and the PPO state that training replaces.

    The reference is a frozen copy of the actor, the critic starts as the reward model (without one, as the actor under
    a new head); estimators other than "gae" have no critic. Reward functions need no reward model; with
    reward_model_weight=0 it only lends the critic its start. `actor` is a HybridEngine that generates with the current
    parameters. With LoRA there are no copies: the frozen base of the actor is the reference, that of the critic, under
    a head of its own, the reward model. Adapters that a given Model brings are merged first.
    """

    def __init__(
        self,
        actor_model_name_or_path: str | Model,
        critic_model_name_or_path: str | Model | None,
        tokenizer: Any,
        num_total_iters: int,
        config: PPOConfig | None = None,
    ) -> None:
        self.config = config = PPOConfig() if config is None else config
        self.tokenizer = tokenizer
        self.mesh = config.make_mesh()
        self.hyperparameters = config.hyperparameters(config.seed)
        actor, reward, critic = self._load(actor_model_name_or_path, critic_model_name_or_path)
        keys = jax.random.split(jax.random.key(config.seed))
        base = actor.module
        actor = with_adapters(actor, config, keys[0])
        self.actor = HybridEngine(actor, self.mesh, config.generate_tensor_parallel or None)
        copy = partial(self._frozen, base, self.actor.params, actor.module)
        self.reference, self._reference = copy(config.reference_zero_stage, config.offload_reference_model)
        if critic is not None:
            self.critic_config, base = critic.config, critic.module
            critic = with_adapters(critic, config, keys[1], config.critic_lora_r, config.critic_lora_target_modules)
            critic = critic.replace(params=place(critic.params, param_shardings(critic.module, self.mesh)))
        self.reward: Decoder | None = None
        self._reward: PyTree = None
        if reward is not None and config.reward_model_weight:
            live = (reward.module, reward.params, reward.module)
            if critic is not None:  # the critic starts as the reward model
                live = (base, critic.params, critic.module)
            self.reward, self._reward = self._frozen(*live, config.reward_zero_stage, config.offload_reward_model)

        per_iteration = config.ppo_epochs * config.num_mini_batches
        updates = max(1, num_total_iters * per_iteration)
        of_actor = max(1, updates - config.critic_only_steps * per_iteration)
        self.schedule = make_schedule(config, of_actor)
        actor_trainable, _ = split_trainable(self.actor.params, actor.module)
        optimizers = {"actor": make_optimizer(config, of_actor, actor_trainable), "critic": None}
        start = partial(init_optimizer, mesh=self.mesh, offload=config.offload_optimizer)
        actor_opt_state = start(optimizers["actor"], actor.module, actor_trainable)
        critic_opt_state = None
        if critic is not None:
            trainable, _ = split_trainable(critic.params, critic.module)
            optimizers["critic"] = make_optimizer(config.critic_optimizer(), updates, trainable)
            critic_opt_state = start(optimizers["critic"], critic.module, trainable)
        on_all = partial(jax.device_put, device=replicated(self.mesh))  # as the step returns it: one compilation
        running = self.hyperparameters.score_normalization == "running"
        self._state = PPOState(
            step=on_all(jnp.int32(0)),
            actor_params=self.actor.params,
            critic_params=None if critic is None else critic.params,
            actor_opt_state=actor_opt_state,
            critic_opt_state=critic_opt_state,
            ema_params=jax.tree.map(jnp.copy, actor_trainable) if config.enable_ema else None,
            kl_coef=on_all(jnp.float32(config.kl_coef)),
            score_moments=on_all(objectives.Moments.empty()) if running else None,
            actor=actor.module,
            critic=None if critic is None else critic.module,
            actor_optimizer=optimizers["actor"],
            critic_optimizer=optimizers["critic"],
            hyperparameters=self.hyperparameters,
            mesh=self.mesh,
        )

    def _load(self, actor: str | Model, reward: str | Model | None) -> tuple[Model, Model | None, Model | None]:
        """Actor, reward model and critic before adapters; the critic is the reward model itself where there is one."""
        config = self.config
        load = partial(
            load_pretrained,
            mesh=self.mesh,
            dtype=config.compute_dtype,
            remat=config.remat,
            progress=is_primary(),
        )
        stage = config.zero_stage
        critic_stage = stage if config.critic_zero_stage is None else config.critic_zero_stage
        actor = _own(actor, stage) if isinstance(actor, Model) else load(actor, zero_stage=stage)
        if isinstance(reward, Model):
            reward = _own(reward, critic_stage)
        elif reward is not None:
            reward = load(reward, head="scalar", new_head=False, zero_stage=critic_stage)
        elif not config.reward_functions:
            raise InputError(
                "critic_model_name_or_path: there is nothing that scores answers; name a reward model, or "
                "reward_functions"
            )
        critic = reward if self.hyperparameters.has_critic else None
        if self.hyperparameters.has_critic and reward is None:
            key = jax.random.fold_in(jax.random.key(config.seed), 4)
            critic = _own(with_head(merged(actor), "scalar", key), critic_stage)
        scalar = critic if reward is None else reward
        if scalar is not None and actor.config.vocab_size != scalar.config.vocab_size:
            raise InputError(
                f"the actor has a vocabulary of {actor.config.vocab_size} tokens and the reward model one of "
                f"{scalar.config.vocab_size}; both must read the same tokens: train them with the same tokenizer"
            )
        longest = config.max_prompt_seq_len + config.max_answer_seq_len
        for model, name in ((actor, "actor"), (scalar, "reward model")):
            if model is not None:
                check_context(model.config, longest, f"max_prompt_seq_len + max_answer_seq_len for the {name}")
        actor = merged(with_special_tokens(with_kernels(actor, **kernel_options(config)), self.tokenizer))
        same = critic is reward
        reward = None if reward is None else merged(with_kernels(reward, **kernel_options(config)))
        if critic is not None:
            critic = reward if same else with_kernels(critic, **kernel_options(config))
        return actor, reward, critic

    def _frozen(
        self, base: Decoder, params: PyTree, trained: Decoder, stage: int | None, offload: bool
    ) -> tuple[Decoder, PyTree]:
        """A model that is only read, and what it must hold of its own: a copy, or what adapters do not leave alone."""
        stage = base.zero_stage if stage is None else stage
        if trained.lora is None:  # below stage 3 a model without optimizer state is whole on every device
            base = base.clone(zero_stage=3 if stage == 3 else 0)
        shardings = _without_base(param_shardings(trained.clone(zero_stage=base.zero_stage), self.mesh), trained)
        shardings = offloaded(shardings) if offload else shardings
        return base, frozen_copy(_without_base(params, trained), shardings, self.config.compute_dtype)

    @property
    def reference_params(self) -> PyTree:
        """Of the reference: its own copy, or the frozen base of the current actor."""
        return _with_base(self._reference, self.state.actor_params, self.state.actor)

    @property
    def reward_params(self) -> PyTree:
        """Of the reward model: its own copy, or the frozen base of the current critic under the reward model's head."""
        if self.state.critic is None:
            return self._reward
        return _with_base(self._reward, self.state.critic_params, self.state.critic)

    @property
    def state(self) -> PPOState:
        return self._state

    @state.setter
    def state(self, state: PPOState) -> None:
        self._state = state
        self.actor.params = state.actor_params

    def actor_model(self, ema: bool = False) -> Model:
        """The trained actor (or its moving average) as a Model that `save_pretrained` takes."""
        params = self.state.actor_params
        if ema:
            params = join(self.state.ema_params, split_trainable(params, self.actor.module)[1])
        return Model(module=self.actor.module, params=params, config=self.actor.config)

    def critic_model(self) -> Model:
        return Model(module=self.state.critic, params=self.state.critic_params, config=self.critic_config)
