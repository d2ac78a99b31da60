"""Saves checkpoints: written by orbax in the background, published under their final name in one step, then thinned.

A save has three parts. `Saver.start` copies the state to host memory. Threads then write the files and their checksums
while training goes on. At the end of a step, all processes look at it together (`Saver.advance`): once every process
has written its part, process 0 adds `index.json` and `metadata.json` and renames the folder.
"""

import json
import shutil
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxrlhf.distributed import from_primary, gather, is_primary
from jaxrlhf.errors import StorageError
from jaxrlhf.runs.checkpoint_index import Files, PyTree, encode
from jaxrlhf.runs.checkpoints import REPLACED, checkpoint_step, clean_folder, list_checkpoints, remove_checkpoint
from jaxrlhf.runs.exchange import Exchange, first
from jaxrlhf.runs.host_copies import hurry
from jaxrlhf.runs.pending_save import PendingSave, Report
from jaxrlhf.runs.storage import reason_of

RETRY = 5.0  # seconds between a failed save and the next attempt, doubled with each further failure
LOOK = 0.2  # seconds between two looks at a save that the run waits for


class Retention(NamedTuple):
    """The checkpoints that a run keeps besides the best one."""

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


class Saver:
    """Saves the checkpoints of one run. All processes call its methods at the same places, `report` aside.

    Args:
        folder: Folder of the run, on a file system that all processes share, except with an `exchange`.
        retention: Which checkpoints to keep.
        max_failures: Failed saves in a row after which a StorageError is raised.
        say: Prints a line.
        on_complete: Called on every process with the path of each checkpoint right after it has its final name, and
            before older ones are removed: a place to copy it elsewhere. It runs in the main thread between two steps,
            so it should start long work in the background; its exceptions end the run.
        exchange: Passes parts between machines that share no folder.
    """

    def __init__(
        self,
        folder: str | Path,
        retention: Retention = Retention(),  # noqa: B008 - immutable
        *,
        max_failures: int = 1,
        say: Callable[[str], None] = lambda text: None,
        on_complete: Callable[[Path], None] = lambda path: None,
        exchange: Exchange | None = None,
    ) -> None:
        self.folder, self.retention = Path(folder), retention
        self.max_failures, self.say, self.on_complete = max_failures, say, on_complete
        self.exchange = exchange
        self._leads = exchange.leads if exchange else is_primary()
        self.failed: set[int] = set()
        """Steps whose checkpoints could not be written."""
        self.holds_off = self.retry_is_due = False
        """After a failed save: whether to wait before another attempt, or to make it now."""
        self._failures, self._next_attempt = 0, 0.0
        self._pending: PendingSave | None = None
        self._newest: PendingSave | None = None  # the threads of a failed one may still run

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
        save = PendingSave(self.folder / name, step, entries, metadata, keep, self.exchange)
        if any(gather(f"starting {name}", before is not None and before.alive)):
            error = "the storage does not answer"
        else:
            error = first(gather(f"folder of {name}", self._make(save) if self._leads else None))
        if error:
            self._fail(save, error)
            return
        self._pending = self._newest = save
        try:
            save.write(arrays, background=background)
        except BaseException:  # what the storage is not to blame for: nobody may wait for this save
            self.abandon()
            raise
        if not background:
            self.wait()

    def _make(self, save: PendingSave) -> str | None:
        """Makes the work folder, without left-overs beside it. Returns why it failed."""
        try:
            if self._newest is None:
                self.folder.mkdir(parents=True, exist_ok=True)
            elif not self.folder.is_dir():  # what is written below the place of a lost file system is lost with it
                return f"{self.folder} is gone"
            clean_folder(self.folder)
            save.work.mkdir()
        except OSError as error:
            return reason_of(error)
        return None

    def report(self) -> Report:
        """The pending save as this process knows it, as JSON, for `advance`."""
        if self._pending is None:
            return {"due": self._failures > 0 and time.monotonic() >= self._next_attempt}
        return self._pending.report()

    def advance(self, reports: Sequence[Report]) -> None:
        """Takes the pending save one stage further, with the reports of all processes.

        Raises:
            StorageError: `max_failures` saves in a row have failed.
        """
        save, self.retry_is_due = self._pending, bool(reports[0].get("due"))
        self.holds_off = self._failures > 0 and not self.retry_is_due
        if save is None:
            return
        errors = [report["error"] for report in reports if "error" in report]
        if errors:
            self._fail(save, errors[0])
        elif all("files" in report for report in reports):
            self._complete(save, {name: facts for report in reports for name, facts in report["files"].items()})
        elif all("files" in report or report.get("gates") == save.gates.opened + 1 for report in reports):
            save.gates.open()

    def wait(self) -> None:
        """Returns when no save is pending.

        Raises:
            StorageError: `max_failures` saves in a row have failed.
        """
        if self._pending is not None:
            hurry()
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

    def _fail(self, save: PendingSave, reason: str) -> None:
        self._pending, self.holds_off = None, True
        save.gates.close()
        if self._leads:  # other processes may still write; `_make` removes the rest
            shutil.rmtree(save.work, ignore_errors=True)
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

    def _complete(self, save: PendingSave, files: Files) -> None:
        """Publishes a save that all processes have written, and removes older checkpoints."""
        name = save.target.name
        error = from_primary(f"publishing {name}", lambda: save.publish(files))
        if error:
            self._fail(save, error)
            return
        self._pending, self._failures = None, 0
        self.failed.discard(save.step)
        if self.exchange:
            self.exchange.discard(save.work)
        if save.in_background:
            self.say(f"{name}: saved in the background in {time.monotonic() - save.begin:.1f}s")
        self.on_complete(save.target)
        problem = from_primary(f"removing checkpoints older than {name}", lambda: self._thin_out(save))
        if problem:
            self.say(f"WARNING: an older checkpoint cannot be removed: {problem}")

    def _thin_out(self, save: PendingSave) -> str | None:
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
