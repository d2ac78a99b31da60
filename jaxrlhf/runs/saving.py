"""Saves checkpoints: written by orbax in the background, published under their final name in one step, then thinned.

A save has three parts. `Saver.start` copies the state to host memory. Threads then write the files and their checksums
while training goes on. At the end of a step, all processes look at it together (`Saver.advance`): once every process
has written its part, process 0 adds `index.json` and `metadata.json` and renames the folder.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.distributed import from_primary, gather, is_primary
from jaxrlhf.errors import StorageError
from jaxrlhf.runs.checkpoint_index import FORMAT, Entry, Files, PyTree, encode, file_facts, sealed, sizes
from jaxrlhf.runs.checkpoints import (
    REPLACED,
    UNFINISHED,
    array_handler,
    checkpoint_step,
    clean_folder,
    list_checkpoints,
    remove_checkpoint,
)
from jaxrlhf.runs.storage import reason_of

LIMIT = 1200  # seconds after which a save counts as failed
RETRY = 5.0  # seconds between a failed save and the next attempt, doubled with each further failure
LOOK = 0.2  # seconds between two looks at a save that the run waits for
FAILURES = (OSError, ValueError)  # tensorstore reports a full disk as a ValueError

Report = dict[str, Any]
"""What a process knows of the pending save: `gates` that it has reached, `files` it has written, or its `error`."""


class Retention(NamedTuple):
    """Which checkpoints a run keeps besides the best one."""

    last: int = 0
    """The newest ones, up to the one just saved; 0: all."""
    period: int = 0
    """Those whose step is a multiple of it; 0: none for this reason."""


def save_checkpoint(
    folder: str | Path,
    step: int,
    state: PyTree,
    metadata: Mapping[str, object],
    keep_last: int = 0,
    keep: Container[int | None] = (),
) -> Path:
    """Writes `folder/checkpoint-{step}/`, then removes older checkpoints; returns when the files are on disk.

    Host memory stays within a few GB, because arrays are copied and written one after another. Every process of a run
    calls it, with a shared file system. An exception or a kill leaves older checkpoints as they were.

    Args:
        folder: Folder of the run.
        step: Number of finished steps.
        state: Pytree whose leaves are `Leaf`s.
        metadata: JSON values to store with it.
        keep_last: How many of the newest checkpoints up to `step` to keep; 0: all.
        keep: Steps whose checkpoints are kept in any case.

    Returns:
        The path of the checkpoint.

    Raises:
        StorageError: The checkpoint cannot be written.
    """
    saver = Saver(folder, Retention(keep_last))
    saver.start(step, state, metadata, keep, background=False)
    return saver.folder / f"checkpoint-{step}"


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


class _Save:
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

    def write(self, arrays: Mapping[str, Any], *, background: bool) -> None:
        """Copies the arrays to host memory, and starts the threads that write them."""
        import orbax.checkpoint as ocp

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

    def _finish(self, checkpointer: Any) -> None:
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
        """What this process tells the others."""
        if self.defect is not None:
            raise self.defect
        late = time.monotonic() - self.begin > LIMIT
        return self.result or ({"error": f"not written after {LIMIT} s"} if late else {"gates": self.gates.reached})


def _is_own(name: str) -> bool:
    """True for the files that this process has written; what belongs to no process is process 0's."""
    first = name.split("/")[0]
    others = {f"ocdbt.process_{i}" for i in range(jax.process_count()) if i != jax.process_index()}
    return first not in others if is_primary() else first == f"ocdbt.process_{jax.process_index()}"


