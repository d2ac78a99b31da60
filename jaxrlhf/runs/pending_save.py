"""One save of a checkpoint that is under way: orbax's threads write the files, another one their checksums."""

import functools
import os
import sys
import threading
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.distributed import is_primary
from jaxrlhf.runs.checkpoint_index import FORMAT, Entry, Files, file_facts, sealed, sizes
from jaxrlhf.runs.checkpoints import REPLACED, UNFINISHED, array_handler
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
    """

    def __init__(self, changed: threading.Condition) -> None:
        self.changed, self.reached, self.opened, self.shut = changed, 0, 0, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        with self.changed:
            self.reached += 1
            number = self.reached
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.opened >= number or self.shut, timeout_ms / 1000)
            if self.opened < number:
                raise TimeoutError(f"{key}: the other processes have not written their part")

    def open(self) -> None:
        with self.changed:
            self.opened += 1
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.shut = True
            self.changed.notify_all()


class PendingSave:
    """One attempt of this process to write its part of a checkpoint into a work folder."""

    def __init__(
        self,
        target: Path,
        step: int,
        entries: list[Entry],
        metadata: Mapping[str, object],
        keep: Container[int | None],
    ) -> None:
        self.target, self.step, self.entries, self.metadata, self.keep = target, step, entries, metadata, keep
        self.work = target.with_name(target.name + UNFINISHED[0])
        self.begin, self.in_background = time.monotonic(), False
        self.changed = threading.Condition()
        self.gates = _Gates(self.changed)
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
        checkpointer = ocp.AsyncCheckpointer(array_handler(arrays, whole=background), async_options=options)
        try:
            checkpointer.save((self.work / "state").absolute(), args=ocp.args.PyTreeSave(arrays))
        except FAILURES as error:
            self.result = {"error": reason_of(error)}
            return
        self.thread = threading.Thread(target=self._finish, args=(checkpointer,), name="checkpoint", daemon=True)
        self.thread.start()

    def _finish(self, checkpointer: "AsyncCheckpointer") -> None:
        result: Report = {}
        try:
            checkpointer.close()  # waits for the files
            names = sizes(self.work / "state")
            result["files"] = file_facts(self.work / "state", filter(_is_own, names))
        except FAILURES as error:
            result = {"error": reason_of(error)}
        except Exception as error:  # for the main thread to raise
            self.defect = error
        with self.changed:
            self.result = result
            self.changed.notify_all()

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
    """Hides a traceback for each array whose write ends after orbax has given up a save: its event loop is closed."""
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _is_own(name: str) -> bool:
    """True for the files that this process has written; what belongs to no process is process 0's."""
    first = name.split("/")[0]
    others = {f"ocdbt.process_{i}" for i in range(jax.process_count()) if i != jax.process_index()}
    return first not in others if is_primary() else first == f"ocdbt.process_{jax.process_index()}"


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
