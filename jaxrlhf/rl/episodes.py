"""Rollouts of several turns: episodes of an environment beside the rows of an `EpisodeBatch` (docs/environments.md).

Process 0 has the environments. All processes of a run learn from it which rows go on, and with which tokens.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from jaxrlhf.data import Tokenizer, answer_text, length_bucket, without_end
from jaxrlhf.data.continuations import Continuer
from jaxrlhf.data.messages import Message, Prompt, as_messages
from jaxrlhf.data.renderer import RowProblem
from jaxrlhf.distributed import from_primary, is_primary
from jaxrlhf.engine import EpisodeBatch, Rollout, SamplingConfig
from jaxrlhf.environments import Calls, EnvironmentConfig, Environments, Episode
from jaxrlhf.environments.running import Call
from jaxrlhf.errors import SharedError
from jaxrlhf.models.model import PyTree
from jaxrlhf.rl.outcomes import Outcome, Played

SHOWN = 3  # failed episodes that are shown of each rollout
GIVE_UP = 64  # episodes in a row without a score that end the run
Say = Callable[[str], object]


class EpisodeRunner:
    """Makes rollouts of several turns.

    Args:
        config: Limits of turns, tokens and seconds.
        environments: The source of episodes.
        tokenizer: With the chat template of the run.
        sampling: With the tokenizer's end ids.
        longest_prompt: Most tokens of a prompt.
        special_tokens_in_data: As in the data's template.
        scored_otherwise: True if a reward model or functions score the responses too.
        keeps_state: True if functions read what environments have at the end of an episode.
        say: Gets messages on failures.

    Raises:
        InputError: The chat template does not show the tools.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        environments: Environments,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        *,
        longest_prompt: int,
        special_tokens_in_data: bool = False,
        scored_otherwise: bool = False,
        keeps_state: bool = False,
        say: Say = print,
    ) -> None:
        self.config, self.environments, self.tokenizer, self.say = config, environments, tokenizer, say
        self.sampling, self.longest_prompt = sampling, longest_prompt
        self.prompt_limit = f"raise max_prompt_seq_len={longest_prompt}"
        """The remedy for longer ones."""
        self.must_reward = environments.rewards and not scored_otherwise
        self.keeps_state = keeps_state
        schemas = [tool.schema for tool in environments.tools]
        self.continuer = Continuer(tokenizer, schemas, special_tokens_in_data)
        self.tool_format = config.form(str(tokenizer.chat_template)) if schemas else ""
        self.failed_in_a_row = 0

    def begin(
        self, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[object]], real: np.ndarray, copies: int
    ) -> "Episodes":
        """Begins `copies` episodes of each of B rows. All processes call it at the same place.

        Args:
            prompts: Texts or messages of the rows.
            columns: B values each.
            real: bool `[B]`: false for filler rows, which have no episode.
            copies: Samples per prompt.
        """
        return Episodes(self, prompts, columns, real, copies)

    def play(
        self,
        begin: Callable[..., EpisodeBatch],
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[object]],
        real: np.ndarray,
        key: jax.Array,
        numbers: np.ndarray,
    ) -> tuple["Episodes", Rollout]:
        """Plays the episodes of B rows to their ends, and shows failures; for commands that train nothing.

        Args:
            begin: `HybridEngine.episodes`.
            prompts: As in `begin`, with columns and real.
            columns: B values each.
            real: bool `[B]`.
            key: Random key.
            numbers: Number of each of the B·n samples, which keys its randomness.
        """
        episodes = self.begin(prompts, columns, real, self.sampling.samples_per_prompt)
        sampling = dataclasses.replace(self.sampling, samples_per_prompt=episodes.copies)
        rollout = episodes.generate(begin, episodes.ids, episodes.mask, key, sampling, numbers=numbers)
        self.report(episodes.outcomes)
        return episodes, rollout

    def report(self, outcomes: Sequence[Outcome]) -> None:
        """Shows failures. Raises SharedError, on every process, when no episode has had a score for long."""
        failed = [row for row, outcome in enumerate(outcomes) if outcome.status == "failed"]
        if is_primary():
            for row in failed[:SHOWN]:
                self.say(f"environment: the episode of sample {row} failed, and has no score: {outcomes[row].reason}")
            if len(failed) > SHOWN:
                self.say(f"… and {len(failed) - SHOWN} more episodes of this batch failed")
        present = sum(outcome.status != "absent" for outcome in outcomes)
        self.failed_in_a_row = self.failed_in_a_row + len(failed) if len(failed) == present else 0
        if self.failed_in_a_row >= GIVE_UP:
            raise SharedError(
                f"environment: the last {self.failed_in_a_row} episodes failed; the first one of this batch: "
                f"{outcomes[failed[0]].reason}. Correct the environment, or the settings that the message names"
            )


