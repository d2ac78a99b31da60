"""The folder of a training run: settings, metrics, samples, summary, report; its console and its trackers."""

import contextlib
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from jaxrlhf.config import Settings, save_yaml, to_dict
from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.config.secrets import redacted
from jaxrlhf.errors import InputError, Interrupted
from jaxrlhf.runs.checkpoints import FINAL, clean_folder, list_checkpoints
from jaxrlhf.runs.console import Console, Progress, format_number
from jaxrlhf.runs.exchange import Exchange
from jaxrlhf.runs.lock import FolderLock
from jaxrlhf.runs.records import JSONL, REMEDY, Record, Records
from jaxrlhf.runs.storage import storage_errors
from jaxrlhf.runs.trackers import TrackedRun, Trackers, TrackingConfig
from jaxrlhf.runs.trackers.registry import IDS

RECORDS = (*JSONL, "summary.json")
CHANGES = "changes.jsonl"
OWN_FILES = ("config.yaml", CHANGES, *RECORDS, "report.html", IDS)
OWN_FOLDERS = ("tensorboard", "profile", "wandb")
EXPORT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
SHOWN_WITHOUT_HEADLINE = 8
SHOWN_ON_BAR = 4


class Run:
    """The folder of one training run, as a context manager that writes `report.html` at its end.

    Only process 0 of a multi-process run writes and prints.

    Args:
        output_dir: The folder.
        config: Dataclass to write to `config.yaml`.
        resume: Continue the run in the folder: records are kept and new ones appended (see `rewind`).
        overwrite: Delete records and checkpoints of the run in the folder. An exported model stays until the new one
            replaces it.
        quiet: Print nothing.
        logging_steps: Steps between console lines. Every record goes to the files.
        headline: Metrics on the console, in this order. Default: the first few.
        stream: Destination of the console. Default: stderr.
        tracking: Trackers that get the metrics too.

    Raises:
        InputError: The folder is a file, or holds a run or a model and neither `resume` nor `overwrite` is set; or a
            tracker cannot be used.
    """

    def __init__(
        self,
        output_dir: str | Path,
        config: Settings,
        *,
        resume: bool = False,
        overwrite: bool = False,
        quiet: bool = False,
        logging_steps: int = 1,
        headline: Sequence[str] = (),
        stream: TextIO | None = None,
        tracking: TrackingConfig = TrackingConfig(),  # noqa: B008 - frozen
    ):
        self.output_dir = Path(output_dir)
        self.is_primary = jax.process_index() == 0
        self.exchange: Exchange | None = None
        """Passes checkpoints between machines that share no folder; set by who opens such a run."""
        self.logging_steps = max(1, logging_steps)
        self.headline = tuple(headline)
        self.latest: dict[str, float | int | None] = {}
        self.console = Console(quiet or not self.is_primary, stream)
        self._closed = False
        self._config, self._resume, self._overwrite = config, resume, overwrite
        self._begun = not self.is_primary
        self._trackers: Trackers | None = None
        self._lock: FolderLock | None = None
        self._records = Records(self.output_dir, self.print)
        # Time as the clock tells it at the start, and from there on without the clock's jumps.
        self._start = time.time() - time.monotonic()
        if self.is_primary:
            if self.output_dir.is_dir():
                self._take_lock()
            else:
                _check_folder(self.output_dir, resume, overwrite)
            name = tracking.run_name or self.output_dir.resolve().name
            tracked = TrackedRun(self.output_dir, name, tracking.project, redacted(to_dict(config)))
            self._trackers = Trackers(tracking, tracked, self.print)

    def begin(self) -> None:
        """Prepares the folder and writes `config.yaml`. The first record does it too.

        A run that is refused for its input before this point leaves the folder as it was.

        Raises:
            InputError: The folder cannot be written, or another run has begun in it.
        """
        if self._begun:
            return
        self._begun = True
        with self._written():
            self.output_dir.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._take_lock()
        with self._written():
            if self._resume:
                self._records.cut_partial_lines()
            elif self._overwrite:
                _delete_run(self.output_dir)
            clean_folder(self.output_dir)
            save_yaml(self._config, self.output_dir / "config.yaml")

    def _take_lock(self) -> None:
        """Keeps other runs out of the folder, and refuses one that holds a run already."""
        with self._written():
            self._lock = FolderLock(self.output_dir)
        try:
            _check_folder(self.output_dir, self._resume, self._overwrite)
        except InputError:
            self._lock.release()
            raise

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); choose another folder"
            raise InputError(f"output_dir {self.output_dir} {reason}") from error

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close(failed=not isinstance(error, Interrupted))
        except (OSError, ValueError) as second:  # the user needs to see the error that ended the run, not this one
            self.console.print(f"report.html is not written: {second}")

    def log(self, step: int, metrics: Mapping[str, object]) -> dict[str, float | int | None]:
        """Records the metrics of a step in metrics.jsonl and the trackers, and prints them every `logging_steps`.

        Numbers keep seven significant digits. NaN and infinities become null; trackers do not get them. A killed
        process loses no record of metrics.jsonl. A record that cannot be written waits in memory.

        Args:
            step: Number of finished steps.
            metrics: Numbers or 0-d arrays by name. Evaluations have names with the prefix `eval/`.

        Returns:
            The metrics as they are recorded.

        Raises:
            StorageError: Another run has taken over the folder.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        self.latest.update(values)
        if self._trackers is not None:
            self._append("metrics.jsonl", int(step), values)
            self._trackers.log(int(step), values)
        self._show(int(step), values)
        return values

    def metrics(self) -> list[Record]:
        """Returns the records of metrics.jsonl, with `step` and `time`; on process 0 alone. Raises StorageError."""
        return self._records.read("metrics.jsonl")

    def rewind(self, step: int, repeats: bool = True) -> None:
        """Drops metrics and samples after `step`, the step of the checkpoint from which the run goes on.

        Args:
            step: The step.
            repeats: The steps after it are done as before, so that trackers need not be told of them again.
        """
        self.begin()
        if self._trackers is None:
            return
        dropped = self._records.rewind(int(step))
        sent = {(r["step"], name) for r in dropped for name in ([r["title"]] if "title" in r else r)}
        self._trackers.rewind(int(step), sent if repeats else set())

    def record_changes(self, step: int, changes: Mapping[str, tuple[object, object]]) -> None:
        """Records in changes.jsonl that the run goes on from `step` with changed settings, {name: (then, now)}."""
        if self.is_primary:
            self._append(CHANGES, step, {"changes": {name: list(pair) for name, pair in changes.items()}})

    def print(self, text: str) -> None:
        """Prints `text` above the progress line."""
        self.console.print(text)

    def status(self, message: str) -> AbstractContextManager[list[str]]:
        """Shows what a block does, and afterwards how long it took."""
        return self.console.status(message)

    def progress(
        self, total: int | None, initial: int = 0, description: str = "", **options: Any
    ) -> AbstractContextManager[Progress]:
        """Shows the progress of a loop that calls `.update()` for each step. `options` as in `Console.progress`."""
        return self.console.progress(total, initial, description, **options)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], step: int) -> None:
        """Prints a table of samples and keeps it, uncut, in samples.jsonl for the report.

        Args:
            title: Title. The report compares tables of the same title.
            columns: Column names.
            rows: Cells: text, numbers, None.
            step: Number of finished steps.

        Raises:
            StorageError: Another run has taken over the folder.
        """
        plain = [[_cell(value) for value in row] for row in rows]
        wrong = next((row for row in plain if len(row) != len(columns)), None)
        if wrong is not None:
            raise ValueError(f"table {title!r}: a row has {len(wrong)} cells, not {len(columns)}: {wrong}")
        if self._trackers is not None:
            self._append("samples.jsonl", int(step), {"title": title, "columns": list(columns), "rows": plain})
            self._trackers.table(int(step), title, columns, plain)
        self.console.table(f"{title} (step {step})", columns, plain)

    def write_summary(self, values: Mapping[str, object]) -> None:
        """Writes `summary.json`, atomically. Raises StorageError when it cannot be written.

        Args:
            values: JSON values. The report shows `title`, the name of the training, and `trainer`.
        """
        self.begin()
        if self.is_primary:
            with self._storage("write summary.json"):
                write_json_atomic(self.output_dir / "summary.json", dict(values))

    def write_json(self, name: str, value: object) -> None:
        """Writes a JSON file of the folder, atomically, on process 0. Waits in memory while it cannot be written."""
        self.begin()
        if self.is_primary:
            self._records.replace(name, value)

    def close(self, failed: bool = False) -> None:
        """Writes what waits and `report.html`, and ends the run in its trackers. A second call does nothing.

        Args:
            failed: An error ends the run.

        Raises:
            StorageError: Records or the report cannot be written.
        """
        if self._closed:
            return
        self._closed = True
        if self._trackers is None:
            return
        report: Path | None = None
        try:
            if self._begun:
                try:
                    self._records.finish()
                finally:
                    report = self._write_report()
        finally:
            self._trackers.finish(report, failed)
            if self._lock is not None:
                self._lock.release()

    def _write_report(self) -> Path | None:
        if not (self.output_dir / "metrics.jsonl").exists():
            return None
        from jaxrlhf.runs.report import write_report

        with self._storage("write report.html"), self.status(f"writing {self.output_dir / 'report.html'}…"):
            return write_report(self.output_dir)

    def _show(self, step: int, values: dict[str, float | int | None]) -> None:
        """Prints the headline of a step if it is due, and puts the latest one on the progress line."""
        names = [name for name in self.headline if name in values]
        evaluation = [name for name in values if name.startswith("eval/") and name not in names]
        names = names + evaluation or list(values)[:SHOWN_WITHOUT_HEADLINE]
        lead, bar = f"step {step}", self.console.bar
        if bar is not None:
            shown = [name for name in self.headline if name in self.latest] or names
            shown = [f"{name.rpartition('/')[2]}={_shown(self.latest[name])}" for name in shown[:SHOWN_ON_BAR]]
            bar.note = " ".join(shown)
            if not self.console.is_terminal:
                lead = bar.line(step)
        if evaluation or step % self.logging_steps == 0:
            self.console.print(" · ".join([lead, *(f"{name} {_shown(values[name])}" for name in names)]))

    def _storage(self, task: str) -> AbstractContextManager[None]:
        return storage_errors(f"{task} in {self.output_dir}", REMEDY)

    def _append(self, name: str, step: int, record: Mapping[str, object]) -> None:
        self.begin()
        if self._lock is not None:
            self._lock.check()
        now = round(self._start + time.monotonic(), 3)
        self._records.append(name, {"step": step, "time": now, **record})


def peak_memory_bytes() -> dict[str, int | None]:
    """Returns the peak memory so far in bytes.

    Returns:
        `host`: resident memory of this process; `device`: the largest of the local devices, None if it is not known.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]
    return {"host": host, "device": max(peaks, default=None)}


