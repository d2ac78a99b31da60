"""The pieces of a PPO iteration: experience from prompts, the update, an evaluation; and a holder for notebooks."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrlhf import keys, objectives
from jaxrlhf.data import PromptData, eval_batches
from jaxrlhf.distributed import to_host
from jaxrlhf.environments import Environments
from jaxrlhf.errors import SharedError
from jaxrlhf.rewards import Rewards
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.experience import Experience
from jaxrlhf.rl.hyperparameters import PPOHyperparameters
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.prepared import compile_ahead
from jaxrlhf.rl.refresh import refreshed
from jaxrlhf.rl.replay import EMPTY, Replayed, kept, narrowed
from jaxrlhf.rl.sampler import Sampler
from jaxrlhf.rl.samples import Metrics, Prompts, Record, RolloutPlan
from jaxrlhf.rl.step import PPOState, ppo_step
from jaxrlhf.runs import Run
from jaxrlhf.trainers.corruption import run_twice
from jaxrlhf.trainers.guards import Limits
from jaxrlhf.trainers.programs import Announce
from jaxrlhf.trainers.task import Watch, unwatched


class PPOTrainer(Sampler):
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
        """Arguments are those of `Sampler`."""
        super().__init__(engine, config, run, rewards, environments)
        self.metrics: Metrics = {}
        """Metrics of the last `train_rlhf`, under TRL's names."""
        self.timing: Metrics = {}
        """Seconds of the last `generate_experience` and `train_rlhf`."""
        self._scored: Metrics = {}
        self._train = Announce(run, f"{self.config.algorithm.algorithm.name} train step", ppo_step)

    def prepare(
        self,
        prompt_length: int,
        state: PPOState | None = None,
        ptx: dict[str, jax.Array] | None = None,
        limits: Limits | None = None,
    ) -> list[Future[object]]:
        """Begins to compile the programs of a step, at the same time in threads; the step then waits for them.

        It does nothing in a run of several processes or devices, or with an environment or tools.

        Args:
            prompt_length: columns of the prompts. A step with prompts of another length compiles as ever.
            state: the models; default: `engine.state`.
            ptx: as in `update`.
            limits: as in `update`.

        Returns:
            The compilations, for callers who want to wait for them.
        """
        state = self.engine.state if state is None else state
        return compile_ahead(self, self._train, state, prompt_length, ptx, limits)

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

    def replay(
        self, state: PPOState, earlier: Sequence[Replayed], step: int, limits: Limits | None = None
    ) -> tuple[PPOState, list[Metrics]]:
        """Trains on earlier rollouts again; the state is donated.

        They count as no step of their own: the step, the weight of the KL and the moments of the scores stay.

        Args:
            state: the models.
            earlier: rollouts with their scores, and places that are still empty.
            step: finished steps before this one.
            limits: as in `ppo_step`.

        Returns:
            The new state, and for each rollout metrics under TRL's names with `sampling/staleness` and `timing/replay`.
        """
        found: list[Metrics] = []
        for old in earlier:
            begin, sampled = time.monotonic(), int(to_host(old.step))
            if sampled == EMPTY:
                continue
            own = {name: jax.tree.map(jnp.copy, getattr(state, name)) for name in ("step", "kl_coef", "score_moments")}
            models = self.engine.models(state).replace(reward=None)  # the scores are known
            if not state.hyperparameters.needs_old_logprobs:
                models = models.replace(actor=None)  # the update computes its log-probs, as for its own rollout
            experience = self.score_program(
                narrowed(old),
                models,
                hyperparameters=state.hyperparameters,
                mesh=self.engine.mesh,
                sampling=self.sampling,
            ).with_scores(old.scores)
            state, metrics = self._updated(state, experience, None, limits, twice=False)
            state = state.replace(**own)
            found.append(metrics | {"sampling/staleness": step - sampled, "timing/replay": time.monotonic() - begin})
        return state, found

    def remembered(self, earlier: tuple[Replayed, ...], experience: Experience, sampled: int) -> tuple[Replayed, ...]:
        """The rollouts to replay after a step, the newest first; the oldest makes room.

        Args:
            earlier: those of the step before.
            experience: scored rows of this step.
            sampled: finished steps of the policy that sampled them.
        """
        width = self.config.data.max_prompt_seq_len + self.sampling.max_new_tokens
        newest = kept(experience, sampled, width=width, mesh=self.engine.mesh)
        return (newest, *earlier)[: len(earlier)]

    def generate_experience(
        self,
        prompt_batch: Mapping[str, ArrayLike],
        columns: Mapping[str, Sequence[object]] | None = None,
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
        self.config.rollout.check_pieces(len(batch.ids))
        batch = dataclasses.replace(batch, progress=self.progress(int(to_host(state.step))))
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
            Metrics, with several sources also `<source>/<metric>` of each, and one record per sample.
        """
        plain = PPOHyperparameters(temperature=state.hyperparameters.temperature)
        key = keys.stream(self.config.data.seed, keys.Stream.EVALUATION)
        plan = RolloutPlan(key, dataclasses.replace(self.sampling, samples_per_prompt=1))
        progress = self.progress(int(to_host(state.step)))
        params = self.engine.generating(state)
        records: list[Record] = []
        for batch in watch(eval_batches(prompts, batch_size), -(-len(prompts) // batch_size)):
            index = batch["index"]
            reading = self.reading(prompts, index) | {"progress": progress}
            chosen = Prompts.of(batch, numbers=np.maximum(index, 0), **reading)
            experience, _, parts, _ = self.finish(state, self.start(params, chosen, plan), plain)
            records += self.records(experience, batch["row_mask"], index, parts)
        if not records:
            raise SharedError("evaluation: no response to a held-out prompt could be scored; see the messages above")
        metrics = evaluation_metrics(records, baseline)
        sources = prompts.rows_by_source()
        for source, rows in sources.items() if len(sources) > 1 else ():
            own = [r for r in records if rows[0] <= r["index"] <= rows[-1]]
            metrics |= {f"{source}/{name}": value for name, value in evaluation_metrics(own, baseline).items()}
        return metrics, records


def evaluation_metrics(records: Sequence[Record], baseline: Mapping[int, float] | None) -> Metrics:
    """Metrics of scored samples, with a win rate against the scores of `baseline` by prompt number; none of none."""
    if not records:
        return {}
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
    return metrics
