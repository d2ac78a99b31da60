"""Step 3: PPO. The four models on one mesh, the loop a user can call piece by piece, and the trainer around it."""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import field
from jaxrlhf.data import DataConfig, eval_batches, load_data, load_tokenizer, pad_token_id, stream_indices
from jaxrlhf.engine import HybridEngine, Rollout
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder, Model, config_to_dict, load_pretrained, param_shardings, save_pretrained
from jaxrlhf.ppo import Experience, PPOHyperparameters, PPOState, ppo_step, score_rollout
from jaxrlhf.runs import Run
from jaxrlhf.sampling import SamplingConfig
from jaxrlhf.sharding import optimizer_shardings
from jaxrlhf.trainers.loop import Announce, Task, fit
from jaxrlhf.trainers.optimizer import make_optimizer, make_schedule
from jaxrlhf.trainers.settings import (
    DTYPES,
    FolderConfig,
    MeshConfig,
    TrainingConfig,
    batch_devices,
    check_context,
    open_run,
    total_steps,
    with_special_tokens,
)

PyTree = Any
HEADLINE = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "perf/sequences_per_second")


@dataclass(frozen=True)
class PPOModelConfig(MeshConfig):
    """The models, the device mesh and the precision."""

    actor_model_name_or_path: str | None = field(
        None, "supervised model to train; also the reference", aliases=("model_name_or_path", "sft_model_path")
    )
    critic_model_name_or_path: str | None = field(
        None,
        "reward model; also the critic's starting point",
        aliases=("reward_model_name_or_path", "reward_model_path"),
    )
    tokenizer_name_or_path: str | None = field(None, "tokenizer folder or hub name; default: that of the actor")


