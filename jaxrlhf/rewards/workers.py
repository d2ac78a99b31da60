"""The thread that calls a reward function, in this process or in one of the function's own."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from jaxrlhf.rewards.arguments import Function, Samples
from jaxrlhf.rewards.calls import Outcome, call_captured, close_event_loop
from jaxrlhf.rewards.functions import RewardFunction, has_own_process, load_function
from jaxrlhf.rewards.processes import Limits, RewardProcess

T = TypeVar("T")
Jobs = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Worker:
    """Calls one reward function, one call after the other, in a daemon thread: the program can end during a call.

    Attributes:
        name: the spec, or the name of the Python function.
        function: a future of the loaded function.
        stop: ends the thread, and the function's process. Called when nothing refers to the worker any more, too.
    """

    def __init__(self, function: str | Function, limits: Limits) -> None:
        self.name = function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)
        self._jobs: Jobs = queue.SimpleQueue()
        process = RewardProcess(str(function), limits) if has_own_process(function) else None
        self._process = process
        self.stop = weakref.finalize(self, _stop, self._jobs, process)
        self.function: Future[RewardFunction]
        if process is not None:  # its own thread starts the process, which ends with the thread
            self.function = self._put(process.load)
        else:
            self.function = Future()
            self.function.set_result(load_function(function))
        threading.Thread(target=_run, args=(self._jobs,), name=f"reward {self.name}", daemon=True).start()

    def call(self, name: str, samples: Samples) -> Future[Outcome]:
        """Queues a call; `name` is the function's name in failures."""
        if self._process is not None:
            return self._put(partial(self._process.call, name, samples))
        return self._put(partial(call_captured, name, self.function.result(), samples))

    def _put(self, call: Callable[[], T]) -> Future[T]:
        future: Future[Any] = Future()
        self._jobs.put((future, call))
        return future


def _run(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        future, call = job
        try:
            future.set_result(call())
        except BaseException as error:  # `Future.result` raises it
            future.set_exception(error)
        del future, call, job  # else they keep the worker alive while the thread waits
    close_event_loop()


def _stop(jobs: Jobs, process: RewardProcess | None) -> None:
    jobs.put(None)
    if process is not None:
        process.stop()
