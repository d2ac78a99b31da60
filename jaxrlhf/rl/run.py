"""Step 3: PPO and its relatives as a run: data, the loop's task, evaluation, export."""

import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.data import TextBlocks, load_data, load_text, load_tokenizer, stream_indices
from jaxrlhf.data.loading import cache_folder
from jaxrlhf.distributed import from_primary, is_primary, joined, to_host
from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder, ModelCard, read_config
from jaxrlhf.rewards import Rewards
from jaxrlhf.rl import PPOState
from jaxrlhf.rl.alarms import Alarms
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.runs import Run
from jaxrlhf.runs.report import HELD_OUT
from jaxrlhf.sharding import held_rows, place_batch
from jaxrlhf.trainers.loop import Task, fit
from jaxrlhf.trainers.lora import describe_model, export_model
from jaxrlhf.trainers.optimizer import updates_made
from jaxrlhf.trainers.settings import DTYPES, batch_devices, lasting_settings, open_run, total_steps
from jaxrlhf.trainers.sft import sft_figures, sft_sums
from jaxrlhf.trainers.supervised import eval_step, evaluation_totals

# Mean |sampler − train log-prob| per token that rounding explains. Float32 on accelerators multiplies in fewer bits.
LOGP_TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
LOGP_TOLERANCE_FAST_FLOAT32 = 5e-3
HEADLINE = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "perf/sequences_per_second")
BASELINE = "eval_baseline.json"


def show_samples(run: Run, title: str, records: list[dict[str, Any]], step: int) -> None:
    if not records:
        return
    rows = [[r["prompt"], r["response"], round(r["score"], 3), round(r["kl"], 2)] for r in records]
    run.table(title, ("prompt", "response", "score", "KL"), rows, step)


def logp_tolerance(module: Decoder, mesh: Any) -> float:
    """What `sampling/logp_difference/mean` stays below when both programs compute the same."""
    name = jnp.dtype(module.dtype).name
    fast = name == "float32" and mesh.devices.flat[0].platform != "cpu"
    return LOGP_TOLERANCE_FAST_FLOAT32 if fast else LOGP_TOLERANCE[name]


class Evaluation:
    """What a run evaluates: answers to held-out prompts, compared with those before training, and held-out text."""

    def __init__(self, run: Run, trainer: PPOTrainer, prompts: Any, text: TextBlocks | None) -> None:
        self.run, self.trainer, self.prompts, self.text = run, trainer, prompts, text
        self.config, self.mesh = trainer.config, trainer.engine.mesh
        self.batch_size = self.config.per_device_eval_batch_size * batch_devices(self.mesh)

    def __call__(self, state: PPOState, done: int) -> dict[str, float]:
        self.trainer.engine.state = state
        figures, records = self.trainer.evaluate(self.prompts, self.batch_size, self._baseline() if done else None)
        if done == 0:
            figures["win_rate"] = 0.5  # the actor still is what it is compared with
            self._keep_baseline(records)
        if self.text is not None:
            figures["ptx_loss"] = self._text_loss(state)
        show_samples(self.run, HELD_OUT, records[: self.config.num_sample_rows], done)
        return figures

    def _keep_baseline(self, records: list[dict[str, Any]]) -> None:
        self.run.begin()
        if is_primary():
            scores = {str(r["index"]): r["score"] for r in records}
            write_json_atomic(self.run.output_dir / BASELINE, {"prompts": self.prompts.key, "scores": scores})

    def _baseline(self) -> dict[int, float] | None:
        """Scores of the answers before training, from the run's folder; None when they are of other prompts."""
        path = self.run.output_dir / BASELINE

        def read() -> dict[str, Any]:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

        kept = from_primary("reading the scores before training", read)
        if kept.get("prompts") != self.prompts.key:
            return None
        return {int(number): score for number, score in kept["scores"].items()}

    def _text_loss(self, state: PPOState) -> float:
        """Nats per token of held-out pretraining text."""
        sums = partial(eval_step, state.actor_params, module=state.actor, mesh=self.mesh, measure=sft_sums)
        return sft_figures(evaluation_totals(sums, self.text, self.batch_size, self.mesh))["loss"]