@dataclass(frozen=True)
class PPOOptions(TrainingConfig):
    """PPO. A rollout batch has per_device_train_batch_size × gradient_accumulation_steps × num_mini_batches rows per
    device; max_steps counts rollout batches."""

    learning_rate: float = field(9.65e-6, "peak learning rate of the actor", aliases=("actor_learning_rate",))
    critic_learning_rate: float = field(5e-6, "peak learning rate of the critic")
    max_answer_seq_len: int = field(256, "longest response in tokens", aliases=("response_length",))
    min_answer_seq_len: int = field(0, "EOS cannot be drawn before this many tokens")
    temperature: float = field(1.0, "sampling temperature; log-probs are taken at the same one")
    top_k: int = field(0, "sample among the k most likely tokens; 0: all")
    top_p: float = field(1.0, "sample among the most likely tokens that hold this probability")
    ppo_epochs: int = field(1, "passes over each rollout batch", aliases=("num_ppo_epochs",))
    num_mini_batches: int = field(1, "optimizer steps per pass")
    kl_coef: float = field(0.1, "weight of the per-token KL penalty in the reward")
    cliprange: float = field(0.2, "clipping of the policy ratio")
    cliprange_value: float = field(0.2, "clipping of the value update")
    gamma: float = field(1.0, "discount")
    lam: float = field(0.95, "lambda of generalised advantage estimation")
    clip_reward: float | None = field(5.0, "bound on the reward model's score; none: unbounded")
    whiten_advantages: bool = field(True, "scale advantages to zero mean and unit variance over the batch")
    enable_ema: bool = field(False, "keep a moving average of the actor and export it to output_dir/ema")
    ema_decay: float = field(0.992, "decay of that average per optimizer step")
    sample_steps: int = field(20, "steps between printed tables of prompts, responses and scores; 0: none")
    num_sample_rows: int = field(4, "rows of those tables")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hyperparameters(seed=0)  # both refuse bad values by name
        self.sampling(None, 0)
        if self.kl_coef < 0:
            raise InputError(f"kl_coef={self.kl_coef} must be 0 or more")
        for name in ("sample_steps", "num_sample_rows"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")

    def hyperparameters(self, seed: int) -> PPOHyperparameters:
        same = ("ppo_epochs", "num_mini_batches", "gamma", "lam", "cliprange", "cliprange_value", "clip_reward")
        same += ("whiten_advantages", "temperature", "ema_decay")
        values = {name: getattr(self, name) for name in same}
        return PPOHyperparameters(micro_batches=self.gradient_accumulation_steps, seed=seed, **values)

    def sampling(self, eos_token_id: int | None, pad_id: int) -> SamplingConfig:
        return SamplingConfig(
            max_new_tokens=self.max_answer_seq_len,
            min_new_tokens=self.min_answer_seq_len,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            eos_token_id=eos_token_id,
            pad_token_id=pad_id,
        )

    def rollout_rows(self, devices: int) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches * devices


@dataclass(frozen=True)
class PPOConfig(DataConfig, PPOModelConfig, FolderConfig, PPOOptions):
    """Step 3 alone."""


@partial(jax.jit, static_argnames="dtype")
def frozen_copy(params: PyTree, dtype: Any) -> PyTree:
    """A copy for a model that is only read: matrices in `dtype`, vectors as they are."""

    def leaf(path: Any, x: jax.Array) -> jax.Array:
        matrix = jax.tree_util.keystr(path, simple=True, separator="/").endswith(("kernel", "embedding"))
        return x.astype(dtype) if matrix and x.dtype != dtype else jnp.copy(x)

    return jax.tree_util.tree_map_with_path(leaf, params)


class RLHFEngine:
    """Actor, reference, critic and reward model on one mesh, and the PPO state that training replaces.

    The reference is a frozen copy of the actor, the critic starts as the reward model. `actor` is a HybridEngine that
    generates with the current parameters.
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
            remat=config.gradient_checkpointing,
            progress=True,
        )
        actor, reward = actor_model_name_or_path, critic_model_name_or_path
        actor = actor if isinstance(actor, Model) else load(actor)
        reward = reward if isinstance(reward, Model) else load(reward, head="scalar", new_head=False)
        if actor.config.vocab_size != reward.config.vocab_size:
            raise InputError(
                f"the actor has a vocabulary of {actor.config.vocab_size} tokens and the reward model one of "
                f"{reward.config.vocab_size}; both must read the same tokens: train them with the same tokenizer"
            )
        longest = config.max_prompt_seq_len + config.max_answer_seq_len
        for model, name in ((actor, "actor"), (reward, "reward model")):
            check_context(model.config, longest, f"max_prompt_seq_len + max_answer_seq_len for the {name}")
        actor = with_special_tokens(actor, tokenizer)
        self.actor = HybridEngine(actor, self.mesh)
        self.critic_config = reward.config
        self.reference: Decoder = actor.module
        self.reward: Decoder = reward.module
        self.reference_params = frozen_copy(self.actor.params, config.compute_dtype)
        critic_engine_params = HybridEngine(reward, self.mesh).params
        self.reward_params = frozen_copy(critic_engine_params, config.compute_dtype)

        updates = max(1, num_total_iters * config.ppo_epochs * config.num_mini_batches)
        self.schedule = make_schedule(config, updates)
        critic_settings = {"learning_rate": config.critic_learning_rate}
        actor_optimizer = make_optimizer(config, updates, self.actor.params)
        critic_optimizer = make_optimizer(replace(config, **critic_settings), updates, critic_engine_params)
        self._state = PPOState(
            step=jnp.int32(0),
            actor_params=self.actor.params,
            critic_params=critic_engine_params,
            actor_opt_state=self._init(actor_optimizer, actor.module, self.actor.params),
            critic_opt_state=self._init(critic_optimizer, reward.module, critic_engine_params),
            ema_params=frozen_copy(self.actor.params, jnp.float32) if config.enable_ema else None,
            kl_coef=jnp.float32(config.kl_coef),
            actor=actor.module,
            critic=reward.module,
            actor_optimizer=actor_optimizer,
            critic_optimizer=critic_optimizer,
            hyperparameters=config.hyperparameters(config.seed),
            mesh=self.mesh,
        )

    def _init(self, optimizer: Any, module: Decoder, params: PyTree) -> PyTree:
        shardings = optimizer_shardings(optimizer, params, param_shardings(module, self.mesh), self.mesh)
        return jax.jit(optimizer.init, out_shardings=shardings)(params)

    @property
    def state(self) -> PPOState:
        return self._state

    @state.setter
    def state(self, state: PPOState) -> None:
        self._state = state
        self.actor.params = state.actor_params

    def actor_model(self, ema: bool = False) -> Model:
        """The trained actor (or its moving average) as a Model that `save_pretrained` takes."""
        params = self.state.ema_params if ema else self.state.actor_params
        return Model(module=self.actor.module, params=params, config=self.actor.config)

    def critic_model(self) -> Model:
        return Model(module=self.state.critic, params=self.state.critic_params, config=self.critic_config)


class PPOTrainer:
    """The two halves of a PPO iteration, for a loop of one's own: `generate_experience`, then `train_rlhf`."""

    def __init__(self, engine: RLHFEngine, config: PPOConfig | None = None, run: Run | None = None) -> None:
        self.engine = engine
        self.config = config = engine.config if config is None else config
        self.run = run
        self.sampling = config.sampling(engine.tokenizer.eos_token_id, pad_token_id(engine.tokenizer))
        self.key = jax.random.fold_in(jax.random.key(config.seed), 2)
        self.metrics: dict[str, float] = {}
        """Of the last `train_rlhf`, under TRL's names."""
        self._generate = Announce(run, "generate program", engine.actor.generate)
        self._score = Announce(run, "scoring program", score_rollout)
        self._train = Announce(run, "PPO train program", ppo_step)
        self.timing: dict[str, float] = {}

    def rollout(self, prompt_batch: dict[str, Any], key: jax.Array, sample_index: Any = None) -> Rollout:
        ids, mask = prompt_batch["prompt_ids"], prompt_batch["prompt_mask"]
        return self._generate(ids, mask, key, self.sampling, sample_index=sample_index)

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
        begin = time.monotonic()
        key = jax.random.fold_in(self.key, int(self.engine.state.step))
        rollout = jax.block_until_ready(self.rollout(prompt_batch, key))
        middle = time.monotonic()
        experience = jax.block_until_ready(self.score(rollout, h))
        self.timing = {"timing/generate": middle - begin, "timing/score": time.monotonic() - middle}
        return experience

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """All PPO epochs and minibatches on this experience; returns (actor loss, critic loss), more in `metrics`."""
        begin = time.monotonic()
        self.engine.state, metrics = self._train(self.engine.state, experience)
        self.metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
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
        e = jax.device_get(experience)
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
                    "ended": bool(len(response)) and int(response[-1]) in self.sampling.eos_ids,
                }
            )
        return records


