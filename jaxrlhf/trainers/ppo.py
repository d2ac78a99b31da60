"""Step 3: PPO. The four models on one mesh, the loop a user can call piece by piece, and the trainer around it."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.data import encode_stops, eval_batches, load_data, load_tokenizer, pad_token_id, stream_indices
from jaxrlhf.distributed import is_primary, joined, to_host
from jaxrlhf.engine import HybridEngine, Rollout
from jaxrlhf.errors import InputError
from jaxrlhf.gradients import init_optimizer
from jaxrlhf.models import (
    Decoder,
    Model,
    ModelCard,
    base_leaves,
    is_matrix,
    join,
    load_pretrained,
    merged,
    param_shardings,
    read_config,
    split_trainable,
    with_kernels,
)
from jaxrlhf.ppo import Experience, PPOHyperparameters, PPOState, ppo_step, score_rollout
from jaxrlhf.runs import Run
from jaxrlhf.sharding import offloaded, replicated
from jaxrlhf.trainers.loop import Announce, Task, fit
from jaxrlhf.trainers.lora import describe_model, export_model, with_adapters
from jaxrlhf.trainers.optimizer import make_optimizer, make_schedule
from jaxrlhf.trainers.ppo_settings import PPOConfig
from jaxrlhf.trainers.rollouts import generate_in_pieces
from jaxrlhf.trainers.settings import (
    DTYPES,
    batch_devices,
    check_context,
    kernel_options,
    lasting_settings,
    open_run,
    total_steps,
    with_special_tokens,
)

PyTree = Any
# Mean |sampler − train log-prob| per token that rounding explains. Float32 on accelerators multiplies in fewer bits.
LOGP_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
LOGP_TOLERANCE_FAST_FLOAT32 = 5e-3
HEADLINE = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "perf/sequences_per_second")


def frozen_copy(params: PyTree, shardings: PyTree, dtype: Any) -> PyTree:
    """A copy for a model that is only read: matrices in `dtype`, vectors and a scalar head as they are.

    Goes leaf by leaf, since `shardings` may lie in host memory to make room.
    """

    def leaf(path: Any, x: jax.Array, sharding: Any) -> jax.Array:
        cast = is_matrix(path) and x.dtype != dtype
        return jax.device_put(x.astype(dtype) if cast else jnp.copy(x), sharding)

    return jax.tree_util.tree_map_with_path(leaf, params, shardings)


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

    The reference is a frozen copy of the actor, the critic starts as the reward model. `actor` is a HybridEngine that
    generates with the current parameters. With LoRA there are no copies: the frozen base of the actor is the reference,
    that of the critic, under a head of its own, the reward model. Adapters that a given Model brings are merged first.
    """

    def __init__(
        self,
        actor_model_name_or_path: str | Model,
        critic_model_name_or_path: str | Model,
        tokenizer: Any,
        num_total_iters: int,
        config: PPOConfig | None = None,
    ) -> None:
        self.config = config = PPOConfig() if config is None else config
        self.tokenizer = tokenizer
        self.mesh = config.make_mesh()
        load = partial(
            load_pretrained,
            mesh=self.mesh,
            dtype=config.compute_dtype,
            remat=config.remat,
            progress=is_primary(),
        )
        actor, reward = actor_model_name_or_path, critic_model_name_or_path
        stage = config.zero_stage
        critic_stage = stage if config.critic_zero_stage is None else config.critic_zero_stage
        actor = _own(actor, stage) if isinstance(actor, Model) else load(actor, zero_stage=stage)
        if isinstance(reward, Model):
            reward = _own(reward, critic_stage)
        else:
            reward = load(reward, head="scalar", new_head=False, zero_stage=critic_stage)
        if actor.config.vocab_size != reward.config.vocab_size:
            raise InputError(
                f"the actor has a vocabulary of {actor.config.vocab_size} tokens and the reward model one of "
                f"{reward.config.vocab_size}; both must read the same tokens: train them with the same tokenizer"
            )
        longest = config.max_prompt_seq_len + config.max_answer_seq_len
        for model, name in ((actor, "actor"), (reward, "reward model")):
            check_context(model.config, longest, f"max_prompt_seq_len + max_answer_seq_len for the {name}")
        actor, reward = (with_kernels(model, **kernel_options(config)) for model in (actor, reward))
        actor, reward = merged(with_special_tokens(actor, tokenizer)), merged(reward)
        self.critic_config = reward.config
        keys = jax.random.split(jax.random.key(config.seed))
        frozen = {
            "reference": (actor.module, config.reference_zero_stage, config.offload_reference_model),
            "reward": (reward.module, config.reward_zero_stage, config.offload_reward_model),
        }
        actor = with_adapters(actor, config, keys[0])
        critic = with_adapters(reward, config, keys[1], config.critic_lora_r, config.critic_lora_target_modules)
        self.actor = HybridEngine(actor, self.mesh, config.generate_tensor_parallel or None)
        critic_params = HybridEngine(critic, self.mesh).params
        # Only what is trained must be copied: the rest is read out of the state (reference_params, reward_params).
        live = {"reference": (self.actor.params, actor.module), "reward": (critic_params, critic.module)}
        modules, copies = {}, {}
        for name, (base, stage, offload) in frozen.items():
            params, trained = live[name]
            stage = base.zero_stage if stage is None else stage
            if trained.lora is None:  # below stage 3 a model without optimizer state is whole on every device
                base = base.clone(zero_stage=3 if stage == 3 else 0)
            shardings = _without_base(param_shardings(trained.clone(zero_stage=base.zero_stage), self.mesh), trained)
            shardings = offloaded(shardings) if offload else shardings
            modules[name] = base
            copies[name] = frozen_copy(_without_base(params, trained), shardings, config.compute_dtype)
        self.reference: Decoder = modules["reference"]
        self.reward: Decoder = modules["reward"]
        self._reference, self._reward = copies["reference"], copies["reward"]

        updates = max(1, num_total_iters * config.ppo_epochs * config.num_mini_batches)
        self.schedule = make_schedule(config, updates)
        critic_settings = {"learning_rate": config.critic_learning_rate}
        actor_trainable, _ = split_trainable(self.actor.params, actor.module)
        critic_trainable, _ = split_trainable(critic_params, critic.module)
        actor_optimizer = make_optimizer(config, updates, actor_trainable)
        critic_optimizer = make_optimizer(replace(config, **critic_settings), updates, critic_trainable)
        start = partial(init_optimizer, mesh=self.mesh, offload=config.offload_optimizer)
        self._state = PPOState(
            step=jax.device_put(jnp.int32(0), replicated(self.mesh)),  # as the step returns it: one compilation
            actor_params=self.actor.params,
            critic_params=critic_params,
            actor_opt_state=start(actor_optimizer, actor.module, actor_trainable),
            critic_opt_state=start(critic_optimizer, critic.module, critic_trainable),
            ema_params=jax.tree.map(jnp.copy, actor_trainable) if config.enable_ema else None,
            kl_coef=jax.device_put(jnp.float32(config.kl_coef), replicated(self.mesh)),
            actor=actor.module,
            critic=critic.module,
            actor_optimizer=actor_optimizer,
            critic_optimizer=critic_optimizer,
            hyperparameters=config.hyperparameters(config.seed),
            mesh=self.mesh,
        )

    @property
    def reference_params(self) -> PyTree:
        """Of the reference: its own copy, or the frozen base of the current actor."""
        return _with_base(self._reference, self.state.actor_params, self.state.actor)

    @property
    def reward_params(self) -> PyTree:
        """Of the reward model: its own copy, or the frozen base of the current critic under the reward model's head."""
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


