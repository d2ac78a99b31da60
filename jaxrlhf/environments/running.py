"""Calls of environments and tools in threads, each with a time limit.

A call that takes too long is given up. A coroutine is cancelled, and Python code gets an exception at its next line. C
code that does not return keeps its thread, which does not keep the program from ending.
"""

import asyncio
import contextlib
import ctypes
import inspect
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from jaxrlhf.config.imports import exception_line
from jaxrlhf.environments.protocol import WrongAnswer

WORKERS = 32
"""Calls at a time; each has a thread."""

_own = threading.local()


class TookTooLong(BaseException):
    """Raised in the thread of a call whose time is over. No `except Exception` of the user's catches it."""


class Call:
    """A call in progress: `result` is set unless there is an `error`, a text, when it is finished."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.result: Any = None
        self.error: str | None = None
        self.coroutine: Future[Any] | None = None
        self.deadline = float("inf")
        self.given_up = False
        self.thread: threading.Thread | None = None


class Calls:
    """Runs calls, at most WORKERS at a time, each for at most `seconds` (0: no limit)."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._queued: list[Call] = []
        self._running: list[Call] = []
        self._finished: queue.SimpleQueue[Call] = queue.SimpleQueue()

    def start(self, function: Callable[[], object]) -> Call:
        """Queues a call of `function`."""
        call = Call(function)
        self._queued.append(call)
        self._begin()
        return call

    def finished(self, block: bool) -> list[Call]:
        """The calls that have finished or run out of time since the last time; `block` waits for at least one."""
        done: list[Call] = []
        while True:
            done += self._drained(block and not done)
            done += self._overdue()
            self._begin()
            if done or not block or not self._running:
                return done

    def _begin(self) -> None:
        while self._queued and len(self._running) < WORKERS:
            call = self._queued.pop(0)
            call.deadline = time.monotonic() + (self.seconds or float("inf"))
            call.thread = threading.Thread(target=self._run, args=(call,), name="environment", daemon=True)
            self._running.append(call)
            call.thread.start()

    def _run(self, call: Call) -> None:
        with contextlib.suppress(TookTooLong):  # raised after the user's code, by a hair
            _own.call = call
            try:
                call.result = call.function()
            except WrongAnswer as error:
                call.error = str(error)
            except BaseException as error:  # whatever the user's code raises
                call.error = exception_line(error)
            self._finished.put(call)

    def _drained(self, wait: bool) -> list[Call]:
        found: list[Call] = []
        try:
            if wait and self._running:
                left = min(call.deadline for call in self._running) - time.monotonic()
                found.append(self._finished.get(timeout=None if left == float("inf") else max(left, 0.0)))
            while True:
                found.append(self._finished.get_nowait())
        except queue.Empty:
            pass
        found = [call for call in found if not call.given_up]
        self._running = [call for call in self._running if call not in found]
        return found

    def _overdue(self) -> list[Call]:
        now = time.monotonic()
        late = [call for call in self._running if call.deadline <= now]
        for call in late:
            call.given_up, call.error = True, f"took longer than {self.seconds:g} s (--environment_timeout)"
            self._running.remove(call)
            if call.coroutine is not None:
                call.coroutine.cancel()
            elif call.thread is not None and call.thread.ident is not None and call.thread.is_alive():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(call.thread.ident), ctypes.py_object(TookTooLong)
                )
        return late


def resolved(value: object) -> Any:
    """The result of a coroutine, which runs in the event loop that all environments share; other values as they are."""
    if not inspect.isawaitable(value):
        return value

    async def wait() -> object:
        return await value

    future = asyncio.run_coroutine_threadsafe(wait(), _event_loop())
    call: Call | None = getattr(_own, "call", None)
    if call is not None:
        call.coroutine = future
    try:
        return future.result()
    finally:
        if call is not None:
            call.coroutine = None


_LOOP: list[asyncio.AbstractEventLoop] = []
_STARTING = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    with _STARTING:
        if not _LOOP:
            _LOOP.append(asyncio.new_event_loop())
            threading.Thread(target=_LOOP[0].run_forever, name="environments", daemon=True).start()
    return _LOOP[0]
