"""A tracker at work in a thread of its own, so that a slow or broken one costs a run no time and never ends it."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config.secrets import redacted
from jaxrlhf.runs.trackers.base import Cell, TrackedRun, Tracker

QUEUE_SIZE = 10_000
"""Calls that may wait for a slow tracker."""


class Background:
    """Queues the calls of one tracker and makes them in order, in a thread.

    The first call that raises ends the tracker with one warning. Calls beyond `QUEUE_SIZE` are dropped, with one
    warning too.

    Args:
        name: For messages.
        tracker: Not started yet.
        run: What it is told of the run.
        say: Prints a line.
        started: Called with the name and what `start` returned.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: TrackedRun,
        say: Callable[[str], None],
        started: Callable[[str, dict[str, str]], None],
    ) -> None:
        self.name, self.rewinds, self.measures_system = name, tracker.rewinds, tracker.measures_system
        self._tracker, self._say, self._started = tracker, say, started
        self._queue: queue.Queue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = queue.Queue(QUEUE_SIZE)
        self._broken, self._dropped = False, False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._put(self._start, run)
        self._thread.start()

    def _start(self, run: TrackedRun) -> None:
        self._started(self.name, self._tracker.start(run))

    def restart(self, run: TrackedRun) -> None:
        """Ends the tracker and starts it again, for a run that went back to `run.rewound_to`."""
        self._put(self._tracker.finish, None, False)
        self._put(self._start, run)

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        self._put(self._tracker.log, step, metrics)

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        self._put(self._tracker.table, step, title, columns, rows)

    def finish(self, report: Path | None, failed: bool) -> None:
        """Queues the end of the run; `wait` waits for it."""
        self._put(self._tracker.finish, report, failed)
        self._put(None)

    def wait(self, seconds: float) -> None:
        """Waits until everything is sent, for at most `seconds`."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say(f"{self.name}: not everything is sent after {seconds:.0f} s; the run ends without it")

    def _put(self, call: Callable[..., object] | None, *arguments: object) -> None:
        if self._broken and call is not None:
            return
        try:
            self._queue.put_nowait(None if call is None else (call, arguments))
        except queue.Full:
            if not self._dropped:
                self._say(f"{self.name}: too slow, {QUEUE_SIZE} calls wait for it; some metrics are not sent")
            self._dropped = True

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._broken:
                continue
            call, arguments = item
            try:
                call(*arguments)
            except Exception as error:  # a tracker may fail in any way, and no failure may end a training run
                self._broken = True
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self._say(redacted(f"{self.name}: {reason}; the run goes on without it, its files are complete"))
