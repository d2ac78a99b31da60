"""The pieces of a PPO iteration: experience from prompts, the update, an evaluation; and a holder for notebooks."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import keys, objectives
from jaxrlhf.data import PromptData, answer_text, eval_batches
from jaxrlhf.distributed import to_host
from jaxrlhf.engine import Rollout
from jaxrlhf.environments import Environments
from jaxrlhf.errors import InputError, SharedError
from jaxrlhf.rewards import Rewards, finite_mean
from jaxrlhf.rl.config import PPOConfig, sampling_for
from jaxrlhf.rl.episodes import EpisodeRunner, Episodes
from jaxrlhf.rl.experience import Experience, score_rollout
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.refresh import refreshed
from jaxrlhf.rl.rollouts import generate_in_pieces
from jaxrlhf.rl.samples import TRANSCRIPT, Each, Metrics, Prompts, Record, RolloutPlan, Sampled
from jaxrlhf.rl.step import PPOState, ppo_step
from jaxrlhf.runs import Run
from jaxrlhf.sharding import place_batch
from jaxrlhf.trainers.corruption import run_twice
from jaxrlhf.trainers.guards import Limits
from jaxrlhf.trainers.loop import Announce, Watch, unwatched


class PPOTrainer:
    """The two halves of a PPO iteration, and an evaluation.

    `sample`, `update` and `evaluate` take the state as an argument. `generate_experience` and `train_rlhf` are for
    loops of your own and work on `engine.state`.
    """

    def __init__(
        self,
        engine: RLHFEngine,
        config: PPOConfig | None = None,
        run: Run | None = None,
        rewards: Rewards | None = None,
        environments: Environments | None = None,
    ) -> None:
        """Args:
        engine: the models.
        config: settings; default: the engine's.
        run: gets messages on what is compiled.
        rewards: replaces the config's reward functions, with Python callables say.
        environments: replaces the config's environment and tools, with Python classes and functions say.
        """
        self.engine = engine
        self.config = config = engine.config if config is None else config
        self.rewards = config.rewards.rewards(print if run is None else run.print) if rewards is None else rewards
        self.sampling = sampling_for(engine.tokenizer, config.sampling)
        self.environments = config.environments.load() if environments is None else environments
        self.runner = None if self.environments is None else self._runner(self.environments, run)
        self.metrics: Metrics = {}
        """Metrics of the last `train_rlhf`, under TRL's names."""
        self.timing: Metrics = {}
        """Seconds of the last `generate_experience` and `train_rlhf`."""
        self._scored: Metrics = {}
        self._generate = Announce(run, "generate program", engine.actor.generate)
        self._begin = Announce(run, "generate program", engine.actor.episodes)
        self._score = Announce(run, "scoring program", score_rollout)
        self._train = Announce(run, "PPO train program", ppo_step)

    def _runner(self, environments: Environments, run: Run | None) -> EpisodeRunner:
        """The maker of rollouts of several turns. Raises InputError when nothing scores them."""
        config, has_model = self.config, self.engine.frozen.reward is not None
        if not (environments.rewards or self.rewards or has_model):
            raise InputError(
                "environment: it has no get_reward, and nothing else scores responses; name a reward model or "
                "reward_functions"
            )
        return EpisodeRunner(
            config.environments,
            environments,
            self.engine.tokenizer,
            self.sampling,
            longest_prompt=config.data.max_prompt_seq_len,
            special_tokens_in_data=config.data.template.special_tokens_in_data,
            scored_otherwise=bool(self.rewards) or has_model,
            say=print if run is None else run.print,
        )

    def reading(self, data: PromptData, indices: np.ndarray) -> dict[str, Any]:
        """Fields of `Prompts` that reward functions and environments read, for these rows."""
        if not self.rewards and self.runner is None:
            return {}
        return {
            "columns": data.columns(indices),
            "texts": data.prompt_texts(indices),
            "messages": data.prompts(indices),
        }

    def rollout_plan(self, step: int, refill: int = 0) -> RolloutPlan:
        """The sampling of a step's rollout, or of one of its refills, numbered from 1 (`jaxrlhf.rl.refills`)."""
        key = keys.stream(self.config.data.seed, keys.Stream.ROLLOUTS, step)
        if refill:
            key = keys.stream(self.config.data.seed, keys.Stream.REFILLS, step, refill)
        return RolloutPlan(key, self.sampling, self.config.rollout.generation_batches)

    def episodes(self, prompts: Prompts, plan: RolloutPlan) -> Episodes | None:
        """Begins an episode for each sample; None without an environment or tools."""
        if self.runner is None:
            return None
        messages = prompts.texts if prompts.messages is None else prompts.messages
        if messages is None:
            raise InputError("prompts: environments and tools read prompts as text or messages; give them with the ids")
        return self.runner.begin(messages, prompts.columns, prompts.real, plan.sampling.samples_per_prompt)

    def rollout(
        self,
        state: PPOState,
        prompts: Prompts,
        plan: RolloutPlan,
        each: Each | None = None,
        episodes: Episodes | None = None,
    ) -> Rollout:
        """`samples_per_prompt` responses to each prompt, those of `episodes` if there are any.

        `each` is as in `generate_in_pieces`.
        """
        if episodes is not None:
            rows = len(episodes.outcomes)
            numbers = np.arange(rows) if prompts.numbers is None else np.asarray(prompts.numbers)
            return generate_in_pieces(
                partial(episodes.generate, self._begin),
                episodes.ids,
                episodes.mask,
                plan.key,
                dataclasses.replace(plan.sampling, samples_per_prompt=episodes.copies),
                pieces=plan.pieces,
                each=each,
                numbers=numbers,
                params=state.actor_params,
            )
        return generate_in_pieces(
            self._generate,
            prompts.ids,
            prompts.mask,
            plan.key,
            plan.sampling,
            pieces=plan.pieces,
            sample_index=prompts.numbers,
            each=each,
            params=state.actor_params,
            slots=self.config.generation.generation_slots,
        )

    def score(self, state: PPOState, rollout: Rollout, hyperparameters: PPOHyperparameters) -> Experience:
        """The four models' part: log-probs, values, and the reward model's scores (0 without one)."""
        return self._score(
            rollout,
            self.engine.models(state),
            hyperparameters=hyperparameters,
            mesh=self.engine.mesh,
            sampling=self.sampling,
        )

    def sample(
        self, state: PPOState, prompts: Prompts, plan: RolloutPlan, hyperparameters: PPOHyperparameters | None = None
    ) -> Sampled:
        """Samples responses and scores them.

        Reward functions work on one piece while the next is generated, and on the last beside the models.

        Args:
            state: the parameters of actor and critic.
            prompts: B prompts.
            plan: key, sampling and pieces.
            hyperparameters: of the scoring programs; default: the state's.

        Returns:
            The experience of B · samples_per_prompt rows, its metrics and its rewards.
        """
        n = plan.sampling.samples_per_prompt
        handles: list[tuple[np.ndarray, Any]] = []

        def submit(rows: np.ndarray, rollout: Rollout) -> None:
            own = rows // n
            real = prompts.real[own]
            texts = None if prompts.texts is None else [prompts.texts[int(i)] for i in own]
            asked, answers, ids = self.read(rollout, texts)
            columns = {name: [values[i] for i in own] for name, values in prompts.columns.items()}
            if episodes is not None:
                outcomes = [episodes.outcomes[row] for row in rows]
                answers = [outcome.reply for outcome in outcomes]
                columns[TRANSCRIPT] = [outcome.messages for outcome in outcomes]
                real = real & np.array([outcome.status != "failed" for outcome in outcomes])
            handle = self.rewards.submit(
                asked,
                answers,
                columns,
                real,
                conversations=None if prompts.messages is None else [prompts.messages[int(i)] for i in own],
                completion_ids=ids,
                progress=prompts.progress,
            )
            handles.append((rows, handle))

        begin = time.monotonic()
        episodes = self.episodes(prompts, plan)
        rollout = self.rollout(state, prompts, plan, submit if self.rewards else None, episodes)
        middle = time.monotonic()
        h = state.hyperparameters if hyperparameters is None else hyperparameters
        experience = jax.block_until_ready(self.score(state, jax.block_until_ready(rollout), h))
        end = time.monotonic()
        metrics = {"timing/generate": middle - begin, "timing/score": end - middle}
        sampled = Sampled(experience, {}, {}, {})
        if self.rewards or episodes is not None:
            sampled = self._with_functions(experience, handles, episodes)
            metrics |= sampled.metrics | {"timing/reward_functions": time.monotonic() - end}
        return sampled._replace(metrics=metrics)

    def progress(self, state: PPOState, epoch: float = 0.0) -> dict[str, float]:
        """Attributes of the `trainer_state` that reward functions read."""
        return {"global_step": int(to_host(state.step)), "max_steps": self.engine.total_steps, "epoch": epoch}

    def read(
        self, rollout: Rollout, prompts: Sequence[str] | None
    ) -> tuple[Sequence[str], list[str], list[np.ndarray]]:
        """Prompts, responses, and the responses' token ids of a rollout, as reward functions read them."""
        tokens, mask, response_mask = to_host((rollout.tokens, rollout.mask, rollout.response_mask))
        asked = self.texts(tokens, mask, response_mask)[0] if prompts is None else prompts
        responses = [ids[inside] for ids, inside in zip(tokens, response_mask, strict=True)]
        read = partial(answer_text, self.engine.tokenizer, stop_strings=self.sampling.stop_strings)
        return asked, [read(ids) for ids in responses], responses

    def _with_functions(
        self, experience: Experience, handles: Sequence[tuple[np.ndarray, Any]], episodes: Episodes | None = None
    ) -> Sampled:
        """The experience with the weighted sum of all scores, rows without one masked out; and the parts."""
        model = to_host(experience.scores)
        has_model = self.engine.frozen.reward is not None
        scores = self.config.rewards.reward_model_weight * model if has_model else np.zeros_like(model)
        counts_model = has_model and self.config.rewards.reward_model_weight != 0
        parts: dict[str, np.ndarray] = {}
        logged: dict[str, list[float]] = {}
        extras: dict[str, np.ndarray] = {}
        failures, passed_over = 0, 0
        for rows, handle in handles:
            result = handle.result()
            scores[rows] = result.beside(scores[rows] if counts_model else None)
            failures += len(result.failures)
            passed_over += sum(result.passed_over.values())
            for name, values in result.parts.items():
                parts.setdefault(name, np.zeros_like(model))[rows] = values
            for name, numbers in result.numbers.items():
                logged.setdefault(f"rewards/{name}", []).extend(numbers)
            for name, column in result.extras.items():
                extras.setdefault(name, np.full(len(model), None, object))[rows] = np.array([*column, None], object)[
                    :-1
                ]
        if episodes is not None and self.runner is not None:
            self.runner.report(episodes.outcomes)
            scores = scores + episodes.scores
            if self.runner.environments.rewards:
                parts["environment"] = episodes.scores
        means = {f"rewards/{name}": finite_mean(values) for name, values in parts.items()}
        means |= {name: finite_mean(np.array(numbers)) for name, numbers in logged.items()}
        metrics = {name: mean for name, mean in means.items() if mean is not None} | {"rewards/failures": failures}
        metrics |= {} if episodes is None else episodes.metrics()
        if passed_over:
            metrics["rewards/not_applicable"] = passed_over
        if has_model:
            metrics["rewards/reward_model"] = float(model.mean())
            parts["reward_model"] = model
        scored = experience.with_scores(place_batch(scores.astype(np.float32), self.engine.mesh))
        return Sampled(scored, metrics, parts, extras)

    def texts(self, tokens: np.ndarray, mask: np.ndarray, response_mask: np.ndarray) -> tuple[list[str], list[str]]:
        """Prompts and responses as text, without special tokens, of host arrays `[B, T]`.

        A response of several turns holds the environment's messages too.
        """
        decode = partial(self.engine.tokenizer.batch_decode, skip_special_tokens=True)
        begun = np.cumsum(response_mask, axis=1) > 0
        rows = list(zip(tokens, mask, begun, strict=True))
        prompts = decode([ids[real & ~response] for ids, real, response in rows])
        return prompts, decode([ids[real & response] for ids, real, response in rows])

    def update(
        self,
        state: PPOState,
        experience: Experience,
        ptx: dict[str, jax.Array] | None = None,
        limits: Limits | None = None,
        twice: bool = False,
    ) -> tuple[PPOState, Metrics]:
        """All epochs and minibatches on one experience; the state is donated.

        Nothing is updated when no response has a score: momentum alone would move the models.

        Args:
            state: the models.
            experience: a scored rollout.
            ptx: as in `ppo_step`.
            limits: as in `ppo_step`.
            twice: runs the update twice and compares (`run_twice`).

        Returns:
            The new state, and metrics under TRL's names with `timing/train`.
        """
        begin = time.monotonic()
        state, metrics = self._updated(state, experience, ptx, limits, twice)
        state = self._with_refreshed_reference(state)
        seconds = time.monotonic() - begin - metrics.get("timing/deterministic_check", 0.0)
        return state, metrics | {"timing/train": seconds}

    def _with_refreshed_reference(self, state: PPOState) -> PPOState:
        """The state with a reference that moves after some of the steps, if after this one."""
        every, reference = self.config.frozen.reference_sync_steps, self.engine.frozen.reference
        if reference is None or not every or int(to_host(state.step)) % every:
            return state
        moved = refreshed(
            state.reference_params,
            state.actor_params,
            weight=self.config.frozen.reference_mixup,
            module=reference.module,
            mesh=self.engine.mesh,
        )
        return state.replace(reference_params=moved)

    def _updated(
        self,
        state: PPOState,
        experience: Experience,
        ptx: dict[str, jax.Array] | None,
        limits: Limits | None,
        twice: bool,
    ) -> tuple[PPOState, Metrics]:
        """The part of `update` that trains."""
        scored = bool(self.rewards) or self.runner is not None
        if scored and not to_host(jnp.any(experience.response_mask)):
            state = state.replace(step=state.step + 1)
            return state, {"guard/skipped_updates": 0.0, "guard/unscored": 1.0}
        train = partial(run_twice, self._train) if twice else self._train
        state, metrics = train(state, experience, ptx, limits, self.engine.rates)
        metrics = {name: float(value) for name, value in to_host(metrics).items()}
        return state, metrics | ({"guard/unscored": 0.0} if scored else {})

    def generate_experience(
        self,
        prompt_batch: Mapping[str, Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Experience:
        """Samples `samples_per_prompt` responses per prompt and scores them, with the models of `engine.state`.

        Samples are keyed by (seed, step, row).

        Args:
            prompt_batch: `prompt_ids` and `prompt_mask`, left-padded `[B, P]`.
            columns: B values each, for reward functions.
            prompts: the prompts as text, for reward functions; default: as decoded from the ids.
        """
        state = self.engine.state
        batch = Prompts.of(prompt_batch, columns=columns or {}, texts=prompts)
        state.hyperparameters.check_rows(len(batch.ids) * self.sampling.samples_per_prompt)
        self.config.check_pieces(len(batch.ids))
        batch = dataclasses.replace(batch, progress=self.progress(state))
        experience, metrics, *_ = self.sample(state, batch, self.rollout_plan(int(state.step)))
        self.timing = {name: value for name, value in metrics.items() if name.startswith("timing/")}
        self._scored = {name: value for name, value in metrics.items() if name not in self.timing}
        return experience

    def train_rlhf(self, experience: Experience, ptx: dict[str, jax.Array] | None = None) -> tuple[float, float]:
        """Updates `engine.state` on this experience; returns (actor loss, critic loss), more in `metrics`.

        Args:
            experience: of `generate_experience`.
            ptx: with ptx_coef, a batch of pretraining text (`TextBlocks.batch`).

        Returns:
            NaN for the critic's loss without a critic, and for both when no response had a score.
        """
        self.engine.state, metrics = self.update(self.engine.state, experience, ptx)
        self.timing["timing/train"] = metrics.pop("timing/train")
        self.metrics = metrics | self._scored
        return metrics.get("loss/policy_avg", float("nan")), metrics.get("loss/value_avg", float("nan"))

    def evaluate(
        self,
        state: PPOState,
        prompts: PromptData,
        batch_size: int,
        baseline: dict[int, float] | None = None,
        watch: Watch = unwatched,
    ) -> tuple[Metrics, list[Record]]:
        """Samples a response to every held-out prompt, always with the same keys.

        Args:
            state: the actor to evaluate.
            prompts: the held-out prompts.
            batch_size: rows at a time.
            baseline: scores by prompt number of another model's responses to the same prompts, for a win rate.
            watch: gets the batches.

        Returns:
            Metrics, and one record per sample.
        """
        plain = PPOHyperparameters(temperature=state.hyperparameters.temperature)
        key = keys.stream(self.config.data.seed, keys.Stream.EVALUATION)
        plan = RolloutPlan(key, dataclasses.replace(self.sampling, samples_per_prompt=1))
        progress = self.progress(state)
        records: list[Record] = []
        for batch in watch(eval_batches(prompts, batch_size), -(-len(prompts) // batch_size)):
            index = batch["index"]
            reading = self.reading(prompts, index) | {"progress": progress}
            chosen = Prompts.of(batch, numbers=np.maximum(index, 0), **reading)
            experience, _, parts, _ = self.sample(state, chosen, plan, plain)
            records += self.records(experience, batch["row_mask"], index, parts)
        if not records:
            raise SharedError("evaluation: no response to a held-out prompt could be scored; see the messages above")
        scores = np.array([r["score"] for r in records])
        metrics = {
            "scores": float(scores.mean()),
            "scores_std": float(scores.std()),
            "kl": float(np.mean([r["kl"] for r in records])),
            "response_length": float(np.mean([r["length"] for r in records])),
            "eos_rate": float(np.mean([r["ended"] for r in records])),
        }
        if baseline is not None:
            before = np.array([baseline.get(r["index"], np.nan) for r in records])
            metrics["win_rate"] = float(objectives.win_rate(jnp.asarray(scores), jnp.asarray(before)))
        return metrics, records

    def records(
        self,
        experience: Experience,
        row_mask: np.ndarray | None = None,
        index: np.ndarray | None = None,
        rewards: Mapping[str, np.ndarray] | None = None,
    ) -> list[Record]:
        """Describes every scored row.

        Args:
            experience: B rows.
            row_mask: `[B]`: rows to describe; default: all that have a score.
            index: `[B]`: the rows' numbers; default: 0 … B-1.
            rewards: as `Sampled` has them; at least B values each.
        """
        e = to_host(experience)
        prompts, responses = self.texts(e.tokens, e.mask, e.response_mask)
        records: list[Record] = []
        for b in range(len(e.scores)):
            if not e.response_mask[b].any() or (row_mask is not None and not row_mask[b]):
                continue
            response = e.tokens[b][e.response_mask[b]]
            gap = np.where(e.response_mask[b], e.logprobs[b] - e.ref_logprobs[b], 0.0)
            record = Record(
                index=b if index is None else int(index[b]),
                prompt=prompts[b],
                response=responses[b],
                score=float(e.scores[b]),
                kl=float(gap.sum()),
                length=len(response),
                ended=self.sampling.ended(response),
                rewards={name: float(values[b]) for name, values in (rewards or {}).items()},
            )
            records.append(record)
        return records
