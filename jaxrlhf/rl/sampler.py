"""The sampling half of an iteration: responses to prompts, scored by the models and by functions."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrlhf import keys
from jaxrlhf.data import PromptData, answer_text
from jaxrlhf.distributed import to_host
from jaxrlhf.engine import Rollout
from jaxrlhf.environments import Environments
from jaxrlhf.errors import InputError
from jaxrlhf.rewards import Handle, Rewards, finite_mean
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.episodes import EpisodeRunner, Episodes
from jaxrlhf.rl.experience import Experience, score_rollout
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.outcomes import Graded, Played, reads_state
from jaxrlhf.rl.samples import Each, Prompts, Reading, Record, RolloutPlan, Sampled, Started
from jaxrlhf.rl.step import PPOState
from jaxrlhf.runs import Run
from jaxrlhf.sharding import place_batch
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.rollouts import generate_in_pieces
from jaxrlhf.trainers.tokenizers import sampling_for

PyTree = Any


class Sampler:
    """Samples responses and scores them; every method takes the state, or its parameters, as an argument.

    `sample` does all of it. `start` and `finish` are its halves: between them reward functions work.
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
        self.generate_program = Announce(run, "generate program", engine.actor.generate)
        self._begin = Announce(run, "generate program", engine.actor.episodes)
        self.score_program = Announce(run, "scoring program", score_rollout)

    def _runner(self, environments: Environments, run: Run | None) -> EpisodeRunner:
        """The maker of rollouts of several turns. Raises InputError when nothing scores them."""
        config, scored_otherwise = self.config, bool(self.rewards) or self.engine.frozen.reward is not None
        environments.check_scored(scored_otherwise)
        return EpisodeRunner(
            config.environments,
            environments,
            self.engine.tokenizer,
            self.sampling,
            longest_prompt=config.data.max_prompt_seq_len,
            special_tokens_in_data=config.data.template.special_tokens_in_data,
            scored_otherwise=scored_otherwise,
            keeps_state=reads_state(self.rewards),
            say=print if run is None else run.print,
        )

    def reading(self, data: PromptData, indices: np.ndarray) -> Reading:
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
        params: PyTree,
        prompts: Prompts,
        plan: RolloutPlan,
        each: Each | None = None,
        episodes: Episodes | None = None,
    ) -> Rollout:
        """`samples_per_prompt` responses to each prompt, those of `episodes` if there are any.

        `params` are those of `RLHFEngine.generating`; `each` is as in `generate_in_pieces`.
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
                params=params,
            )
        return generate_in_pieces(
            self.generate_program,
            prompts.ids,
            prompts.mask,
            plan.key,
            plan.sampling,
            pieces=plan.pieces,
            sample_index=prompts.numbers,
            each=each,
            params=params,
            slots=self.config.generation.generation_slots,
        )

    def score(
        self, state: PPOState, rollout: Rollout, hyperparameters: PPOHyperparameters, policy: bool = True
    ) -> Experience:
        """The four models' part: log-probs, values, and the reward model's scores (0 without one).

        Without `policy`, the update computes the policy's log-probs (`PPOConfig.scores_policy`).
        """
        models = self.engine.models(state)
        return self.score_program(
            rollout,
            models if policy else models.replace(actor=None),
            hyperparameters=hyperparameters,
            mesh=self.engine.mesh,
            sampling=self.sampling,
        )

    def sample(
        self,
        state: PPOState,
        prompts: Prompts,
        plan: RolloutPlan,
        hyperparameters: PPOHyperparameters | None = None,
        policy: bool = True,
    ) -> Sampled:
        """Samples responses and scores them.

        Args:
            state: the parameters of actor and critic.
            prompts: B prompts.
            plan: key, sampling and pieces.
            hyperparameters: of the scoring programs; default: the state's.
            policy: as in `score`. False only if the next update of `state`, and no other, is on these samples.

        Returns:
            The experience of B · samples_per_prompt rows, its metrics and its rewards.
        """
        return self.finish(state, self.start(self.engine.generating(state), prompts, plan), hyperparameters, policy)

    def start(self, params: PyTree, prompts: Prompts, plan: RolloutPlan) -> Started:
        """Generates responses and hands them to the reward functions, which work on one piece while the next is made.

        `params` are those of `RLHFEngine.generating`; the other arguments are as in `sample`.
        """
        begin = time.monotonic()
        episodes = self.episodes(prompts, plan)
        handles: list[tuple[np.ndarray, Handle]] = []
        n = plan.sampling.samples_per_prompt

        def submit(rows: np.ndarray, rollout: Rollout) -> None:
            handles.append((rows, self.submit(prompts, rollout, rows, n, episodes)))

        rollout = self.rollout(params, prompts, plan, submit if self.rewards else None, episodes)
        return Started(self.engine.gathered(rollout), handles, episodes, time.monotonic() - begin)

    def submit(
        self, prompts: Prompts, rollout: Rollout, rows: np.ndarray, per_prompt: int, episodes: Played | None = None
    ) -> Handle:
        """Hands responses to the reward functions.

        Args:
            prompts: B prompts.
            rollout: R responses.
            rows: `[R]`: the responses' numbers among all of these prompts.
            per_prompt: responses per prompt.
            episodes: those that the responses belong to.

        Returns:
            A handle whose `result` waits for the scores.
        """
        own = rows // per_prompt
        real = prompts.real[own]
        texts = None if prompts.texts is None else [prompts.texts[int(i)] for i in own]
        asked, answers, ids = self.read(rollout, texts)
        columns = {name: [values[i] for i in own] for name, values in prompts.columns.items()}
        messages, completions = None if prompts.messages is None else [prompts.messages[int(i)] for i in own], None
        if episodes is not None:
            graded = Graded.of([episodes.outcomes[row] for row in rows])
            answers, real = graded.replies, real & graded.scored
            messages, completions = graded.prompts, graded.completions
            columns |= graded.columns
        return self.rewards.submit(
            asked,
            answers,
            columns,
            real,
            conversations=messages,
            completion_ids=ids,
            progress=prompts.progress,
            completions=completions,
        )

    def finish(
        self,
        state: PPOState,
        started: Started,
        hyperparameters: PPOHyperparameters | None = None,
        policy: bool = True,
    ) -> Sampled:
        """Scores responses with the models of `state`, and waits for the reward functions.

        Args:
            state: the parameters of actor and critic, which may be newer than those that have generated.
            started: of `start`.
            hyperparameters: as in `sample`.
            policy: as in `sample`.
        """
        begin = time.monotonic()
        h = state.hyperparameters if hyperparameters is None else hyperparameters
        rollout = jax.block_until_ready(started.rollout)  # `start` has only dispatched it, where nothing read it
        generated = time.monotonic()
        experience = jax.block_until_ready(self.score(state, rollout, h, policy))
        end = time.monotonic()
        metrics = {"timing/generate": started.seconds + generated - begin, "timing/score": end - generated}
        sampled = Sampled(experience, {}, {}, {})
        if self.rewards or started.episodes is not None:
            sampled = self._with_functions(experience, started.handles, started.episodes)
            metrics |= sampled.metrics | {"timing/reward_functions": time.monotonic() - end}
        return sampled._replace(metrics=metrics)

    def progress(self, step: int, epoch: float = 0.0) -> dict[str, float]:
        """Attributes of the `trainer_state` that reward functions read, after `step` steps."""
        return {"global_step": step, "max_steps": self.engine.total_steps, "epoch": epoch}

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
        self, experience: Experience, handles: Sequence[tuple[np.ndarray, Handle]], episodes: Played | None = None
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
        gaps = np.where(e.response_mask, e.known_logprobs - e.ref_logprobs, 0.0)
        prompts, responses = self.texts(e.tokens, e.mask, e.response_mask)
        records: list[Record] = []
        for b in range(len(e.scores)):
            if not e.response_mask[b].any() or (row_mask is not None and not row_mask[b]):
                continue
            response = e.tokens[b][e.response_mask[b]]
            record = Record(
                index=b if index is None else int(index[b]),
                prompt=prompts[b],
                response=responses[b],
                score=float(e.scores[b]),
                kl=float(gaps[b].sum()),
                length=len(response),
                ended=self.sampling.ended(response),
                rewards={name: float(values[b]) for name, values in (rewards or {}).items()},
            )
            records.append(record)
        return records
