"""Step 3: PPO and its relatives as a run: data, the loop's task, evaluation, export."""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config import lasting, lasting_defaults
from jaxrlhf.config.files import read_json
from jaxrlhf.distributed import from_primary, joined, to_host
from jaxrlhf.environments import Environments
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder, ModelCard, read_config, score_offset
from jaxrlhf.rewards import Rewards
from jaxrlhf.rl.ahead import Ahead
from jaxrlhf.rl.alarms import Alarms, kl_limit
from jaxrlhf.rl.build import updates_of
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.data import RLData, read_data
from jaxrlhf.rl.experience import Experience
from jaxrlhf.rl.models import RLHFEngine, meshes
from jaxrlhf.rl.refills import differing, refilled
from jaxrlhf.rl.replay import with_replays
from jaxrlhf.rl.samples import Metrics, Prompts, Record, Sampled
from jaxrlhf.rl.step import PPOState
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.runs import Run
from jaxrlhf.runs.report import HELD_OUT
from jaxrlhf.runs.working_folder import works_locally
from jaxrlhf.sharding import held_rows, place_batch
from jaxrlhf.trainers.evaluation import eval_step, evaluation_totals
from jaxrlhf.trainers.guards import History, StepPlan, robust_limit
from jaxrlhf.trainers.loop import fit
from jaxrlhf.trainers.lora import check_base, describe_model, export_model
from jaxrlhf.trainers.optimizer import same_past, updates_made
from jaxrlhf.trainers.resuming import same_rows, start_from
from jaxrlhf.trainers.settings import DTYPES, batch_devices, open_run
from jaxrlhf.trainers.sft import sft_metrics, sft_sums
from jaxrlhf.trainers.task import Watch, unwatched
from jaxrlhf.trainers.tokenizers import check_reads_tokens

# Mean |sampler − train log-prob| per token that rounding explains. Float32 on accelerators multiplies in fewer bits.
LOGP_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
LOGP_TOLERANCE_FAST_FLOAT32 = 5e-3
HEADLINE = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "perf/sequences_per_second")
BASELINE = "eval_baseline.json"


def logp_tolerance(module: Decoder, mesh: Mesh) -> float:
    """The bound on `sampling/logp_difference/mean` while both programs compute the same."""
    name = jnp.dtype(module.dtype).name
    fast = name == "float32" and mesh.devices.flat[0].platform != "cpu"
    return LOGP_TOLERANCE_FAST_FLOAT32 if fast else LOGP_TOLERANCE[name]


class Baseline:
    """Scores of the responses before training, in the run's folder, for win rates of later ones."""

    def __init__(self, run: Run, key: str) -> None:
        self.run, self.key, self.path = run, key, run.output_dir / BASELINE
        self._saved: dict[str, Any] = {}

    def save(self, records: list[Record]) -> None:
        scores = {str(r["index"]): r["score"] for r in records}
        self._saved = {"prompts": self.key, "scores": scores}
        self.run.write_json(BASELINE, self._saved)

    def read(self) -> dict[int, float] | None:
        """Scores by prompt number; None when they belong to other prompts."""

        def kept_scores() -> dict[str, Any]:
            return read_json(self.path, "delete it") if self.path.exists() else {}

        kept = self._saved or from_primary("reading the scores before training", kept_scores)
        if kept.get("prompts") != self.key:
            return None
        try:
            return {int(number): float(score) for number, score in kept["scores"].items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path} holds no scores by prompt; delete it") from error


