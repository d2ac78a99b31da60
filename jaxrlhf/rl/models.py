"""The models of a PPO run on one mesh, and the state that training replaces."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrlhf import keys
from jaxrlhf.data import Tokenizer, knows_model, vocabulary_size, with_template
from jaxrlhf.distributed import is_primary
from jaxrlhf.engine import HybridEngine, Rollout
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    Model,
    check_same_rows,
    check_tokenizer_fits,
    frozen_copy,
    join,
    load_pretrained,
    merged,
    param_shardings,
    split_trainable,
    with_head,
    with_kernels,
)
from jaxrlhf.rl.build import build_models, model_of, rates_of, updates_of
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.experience import RLModels
from jaxrlhf.rl.step import PPOState
from jaxrlhf.sharding import make_mesh, place_batch
from jaxrlhf.trainers.optimizer import make_schedule
from jaxrlhf.trainers.settings import check_context
from jaxrlhf.trainers.starting import with_template_rows
from jaxrlhf.trainers.tokenizers import check_reads_tokens, with_model_ends, with_special_tokens

PyTree = Any


def meshes(config: PPOConfig) -> tuple[Mesh, Mesh | None]:
    """The mesh that trains, and that of the devices that only generate (`generation_devices`).

    Raises:
        InputError: too few devices are there, or they belong to several processes.
    """
    apart, devices = config.rollout.generation_devices, jax.devices()
    if not apart:
        return config.mesh.make_mesh(), None
    if jax.process_count() > 1:
        raise InputError(
            f"generation_devices={apart} works in one process, and this run has {jax.process_count()}; leave it out"
        )
    if apart >= len(devices):
        raise InputError(
            f"generation_devices={apart} leaves none of the {len(devices)} devices to train; lower it, or leave it out"
        )
    return config.mesh.make_mesh(devices[:-apart]), make_mesh(devices=devices[-apart:])


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

    `state` is the first state, for loops of your own (`PPOTrainer`). Everything here takes the state as an argument.
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
        self._has_text = hasattr(tokenizer, "chat_template")  # token ids alone suffice for a loop without text
        self.tokenizer = with_template(tokenizer, config.data.template) if self._has_text else tokenizer
        self.mesh, self._apart = meshes(config)
        self.hyperparameters = config.hyperparameters()
        actor, reward, critic = self._load(actor_model_name_or_path, critic_model_name_or_path)
        self.schedule = make_schedule(config.optimizer, updates_of(config, num_total_iters)[0])
        self.rates = rates_of(config, num_total_iters)
        self.total_steps = num_total_iters
        self.state, self.frozen = build_models(config, self.mesh, actor, critic, reward, num_total_iters)
        trained = model_of(self.state.actor, self.state.actor_params)
        parallel = config.rollout.generate_tensor_parallel or None
        if self._apart is not None:
            trained = trained.replace(params=self.generating(self.state))
        self.actor = HybridEngine(trained, self._apart or self.mesh, parallel)
        self.actor.params = None  # the state has them

    def _load(self, actor: str | Model, reward: str | Model | None) -> tuple[Model, Model | None, Model | None]:
        """Actor, reward model and critic before adapters; the critic is the reward model itself where there is one."""
        config, kernels = (
            self.config,
            self.config.compute.kernels | {"kv_cache_dtype": self.config.generation.kv_cache_dtype},
        )
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
        if self._has_text:
            if not knows_model(self.tokenizer):
                self.tokenizer = with_model_ends(self.tokenizer, actor.config, of=" of the actor")
            actor = with_template_rows(actor, config.data, self.tokenizer)
            check_tokenizer_fits(vocabulary_size(self.tokenizer), actor.config, "the tokenizer", model="the actor")
        names = ("the actor", "the reward model")
        if isinstance(reward, Model):
            check_same_rows(actor.config, reward.config, names)
            reward = _own(reward, critic_stage)
        elif reward is not None:
            if self._has_text:
                check_reads_tokens(self.tokenizer, actor.config, reward, names)
            reward = load(reward, head="scalar", new_head=False, zero_stage=critic_stage)
        elif not config.rewards.reward_functions and not config.environments.environment:
            raise InputError(
                "reward_model_name_or_path: nothing scores responses; name a reward model, reward_functions or an "
                "environment"
            )
        critic = reward if self.hyperparameters.has_critic else None
        if self.hyperparameters.has_critic and reward is None:
            key = keys.stream(config.data.seed, keys.Stream.CRITIC_HEAD)
            critic = _own(with_head(merged(actor), "scalar", key), critic_stage)
        scalar = critic if reward is None else reward
        if self._has_text and scalar is not None:
            size = vocabulary_size(self.tokenizer)
            check_tokenizer_fits(size, scalar.config, "the tokenizer", model="the reward model")
        longest = config.data.max_prompt_seq_len + config.sampling.max_new_tokens
        for model, name in ((actor, "actor"), (scalar, "reward model")):
            if model is not None:
                check_context(model.config, longest, f"max_prompt_seq_len + max_new_tokens for the {name}")
        config.routers.check_models(*(model.config for model in (actor, critic) if model is not None))
        same = critic is reward
        actor = merged(with_special_tokens(with_kernels(actor, **kernels), self.tokenizer))
        if reward is not None:
            reward = merged(with_special_tokens(with_kernels(reward, **kernels), self.tokenizer))
        if critic is not None:
            critic = reward if same else with_special_tokens(with_kernels(critic, **kernels), self.tokenizer)
        return actor, reward, critic

    def generating(self, state: PPOState) -> PyTree:
        """The actor's parameters as the generate program reads them: the state's, or a copy on the devices apart."""
        if self._apart is None:
            return state.actor_params
        return frozen_copy(
            state.actor_params, param_shardings(state.actor, self._apart), self.config.mesh.compute_dtype
        )

    def gathered(self, rollout: Rollout) -> Rollout:
        """The rollout on the mesh that trains."""
        return rollout if self._apart is None else place_batch(rollout, self.mesh)

    def models(self, state: PPOState) -> RLModels:
        """All models with the parameters that scoring reads: the state's, and those of the frozen models."""
        return self.frozen.with_trained(state)

    def actor_model(self, state: PPOState | None = None, ema: bool = False) -> Model:
        """The trained actor (or its moving average) of a state as a Model that `save_pretrained` takes."""
        state = self.state if state is None else state
        params = state.actor_params
        if ema:
            params = join(state.ema_params, split_trainable(params, state.actor)[1])
        return model_of(state.actor, params)

    def critic_model(self, state: PPOState | None = None) -> Model:
        """The trained critic of a state. Raises InputError when the algorithm has none."""
        state = self.state if state is None else state
        if state.critic is None:
            raise InputError(f"advantage_estimator={self.hyperparameters.advantage_estimator} has no critic")
        return model_of(state.critic, state.critic_params)
