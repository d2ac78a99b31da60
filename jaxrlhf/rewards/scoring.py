"""Runs reward functions while the devices work, and combines their results to one score per sample."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Protocol, TypeVar

import numpy as np

from jaxrlhf.errors import InputError, SharedError
from jaxrlhf.rewards.arguments import Function, Message, Samples
from jaxrlhf.rewards.calls import Failure, Outcome, describe
from jaxrlhf.rewards.processes import DEFAULT_LIMITS, Limits
from jaxrlhf.rewards.workers import Worker

SHOWN = 3  # failed samples that are shown of each call
WAIT = 30.0  # seconds until a wait for a function is reported
GIVE_UP = 64  # samples in a row without a score that end the run

Say = Callable[[str], object]
Result = TypeVar("Result")


class References(Protocol):
    """Rows with columns, such as a `PromptData`."""

    def __len__(self) -> int: ...

    def columns(self, indices: Sequence[int]) -> dict[str, list[object]]: ...

    def where(self, i: int) -> str: ...


@dataclass(frozen=True)
class RewardResult:
    """Scores of a batch, the same on every process.

    A sample that failed has NaN, and so has one to which no function of a weight applies.

    Attributes:
        scores: float32 [B]: the weighted sum of the parts; 0 in rows that are not scored.
        parts: float32 [B] of each function, unweighted; NaN also where it does not apply.
        failures: samples without a score.
        seconds: duration of each function's call.
        applies: bool [B]: some function of a weight applies to the sample, or none has a weight.
        passed_over: samples to which each function does not apply, by their number.
        numbers: what functions logged by `log_metric`, by `function/name`.
        extras: [B] of what functions logged by `log_extra`, by name; None where nothing was logged.
    """

    scores: np.ndarray
    parts: dict[str, np.ndarray]
    failures: tuple[Failure, ...]
    seconds: dict[str, float]
    applies: np.ndarray
    passed_over: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[object]] = field(default_factory=dict)

    def beside(self, others: np.ndarray | None) -> np.ndarray:
        """The scores plus those of a model, float32 [B]; with None, the scores."""
        if others is None:
            return self.scores
        own = np.where(self.applies, self.scores, 0.0)
        return (own.astype(np.float64) + others).astype(np.float32)


class Rewards:
    """Several reward functions and their weights.

    Functions run in parallel, and calls of one function never overlap. A function given as a spec runs in a process of
    its own, within `limits`; a Python function runs in a thread of this process. With several processes, only process 0
    calls the functions.

    Args:
        functions: specs, as in the flag `reward_functions`, or Python functions.
        weights: weight of each function. Default: 1.
        say: called with the lines that functions print, and with failures.
        limits: of the processes of functions.

    Attributes:
        functions: the functions by their distinct names, which name the parts of a result.
        weights: weight of each function.
        failed_in_a_row: samples since each function last scored one (on process 0).

    Raises:
        InputError: a function cannot be imported or called, or the weights do not match.
    """

    def __init__(
        self,
        functions: Sequence[str | Function],
        weights: Sequence[float] = (),
        *,
        say: Say = print,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if weights and len(weights) != len(functions):
            raise InputError(f"weights: {len(weights)} for {len(functions)} reward functions; give one each, or none")
        self.say = say
        workers = [Worker(function, limits) for function in functions]
        loaded = [self.wait(f"the import of {worker.name}", worker.function) for worker in workers]
        self.functions = dict(zip(distinct([f.name for f in loaded]), loaded, strict=True))
        self.weights = dict(zip(self.functions, weights or (1.0,) * len(loaded), strict=True))
        self.failed_in_a_row = dict.fromkeys(self.functions, 0)
        self._workers = dict(zip(self.functions, workers, strict=True))

    def __bool__(self) -> bool:
        return bool(self.functions)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the functions need."""
        return tuple(dict.fromkeys(c for f in self.functions.values() for c in f.columns.values()))

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that functions take where the data has them, besides `columns`."""
        names = dict.fromkeys(c for f in self.functions.values() for c in f.wanted)
        return tuple(name for name in names if name not in self.columns)

    def check_references(self, data: References, chunk: int = 1000) -> None:
        """Raises InputError for the first row of `data` on which no response can be scored."""
        checks = [(name, f, f.check_references) for name, f in self.functions.items() if f.check_references is not None]
        for start in range(0, len(data) if checks else 0, chunk):
            indices = range(start, min(start + chunk, len(data)))
            columns = data.columns(indices)
            for name, function, check in checks:
                names = function.columns.values()
                for i, *values in zip(indices, *(columns[column] for column in names), strict=True):
                    try:
                        check(*values)
                    except ValueError as error:
                        if isinstance(error, InputError):  # not the row is wrong
                            raise
                        place = f"{data.where(i)}, column{'s' * (len(values) > 1)} {', '.join(map(repr, names))}"
                        other = f", or name another column: {name}:column=…" if "references" in function.columns else ""
                        raise InputError(
                            f"{place}: {error} (reward function {name}); correct the data{other}"
                        ) from error

    def wait(self, what: str, job: "Future[Result]") -> "Result":
        """Waits for a result; reports after 30 s, 60 s, 120 s, …"""
        waited, limit = 0.0, WAIT
        while not wait([job], limit).done:
            waited, limit = waited + limit, waited + limit
            self.say(f"still waiting for {what}, after {waited:.0f} s")
        return job.result()

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[object]] | None = None,
        rows: Sequence[bool] | np.ndarray | None = None,
        *,
        conversations: Sequence[object] | None = None,
        completion_ids: Sequence[Sequence[int] | np.ndarray] | None = None,
        progress: Mapping[str, float] | None = None,
        completions: Sequence[Sequence[Message]] | None = None,
    ) -> "Handle":
        """Starts to score a batch of B samples. Every process calls it with the whole batch.

        Args:
            prompts: the prompts [B].
            responses: the responses [B].
            columns: other fields of the samples, B values each.
            rows: bool [B]: the rows to score; the functions do not see the others. Default: all.
            conversations: [B] the prompts as the data has them; those that are lists of messages reach functions as
                such. Default: all are text.
            completion_ids: [B] token ids of the responses, with the end; None: not known.
            progress: attributes of `trainer_state`, such as global_step; None: nothing is trained.
            completions: [B] the messages of responses with several turns, those of tools included; None: the responses
                have one turn.

        Returns:
            A handle whose `result` waits for the scores.

        Raises:
            InputError: a function needs a column or token ids that the samples do not have.
        """
        from jaxrlhf.distributed import is_primary  # the processes of functions do without JAX

        size = len(prompts)
        columns = {} if columns is None else columns
        given = {"responses": responses, "conversations": conversations, "completion_ids": completion_ids}
        given |= {"completions": completions}
        for name, values in (given | dict(columns)).items():
            if values is not None and len(values) != size:
                raise ValueError(f"{name}: {len(values)} values for {size} prompts")
        counted = list(range(size)) if rows is None else np.flatnonzero(np.asarray(rows)).tolist()
        samples = Samples(
            counted,
            [prompts[i] for i in counted],
            [responses[i] for i in counted],
            {name: [values[i] for i in counted] for name, values in columns.items()},
            None if conversations is None else [_messages(conversations[i]) for i in counted],
            None if completion_ids is None else [[int(x) for x in completion_ids[i]] for i in counted],
            None if progress is None else dict(progress),
            None if completions is None else [list(completions[i]) for i in counted],
        )
        jobs: dict[str, Future[Outcome]] = {}
        for name, function in self.functions.items():
            function.check(samples)  # reports a missing column before any function runs
            if not is_primary():
                self._workers[name].stop()
            elif counted:
                jobs[name] = self._workers[name].call(name, samples)
        return Handle(self, samples, size, jobs)


def _messages(prompt: object) -> list[Message] | None:
    """A prompt that is a list of messages; None for another one."""
    return prompt if isinstance(prompt, list) else None


def finite_mean(values: np.ndarray) -> float | None:
    """The mean of the finite values; None when there is none."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def distinct(names: list[str]) -> list[str]:
    """The names, with `_2`, `_3`, … after repeated ones."""
    result: list[str] = []
    for name in names:
        candidates = chain([name], (f"{name}_{number}" for number in count(2)))
        result.append(next(candidate for candidate in candidates if candidate not in result))
    return result


