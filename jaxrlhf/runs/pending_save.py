"""One save of a checkpoint that is under way: orbax's threads write the files, another one their checksums."""

import contextlib
import functools
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.distributed import is_primary
from jaxrlhf.runs.checkpoint_index import FORMAT, Entry, Files, file_facts, is_own, sealed, sizes
from jaxrlhf.runs.checkpoints import REPLACED, UNFINISHED, array_handler
from jaxrlhf.runs.exchange import Exchange
from jaxrlhf.runs.host_copies import at_low_priority, owned
from jaxrlhf.runs.storage import reason_of

if TYPE_CHECKING:
    from orbax.checkpoint import AsyncCheckpointer

LIMIT = 1200  # seconds after which a save counts as failed
FAILURES = (OSError, ValueError)  # tensorstore reports a full disk as a ValueError

Report = dict[str, Any]
"""The state of the pending save on a process: `gates` that it has reached, `files` it has written, or its `error`."""


class _Gates:
    """The barriers of orbax's background thread, which the main threads of all processes open together.

    Orbax's own barriers would wait for minutes for a process whose write has failed.

    Args:
        changed: Notified of every change.
        written: Called when this process has written its part.
        all_written: Called when all processes have.
    """

    def __init__(
        self, changed: threading.Condition, written: Callable[[], None], all_written: Callable[[], None]
    ) -> None:
        self.changed, self.reached, self.opened, self.shut = changed, 0, 0, False
        self._written, self._all_written = written, all_written

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        is_first = self.reached == 0
        if is_first:
            self._written()
        with self.changed:
            self.reached += 1
            number = self.reached
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.opened >= number or self.shut, timeout_ms / 1000)
            if self.opened < number:
                raise TimeoutError(f"{key}: the other processes have not written their part")
        if is_first:
            self._all_written()

    def open(self) -> None:
        with self.changed:
            self.opened += 1
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.shut = True
            self.changed.notify_all()


class PendingSave:
    """One attempt of this process to write its part of a checkpoint into a work folder.

    Args:
        target: Final path.
        step: Number of finished steps.
        entries: Index entries of all leaves.
        metadata: JSON values to store with it.
        keep: Steps whose checkpoints are kept in any case.
        exchange: Passes parts between machines that share no folder.
    """

    def __init__(
        self,
        target: Path,
        step: int,
        entries: list[Entry],
        metadata: Mapping[str, object],
        keep: Container[int | None],
        exchange: Exchange | None = None,
    ) -> None:
        self.target, self.step, self.entries, self.metadata, self.keep = target, step, entries, metadata, keep
        self.work = target.with_name(target.name + UNFINISHED[0])
        self.begin, self.in_background = time.monotonic(), False
        self.changed = threading.Condition()
        self.exchange = exchange
        self.gates = _Gates(self.changed, self._written, self._all_written)
        self._parts = exchange.new_name() if exchange else ""
        self._sent: Files | None = None
        self.result: Report = {}
        self.defect: Exception | None = None
        self.thread: threading.Thread | None = None

    def write(self, arrays: Mapping[str, jax.Array | np.ndarray], *, background: bool) -> None:
        """Copies the arrays to host memory, and starts the threads that write them."""
        import orbax.checkpoint as ocp

        _hide_late_writes()
        self.in_background = background
        options = ocp.options.AsyncOptions(
            timeout_secs=LIMIT, barrier_sync_fn=self.gates, create_directories_asynchronously=False
        )
        leader = self.exchange.leader if self.exchange else 0
        checkpointer = ocp.AsyncCheckpointer(
            array_handler(arrays, whole=background, leader=leader),
            async_options=options,
            multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=leader),
        )
        arguments = ocp.args.PyTreeSave(owned(arrays) if background else arrays)

        def begin() -> None:
            checkpointer.save((self.work / "state").absolute(), args=arguments)
            self.thread = threading.Thread(target=self._finish, args=(checkpointer,), name="checkpoint", daemon=True)
            self.thread.start()

        try:
            at_low_priority(begin) if background else begin()
        except FAILURES as error:
            self.result = {"error": reason_of(error)}

    def _finish(self, checkpointer: "AsyncCheckpointer") -> None:
        result: Report = {}
        try:
            with contextlib.suppress(CancelledError):
                checkpointer.close()  # waits for the files
            if self._sent is None:
                names = sizes(self.work / "state")
                result["files"] = file_facts(self.work / "state", filter(is_own, names))
            else:
                result["files"] = self._sent
        except FAILURES as error:
            result = {"error": reason_of(error)}
        except Exception as error:  # for the main thread to raise
            self.defect = error
        with self.changed:
            self.result = result
            self.changed.notify_all()

    def _written(self) -> None:
        if self.exchange and self.exchange.is_apart:
            self._sent = self.exchange.send(self._folder(), self._parts)

    def _all_written(self) -> None:
        if self.exchange and is_primary():
            self.exchange.collect(self._folder(), self._parts)
        elif self.exchange and self.exchange.is_apart:
            raise CancelledError("process 0 completes the checkpoint")

    def _folder(self) -> Path:
        """Orbax's folder, which it renames to `state` at the end."""
        return next(path for path in self.work.iterdir() if path.is_dir())

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait_for_news(self, seconds: float) -> None:
        """Returns when there is more to report, at the latest after `seconds`."""
        before = self.report()
        with self.changed:
            self.changed.wait_for(lambda: self.report() != before, seconds)

    def publish(self, files: Files) -> str | None:
        """Adds the index and the metadata, and renames the folder (process 0). Returns why it failed."""
        try:
            found = sizes(self.work / "state")
            # A network file system may not have shown a process its files in time.
            files = files | file_facts(self.work / "state", found.keys() - files.keys())
            if lost := files.keys() - found.keys():
                return f"{min(lost)} is not in {self.work / 'state'}"
            index = {"format": FORMAT, "leaves": self.entries, "files": files}
            write_json_atomic(self.work / "index.json", sealed(index))
            write_json_atomic(self.work / "metadata.json", sealed({**self.metadata, "step": self.step}))
            if self.target.exists():
                os.rename(self.target, f"{self.target}{REPLACED}")
            os.rename(self.work, self.target)
            _fsync_folder(self.target.parent)
        except OSError as error:
            return reason_of(error)
        return None

    def report(self) -> Report:
        """The report of this process to the others."""
        if self.defect is not None:
            raise self.defect
        late = time.monotonic() - self.begin > LIMIT
        return self.result or ({"error": f"not written after {LIMIT} s"} if late else {"gates": self.gates.reached})


@functools.cache
def _hide_late_writes() -> None:
    """Hides a traceback for each array whose write fails or ends after orbax has given up a save.

    The save was reported as failed by then; for the interpreter, nobody has asked for the result of the write, or the
    event loop is closed.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: not _is_late_write(record))


def _is_late_write(record: logging.LogRecord) -> bool:
    trace = record.exc_info[2] if record.exc_info else None
    by_orbax = any("/orbax/" in frame.filename for frame in traceback.extract_tb(trace))
    return by_orbax and "exception was never retrieved" in record.getMessage()


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