class PPOTrainer:
    """The two halves of a PPO iteration, for a loop of one's own: `generate_experience`, then `train_rlhf`."""

    def __init__(self, engine: RLHFEngine, config: PPOConfig | None = None, run: Run | None = None) -> None:
        self.engine = engine
        self.config = config = engine.config if config is None else config
        self.run = run
        stops = encode_stops(engine.tokenizer, config.stop_strings)
        self.sampling = config.sampling(engine.tokenizer.eos_token_id, pad_token_id(engine.tokenizer), stops)
        self.key = jax.random.fold_in(jax.random.key(config.seed), 2)
        self.metrics: dict[str, float] = {}
        """Of the last `train_rlhf`, under TRL's names."""
        self._generate = Announce(run, "generate program", engine.actor.generate)
        self._score = Announce(run, "scoring program", score_rollout)
        self._train = Announce(run, "PPO train program", ppo_step)
        self.timing: dict[str, float] = {}

    def rollout(
        self, prompt_batch: dict[str, Any], key: jax.Array, sample_index: Any = None, pieces: int = 1
    ) -> Rollout:
        batch = (self._generate, prompt_batch["prompt_ids"], prompt_batch["prompt_mask"], key, self.sampling)
        slots = self.config.generation_slots
        return generate_in_pieces(*batch, pieces=pieces, sample_index=sample_index, slots=slots)

    def score(self, rollout: Rollout, hyperparameters: PPOHyperparameters) -> Experience:
        e = self.engine
        params = (e.state.actor_params, e.state.critic_params, e.reference_params, e.reward_params)
        modules = {"actor": e.state.actor, "critic": e.state.critic, "reference": e.reference, "reward": e.reward}
        return self._score(rollout, *params, **modules, hyperparameters=hyperparameters, mesh=e.mesh)

    def generate_experience(self, prompt_batch: dict[str, Any]) -> Experience:
        """Sample one response per prompt and score it.

        `prompt_batch` holds `prompt_ids` and `prompt_mask`, left-padded `[B, P]`; draws are keyed by (seed, step, row).
        """
        h = self.engine.state.hyperparameters
        h.check_rows(len(prompt_batch["prompt_ids"]))
        self.config.check_pieces(len(prompt_batch["prompt_ids"]))
        begin = time.monotonic()
        key = jax.random.fold_in(self.key, int(self.engine.state.step))
        rollout = jax.block_until_ready(self.rollout(prompt_batch, key, pieces=self.config.generation_batches))
        middle = time.monotonic()
        experience = jax.block_until_ready(self.score(rollout, h))
        self.timing = {"timing/generate": middle - begin, "timing/score": time.monotonic() - middle}
        return experience

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """All PPO epochs and minibatches on this experience; returns (actor loss, critic loss), more in `metrics`."""
        begin = time.monotonic()
        self.engine.state, metrics = self._train(self.engine.state, experience)
        self.metrics = {name: float(value) for name, value in to_host(metrics).items()}
        self.timing["timing/train"] = time.monotonic() - begin
        return self.metrics["loss/policy_avg"], self.metrics["loss/value_avg"]

    def evaluate(self, prompts: Any, batch_size: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sample an answer to every held-out prompt, always with the same keys; (figures, one record per sample)."""
        plain = replace(self.engine.state.hyperparameters, num_mini_batches=1, micro_batches=1)
        key = jax.random.fold_in(jax.random.key(self.config.seed), 3)
        records: list[dict[str, Any]] = []
        for batch in eval_batches(prompts, batch_size):
            experience = self.score(self.rollout(batch, key, np.maximum(batch["index"], 0)), plain)
            records += self.records(experience, batch["row_mask"])
        scores = np.array([r["score"] for r in records])
        return {
            "scores": float(scores.mean()),
            "scores_std": float(scores.std()),
            "kl": float(np.mean([r["kl"] for r in records])),
            "response_length": float(np.mean([r["length"] for r in records])),
            "eos_rate": float(np.mean([r["ended"] for r in records])),
        }, records

    def records(self, experience: Experience, row_mask: Any = None) -> list[dict[str, Any]]:
        """Per real row: prompt and response text, score, KL to the reference in nats, length, whether it ended."""
        e = to_host(experience)
        decode = partial(self.engine.tokenizer.decode, skip_special_tokens=True)
        records = []
        for b in range(len(e.scores)):
            if row_mask is not None and not row_mask[b]:
                continue
            response = e.tokens[b][e.response_mask[b]]
            gap = np.where(e.response_mask[b], e.logprobs[b] - e.ref_logprobs[b], 0.0)
            records.append(
                {
                    "prompt": decode(e.tokens[b][e.mask[b] & ~e.response_mask[b]]),
                    "response": decode(response),
                    "score": float(e.scores[b]),
                    "kl": float(gap.sum()),
                    "length": len(response),
                    "ended": self.sampling.ended(response),
                }
            )
        return records


def show_samples(run: Run, title: str, records: list[dict[str, Any]], step: int) -> None:
    rows = [[r["prompt"], r["response"], round(r["score"], 3), round(r["kl"], 2)] for r in records]
    run.table(title, ("prompt", "response", "score", "KL"), rows, step)


def logp_tolerance(module: Decoder, mesh: Any) -> float:
    """What `sampling/logp_difference/mean` stays below when both programs compute the same."""
    name = jnp.dtype(module.dtype).name
    fast = name == "float32" and mesh.devices.flat[0].platform != "cpu"
    return LOGP_TOLERANCE_FAST_FLOAT32 if fast else LOGP_TOLERANCE[name]


def ppo_task(run: Run, config: PPOConfig, engine: RLHFEngine, train: Any, evaluation: Any, steps: int) -> Task:
    """The Task of a PPO run over prompts `train`, evaluated on `evaluation`."""
    trainer = PPOTrainer(engine, config, run)
    devices = batch_devices(engine.mesh)
    rows = config.rollout_rows(devices)
    engine.actor.check_slots(config.generation_slots, rows // config.generation_batches)
    updates = config.ppo_epochs * config.num_mini_batches
    tolerance = logp_tolerance(engine.actor.module, engine.mesh)
    told: list[int] = []

    def check_consistency(step: int) -> None:
        gap = trainer.metrics["sampling/logp_difference/mean"]
        if gap > tolerance and not told:
            told.append(step)
            run.print(
                f"step {step}: log-probs of the sampler and the train program differ by {gap:.2g} a token on average, "
                f"above the {tolerance:.2g} that rounding explains; --importance_sampling_correction makes up for it "
                "(said once)"
            )

    def step(state: PPOState, i: int) -> tuple[PPOState, dict[str, Any]]:
        engine.state = state
        batch = train.batch(stream_indices(i, rows, len(train), config.seed))
        experience = trainer.generate_experience(batch)
        if config.sample_steps and (i + 1) % config.sample_steps == 0:
            first = jax.tree.map(lambda x: x[: config.num_sample_rows], experience)
            show_samples(run, "training samples", trainer.records(first), i + 1)
        ids, mask, response_mask = to_host((experience.tokens, experience.mask, experience.response_mask))
        ended = np.isin(ids, trainer.sampling.eos_ids) & response_mask
        tokens = int(mask.sum())
        trainer.train_rlhf(experience)
        check_consistency(i + 1)
        seconds = sum(trainer.timing.values())
        return engine.state, trainer.metrics | trainer.timing | {
            "val/num_eos_tokens": int(ended.sum()),
            "lr": float(engine.schedule(i * updates)),
            "episode": (i + 1) * rows,
            "epoch": (i + 1) * rows / len(train),
            "timing/step": seconds,
            "perf/sequences_per_second": rows / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/padding": 1 - tokens / experience.mask.size,
        }

    def evaluate(state: PPOState, done: int) -> dict[str, float]:
        engine.state = state
        figures, records = trainer.evaluate(evaluation, config.per_device_eval_batch_size * devices)
        show_samples(run, "held-out samples", records[: config.num_sample_rows], done)
        return figures

    def export(state: PPOState, card: ModelCard) -> None:
        engine.state = state
        folder, actor, critic = run.output_dir, config.actor_model_name_or_path, config.critic_model_name_or_path
        options = {"tokenizer": engine.tokenizer, "options": config, "dtype": DTYPES[config.save_dtype], "card": card}
        export = partial(export_model, **options)
        export(engine.critic_model(), folder / "critic", base=critic)
        if config.enable_ema:
            export(engine.actor_model(ema=True), folder / "ema", base=actor)
        export(engine.actor_model(), folder, base=actor)

    identity = {
        "trainer": "ppo",
        "data": train.key,
        "rollout_batch_size": rows,
        "train_rows": len(train),
        "total_steps": steps,
        "actor": config.actor_model_name_or_path,
        "reward": config.critic_model_name_or_path,
        **lasting_settings(config),
    }
    actor, critic = describe_model(engine.actor_model()), describe_model(engine.critic_model())
    identity |= {"actor_lora": actor.get("lora"), "critic_lora": critic.get("lora")}
    exports = {"actor_params": actor, "critic_params": critic}
    if config.enable_ema:
        exports["ema_params"] = describe_model(engine.actor_model(), frozen="actor_params")
    return Task("ppo", steps, step, evaluate, export, str(config.actor_model_name_or_path), identity, exports)


def train_ppo(config: PPOConfig) -> PPOState:
    """Run step 3; the trained actor lies in `config.output_dir`, the critic and the average in subfolders."""
    for name in ("actor_model_name_or_path", "critic_model_name_or_path"):
        if getattr(config, name) is None:
            raise InputError(f"{name}: name a model folder ({'sft' if name[0] == 'a' else 'reward'} step's output)")
    config = joined(config)
    with open_run(config, HEADLINE) as run:
        for model in (config.actor_model_name_or_path, config.critic_model_name_or_path):
            read_config(model)  # a model that cannot be used is the first thing to say
        tokenizer = load_tokenizer(config.tokenizer_name_or_path or config.actor_model_name_or_path)
        train, evaluation = load_data(config, tokenizer, "ppo")
        rows = config.rollout_rows(batch_devices(config.make_mesh()))
        steps = total_steps(config, len(train), rows)
        engine = RLHFEngine(config.actor_model_name_or_path, config.critic_model_name_or_path, tokenizer, steps, config)
        return fit(run, config, ppo_task(run, config, engine, train, evaluation, steps), engine.state)
