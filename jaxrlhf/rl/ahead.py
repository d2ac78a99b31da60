"""Rollouts made some steps before their update (`async_steps`): functions score them while the models train on others.

A rollout then comes from a policy that is a few steps old. The update weighs its tokens by the ratio of the policy's
probabilities at the update and at the rollout (`importance_sampling_correction`). Episodes of an environment have ended
before they wait, and only their outcomes are kept.
Source: the decoupled objective of Hilton et al. 2021 (arXiv 2110.00641), as Fu et al. 2025 use it (AReaL, arXiv
2505.24298).
"""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrlhf.data import length_bucket
from jaxrlhf.distributed import to_host
from jaxrlhf.engine import Rollout
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.outcomes import Played
from jaxrlhf.rl.sampler import Sampler
from jaxrlhf.rl.samples import Prompts, RolloutPlan, Started
from jaxrlhf.rl.step import PPOState
from jaxrlhf.sharding import batch_sharding
from jaxrlhf.trainers.guards import StepPlan
from jaxrlhf.trainers.rollouts import join

PyTree = Any


class Ahead:
    """The rollouts that wait for their update, the oldest first.

    The rollout of step t comes from the policy before step t - k, with k = async_steps, or from the first policy. So a
    run that goes on from a checkpoint needs those that wait: the state has them (`PPOState.pending`).
    """

    def __init__(
        self, sampler: Sampler, config: PPOConfig, prompts: Callable[[int, int], Prompts], total_steps: int
    ) -> None:
        """Args:
        sampler: makes rollouts.
        config: settings of the run.
        prompts: the prompts of a batch, given its number and the finished steps of the policy that answers them.
        total_steps: steps of the run, behind which there are no rollouts.
        """
        self.sampler, self.steps, self.prompts, self.total = sampler, config.rollout.async_steps, prompts, total_steps
        self.width = config.data.max_prompt_seq_len
        self._thread = ThreadPoolExecutor(1, "rollouts") if config.rollout.generation_devices else None
        self._waiting: deque[Future[Started]] = deque()
        """Their rollouts have the widest prompts, as checkpoints need it."""

    def take(self, state: PPOState, plan: StepPlan) -> Started:
        """Starts the rollout of the step `async_steps` ahead, and returns that of this step."""
        step, left = int(to_host(state.step)), self.total - plan.index
        if step and not self._waiting:  # the run goes on from a checkpoint
            for ahead, rollout in enumerate(state.pending[:left]):
                played = Played.from_json(state.pending_episodes[ahead]) if state.pending_episodes else None
                self._restart(rollout, played, plan.batch + ahead, step + ahead)
        begin, missing = time.monotonic(), range(len(self._waiting), min(self.steps + 1, left))
        params = self.sampler.engine.generating(state) if missing else None
        for ahead in missing:
            prompts = self.prompts(plan.batch + ahead, step)
            started = self._begin(partial(self._started, params, prompts, self.sampler.rollout_plan(step + ahead)))
            self._waiting.append(started)
        started = self._waiting.popleft().result()
        return started._replace(rollout=narrowest(started.rollout), seconds=time.monotonic() - begin)

    def keep(self, state: PPOState, rollouts: tuple[Rollout, ...], episodes: tuple[str, ...]) -> PPOState:
        """The state after a step with what waits. At the end of the run, what waited before the step fills up.

        Devices that only generate have done so when it returns: saving and evaluating disturb nobody.

        Args:
            state: the models after the step.
            rollouts: `pending` before it.
            episodes: `pending_episodes` before it.
        """
        waiting = [started.result() for started in self._waiting]
        texts = tuple(started.episodes.as_json() for started in waiting if started.episodes is not None)
        return state.replace(
            pending=tuple(started.rollout for started in waiting) + rollouts[len(waiting) :],
            pending_episodes=texts + episodes[len(texts) :],
        )

    def _begin(self, work: Callable[[], Started]) -> Future[Started]:
        """Does the work beside the caller's, where there are devices for it, else before."""
        if self._thread is not None:
            return self._thread.submit(work)
        done: Future[Started] = Future()
        done.set_result(work())
        return done

    def _started(self, params: PyTree, prompts: Prompts, plan: RolloutPlan) -> Started:
        started = self.sampler.start(params, prompts, plan)
        return started._replace(rollout=jax.block_until_ready(self._wide(started.rollout)))

    def staleness(self, step: int) -> int:
        """Steps between the policy that has made the rollout of a step and the one that trains on it."""
        return min(step, self.steps)

    def _restart(self, rollout: Rollout, played: Played | None, batch: int, step: int) -> None:
        """Hands a rollout of a checkpoint to the reward functions again."""
        prompts, handles = self.prompts(batch, step - self.staleness(step)), []
        if self.sampler.rewards:
            rows = np.arange(rollout.tokens.shape[0])
            own = self.sampler.submit(prompts, narrowest(rollout), rows, len(rows) // len(prompts.ids), played)
            handles.append((rows, own))
        self._waiting.append(self._begin(lambda: Started(rollout, handles, played)))

    def _wide(self, rollout: Rollout) -> Rollout:
        """The rollout with the widest prompts, as checkpoints have it."""
        rows, columns = rollout.tokens.shape
        shape = (rows, columns - rollout.prompt_length + self.width)
        sharding = batch_sharding(self.sampler.engine.mesh, shape)
        pad_id = self.sampler.sampling.pad_token_id
        return join([rollout], np.arange(rows), prompt_length=self.width, pad_id=pad_id, sharding=sharding)


def narrowest(rollout: Rollout) -> Rollout:
    """The rollout without columns on the left that pad all of its prompts, in the bucket that it was sampled in."""
    longest = int(to_host(rollout.mask[:, : rollout.prompt_length]).sum(axis=1).max())
    width = length_bucket(longest, rollout.prompt_length)
    cut = rollout.prompt_length - width
    return jax.tree.map(lambda x: x[:, cut:], rollout).replace(prompt_length=width)
