"""A reward function in a process of its own, with limits on time and memory; restarted when it dies.

`multiprocessing` and pools on top of it import the user's main module in the new process, which starts a script without
an `if __name__ == "__main__"` a second time. So the process is a plain subprocess with a connection.
"""

import contextlib
import json
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import IO, Any, NamedTuple

from jaxrlhf.errors import InputError
from jaxrlhf.rewards.arguments import Samples
from jaxrlhf.rewards.calls import LINE, SHOWN_LINES, Failure, Outcome
from jaxrlhf.rewards.functions import RewardFunction, split_spec
from jaxrlhf.rewards.verifiable import REFERENCE_CHECKS

IMPORT_FACTOR = 10  # time limit of the import, in time limits of a call
SEARCH_SHARE = 8  # most deaths of a search for the samples that kill, each within this share of the time limit
DEAD_CALLS = 3  # calls in a row that give no score because the process dies, which end the run
LONGEST_WAIT = 5.0  # seconds before a restart, at most
LAST_WORDS = 0.3  # seconds for the stacks of a process that is about to be killed
CHUNK = 1 << 16  # bytes of output that are read at once, and kept
PAUSE = 0.01  # seconds after a full chunk

PROGRAM = (
    "import json, sys; sys.path[:], *rest = json.loads(sys.argv[1]); "
    "from jaxrlhf.rewards.worker import main; main(*rest)"
)


class Limits(NamedTuple):
    """Limits of the process of a reward function."""

    seconds: float = 60.0
    """Time limit of one call; 0: none."""
    gib: float | None = None
    """Memory; None: half of the machine's; 0: no limit."""

    @property
    def bytes(self) -> int:
        if self.gib is None:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        return int(self.gib * 2**30)


DEFAULT_LIMITS = Limits()


class Died(Exception):
    """The process ended, or was killed, before it answered. The message says why."""