class Saver:
    """Saves the checkpoints of one run. All processes call its methods at the same places, `report` aside.

    Args:
        folder: Folder of the run, on a file system that all processes share.
        retention: Which checkpoints to keep.
        max_failures: Failed saves in a row after which a StorageError is raised.
        say: Prints a line.
        on_complete: Called on every process with the path of each checkpoint right after it has its final name, and
            before older ones are removed: a place to copy it elsewhere. It runs in the main thread between two steps,
            so it should start long work in the background; its exceptions end the run.
    """

    def __init__(
        self,
        folder: str | Path,
        retention: Retention = Retention(),  # noqa: B008 - immutable
        *,
        max_failures: int = 1,
        say: Callable[[str], None] = lambda text: None,
        on_complete: Callable[[Path], None] = lambda path: None,
    ) -> None:
        self.folder, self.retention = Path(folder), retention
        self.max_failures, self.say, self.on_complete = max_failures, say, on_complete
        self.failed: set[int] = set()
        """Steps whose checkpoints could not be written."""
        self.retry_is_due = False
        """True when a save has failed and it is time for another attempt."""
        self._failures, self._next_attempt = 0, 0.0
        self._pending: _Save | None = None
        self._newest: _Save | None = None  # the threads of a failed one may still run

    def start(
        self,
        step: int,
        state: PyTree,
        metadata: Mapping[str, object],
        keep: Container[int | None] = (),
        *,
        background: bool = True,
    ) -> None:
        """Begins to save a state, after the pending save has ended. The caller may donate the state afterwards.

        Args:
            step: Number of finished steps.
            state: Pytree whose leaves are `Leaf`s.
            metadata: JSON values to store with it.
            keep: Steps whose checkpoints are kept in any case.
            background: Return once the state is in host memory; otherwise when the save has ended.

        Raises:
            StorageError: `max_failures` saves in a row have failed.
        """
        self.wait()
        json.dumps(metadata, allow_nan=False)  # fail before the slow part
        entries, arrays = encode(state)
        before, name = self._newest, f"checkpoint-{step}"
        save = _Save(self.folder / name, step, entries, metadata, keep)
        busy = any(gather(f"starting {name}", before is not None and before.alive))
        error = "the storage does not answer" if busy else from_primary(f"folder of {name}", lambda: self._make(save))
        if error:
            self._fail(save, error)
            return
        self._pending = self._newest = save
        save.write(arrays, background=background)
        if not background:
            self.wait()

    def _make(self, save: _Save) -> str | None:
        """Makes the work folder, without left-overs beside it. Returns why it failed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean_folder(self.folder)
            save.work.mkdir()
        except OSError as error:
            return reason_of(error)
        return None

    def report(self) -> Report:
        """What this process knows of the pending save, as JSON, for `advance`."""
        if self._pending is None:
            return {"due": self._failures > 0 and time.monotonic() >= self._next_attempt}
        return self._pending.report()

    def advance(self, reports: Sequence[Report]) -> None:
        """Takes the pending save one stage further, with the reports of all processes.

        Raises:
            StorageError: `max_failures` saves in a row have failed.
        """
        save, self.retry_is_due = self._pending, bool(reports[0].get("due"))
        if save is None:
            return
        errors = [report["error"] for report in reports if "error" in report]
        if errors:
            self._fail(save, errors[0])
        elif all("files" in report for report in reports):
            self._complete(save, {name: facts for report in reports for name, facts in report["files"].items()})
        elif all(report.get("gates") == save.gates.opened + 1 for report in reports):
            save.gates.open()

    def wait(self) -> None:
        """Returns when no save is pending.

        Raises:
            StorageError: `max_failures` saves in a row have failed.
        """
        while self._pending is not None:
            self._pending.wait_for_news(LOOK)
            self.advance(gather(f"saving checkpoint-{self._pending.step}", self.report()))

    def wait_for_retry(self) -> bool:
        """After a failed save, waits until the next attempt is due; False when the last save has not failed."""
        if not self._failures:
            return False
        time.sleep(max(0.0, self._next_attempt - time.monotonic()))
        return True

    def abandon(self) -> None:
        """Gives the pending save up. Other processes need not take part."""
        if self._pending is not None:
            self._pending.gates.close()
        self._pending = None

    def _fail(self, save: _Save, reason: str) -> None:
        self._pending = None
        save.gates.close()
        self.failed.add(save.step)
        self._failures += 1
        pause = RETRY * 2 ** (self._failures - 1)
        self._next_attempt = time.monotonic() + pause
        text = f"cannot write the checkpoint {save.target}: {reason}"
        if self._failures >= self.max_failures:
            times = f" ({self._failures} times in a row)" if self._failures > 1 else ""
            raise StorageError(f"{text}{times}; older checkpoints are kept")
        self.say(
            f"WARNING: {text}; training goes on, and older checkpoints are kept. Next attempt in {pause:.0f} s or "
            f"more; the run ends after {self.max_failures} failures in a row, and this is number {self._failures}"
        )

    def _complete(self, save: _Save, files: Files) -> None:
        """Publishes a save that all processes have written, and removes older checkpoints."""
        name = save.target.name
        error = from_primary(f"publishing {name}", lambda: save.publish(files))
        if error:
            self._fail(save, error)
            return
        self._pending, self._failures = None, 0
        self.failed.discard(save.step)
        if save.in_background:
            self.say(f"{name}: saved in the background in {time.monotonic() - save.begin:.1f}s")
        self.on_complete(save.target)
        problem = from_primary(f"removing checkpoints older than {name}", lambda: self._thin_out(save))
        if problem:
            self.say(f"WARNING: an older checkpoint cannot be removed: {problem}")

    def _thin_out(self, save: _Save) -> str | None:
        """Removes the checkpoints up to the saved one that retention does not keep. Returns why it failed."""
        last, period = self.retention
        older = [path for path in list_checkpoints(self.folder) if checkpoint_step(path) <= save.step]
        try:
            remove_checkpoint(save.target.with_name(save.target.name + REPLACED))
            for path in older[: -last if last else 0]:
                number = checkpoint_step(path)
                if number not in save.keep and not (period and number % period == 0):
                    remove_checkpoint(path)
        except OSError as error:
            return reason_of(error)
        return None


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
