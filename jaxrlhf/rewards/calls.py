"""One call of a reward function: what it printed, what it returned as numbers, and which samples it failed on."""

import contextlib
import io
import numbers
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.config.imports import exception_line
from jaxrlhf.errors import InputError
from jaxrlhf.rewards.functions import RewardFunction

SHOWN_LINES = 20  # lines of a function's own output that are shown of each call
SHOWN_TEXT = 300  # characters of a prompt or response in a message


class Failure(NamedTuple):
    """A sample that a function gave no score."""

    function: str
    sample: int
    """Its row in the batch."""
    reason: str


class Samples(NamedTuple):
    """The rows of a batch that count."""

    rows: list[int]
    prompts: list[str]
    responses: list[str]
    columns: dict[str, list[Any]]


class Outcome(NamedTuple):
    values: list[float]
    failures: list[Failure]
    lines: list[str]
    seconds: float


def describe(prompt: str, response: str) -> str:
    """A sample for people, cut in the middle where it is long."""

    def cut(text: str) -> str:
        return text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT // 2]} … {text[-SHOWN_TEXT // 2 :]}"

    return f"  prompt: {cut(prompt)!r}\n  response: {cut(response)!r}"


def call_captured(name: str, function: RewardFunction, samples: Samples) -> Outcome:
    """`call`, timed, with what the function printed."""
    begin = time.monotonic()
    with captured() as output:
        values, failures, note = call(name, function, samples)
    lines = output.getvalue().splitlines()
    more = len(lines) - SHOWN_LINES
    lines = lines[:SHOWN_LINES] + ([f"… and {more} more lines"] if more > 0 else [])
    return Outcome(values, failures, lines + note, time.monotonic() - begin)


def call(name: str, function: RewardFunction, samples: Samples) -> tuple[list[float], list[Failure], list[str]]:
    """One value per sample, NaN for those that failed, which are listed; and notes.

    A call that raises is made again for each sample alone, to find those that it fails on.
    """
    every = range(len(samples.rows))
    reasons: dict[int, str] = {}
    notes = []
    try:
        found = values_of(name, run(function, samples, every), len(every))
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        found, reasons = one_by_one(name, function, samples)
        if not reasons:
            whole = exception_line(error, function.function)
            notes = [f"raised {whole} on the batch, but on no sample alone: the scores are those of single samples"]
    with np.errstate(over="ignore"):
        values = [float("nan") if v is None else float(np.float32(v)) for v in found]
    bad = [k for k in every if not np.isfinite(values[k])]
    failures = [Failure(name, samples.rows[k], reasons.get(k, f"returned {found[k]}")) for k in bad]
    for k in bad:
        values[k] = float("nan")
    return values, failures, notes


def one_by_one(name: str, function: RewardFunction, samples: Samples) -> tuple[list[float | None], dict[int, str]]:
    """Each sample's value alone, None where the function raised, and why it did."""
    found: list[float | None] = []
    reasons = {}
    for k in range(len(samples.rows)):
        try:
            found += values_of(name, run(function, samples, [k]), 1)
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            found.append(None)
            reasons[k] = exception_line(error, function.function)
    return found, reasons


def run(function: RewardFunction, samples: Samples, which: Sequence[int]) -> Any:
    """Call the function on some of the samples, with lists of its own."""
    columns = {name: [values[k] for k in which] for name, values in samples.columns.items()}
    prompts, responses = ([texts[k] for k in which] for texts in (samples.prompts, samples.responses))
    return function.function(prompts, responses, **function.arguments(columns), **function.options)


def values_of(name: str, returned: Any, size: int) -> list[float | None]:
    """What a function returned as numbers or None; InputError for the wrong type or count."""
    expected = f"reward function {name}: must return one number per response"
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__len__"):
        hint = "; an async function must be wrapped in one that waits for it" if hasattr(returned, "cr_frame") else ""
        hint = hint or ("; put the generator in list(…)" if hasattr(returned, "gi_frame") else "")
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
    if value is None or isinstance(value, numbers.Real):
        return None if value is None else _float(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item") and isinstance(value.item(), numbers.Real):
        return float(value.item())
    raise InputError(f"{expected}; value {k} is {_kind(value)}: {value!r}"[:500])


def _float(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        return float("inf")


def _kind(value: Any) -> str:
    known = {str: "a text", list: "a list", tuple: "a tuple", dict: "a dict", type(None): "None", float: "one number"}
    return {**known, int: "one number"}.get(type(value), f"a {type(value).__name__}")


class _Threads:
    """Stands in for a stream: what some threads write goes to their own buffers, all else to the stream."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.buffers: dict[int, io.StringIO] = {}

    def write(self, text: str) -> int:
        return self.buffers.get(threading.get_ident(), self.stream).write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_SWITCH = threading.Lock()


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Catch what this thread prints, and leave the other threads' output alone."""
    buffer, thread = io.StringIO(), threading.get_ident()
    with _SWITCH:
        for name in ("stdout", "stderr"):
            if not isinstance(getattr(sys, name), _Threads):
                setattr(sys, name, _Threads(getattr(sys, name)))
            getattr(sys, name).buffers[thread] = buffer
        both = [sys.stdout, sys.stderr]
    try:
        yield buffer
    finally:
        with _SWITCH:
            for name, stream in zip(("stdout", "stderr"), both, strict=True):
                del stream.buffers[thread]
                if not stream.buffers and getattr(sys, name) is stream:
                    setattr(sys, name, stream.stream)