class Handle:
    """A batch on its way through the reward functions; made by `Rewards.submit`."""

    def __init__(self, rewards: Rewards, samples: Samples, size: int, jobs: dict[str, Future[Outcome]]) -> None:
        self._rewards, self._samples, self._size, self._jobs = rewards, samples, size, jobs
        self._result: RewardResult | None = None

    def result(self) -> RewardResult:
        """Waits for the scores; all processes call it at the same place.

        Raises:
            SharedError: a function failed on GIVE_UP samples in a row, or did not return one number per sample.
        """
        from jaxrlhf.distributed import from_primary

        if self._result is None:
            outcomes, error = from_primary("the reward functions", self._gathered)
            if error is not None:
                raise SharedError(error)
            self._result = self._combined({name: Outcome.from_json(values) for name, values in outcomes.items()})
        return self._result

    def _gathered(self) -> tuple[dict[str, Outcome], str | None]:
        """Every function's outcome, and the first error; both travel to the other processes as JSON."""
        outcomes: dict[str, Outcome] = {}
        for name, job in self._jobs.items():
            try:
                outcome = self._rewards.wait(f"the reward function {name}", job)
            except InputError as error:
                return {}, str(error)
            for line in outcome.lines:
                self._rewards.say(f"{name}: {line}")
            self._report(outcome.failures)
            if error := self._given_up(name, outcome):
                return {}, error
            outcomes[name] = outcome
        return outcomes, None

    def _given_up(self, name: str, outcome: Outcome) -> str | None:
        """The error of a function that failed on GIVE_UP samples in a row, or None."""
        counts, failures = self._rewards.failed_in_a_row, outcome.failures
        applied = sum(value is not None for value in outcome.values)
        if applied:
            counts[name] = counts[name] + len(failures) if len(failures) == applied else 0
        if counts[name] < GIVE_UP or not failures:
            return None
        first = failures[0]
        return (
            f"reward function {name} gave none of the last {counts[name]} samples a score; sample {first.sample}: "
            f"{first.reason}\n{self._shown(first.sample)}\nCorrect the function, or the columns that it reads"
        )

    def _shown(self, sample: int) -> str:
        """The prompt and the response of a sample, for messages."""
        k = self._samples.rows.index(sample)
        return describe(self._samples.prompts[k], self._samples.responses[k])

    def _report(self, failures: list[Failure]) -> None:
        """Prints the first failures, and the number of the others."""
        for function, sample, reason in failures[:SHOWN]:
            shown = self._shown(sample)
            self._rewards.say(f"reward function {function} gave sample {sample} no score: {reason}\n{shown}")
        if len(failures) > SHOWN:
            self._rewards.say(f"… and {len(failures) - SHOWN} more samples of this batch without a score")

    def _combined(self, outcomes: dict[str, Outcome]) -> RewardResult:
        """The result of the whole batch."""
        weights, size = self._rewards.weights, self._size
        parts, total = {}, np.zeros(size)
        applies = np.full(size, not any(weights.values()))
        applies[np.setdiff1d(np.arange(size), self._samples.rows)] = True  # rows that are not scored
        numbers: dict[str, list[float]] = {}
        extras: dict[str, list[object]] = {}
        for name in self._rewards.functions:
            parts[name] = part = np.zeros(size, np.float32)
            if name not in outcomes:
                continue
            values = np.array([np.nan if v is None else v for v in outcomes[name].values], np.float32)
            applied = np.array([v is not None for v in outcomes[name].values], bool)
            part[self._samples.rows] = values
            if weights[name]:
                total[self._samples.rows] += weights[name] * np.where(applied, values.astype(np.float64), 0.0)
                applies[self._samples.rows] |= applied
            numbers |= {f"{name}/{key}": logged for key, logged in outcomes[name].numbers.items()}
            for key, column in outcomes[name].extras.items():
                wide = extras.setdefault(key, [None] * size)
                for row, value in zip(self._samples.rows, column, strict=True):
                    wide[row] = value
        return RewardResult(
            scores=np.where(applies, total, np.nan).astype(np.float32),
            parts=parts,
            failures=tuple(failure for outcome in outcomes.values() for failure in outcome.failures),
            seconds={name: outcome.seconds for name, outcome in outcomes.items()},
            applies=applies,
            passed_over={name: sum(v is None for v in outcome.values) for name, outcome in outcomes.items()},
            numbers=numbers,
            extras=extras,
        )
