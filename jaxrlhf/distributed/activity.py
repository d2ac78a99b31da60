"""What this process is doing: the program that was started last, compilations, and the stacks of all threads."""

import faulthandler
import os
import threading
import time

import jax

COMPILING = "/jax/core/compile/"
"""Events of JAX with this prefix are tracing, lowering and XLA's compilation: a scalar at the start, a duration at the
end."""


class Activity:
    """Notes on a process, which any thread may read."""

    def __init__(self) -> None:
        self.program = "none yet"
        """Name of the program that was started last."""
        self.compiled = "none yet"
        """Name of the function that JAX compiled last, or compiles."""
        self._lock = threading.Lock()
        self._depth, self._began, self._seconds = 0, 0.0, 0.0
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)

    @property
    def compiling(self) -> bool:
        return self._depth > 0

    def compile_seconds(self) -> float:
        """Seconds that this process has spent compiling, until now."""
        with self._lock:
            return self._seconds + (time.monotonic() - self._began if self._depth else 0.0)

    def describe(self) -> str:
        state = "compiling" if self.compiling else "compiled last"
        return f"program started last: {self.program}; {state}: {self.compiled}"

    def print(self, descriptor: int) -> None:
        """Writes what the process does, and the stacks of all Python threads."""
        os.write(descriptor, f"{self.describe()}; all stacks of process {os.getpid()}:\n".encode())
        faulthandler.dump_traceback(descriptor, all_threads=True)

    def _begin(self, event: str, value: float, **facts: object) -> None:
        if event.startswith(COMPILING):
            with self._lock:
                self.compiled = str(facts.get("fun_name", self.compiled))
                self._began = self._began if self._depth else time.monotonic()
                self._depth += 1

    def _end(self, event: str, duration_secs: float, **facts: object) -> None:
        if event.startswith(COMPILING) and self._depth:
            with self._lock:
                self._depth -= 1
                self._seconds += 0.0 if self._depth else time.monotonic() - self._began


activity = Activity()