class RewardProcess:
    """One reward function in a process of its own. All methods but `stop` belong to one thread.

    The process ends with the thread that starts it (Linux), and so with the trainer, however that ends.
    """

    def __init__(self, spec: str, limits: Limits) -> None:
        self.spec, self.limits = spec, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._printed = b""  # past Python's streams, since it was shown; the newest part
        self._stream: IO[bytes] | None = None  # its output
        self._reading = threading.Lock()
        self._deaths = 0  # since the last answer
        self._dead_calls = 0
        self._stopped = False

    def load(self) -> RewardFunction:
        """Starts the process, which imports the function; returns its description. Raises InputError."""
        try:
            check = REFERENCE_CHECKS.get(split_spec(self.spec)[0])
            described = self._start()
            described["wanted"] = tuple(described["wanted"])
            return RewardFunction(function=_elsewhere, check_references=check, **described)
        except Died as error:
            said = "".join(f"\n  {line}" for line in self._output())
            self._end()
            raise InputError(f"reward function {self.spec!r}: importing it failed: {error}{said}") from error

    def call(self, name: str, samples: Samples) -> Outcome:
        """Calls the function on samples. When its process dies, each sample is tried alone in a new one.

        Raises:
            InputError: as `call_captured`; the function cannot be imported again; or its process died in DEAD_CALLS
                calls in a row, and gave no score.
        """
        begin = time.monotonic()
        try:
            outcome, died = self._ask(name, samples, self.limits.seconds), False
        except Died as error:
            outcome, died = self._search(name, samples, error), True
        self._dead_calls = self._dead_calls + 1 if died and len(outcome.failures) == len(samples.rows) else 0
        if self._dead_calls >= DEAD_CALLS:
            raise InputError(
                f"reward function {name}: its process died in {DEAD_CALLS} calls in a row, and gave no score; the last "
                f"time {outcome.failures[0].reason}. Correct the function, or raise --reward_time_limit and "
                "--reward_memory_limit"
            )
        lines = (outcome.lines + self._output())[:SHOWN_LINES]
        return outcome._replace(lines=lines, seconds=time.monotonic() - begin)

    def stop(self) -> None:
        """Kills the process, from any thread; it is not started again."""
        self._stopped = True
        self._kill()

    def _search(self, name: str, samples: Samples, first: Died) -> Outcome:
        """Scores each sample alone, to find those that kill the process.

        Scores take at most the time limit again, and so do the samples that kill; starts of the process come on top.
        """
        limit, spent, deaths = self.limits.seconds / SEARCH_SHARE, 0.0, 0
        lines = [f"{first}; every sample is scored alone", *self._output()]
        values, failures = [], []
        numbers: dict[str, list[float]] = {}
        extras: dict[str, list[object]] = {}
        for k, row in enumerate(samples.rows):
            if deaths == SEARCH_SHARE or (limit and spent > self.limits.seconds):
                reason = f"not tried alone, after {deaths} other samples had no score; on the batch {first}"
                outcome = failed(name, row, reason)
            else:
                try:
                    outcome = self._ask(name, samples.take([k]), limit)
                except Died as error:
                    deaths += 1
                    outcome = failed(name, row, str(error))
            spent += outcome.seconds
            values += outcome.values
            failures += outcome.failures
            lines += outcome.lines
            for key, found in outcome.numbers.items():
                numbers.setdefault(key, []).extend(found)
            for key, column in outcome.extras.items():
                extras.setdefault(key, [None] * len(samples.rows))[k] = column[0]
        return Outcome(values, failures, lines, 0.0, numbers, extras)

    def _ask(self, name: str, samples: Samples, limit: float) -> Outcome:
        """Sends a request and waits for the answer. Raises Died, or the InputError that the function raised."""
        try:
            if self._process is None:
                time.sleep(min(LONGEST_WAIT, 0.1 * 2**self._deaths) if self._deaths else 0.0)
                self._start()
            assert self._connection is not None
            try:
                self._connection.send((name, tuple(samples)))
            except OSError as error:
                raise Died(self._how_it_ended()) from error
            answer = self._receive(limit)
        except Died:
            self._deaths += 1
            self._end()
            raise
        self._deaths = 0
        return Outcome.from_json(answer["outcome"])

    def _start(self) -> dict[str, Any]:
        """Starts the process; returns the function's description. Raises Died or InputError."""
        if self._stopped:
            raise Died("it was stopped")
        ours, theirs = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # a process that stops in the middle of a message
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", math.ceil(self.limits.seconds), 0))
        settings = [sys.path, theirs.fileno(), self.spec, os.getpid(), self.limits.bytes]
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", PROGRAM, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C goes to the trainer alone, and a kill to what the function has started too
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the devices are the trainer's
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        assert self._process.stdout is not None
        self._stream = self._process.stdout
        os.set_blocking(self._stream.fileno(), False)
        threading.Thread(target=self._read, args=(self._stream,), daemon=True).start()
        return self._receive(self.limits.seconds * IMPORT_FACTOR)

    def _receive(self, limit: float) -> dict[str, Any]:
        """The next answer, within `limit` seconds (0: no limit). Raises Died or InputError."""
        assert self._connection is not None and self._process is not None
        try:
            if not self._connection.poll(limit or None):
                self._signal(signal.SIGUSR1)  # it prints its stacks
                time.sleep(LAST_WORDS)
                raise Died(f"it took longer than {limit:g} s (--reward_time_limit {self.limits.seconds:g})")
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError, ValueError) as error:
            raise Died(self._how_it_ended()) from error
        if "refused" in answer:
            raise InputError(answer["refused"])
        return answer

    def _how_it_ended(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(LAST_WORDS)
            hint = ", perhaps for lack of memory" if status == -signal.SIGKILL else ""
            how = f"with status {status}" if status >= 0 else f"by signal {-status} ({signal.strsignal(-status)})"
            return f"its process ended {how}{hint}"
        return "its process closed the connection"

    def _end(self) -> None:
        """Kills the process and closes the connection."""
        self._kill()
        if self._process is not None:
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """Sends a signal to the process; SIGKILL goes to all that the function has started."""
        process = self._process
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if process is not None and number == signal.SIGKILL:
                os.killpg(process.pid, number)
            elif process is not None:
                process.send_signal(number)

    def _read(self, stream: IO[bytes]) -> None:
        """Reads what the process prints, however much that is, until it ends."""
        readable = select.poll()
        readable.register(stream, select.POLLIN)
        while True:
            readable.poll()
            with self._reading:
                size = self._read_chunk(stream)
                if size == 0:
                    stream.close()
                    return
            if size == CHUNK:  # endless output waits, rather than keep this process busy
                time.sleep(PAUSE)

    def _read_chunk(self, stream: IO[bytes]) -> int | None:
        """Keeps what the pipe holds now, and returns its size; None: nothing yet; 0: the end."""
        try:
            chunk = os.read(stream.fileno(), CHUNK)
        except BlockingIOError:
            return None
        self._printed = (self._printed + chunk)[-CHUNK:]
        return len(chunk)

    def _output(self) -> list[str]:
        """The newest lines that the process printed past Python's streams, once.

        What it printed before its answer is there, even if the thread that reads has not had its turn.
        """
        with self._reading:
            if self._stream is not None and not self._stream.closed:
                self._read_chunk(self._stream)
            printed, self._printed = self._printed, b""
        return [line[:LINE] for line in printed.decode(errors="replace").splitlines()[-SHOWN_LINES:]]


def failed(name: str, row: int, reason: str) -> Outcome:
    """The outcome of a sample that is given up."""
    return Outcome([math.nan], [Failure(name, row, reason)], [], 0.0, {}, {})


def _elsewhere(*args: object, **options: object) -> object:
    raise RuntimeError("this reward function runs in a process of its own")
