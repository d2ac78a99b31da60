"""Runs reward functions beside the work on the devices, and makes of what they return one score per sample."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.distributed import from_primary, is_primary
from jaxrlhf.errors import InputError, SharedError
from jaxrlhf.rewards.calls import Failure, Outcome, Samples, call_captured, describe
from jaxrlhf.rewards.functions import load_function

SHOWN = 3  # failed samples that are shown of each call
WAIT = 30.0  # seconds after which a wait for a function is said
GIVE_UP = 64  # samples in a row without a score after which a function is taken to be broken


@dataclass(frozen=True)
class RewardResult:
    """What the functions gave a batch; the same on every process. A sample that failed has NaN."""

    scores: np.ndarray
    """float32 `[B]`: the sum of the parts times their weights. 0 in rows that do not count."""
    parts: dict[str, np.ndarray]
    """float32 `[B]` of each function, unweighted."""
    failures: tuple[Failure, ...]
    seconds: dict[str, float]
    """How long each function worked."""


class Rewards:
    """Several reward functions and their weights.

    `functions`: specs, as in the flag `reward_functions`, or Python callables; `weights`: default 1 each. Every
    function has a thread of its own, so functions run beside one another and calls of one never overlap; in a run of
    several processes only process 0 calls them. `say` gets what they print and which samples failed. Raises InputError
    for a function that cannot be found or called.
    """

    def __init__(
        self,
        functions: Sequence[str | Callable[..., Any]],
        weights: Sequence[float] = (),
        *,
        say: Callable[[str], Any] = print,
    ) -> None:
        if weights and len(weights) != len(functions):
            raise InputError(f"{len(weights)} weights for {len(functions)} reward functions; give one each, or none")
        loaded = [load_function(function) for function in functions]
        self.functions = dict(zip(distinct([f.name for f in loaded]), loaded, strict=True))
        """By the names that the parts of a result have."""
        self.weights = dict(zip(self.functions, weights or (1.0,) * len(loaded), strict=True))
        self.say = say
        self._workers: dict[str, _Worker] = {}
        self.failed_in_a_row = dict.fromkeys(self.functions, 0)
        """Samples since each function last gave one a score (on process 0)."""

    def __bool__(self) -> bool:
        return bool(self.functions)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the functions cannot do without."""
        return tuple(dict.fromkeys(c for f in self.functions.values() for c in f.columns.values()))

    def check_references(self, data: Any, chunk: int = 1000) -> None:
        """Raise InputError for the first row of `data` (a PromptData) whose reference no response could match."""
        checks = [(name, f) for name, f in self.functions.items() if f.check_references is not None]
        for start in range(0, len(data) if checks else 0, chunk):
            indices = range(start, min(start + chunk, len(data)))
            columns = data.columns(indices)
            for name, function in checks:
                column = function.columns["references"]
                for i, reference in zip(indices, columns[column], strict=True):
                    try:
                        function.check_references(reference)
                    except ValueError as error:
                        source, row = data.source(i)
                        raise InputError(
                            f"{source} row {row + 1}, column '{column}': {error}, which reward function {name} needs; "
                            f"mend the data, or name another column: {name}:column=…"
                        ) from error

    def submit(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
        rows: Sequence[bool] | np.ndarray | None = None,
    ) -> "Handle":
        """Start scoring a batch of B samples; `result()` of what is returned waits for it.

        `columns`: other fields of the samples, B values each. `rows`, bool `[B]`: which samples count (default: all);
        the functions do not see the others. On several processes all call it with the whole batch.
        """
        size = len(prompts)
        columns = {} if columns is None else columns
        for name, values in (("responses", responses), *columns.items()):
            if len(values) != size:
                raise ValueError(f"{name}: {len(values)} values for {size} prompts")
        counted = list(range(size)) if rows is None else np.flatnonzero(np.asarray(rows)).tolist()
        samples = Samples(
            counted,
            [prompts[i] for i in counted],
            [responses[i] for i in counted],
            {name: [values[i] for i in counted] for name, values in columns.items()},
        )
        jobs: dict[str, Future] = {}
        for name, function in self.functions.items():
            function.arguments(samples.columns)  # a missing column is said before anything is waited for
            if is_primary() and counted:
                if name not in self._workers:
                    self._workers[name] = _Worker(name)
                jobs[name] = self._workers[name].put(lambda name=name, f=function: call_captured(name, f, samples))
        return Handle(self, samples, size, jobs)