class PPOTask:
    """The steps of PPO and its relatives over prompts (a `Task`)."""

    def __init__(
        self,
        run: Run,
        engine: RLHFEngine,
        data: RLData,
        steps: int,
        rewards: Rewards | None = None,
        environments: Environments | None = None,
    ) -> None:
        self.run, self.engine, self.data, self.total_steps = run, engine, data, steps
        self.config = config = engine.config
        self.trainer = PPOTrainer(engine, config, run, rewards, environments)
        self.devices = batch_devices(engine.mesh)
        self.rows = config.rollout_rows(self.devices)
        self.prompts = self.rows // config.sampling.samples_per_prompt
        slots = config.generation.generation_slots
        engine.actor.check_slots(slots, self.rows // config.rollout.generation_batches)
        for part in (data.train, data.held_out):
            self.trainer.rewards.check_references(part)
        self.tolerance = logp_tolerance(engine.actor.module, engine.mesh)
        self.alarms = Alarms(run.print, config.algorithm.kl_target, has_reference=not config.frozen.reference_free)
        self.baseline = Baseline(run, data.held_out.key)
        self.ahead = None
        if config.rollout.async_steps:
            self.ahead = Ahead(self.trainer, config, self._prompts, steps)
        self.warned = False
        self._newest: dict[str, jax.Array] = {}
        self.name, self.title = config.algorithm.algorithm.name, config.algorithm.algorithm.title
        self.best: tuple[str, int] = ("scores", 1)
        self.base_model = str(config.models.actor_model_name_or_path)
        self.data_names = config.data.names
        self.exports = self._exports()
        self.identity, self.defaults = self._identity(), lasting_defaults(type(config))

    def _exports(self) -> dict[str, dict[str, Any]]:
        state = self.engine.state
        actor = describe_model(self.engine.actor_model(state))
        exports = {"actor_params": actor}
        if state.critic is not None:
            exports["critic_params"] = describe_model(self.engine.critic_model(state))
        if state.ema_params is not None:
            exports["ema_params"] = describe_model(self.engine.actor_model(state), frozen="actor_params")
        return exports

    def _identity(self) -> dict[str, object]:
        text, config = self.data.text, self.config
        blocks = text and [text.key, *text.tokens.shape, config.ptx_rows(self.devices)]
        adapters = {f"{m}_lora": self.exports.get(f"{m}_params", {}).get("lora") for m in ("actor", "critic")}
        return {
            "trainer": self.name,
            "data": self.data.train.key,
            "rollout_batch_size": self.rows,
            "train_rows": self.data.train.size,
            "total_steps": self.total_steps,
            "actor": config.models.actor_model_name_or_path,
            "reward": config.models.reward_model_name_or_path,
            "pretraining_text": blocks,
            **lasting(config),
            **adapters,
        }

    def prepare(self, state: PPOState, plan: StepPlan) -> None:
        width = self.data.train.width(self.data.train.indices(plan.batch, self.prompts))
        self.trainer.prepare(width, state, self._text_batch(plan.batch), plan.limits)

    def step(self, state: PPOState, plan: StepPlan) -> tuple[PPOState, Metrics]:
        trainer, train, index = self.trainer, self.data.train, plan.index
        experience, scored, rewards, extras = self._sample(state, plan)
        if self.config.algorithm.algorithm.grouped:
            teaching = differing(experience, self.config.sampling.samples_per_prompt)
            scored["objective/equal_groups"] = float(1 - teaching.mean())
        rollout = self.config.rollout
        if rollout.sample_steps and (index + 1) % rollout.sample_steps == 0:
            first = jax.tree.map(lambda x: x[: rollout.num_sample_rows], experience)
            self.show_samples("training samples", trainer.records(first, rewards=rewards), index + 1, extras)
        counts = self._counts(experience)
        text = self._text_batch(plan.batch)
        self._keep(experience, text)
        made = int(to_host(updates_made(state.actor_opt_state)))
        waiting, earlier = (state.pending, state.pending_episodes), state.replay
        alone = state.replace(pending=(), pending_episodes=(), replay=())
        state, metrics = trainer.update(alone, experience, text, plan.limits, plan.twice)
        age = self._staleness(index)
        if earlier:
            state, replays = trainer.replay(state, earlier, index, plan.limits)
            metrics = with_replays(metrics, replays, age)
            state = state.replace(replay=trainer.remembered(earlier, experience, index - age))
        elif self.ahead is not None:
            metrics["sampling/staleness"] = age
        if self.ahead is not None:
            begin = time.monotonic()
            state = self.ahead.keep(state, *waiting)
            scored["timing/generate"] += time.monotonic() - begin
        metrics |= scored
        if not metrics.get("guard/unscored"):
            self._check_consistency(metrics, index + 1)
            self.alarms.check(metrics, index + 1)
        seconds = sum(value for name, value in metrics.items() if name.startswith("timing/"))
        return state, metrics | {
            "val/num_eos_tokens": counts["ended"],
            "lr": float(self.engine.schedule(made)),
            "episode": (index + 1) * self.rows,
            **train.progress(plan.batch + 1, self.prompts),
            "timing/step": seconds,
            "perf/sequences_per_second": self.rows / seconds,
            "perf/tokens_per_second": counts["tokens"] / seconds,
            "perf/padding": 1 - counts["tokens"] / experience.mask.size,
        }

    def _staleness(self, index: int) -> int:
        """Steps between the policy that has made the rollout of a step and the one that trains on it."""
        return 0 if self.ahead is None else self.ahead.staleness(index)

    def _sample(self, state: PPOState, plan: StepPlan) -> Sampled:
        """The samples of a step: its prompts, and with dynamic sampling those that replace groups of equal scores."""
        trainer, limit = self.trainer, self.config.rollout.dynamic_sampling
        step = int(to_host(state.step))

        def sample(number: int) -> Sampled:
            prompts = self._prompts(plan.batch + number * self.total_steps, step, plan.batch)
            plan_of_rollout = trainer.rollout_plan(step, number)
            return trainer.sample(state, prompts, plan_of_rollout, policy=self.config.scores_policy)

        first = sample(0) if self.ahead is None else trainer.finish(state, self.ahead.take(state, plan))
        if not limit:
            return first
        # Further prompts come from behind the run's own ones, so that a step's prompts depend on its number alone.
        size, pad_id = self.config.sampling.samples_per_prompt, trainer.sampling.pad_token_id
        return refilled(first, sample, size, limit, pad_id=pad_id, mesh=self.engine.mesh)

    def _prompts(self, batch: int, step: int, position: int | None = None) -> Prompts:
        """The prompts of a batch, for the policy after `step` steps; `position`: of their step, if not the batch's."""
        trainer, train = self.trainer, self.data.train
        indices = train.indices(batch, self.prompts)
        epoch = train.progress(batch if position is None else position, self.prompts).get("epoch", 0.0)
        progress = trainer.progress(step, float(epoch))
        return Prompts.of(train.batch(indices), **trainer.reading(train, indices), progress=progress)

    def limits(self, history: History) -> dict[str, float]:
        h, threshold = self.config.algorithm, self.config.run.guard.spike_threshold
        names = ["policy/grad_norm"]
        if self.engine.state.critic is not None:
            names += ["loss/value_avg", "val/grad_norm"]
        limits = {name: robust_limit(history.get(name, ()), threshold, h.updates) for name in names}
        if self.config.frozen.reference_free:
            return limits
        return limits | {"objective/kl": kl_limit(history, h.kl_target)}

    def _counts(self, experience: Experience) -> dict[str, int]:
        ids, mask, response_mask = to_host((experience.tokens, experience.mask, experience.response_mask))
        ended = np.isin(ids, self.trainer.sampling.eos_ids) & response_mask
        return {"ended": int(ended.sum()), "tokens": int(mask.sum())}

    def _text_batch(self, index: int) -> dict[str, jax.Array] | None:
        """The pretraining text of a step, on the devices."""
        if self.data.text is None:
            return None
        size = self.config.ptx_rows(self.devices)
        indices = self.data.text.indices(index, size)
        return place_batch(self.data.text.batch(indices, held=held_rows(self.engine.mesh, size)), self.engine.mesh)

    def _keep(self, experience: Experience, text: dict[str, jax.Array] | None) -> None:
        """Keeps the newest batch for `last_batch`."""
        names = [f.name for f in dataclasses.fields(experience) if f.name != "longest"]
        arrays = {name: getattr(experience, name) for name in names}
        arrays |= {f"ptx_{name}": x for name, x in (text or {}).items()}
        self._newest = {name: value for name, value in arrays.items() if value is not None}

    def _check_consistency(self, metrics: Metrics, step: int) -> None:
        """Warns once when the sampler's log-probs differ from the train program's by more than rounding explains."""
        gap = metrics["sampling/logp_difference/mean"]
        if self._staleness(step - 1):
            return  # another policy than this one has sampled
        if gap > self.tolerance and not self.warned:
            self.warned = True
            self.run.print(
                f"step {step}: log-probs of the sampler and the train program differ by {gap:.2g} per token on "
                f"average, above the {self.tolerance:.2g} that rounding explains; --importance_sampling_correction "
                "corrects for it (printed once)"
            )

    def show_samples(
        self, title: str, records: list[Record], step: int, extras: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Prints a table of samples, with the further columns that reward functions logged of every row."""
        extras = {} if extras is None else extras
        if records:
            names = list(records[0]["rewards"])
            scores = [[round(value, 3) for value in (r["score"], *r["rewards"].values())] for r in records]
            rows = [[r["prompt"], r["response"], *s, round(r["kl"], 2)] for r, s in zip(records, scores, strict=True)]
            rows = [[*row, *(v[r["index"]] for v in extras.values())] for row, r in zip(rows, records, strict=True)]
            kl = "log-prob" if self.config.frozen.reference_free else "KL"
            self.run.table(title, ("prompt", "response", "score", *names, kl, *extras), rows, step)

    def evaluate(self, state: PPOState, done: int, watch: Watch = unwatched) -> Metrics:
        """Scores responses to held-out prompts and compares them with those before training; loss of held-out text."""
        batch_size = self.config.run.per_device_eval_batch_size * self.devices
        baseline = self.baseline.read() if done else None
        metrics, records = self.trainer.evaluate(state, self.data.held_out, batch_size, baseline, watch)
        if done == 0:
            # The actor still is what it is compared with.
            metrics |= {name.removesuffix("scores") + "win_rate": 0.5 for name in metrics if name.endswith("scores")}
            self.baseline.save(records)
        if self.data.held_out_text is not None:
            mesh = self.engine.mesh
            sums = partial(eval_step, state.actor_params, module=state.actor, mesh=mesh, measure=sft_sums)
            totals = evaluation_totals(sums, self.data.held_out_text, batch_size, mesh, watch=watch)
            metrics["ptx_loss"] = sft_metrics(totals)["loss"]
        self.show_samples(HELD_OUT, records[: self.config.rollout.num_sample_rows], done)
        return metrics

    def export(self, state: PPOState, card: ModelCard) -> None:
        config, folder = self.config, self.run.output_dir
        actor, reward = config.models.actor_model_name_or_path, config.models.reward_model_name_or_path
        export = partial(
            export_model,
            tokenizer=self.engine.tokenizer,
            export=config.lora.lora_export,
            dtype=DTYPES[config.run.save_dtype],
            card=card,
        )
        if state.critic is not None and score_offset(self.engine.critic_model(state)):
            self.run.print("the critic is not exported: it adds a constant to its values, which transformers cannot")
        elif state.critic is not None:
            export(self.engine.critic_model(state), folder / "critic", base=reward or actor)
        if state.ema_params is not None:
            export(self.engine.actor_model(state, ema=True), folder / "ema", base=actor)
        export(self.engine.actor_model(state), folder, base=actor)

    def last_batch(self) -> dict[str, jax.Array]:
        return self._newest

    def same_past(self, steps: int) -> bool:
        rollout = self.config.rollout
        # Refills begin behind the run's own prompts, and nothing waits for its update at the end of a run.
        if (rollout.dynamic_sampling or rollout.async_steps) and steps != self.total_steps:
            return False
        actor = self.config.optimizer
        updates = zip(updates_of(self.config, steps), updates_of(self.config, self.total_steps), strict=True)
        optimizers = (actor, self.config.critic.optimizer(actor))
        return all(same_past(own, *pair) for own, pair in zip(optimizers, updates, strict=True))


def check_models(config: PPOConfig) -> str:
    """Returns the actor's name. Raises InputError when there is none, or nothing that scores."""
    actor = config.models.actor_model_name_or_path
    if actor is None:
        raise InputError("actor_model_name_or_path: name a model folder (the sft step's output)")
    environment = config.environments.environment
    if config.models.reward_model_name_or_path is None and not config.rewards.reward_functions and not environment:
        raise InputError(
            "reward_model_name_or_path: name a model folder (the reward step's output), or give reward_functions or an "
            "environment that rewards"
        )
    return actor


@works_locally
def train_ppo(config: PPOConfig) -> PPOState:
    """Runs step 3 by the config's algorithm; returns the final state.

    The trained actor lies in the run's folder afterwards, the critic and the moving average in subfolders.
    """
    actor, reward = check_models(config), config.models.reward_model_name_or_path
    config = joined(config)
    headline = HEADLINE
    if config.frozen.reference_free:
        headline = tuple(name for name in HEADLINE if name != "objective/kl")  # there is nothing to differ from
    with open_run(config, config.run.logging_steps, headline) as run:
        devices = batch_devices(meshes(config)[0])
        config = same_rows(config, run, config.rows_per_device * devices, devices)
        for model in (actor, reward):
            check_base(config.lora, model)
        tokenizer = config.models.tokenizer.load(actor, config.data.template)
        if reward is not None:  # fails early when the model cannot be used
            check_reads_tokens(tokenizer, read_config(actor), reward, ("the actor", "the reward model"))
        rewards = config.rewards.rewards(run.print)
        environments = config.environments.load()
        data = read_data(config, tokenizer, rewards, environments)
        rows = config.rollout_rows(devices)
        steps = config.total_steps(lambda: len(data.train), rows)
        if config.algorithm.critic_only_steps >= steps:
            raise InputError(
                f"critic_only_steps={config.algorithm.critic_only_steps} leaves none of the run's {steps} steps to "
                "train the policy; lower it, or give more steps"
            )
        engine = RLHFEngine(actor, reward, tokenizer, steps, config)
        folder, options = config.folder, config.checkpoint
        engine.state = start_from(run, options, engine.state, folder.resume)
        task = PPOTask(run, engine, data, steps, rewards, environments)
        return fit(
            run,
            config.run,
            task,
            engine.state,
            resume=folder.resume,
            named=folder.resume_from_checkpoint,
            allowed=options.allow_changes,
        )


train_grpo = train_rloo = train_reinforce = train_ppo
"""The same run; the algorithm is the config's."""