def show_samples(run: Run, title: str, records: list[dict[str, Any]], step: int) -> None:
    rows = [[r["prompt"], r["response"], round(r["score"], 3), round(r["kl"], 2)] for r in records]
    run.table(title, ("prompt", "response", "score", "KL"), rows, step)


def ppo_task(run: Run, config: PPOConfig, engine: RLHFEngine, train: Any, evaluation: Any, steps: int) -> Task:
    """The Task of a PPO run over prompts `train`, evaluated on `evaluation`."""
    trainer = PPOTrainer(engine, config, run)
    devices = batch_devices(engine.mesh)
    rows = config.rollout_rows(devices)
    updates = config.ppo_epochs * config.num_mini_batches

    def step(state: PPOState, i: int) -> tuple[PPOState, dict[str, Any]]:
        engine.state = state
        batch = train.batch(stream_indices(i, rows, len(train), config.seed))
        experience = trainer.generate_experience(batch)
        if config.sample_steps and (i + 1) % config.sample_steps == 0:
            first = jax.tree.map(lambda x: x[: config.num_sample_rows], experience)
            show_samples(run, "training samples", trainer.records(first), i + 1)
        ended = np.isin(np.asarray(experience.tokens), trainer.sampling.eos_ids) & np.asarray(experience.response_mask)
        tokens = int(np.asarray(experience.mask).sum())
        trainer.train_rlhf(experience)
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

    def export(state: PPOState) -> None:
        engine.state = state
        dtype = DTYPES[config.save_dtype]
        save_pretrained(engine.critic_model(), run.output_dir / "critic", engine.tokenizer, dtype=dtype)
        if config.enable_ema:
            save_pretrained(engine.actor_model(ema=True), run.output_dir / "ema", engine.tokenizer, dtype=dtype)
        save_pretrained(engine.actor_model(), run.output_dir, engine.tokenizer, dtype=dtype)

    identity = {
        "trainer": "ppo",
        "seed": config.seed,
        "rollout_batch_size": rows,
        "train_rows": len(train),
        "total_steps": steps,
        "actor": config.actor_model_name_or_path,
        "reward": config.critic_model_name_or_path,
        "learning_rate": config.learning_rate,
        "critic_learning_rate": config.critic_learning_rate,
        "max_answer_seq_len": config.max_answer_seq_len,
        "ppo_epochs": config.ppo_epochs,
        "num_mini_batches": config.num_mini_batches,
        "enable_ema": config.enable_ema,
    }
    actor = {"head": "lm", "config": config_to_dict(engine.actor.config)}
    critic = {"head": "scalar", "config": config_to_dict(engine.critic_config, "scalar")}
    exports = {"actor_params": actor, "critic_params": critic} | ({"ema_params": actor} if config.enable_ema else {})
    return Task("ppo", steps, step, evaluate, export, identity, exports)


def train_ppo(config: PPOConfig) -> PPOState:
    """Run step 3; the trained actor lies in `config.output_dir`, the critic and the average in subfolders."""
    for name in ("actor_model_name_or_path", "critic_model_name_or_path"):
        if getattr(config, name) is None:
            raise InputError(f"{name}: name a model folder ({'sft' if name[0] == 'a' else 'reward'} step's output)")
    with open_run(config, HEADLINE) as run:
        tokenizer = load_tokenizer(config.tokenizer_name_or_path or config.actor_model_name_or_path)
        train, evaluation = load_data(config, tokenizer, "ppo")
        rows = config.rollout_rows(batch_devices(config.make_mesh()))
        steps = total_steps(config, len(train), rows)
        engine = RLHFEngine(config.actor_model_name_or_path, config.critic_model_name_or_path, tokenizer, steps, config)
        return fit(run, config, ppo_task(run, config, engine, train, evaluation, steps), engine.state)
