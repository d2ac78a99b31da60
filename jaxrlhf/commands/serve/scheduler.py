"""Moves samples through the slots of one model, in a thread of its own: a queue, joins, steps, cancellation."""

import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxrlhf.engine import Sampled, SlotBatch, SlotSampling

logger = logging.getLogger(__name__)


class Event(NamedTuple):
    """A token of a sample, or the end of one that has no more tokens."""

    job: "Job"
    token: int | None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    """With the last event: stop (an end token), length, timeout or error."""


@dataclass(eq=False)
class Job:
    """One sample of a request."""

    prompt: list[int]
    """Samples of one prompt share the list, and a prefill."""
    sampling: SlotSampling
    max_tokens: int
    top_logprobs: int
    """Likeliest tokens to report."""
    deadline: float
    """In the time of `time.monotonic`."""
    deliver: Callable[["Event"], object]
    """Called in the thread of the scheduler."""
    submitted: float = field(default_factory=time.monotonic)
    dispatched: int = 0
    """Tokens that the devices were asked for."""
    received: int = 0
    done: bool = False
    """Nothing more is delivered: it has ended or was cancelled."""


class QueueFull(Exception):
    """No room for the samples of a request."""


class Stopped(Exception):
    """The scheduler has stopped."""


class Scheduler:
    """Keeps the slots of a batch filled from a queue.

    A step is dispatched before the tokens of the one before it are read, so that the devices do not wait for the host.

    Args:
        batch: The slots. No other thread may use them once this one has started.
        ends: The token ids that end a response.
        max_queue: Most samples that wait.
        observe: Called with each event and the seconds since its sample was submitted.
    """

    def __init__(
        self, batch: SlotBatch, ends: Iterable[int], max_queue: int, observe: Callable[[Event, float], object]
    ) -> None:
        self.batch, self.ends, self.max_queue, self.observe = batch, frozenset(ends), max_queue, observe
        self.error: Exception | None = None
        self.waiting: collections.deque[Job] = collections.deque()
        self.running: dict[int, Job] = {}
        """The job of each slot that is taken."""
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._results: collections.deque[tuple[dict[int, Job], Sampled]] = collections.deque()

    def start(self, on_failure: Callable[[], object]) -> None:
        """Starts the thread. `on_failure` is called when an error has ended it."""
        self._thread = threading.Thread(target=self._work, args=(on_failure,), name="scheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, and with it every sample."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, jobs: list[Job]) -> None:
        """Queues the samples of a request. Raises QueueFull unless all of them have room."""
        with self._changed:
            if self._stopping or self.error is not None:
                raise Stopped
            free = max(self.batch.slots - len(self.running) - len(self.waiting), 0)
            if len(self.waiting) + len(jobs) > self.max_queue + free:
                raise QueueFull
            self.waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Ends samples early; they deliver nothing more, and their slots become free before the next step."""
        with self._changed:
            for job in jobs:
                job.done = True
            self.waiting = collections.deque(job for job in self.waiting if not job.done)
            self._changed.notify()

    def _work(self, on_failure: Callable[[], object]) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # whatever the devices raise: the server ends, and says why
            logger.exception("the model's thread has failed")
            self.error = error
            on_failure()
        finally:
            with self._changed:
                self._stopping = True
            for job in [*self.running.values(), *self.waiting]:
                self._send(job, Event(job, None, finish="error"))

    def _turn(self) -> bool:
        """One step of the batch, after the joins that it makes room for; False at the end."""
        with self._changed:
            while not (self.waiting or self.running or self._results or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            self._expire()
            self._free()
            groups = list(self._groups())
        for group in groups:
            first = next(iter(group.values()))
            self._dispatched(self.batch.join(first.prompt, {slot: job.sampling for slot, job in group.items()}), group)
        if self.running:
            self._dispatched(self.batch.step(), dict(self.running))
        while len(self._results) > bool(self.running):
            self._read(*self._results.popleft())
        return True

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [job for job in (*self.waiting, *self.running.values()) if job.deadline < now and not job.done]:
            self._send(job, Event(job, None, finish="timeout"))
        self.waiting = collections.deque(job for job in self.waiting if not job.done)

    def _free(self) -> None:
        """Frees the slots of samples that need no more tokens."""
        for slot, job in list(self.running.items()):
            if job.done or job.dispatched == job.max_tokens:
                self.batch.leave(slot)
                del self.running[slot]

    def _groups(self) -> Iterable[dict[int, Job]]:
        """Yields the samples that begin, by slot: in the order of the queue, those of one prompt together."""
        free = [slot for slot in range(self.batch.slots) if slot not in self.running]
        while free and self.waiting:
            group, prompt = {}, self.waiting[0].prompt
            while free and self.waiting and self.waiting[0].prompt is prompt:
                group[free.pop(0)] = self.waiting.popleft()
            self.running |= group
            yield group

    def _dispatched(self, sampled: Sampled, jobs: dict[int, Job]) -> None:
        for job in jobs.values():
            job.dispatched += 1
        self._results.append((jobs, sampled))
        self._free()

    def _read(self, jobs: dict[int, Job], sampled: Sampled) -> None:
        """Delivers the tokens of one program, which this waits for."""
        jobs = {slot: job for slot, job in jobs.items() if not job.done}
        if not jobs:
            return
        tokens, logprobs = np.asarray(sampled.token).tolist(), np.asarray(sampled.logprob).tolist()
        wanted = any(job.top_logprobs for job in jobs.values())
        tops = [np.asarray(x).tolist() for x in (sampled.top_tokens, sampled.top_logprobs)] if wanted else []
        for slot, job in jobs.items():
            job.received += 1
            finish = "length" if job.received == job.max_tokens else None
            finish = "stop" if tokens[slot] in self.ends else finish
            top = tuple(zip(*(x[slot][: job.top_logprobs] for x in tops), strict=True)) if job.top_logprobs else ()
            self._send(job, Event(job, tokens[slot], logprobs[slot], top, finish))

    def _send(self, job: Job, event: Event) -> None:
        if not job.done:
            job.done = event.finish is not None
            self.observe(event, time.monotonic() - job.submitted)
            job.deliver(event)
