"""Activity of this process: the program that was started last, compilations, and the stacks of all threads."""

import faulthandler
import os
import threading
import time

import jax

from jaxrlhf.config.allocator import give_back

COMPILING = "/jax/core/compile/"
"""Events of JAX with this prefix are tracing, lowering and XLA's compilation: a scalar at the start, a duration at the
end."""
BACKEND = COMPILING + "backend_compile_duration"
"""The event of XLA's own part."""
LONG_COMPILE = 1.0
"""Seconds of a compilation after which the compiler's memory is given back."""


class Activity:
    """Notes on a process, which any thread may read."""

    def __init__(self) -> None:
        self.program = "none yet"
        """Name of the program that was started last."""
        self.compiled = "none yet"
        """Name of the function that JAX compiled last, or compiles."""
        self.compiling = False
        """True while JAX traces, lowers or compiles, in any thread."""
        self._lock, self._depth, self._since, self._ended = threading.Lock(), 0, 0.0, 0.0
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)

    @property
    def compile_seconds(self) -> float:
        """Seconds so far in which some thread traced, lowered or compiled, the compilation in progress included."""
        with self._lock:
            return self._ended + (time.monotonic() - self._since if self.compiling else 0.0)

    def print(self, descriptor: int) -> None:
        """Writes what the process does, and the stacks of all Python threads."""
        compiled = f"{'compiling' if self.compiling else 'compiled last'}: {self.compiled}"
        line = f"process {os.getpid()}, program started last: {self.program}; {compiled}; all stacks:\n"
        os.write(descriptor, line.encode())
        faulthandler.dump_traceback(descriptor, all_threads=True)

    def _begin(self, event: str, value: float, **facts: object) -> None:
        if event.startswith(COMPILING):
            self.compiled = str(facts.get("fun_name", self.compiled))
            self._nest(1)

    def _end(self, event: str, duration_secs: float, **facts: object) -> None:
        if event.startswith(COMPILING):
            self._nest(-1)
        if event == BACKEND and duration_secs >= LONG_COMPILE:
            give_back()  # the compiler leaves small pieces behind, which the program's arrays do not fit

    def _nest(self, change: int) -> None:
        with self._lock:
            was, self._depth = self._depth, max(0, self._depth + change)
            self.compiling = self._depth > 0
            if not was and self.compiling:
                self._since = time.monotonic()
            elif was and not self.compiling:
                self._ended += time.monotonic() - self._since


activity = Activity()
