"""One call of a reward function: its output, its scores as numbers, and the samples that it fails on."""

import contextlib
import inspect
import math
import numbers
import sys
import threading
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

from jaxrlhf.config.imports import exception_line
from jaxrlhf.errors import InputError
from jaxrlhf.rewards.arguments import Log, Samples
from jaxrlhf.rewards.functions import RewardFunction

if TYPE_CHECKING:
    import asyncio

SHOWN_LINES = 20  # lines of a function's own output that are shown of each call
SHOWN_TEXT = 300  # characters of a prompt or response in a message
LINE = 1000  # characters of a line of output that are shown
KEPT_TEXT = 1 << 16  # characters of a function's own output that are kept of each call


class Failure(NamedTuple):
    """A sample without a score."""

    function: str
    sample: int
    """Its row in the batch."""
    reason: str


class Outcome(NamedTuple):
    """Result of a call.

    Attributes:
        values: scores; NaN for a sample that failed, None for one that the function does not apply to.
        failures: samples that failed.
        lines: what the function printed.
        seconds: duration.
        numbers: what the function logged by `log_metric`, by name.
        extras: a value per sample that it logged by `log_extra`, by name.
    """

    values: list[float | None]
    failures: list[Failure]
    lines: list[str]
    seconds: float
    numbers: dict[str, list[float]]
    extras: dict[str, list[object]]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "Outcome":
        """Restores an outcome from the list that JSON makes of it."""
        values, failures, *rest = value
        return cls(values, [Failure(*failure) for failure in failures], *rest)


def describe(prompt: str, response: str) -> str:
    """Formats a sample for a message; cuts the middle of long texts."""

    def cut(text: str) -> str:
        return text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT // 2]} … {text[-SHOWN_TEXT // 2 :]}"

    return f"  prompt: {cut(prompt)!r}\n  response: {cut(response)!r}"


def call_captured(name: str, function: RewardFunction, samples: Samples) -> Outcome:
    """Calls a function on samples, and captures what it prints.

    When the call raises, the function is called again for each sample alone, to find the samples that it fails on.

    Raises:
        InputError: the function returns something other than one number per sample.
    """
    begin = time.monotonic()
    with captured() as output:
        found, reasons, notes, log = scores(name, function, samples)
    values: list[float | None] = []
    failures = []
    for k, (row, value) in enumerate(zip(samples.rows, found, strict=True)):
        if k in reasons or value is not None:
            with np.errstate(over="ignore"):
                number = float(np.float32(np.nan if value is None else value))
            if not math.isfinite(number):
                failures.append(Failure(name, row, reasons.get(k, f"returned {value}")))
                number = math.nan
            values.append(number)
        else:
            values.append(None)
    seconds = time.monotonic() - begin
    return Outcome(values, failures, output.lines() + notes, seconds, log.numbers, log.columns)


def scores(
    name: str, function: RewardFunction, samples: Samples
) -> tuple[list[float | None], dict[int, str], list[str], Log]:
    """One value per sample, None where the function raised or does not apply; the reason of each exception; notes; and
    what the function logged."""
    every = range(len(samples.rows))
    log = Log(len(every))
    values, error = run(name, function, samples, log)
    if values is not None:
        return values, {}, [], log
    found: list[float | None] = []
    reasons = {}
    log = Log(len(every))
    for k in every:
        alone = Log(1)
        values, reason = run(name, function, samples.take([k]), alone)
        found += [None] if values is None else values
        if reason is not None:
            reasons[k] = reason
            continue
        for key, numbers_ in alone.numbers.items():
            log.numbers.setdefault(key, []).extend(numbers_)
        for key, column in alone.columns.items():
            log.columns.setdefault(key, [None] * len(every))[k] = column[0]
    note = f"raised {error} on the batch, but on no sample alone: the scores are those of single samples"
    return found, reasons, [] if reasons else [note], log


def run(
    name: str, function: RewardFunction, samples: Samples, log: Log
) -> tuple[list[float | None] | None, str | None]:
    """Calls the function with copies of the lists: the values, or the exception's line."""
    args, named = function.arguments(samples, log)
    try:
        returned = function.function(*args, **named)
        if inspect.isawaitable(returned):
            returned = _event_loop().run(_awaited(returned))
        return values_of(name, returned, len(samples.rows)), None
    except InputError:
        raise
    except BaseException as error:  # whatever the user's code raises; Ctrl-C does not come to this thread
        line = exception_line(error, function.function)
        key = error.args[0] if isinstance(error, KeyError) and error.args else None
        if isinstance(key, str) and function.optional is None and key not in samples.columns:
            line += f"; the columns are {', '.join(samples.columns) or 'none'}: name '{key}' in reward_columns"
        return None, line