def what_is_there(folder: Path) -> list[str]:
    """Returns the names of an earlier run's records, checkpoints and weights in `folder`. Settings do not count."""
    if not folder.is_dir():
        return []
    found = [name for name in (*RECORDS, *EXPORT_FILES) if (folder / name).exists()]
    return found + [path.name for path in list_checkpoints(folder)]


def check_unused(folder: str | Path, found: Sequence[str]) -> None:
    """Raises InputError when an output_dir, a folder or a URL, holds something: the names in `found`."""
    if found:
        shown = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
        raise InputError(
            f"output_dir {folder} already holds a run or a model ({shown}); choose another folder, "
            "continue it with --resume, or start over with --overwrite_output_dir"
        )


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; give a folder")
    if not (resume or overwrite):
        check_unused(folder, what_is_there(folder))


def _delete_run(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name in OWN_FILES:
            path.unlink()
        elif path.is_dir() and (path.name in OWN_FOLDERS or FINAL.match(path.name)):  # unfinished ones too
            shutil.rmtree(path)


def _number(name: str, value: object) -> float | int | None:
    """A metric as it is recorded."""
    if name in ("step", "time"):
        raise ValueError(f"a metric cannot be called {name!r}")
    number = _cell(value)
    if isinstance(number, str) or value is None:
        raise TypeError(f"metric {name} must be a number, not {type(value).__name__}")
    return int(number) if isinstance(number, bool) else number


def _cell(value: object) -> str | float | int | None:
    """A number or 0-d array as a JSON number of seven digits, None if it is not finite; None; or text."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _shown(value: float | int | None) -> str:
    return "nan" if value is None else format_number(value)