def finite_mean(values: np.ndarray) -> float | None:
    """The mean of the finite ones; None where there is none."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def distinct(names: list[str]) -> list[str]:
    """The names, with `_2`, `_3`, … after those that occurred before."""
    result: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in result:
            number += 1
            candidate = f"{name}_{number}"
        result.append(candidate)
    return result


class Handle:
    """A batch that is being scored."""

    def __init__(self, rewards: Rewards, samples: Samples, size: int, jobs: dict[str, Future]) -> None:
        self._rewards, self._samples, self._size, self._jobs = rewards, samples, size, jobs
        self._result: RewardResult | None = None

    def result(self) -> RewardResult:
        """The scores, when all functions are done; all processes call it at the same place.

        Raises SharedError for a function that failed on GIVE_UP samples in a row or more, or returned what is no list
        of one number per sample.
        """
        if self._result is None:
            outcomes, error = from_primary("the reward functions", self._gathered)
            if error is not None:
                raise SharedError(error)
            self._result = self._combined({name: Outcome(*values) for name, values in outcomes.items()})
        return self._result

    def _gathered(self) -> tuple[dict[str, Any], str | None]:
        """Every function's outcome as JSON values, and the first error."""
        outcomes: dict[str, Any] = {}
        for name, job in self._jobs.items():
            try:
                outcome = self._wait(name, job)
            except InputError as error:
                return {}, str(error)
            for line in outcome.lines:
                self._rewards.say(f"{name}: {line}")
            self._report(outcome.failures)
            if error := self._given_up(name, outcome.failures):
                return {}, error
            outcomes[name] = list(outcome)
        return outcomes, None

    def _wait(self, name: str, job: Future) -> Outcome:
        waited, limit = 0.0, WAIT
        while not wait([job], limit).done:
            waited, limit = waited + limit, waited + limit
            self._rewards.say(f"waiting for the reward function {name} for {waited:.0f}s already…")
        return job.result()

    def _given_up(self, name: str, failures: list[Failure]) -> str | None:
        """Why the function is taken to be broken, or None."""
        counts = self._rewards.failed_in_a_row
        counts[name] = counts[name] + len(failures) if len(failures) == len(self._samples.rows) else 0
        if counts[name] < GIVE_UP:
            return None
        first = failures[0]
        return (
            f"reward function {name} gave none of the last {counts[name]} samples a score; sample {first.sample}: "
            f"{first.reason}\n{self._shown(first.sample)}\nMend the function, or the columns that it reads"
        )

    def _shown(self, sample: int) -> str:
        k = self._samples.rows.index(sample)
        return describe(self._samples.prompts[k], self._samples.responses[k])

    def _report(self, failures: list[Failure]) -> None:
        for function, sample, reason in failures[:SHOWN]:
            shown = self._shown(sample)
            self._rewards.say(f"reward function {function} gave sample {sample} no score: {reason}\n{shown}")
        if len(failures) > SHOWN:
            self._rewards.say(f"… and {len(failures) - SHOWN} more samples of this batch no score")

    def _combined(self, outcomes: dict[str, Outcome]) -> RewardResult:
        parts, total = {}, np.zeros(self._size)
        for name in self._rewards.functions:
            part = np.zeros(self._size, np.float32)
            if name in outcomes:
                part[self._samples.rows] = np.asarray(outcomes[name].values, np.float32)
            parts[name] = part
            if self._rewards.weights[name]:
                total += self._rewards.weights[name] * part.astype(np.float64)
        failures = tuple(Failure(*failure) for outcome in outcomes.values() for failure in outcome.failures)
        seconds = {name: outcome.seconds for name, outcome in outcomes.items()}
        return RewardResult(total.astype(np.float32), parts, failures, seconds)


class _Worker:
    """A thread that makes one call after the other; it does not keep the program from ending."""

    def __init__(self, name: str) -> None:
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"reward {name}", daemon=True).start()

    def put(self, call: Callable[[], Any]) -> Future:
        future: Future = Future()
        self.jobs.put((future, call))
        return future

    def _run(self) -> None:
        while True:
            future, call = self.jobs.get()
            try:
                future.set_result(call())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