def ppo_task(
    run: Run,
    config: PPOConfig,
    engine: RLHFEngine,
    train: Any,
    evaluation: Any,
    steps: int,
    text: tuple[TextBlocks, TextBlocks] | None = None,
    rewards: Rewards | None = None,
) -> Task:
    """The Task of a run over prompts `train`, evaluated on `evaluation`; `text`: training and held-out blocks."""
    trainer = PPOTrainer(engine, config, run, rewards)
    devices = batch_devices(engine.mesh)
    rows = config.rollout_rows(devices)
    prompts = rows // config.samples_per_prompt
    engine.actor.check_slots(config.generation_slots, rows // config.generation_batches)
    for data in (train, evaluation):
        trainer.rewards.check_references(data)
    tolerance = logp_tolerance(engine.actor.module, engine.mesh)
    alarms = Alarms(run.print, config)
    newest: dict[str, Any] = {}
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

    def text_batch(i: int) -> dict[str, Any] | None:
        if text is None:
            return None
        size = config.ptx_rows(devices)
        batch = text[0].batch(stream_indices(i, size, len(text[0]), config.seed), held=held_rows(engine.mesh, size))
        return place_batch({name: batch[name] for name in ("input_ids", "attention_mask", "loss_mask")}, engine.mesh)

    def step(state: PPOState, i: int) -> tuple[PPOState, dict[str, Any]]:
        engine.state = state
        indices = stream_indices(i, prompts, len(train), config.seed)
        batch = train.batch(indices)
        read = (train.columns(indices), train.prompt_texts(indices)) if trainer.rewards else ()
        experience = trainer.generate_experience(batch, *read)
        if config.sample_steps and (i + 1) % config.sample_steps == 0:
            first = jax.tree.map(lambda x: x[: config.num_sample_rows], experience)
            show_samples(run, "training samples", trainer.records(first), i + 1)
        ids, mask, response_mask = to_host((experience.tokens, experience.mask, experience.response_mask))
        ended = np.isin(ids, trainer.sampling.eos_ids) & response_mask
        tokens = int(mask.sum())
        texts = text_batch(i)
        arrays = {f.name: getattr(experience, f.name) for f in dataclasses.fields(experience) if f.name != "longest"}
        arrays |= {f"ptx_{name}": x for name, x in (texts or {}).items()}
        newest.update({name: value for name, value in arrays.items() if value is not None})
        made = int(to_host(updates_made(state.actor_opt_state)))
        trainer.train_rlhf(experience, texts)
        if not trainer.metrics.get("guard/unscored"):
            check_consistency(i + 1)
            alarms.check(trainer.metrics, i + 1)
        seconds = sum(trainer.timing.values())
        return engine.state, trainer.metrics | trainer.timing | {
            "val/num_eos_tokens": int(ended.sum()),
            "lr": float(engine.schedule(made)),
            "episode": (i + 1) * rows,
            "epoch": (i + 1) * prompts / len(train),
            "timing/step": seconds,
            "perf/sequences_per_second": rows / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/padding": 1 - tokens / experience.mask.size,
        }

    def export(state: PPOState, card: ModelCard) -> None:
        engine.state = state
        folder, actor, critic = run.output_dir, config.actor_model_name_or_path, config.critic_model_name_or_path
        options = {"tokenizer": engine.tokenizer, "options": config, "dtype": DTYPES[config.save_dtype], "card": card}
        export = partial(export_model, **options)
        if state.critic is not None:
            export(engine.critic_model(), folder / "critic", base=critic or actor)
        if config.enable_ema:
            export(engine.actor_model(ema=True), folder / "ema", base=actor)
        export(engine.actor_model(), folder, base=actor)

    name = "ppo" if config.advantage_estimator == "gae" else config.advantage_estimator
    identity = {
        "trainer": name,
        "data": train.key,
        "rollout_batch_size": rows,
        "train_rows": len(train),
        "total_steps": steps,
        "actor": config.actor_model_name_or_path,
        "reward": config.critic_model_name_or_path,
        "pretraining_text": text and [text[0].key, *text[0].tokens.shape, config.ptx_rows(devices)],
        **lasting_settings(config),
    }
    actor = describe_model(engine.actor_model())
    identity["actor_lora"] = actor.get("lora")
    exports = {"actor_params": actor}
    if engine.state.critic is not None:
        exports["critic_params"] = describe_model(engine.critic_model())
        identity["critic_lora"] = exports["critic_params"].get("lora")
    if config.enable_ema:
        exports["ema_params"] = describe_model(engine.actor_model(), frozen="actor_params")
    return Task(
        name=name,
        total_steps=steps,
        step=step,
        evaluate=Evaluation(run, trainer, evaluation, None if text is None else text[1]),
        export=export,
        base_model=str(config.actor_model_name_or_path),
        identity=identity,
        exports=exports,
        best=("scores", 1),
        last_batch=lambda: dict(newest),
    )


def check_models(config: PPOConfig) -> None:
    """InputError when no actor is named, or nothing that scores."""
    if config.actor_model_name_or_path is None:
        raise InputError("actor_model_name_or_path: name a model folder (sft step's output)")
    if config.critic_model_name_or_path is None and not config.reward_functions:
        name = "critic" if config.advantage_estimator == "gae" else "reward"
        raise InputError(
            f"{name}_model_name_or_path: name a model folder (reward step's output), or give reward_functions"
        )


def train_ppo(config: PPOConfig) -> PPOState:
    """Run step 3; the trained actor lies in `config.output_dir`, the critic and the average in subfolders."""
    check_models(config)
    config = joined(config)
    with open_run(config, HEADLINE) as run:
        for model in (config.actor_model_name_or_path, config.critic_model_name_or_path):
            if model is not None:
                read_config(model)  # a model that cannot be used is the first thing to say
        tokenizer = load_tokenizer(config.tokenizer_name_or_path or config.actor_model_name_or_path)
        rewards = config.rewards(run.print)
        train, evaluation = load_data(config, tokenizer, "ppo", columns=rewards.columns)
        text = None
        if config.ptx_coef:
            text = load_text(
                config.ptx_data_path,
                tokenizer,
                field=config.ptx_field,
                block=config.ptx_block_size or config.max_prompt_seq_len + config.max_answer_seq_len,
                held_out=config.eval_fraction,
                cache=cache_folder(config),
            )
        rows = config.rollout_rows(batch_devices(config.make_mesh()))
        steps = total_steps(config, len(train) * config.samples_per_prompt, rows)
        if config.critic_only_steps >= steps:
            raise InputError(
                f"critic_only_steps={config.critic_only_steps} leaves none of the run's {steps} steps to train the "
                "policy; lower it, or give more steps"
            )
        engine = RLHFEngine(config.actor_model_name_or_path, config.critic_model_name_or_path, tokenizer, steps, config)
        task = ppo_task(run, config, engine, train, evaluation, steps, text, rewards)
        return fit(run, config, task, engine.state)