class Episodes(Played):
    """The episodes of a rollout batch, B·n rows; made by `EpisodeRunner.begin`.

    Attributes:
        ids: int32 `[R, P]`, left-padded: the prompts; R is B where the samples of a prompt begin alike, else B·n.
        mask: bool `[R, P]`.
        copies: Samples per row of `ids`: n or 1.
    """

    def __init__(
        self,
        runner: EpisodeRunner,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[object]],
        real: np.ndarray,
        copies: int,
    ) -> None:
        outcomes = [Outcome("running" if real[row // copies] else "absent") for row in range(len(real) * copies)]
        super().__init__(outcomes, has_tools=bool(runner.environments.tools))
        self.runner = runner
        self._calls = Calls(runner.config.environment_timeout)
        self._episodes: dict[int, Episode] = {}

        def starts() -> list[list[int]]:
            return self._reset(prompts, columns, copies)

        start = time.monotonic()
        begun = from_primary("the environments", starts)
        self.waited += time.monotonic() - start
        failed = [row for row, ids in enumerate(begun) if not ids and self.outcomes[row].status == "running"]
        for row in failed:
            self.outcomes[row].status = "failed"
        pad = runner.sampling.pad_token_id
        groups = [begun[k : k + copies] for k in range(0, len(begun), copies)]
        self.copies = copies if all(len({*map(tuple, filter(None, group))}) <= 1 for group in groups) else 1
        chosen = begun if self.copies == 1 else [next(filter(None, group), []) for group in groups]
        rows = [ids or [pad] for ids in chosen]  # a row without an episode has a prompt of one token
        width = length_bucket(max(map(len, rows)), max(runner.longest_prompt, 1))
        self.mask = np.arange(width) >= width - np.array([len(ids) for ids in rows])[:, None]
        self.ids = np.full(self.mask.shape, pad, np.int32)
        self.ids[self.mask] = np.concatenate(rows)

    def _reset(
        self, prompts: Sequence[Prompt], columns: Mapping[str, Sequence[object]], copies: int
    ) -> list[list[int]]:
        """Resets the environments of all rows; returns their prompts, empty for filler rows and failed episodes."""
        runner, calls = self.runner, {}
        for row, outcome in enumerate(self.outcomes):
            if outcome.status == "running":
                own = {name: values[row // copies] for name, values in columns.items()}
                # The samples of a prompt share its row, which an environment may change.
                given = copy.deepcopy(own | {"prompt": as_messages(prompts[row // copies])})
                episode = self._episodes[row] = runner.environments.episode(runner.tool_format)
                episode.keeps_state = runner.keeps_state
                calls[self._calls.start(partial(episode.begin, given))] = row
        left = dict(calls)
        while left:
            for call in self._calls.finished(block=True):
                row = left.pop(call)
                if call.error is not None:
                    self._fail(row, f"reset: {call.error}")
        running = [row for row in calls.values() if self.outcomes[row].status == "running"]
        for row in running:
            self.outcomes[row].begun = len(self._episodes[row].messages)
        encoded = runner.continuer.prompts([self._episodes[row].messages for row in running])
        begun: list[list[int]] = [[] for _ in self.outcomes]
        for row, ids in zip(running, encoded, strict=True):
            if isinstance(ids, str):
                self._fail(row, ids)
            elif len(ids) > runner.longest_prompt:
                self._fail(row, f"its prompt has {len(ids)} tokens, tools included; {runner.prompt_limit}")
            else:
                begun[row] = ids
        return begun

    def generate(
        self,
        begin: Callable[..., EpisodeBatch],
        ids: np.ndarray,
        mask: np.ndarray,
        key: jax.Array,
        sampling: SamplingConfig,
        *,
        numbers: np.ndarray,
        sample_index: np.ndarray | None = None,
        **options: PyTree,
    ) -> Rollout:
        """Plays the episodes of some rows to their ends.

        Args:
            begin: `HybridEngine.episodes` of the actor.
            ids: Prompts, as in `ids`.
            mask: As in `mask`.
            key: Of the rollout.
            sampling: With `copies` samples per prompt.
            numbers: Number of each of the B·n samples, which keys its randomness.
            sample_index: The rows; None: all.
            options: `params` of `begin`.
        """
        rows = np.arange(len(self.outcomes)) if sample_index is None else np.asarray(sample_index)
        live = np.array([self.outcomes[row].status == "running" for row in rows])
        batch = begin(
            ids,
            mask,
            key,
            sampling,
            sample_index=numbers[rows],
            live=live,
            turn_tokens=self.runner.config.max_turn_tokens,
            **options,
        )
        _Play(self, batch, rows).run()
        self._share(rows)
        rewards = {k: self.outcomes[row].rewards for k, row in enumerate(rows)}
        return batch.rollout(rewards)

    def _share(self, rows: np.ndarray) -> None:
        """Brings the outcomes of these rows to every process."""
        found = from_primary("the episodes", lambda: [vars(self.outcomes[row]) for row in rows])
        for row, values in zip(rows, found, strict=True):
            self.outcomes[row] = Outcome.from_json(values)

    def _fail(self, row: int, reason: str) -> None:
        outcome = self.outcomes[row]
        outcome.status, outcome.reason = "failed", reason
        outcome.messages = list(self._episodes[row].messages)  # a call that was given up may still add to them


class _Play:
    """The turns of a batch of rows. On process 0 it also has the calls of the environments."""

    def __init__(self, episodes: Episodes, batch: EpisodeBatch, rows: np.ndarray) -> None:
        self.episodes, self.batch, self.rows, self.runner = episodes, batch, rows, episodes.runner
        self.calls: dict[Call, int] = {}
        """Steps and ends in progress, by place in the batch."""
        self.cutting: dict[int, str] = {}
        """Rows whose episode a limit has ended, and which limit."""
        self.closed: dict[int, bool] = {}
        """True for rows whose last turn has its end id."""

    def run(self) -> None:
        given: dict[int, list[int]] = {}
        waiting = False
        while given or waiting or self.batch.running.any():
            ended = self.batch.advance(given) if given or self.batch.running.any() else {}
            idle, start = not self.batch.running.any(), time.monotonic()
            go_on, waiting = from_primary("the environments", partial(self._exchange, ended))
            self.episodes.waited += (time.monotonic() - start) * idle
            given = dict(go_on)

    def _exchange(self, ended: Mapping[int, list[int]]) -> tuple[list[tuple[int, list[int]]], bool]:
        """Hands ended turns to the environments; returns the rows that go on with their tokens, and whether some wait.

        While rows run on the devices, it waits for no environment.
        """
        for row, ids in ended.items():
            self._turn_ended(row, ids)
        go_on: list[tuple[int, list[int]]] = []
        if self.calls:
            for call in self.episodes._calls.finished(block=not self.batch.running.any()):
                row = self.calls.pop(call)
                ids = self._answered(row, call)
                if ids is not None:
                    go_on.append((row, ids))
        return go_on, bool(self.calls)

    def _outcome(self, row: int) -> Outcome:
        return self.episodes.outcomes[self.rows[row]]

    def _start(self, row: int, function: Callable[[], object]) -> None:
        self.calls[self.episodes._calls.start(function)] = row

    def _turn_ended(self, row: int, ids: list[int]) -> None:
        runner, outcome, tokenizer = self.runner, self._outcome(row), self.runner.tokenizer
        outcome.turns += 1
        outcome.reply = answer_text(tokenizer, ids, runner.sampling.stop_strings)
        episode = self.episodes._episodes[self.rows[row]]
        if not runner.sampling.ended(ids) and not self.batch.room(row):
            episode.messages.append({"role": "assistant", "content": outcome.reply})
            self._cut(row, "tokens")
            return
        raw = str(tokenizer.decode(list(without_end(tokenizer, ids)), skip_special_tokens=False))
        self.closed[row] = ids[-1] in runner.sampling.eos_ids
        self._start(row, partial(episode.respond, outcome.reply, raw))

    def _answered(self, row: int, call: Call) -> list[int] | None:
        """The tokens with which a row goes on after a call, or None."""
        outcome, runner = self._outcome(row), self.runner
        if call.error is not None:
            self.episodes._fail(self.rows[row], f"turn {outcome.turns}: {call.error}")
            return None
        if row in self.cutting:
            self._reward(row, call.result)
            self._finish(row, "truncated", self.cutting[row])
            return None
        observation, calls, errors = call.result
        outcome.calls, outcome.errors = outcome.calls + calls, outcome.errors + errors
        outcome.info |= _numbers(observation.info)
        self._reward(row, observation.reward)
        if observation.done:
            self._finish(row, "done")
        elif outcome.turns >= runner.config.max_turns:
            self._cut(row, "turns")
        else:
            return self._continuation(row, observation.messages)
        return None

    def _continuation(self, row: int, messages: Sequence[Message]) -> list[int] | None:
        try:
            ids = self.runner.continuer.after_turn(messages, self.closed[row])
        except RowProblem as error:
            self.episodes._fail(self.rows[row], f"turn {self._outcome(row).turns}: {error}")
            return None
        if len(ids) >= self.batch.room(row):
            self._cut(row, "tokens")
            return None
        self._outcome(row).given += len(ids)
        return ids

    def _reward(self, row: int, reward: float | None) -> None:
        if reward is not None:
            rewards, at = self._outcome(row).rewards, int(self.batch.lengths[row])
            rewards[at] = rewards.get(at, 0.0) + reward

    def _cut(self, row: int, limit: str) -> None:
        """Ends an episode at a limit; the environment may give it a last reward."""
        episode = self.episodes._episodes[self.rows[row]]
        if hasattr(episode.environment, "truncated") or episode.keeps_state:
            self.cutting[row] = limit
            self._start(row, episode.cut)
        else:
            self._finish(row, "truncated", limit)

    def _finish(self, row: int, status: str, reason: str = "") -> None:
        outcome, episode = self._outcome(row), self.episodes._episodes[self.rows[row]]
        outcome.messages = episode.messages
        outcome.state = episode.state
        if status == "done" and self.runner.must_reward and not outcome.rewards:
            status, reason = "failed", "it ended without a reward, and nothing else scores the response"
        outcome.status, outcome.reason = status, reason
        self.runner.environments.release(episode)


def _numbers(info: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers of an observation's info."""
    kinds = (int, float, bool, np.integer, np.floating)
    return {str(name): float(x) for name, x in info.items() if isinstance(x, kinds) and np.isfinite(x)}
