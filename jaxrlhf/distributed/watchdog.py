"""Ends a run that no longer moves, with the stacks of all processes, so that a launcher can start it again."""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import jax

from jaxrlhf.distributed.activity import activity
from jaxrlhf.distributed.processes import stop_all

REMEMBERED = 50  # durations of a kind of work that decide its usual time
FIRST = 12  # time limit of work without a usual time, in floors
TICK = 1.0  # seconds between two looks
RESCUE_LIMIT = 60.0  # seconds for a last checkpoint


@dataclass
class Work:
    """A part of the run that is under way.

    Attributes:
        kind: work of one kind usually takes the same time.
        name: name for messages.
        limit: seconds after which the run ends.
        seconds: duration until now. Compilations do not count, nor the time in which the process was stopped, nor the
            work within this one.
    """

    kind: str
    name: str
    limit: float
    seconds: float = 0.0


class Watchdog:
    """Watches the work of a run, from a thread of its own; a context manager.

    Work that takes `factor` times its usual time, the median of its kind, and at least `floor` seconds, ends all
    processes with status 75. They print their stacks first, and a single process tries to save a checkpoint.

    Args:
        factor: 0: never act.
        floor: seconds.
        rescue: called with the kind of work, saves what it can, and returns what it did, in words.
    """

    def __init__(self, factor: float, floor: float, rescue: Callable[[str], str]) -> None:
        self.factor, self.floor, self.rescue = factor, floor, rescue
        self._durations: dict[str, deque[float]] = {}
        self._work: Work | None = None
        self._over: threading.Event | None = None

    def __enter__(self) -> Self:
        if self.factor:
            self._over = threading.Event()
            threading.Thread(target=self._watch, args=(self._over,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._over is not None:
            self._over.set()

    @contextmanager
    def work(self, kind: str, name: str = "") -> Iterator[None]:
        """Watches the body: work of a kind, with a name for messages (default: the kind)."""
        around, self._work = self._work, Work(kind, name or kind, self.limit(kind))
        work = self._work
        try:
            yield
            self._durations.setdefault(kind, deque(maxlen=REMEMBERED)).append(work.seconds)
        finally:
            self._work = around

    def usual(self, kind: str) -> float | None:
        """The usual duration of a kind of work, in seconds; None before the first."""
        return statistics.median(self._durations[kind]) if kind in self._durations else None

    def limit(self, kind: str) -> float:
        """Seconds that work of a kind may take."""
        usual = self.usual(kind)
        return self.floor * FIRST if usual is None else max(self.floor, self.factor * usual)

    def _watch(self, over: threading.Event) -> None:
        last = time.monotonic()
        while not over.wait(TICK):
            now, work = time.monotonic(), self._work
            passed, last = min(now - last, 2 * TICK), now  # longer: this process was stopped
            if work is not None and not activity.compiling:
                work.seconds += passed
                if work.seconds > work.limit:
                    return self._end(work)

    def _end(self, work: Work) -> None:
        usual = self.usual(work.kind)
        known = "it has no usual time yet" if usual is None else f"usually {usual:.4g} s"
        reason = f"{work.name} takes longer than {work.limit:.4g} s ({known}; --watchdog {self.factor:g})"
        activity.print(2)
        stop_all(f"{reason}; {self._rescued(work.kind)}")

    def _rescued(self, kind: str) -> str:
        """Saves a checkpoint, if that is possible; returns what was done."""
        if jax.process_count() > 1:
            return "no checkpoint was saved, as that needs all processes"
        done = ["no checkpoint was saved, as saving takes too long"]

        def rescue() -> None:
            try:
                done[0] = self.rescue(kind)
            except Exception as error:  # whatever keeps the run from moving
                done[0] = f"no checkpoint was saved ({type(error).__name__}: {error})"

        thread = threading.Thread(target=rescue, daemon=True)
        thread.start()
        thread.join(RESCUE_LIMIT)
        return done[0]