async def _awaited(value: Awaitable[object]) -> object:
    return await value


_LOOPS = threading.local()


def _event_loop() -> "asyncio.Runner":
    """The event loop of this thread. It stays, so that a function may keep its connections from call to call."""
    import asyncio  # only async functions need it, and every function's process would wait for it

    if not hasattr(_LOOPS, "runner"):
        _LOOPS.runner = asyncio.Runner()
    return _LOOPS.runner


def close_event_loop() -> None:
    """Closes the event loop of this thread, if it has one."""
    runner = _LOOPS.__dict__.pop("runner", None)
    if runner is not None:
        runner.close()


def values_of(name: str, returned: Any, size: int) -> list[float | None]:
    """Converts what a function returned to numbers or None. Raises InputError for another type or count."""
    expected = f"reward function {name}: must return one number per response"
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__len__"):
        hint = "; put the generator in list(…)" if hasattr(returned, "gi_frame") else ""
        hint = hint or ("; an option of its first parameter makes the function" if callable(returned) else "")
        raise InputError(f"{expected}, a list or array of {size}; it returned {_kind(returned)}{hint}")
    shape = getattr(returned, "shape", None)
    if shape is not None and len(shape) != 1:
        raise InputError(f"{expected}, of shape ({size},); it returned {_kind(returned)} of shape {tuple(shape)}")
    if isinstance(returned, set | frozenset):
        raise InputError(f"{expected}, in their order; it returned a set")
    values = list(returned)
    if len(values) != size:
        raise InputError(f"{expected}; it returned {len(values)} for {size} responses")
    return [_number(expected, k, value) for k, value in enumerate(values)]


def _number(expected: str, k: int, value: Any) -> float | None:
    """A Python, NumPy or JAX number as a float; None stays."""
    number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if number is None:
        return None
    if not isinstance(number, numbers.Real):
        raise InputError(f"{expected}; value {k} is {_kind(value)}: {value!r}"[:500])
    try:
        return float(number)
    except OverflowError:  # an int of hundreds of digits
        return float("inf")


def _kind(value: object) -> str:
    """The type of a value, for messages."""
    known = {str: "a text", list: "a list", tuple: "a tuple", dict: "a dict", type(None): "None", float: "one number"}
    return {**known, int: "one number"}.get(type(value), f"a {type(value).__name__}")


class Output:
    """The beginning of what a call prints, and the number of further lines."""

    def __init__(self) -> None:
        self.text, self.more = "", 0

    def write(self, text: str) -> int:
        room = KEPT_TEXT - len(self.text)
        self.text += text[:room]
        self.more += text[room:].count("\n")
        return len(text)

    def lines(self) -> list[str]:
        """The first SHOWN_LINES lines, and a line that counts the others."""
        lines = [line[:LINE] for line in self.text.splitlines()]
        more = self.more + max(0, len(lines) - SHOWN_LINES)
        return lines[:SHOWN_LINES] + ([f"… and {more} more lines"] if more else [])


class _Threads:
    """Replaces a stream: collects what some threads write in their own buffers; other threads write to the stream."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.buffers: dict[int, Output] = {}

    def write(self, text: str) -> int:
        return self.buffers.get(threading.get_ident(), self.stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_SWITCH = threading.Lock()


@contextlib.contextmanager
def captured() -> Iterator[Output]:
    """Captures what this thread prints; the output of other threads is not affected."""
    buffer, thread = Output(), threading.get_ident()
    streams: dict[str, _Threads] = {}
    with _SWITCH:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            streams[name] = stream if isinstance(stream, _Threads) else _Threads(stream)
            streams[name].buffers[thread] = buffer
            setattr(sys, name, streams[name])
    try:
        yield buffer
    finally:
        with _SWITCH:
            for name, stream in streams.items():
                del stream.buffers[thread]
                if not stream.buffers and getattr(sys, name) is stream:
                    setattr(sys, name, stream.stream)
