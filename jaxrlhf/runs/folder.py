"""One training run's folder: its config, metrics, samples, TensorBoard events, summary and report, and its console."""

import contextlib
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from tqdm import tqdm

from jaxrlhf.config import save_yaml
from jaxrlhf.config.files import read_jsonl, write_json_atomic, write_text_atomic
from jaxrlhf.errors import InputError
from jaxrlhf.runs.checkpoints import FINAL, list_checkpoints
from jaxrlhf.runs.console import Console, format_number, progress_line

RECORDS = ("metrics.jsonl", "samples.jsonl", "summary.json")
OWN_FILES = ("config.yaml", *RECORDS, "report.html")
EXPORT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
SHOWN_WITHOUT_HEADLINE = 8


class Run:
    """The folder `output_dir` of one training run, as a context manager; on leaving, `report.html` is written.

    `config`: the dataclass written to `config.yaml`. A folder that holds a run or a model already is refused
    (InputError) unless `resume` (everything is kept, new records are appended; see `rewind`) or `overwrite` (the old
    run's records and checkpoints are deleted; an exported model stays until the new one takes its place).
    `headline`: metrics shown on the console, in this order (default: the first few). `logging_steps`: steps between
    console lines; every record goes to the files. Only process 0 of a multi-process run writes and prints.
    """

    def __init__(
        self,
        output_dir: str | Path,
        config: Any,
        *,
        resume: bool = False,
        overwrite: bool = False,
        quiet: bool = False,
        logging_steps: int = 1,
        headline: Sequence[str] = (),
        stream: TextIO | None = None,
    ):
        self.output_dir = Path(output_dir)
        self.is_primary = jax.process_index() == 0
        self.logging_steps = max(1, logging_steps)
        self.headline = tuple(headline)
        self.latest: dict[str, float | int | None] = {}
        self.console = Console(quiet or not self.is_primary, stream)
        self._files: dict[str, TextIO] = {}
        self._tensorboard: Any = None
        self._purge_step: int | None = None
        self._closed = False
        self._config, self._resume, self._overwrite = config, resume, overwrite
        self._begun = not self.is_primary
        if self.is_primary:
            _check_folder(self.output_dir, resume, overwrite)

    def begin(self) -> None:
        """Make the folder ready and write `config.yaml`; the first record does it too.

        Nothing is written or deleted before, so that a run refused for its input leaves the folder as it was.
        """
        if not self._begun:
            self._begun = True
            _prepare_folder(self.output_dir, self._resume, self._overwrite)
            save_yaml(self._config, self.output_dir / "config.yaml")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as second:  # the error that ended the run is the one to see; this one is told, not raised
            self.console.print(f"report.html could not be written: {type(second).__name__}: {second}")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics (numbers or 0-d arrays) of `step`: metrics.jsonl, TensorBoard, and the console now and then.

        Numbers are kept to seven significant digits; NaN and infinities become null, and are left out of
        TensorBoard. Each record is flushed.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        self.latest.update(values)
        if self.is_primary:
            self._append("metrics.jsonl", {"step": int(step), "time": round(time.time(), 3), **values})
            writer = self._event_writer()
            for name, value in values.items():
                if value is not None:
                    writer.add_scalar(name, value, int(step))
        self._show(int(step), values)

    def rewind(self, step: int) -> None:
        """Drop metrics and samples recorded after `step`: what a run did past the checkpoint it resumes from."""
        self.begin()
        if self.is_primary:
            for name in ("metrics.jsonl", "samples.jsonl"):
                self._close_file(name)
                path = self.output_dir / name
                if path.exists():
                    kept = [record for record in read_jsonl(path) if record["step"] <= step]
                    write_text_atomic(path, "".join(_json_line(record) for record in kept))
            self._close_tensorboard()
            self._purge_step = int(step) + 1

    def print(self, text: str) -> None:
        """Print `text` without disturbing the progress bar."""
        self.console.print(text)

    def status(self, message: str) -> contextlib.AbstractContextManager[None]:
        """`with run.status("compiling train step…"):` says so, and then how long it took."""
        return self.console.status(message)

    def progress(
        self, total: int | None, initial: int = 0, description: str = ""
    ) -> contextlib.AbstractContextManager[tqdm]:
        """`with run.progress(total) as bar: bar.update()`: rate, remaining time and the latest headline metrics."""
        return self.console.progress(total, initial, description)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Print a table of samples and keep it, uncut, in samples.jsonl for the report. Cells: text, numbers, None."""
        plain = [[_cell(value) for value in row] for row in rows]
        wrong = next((row for row in plain if len(row) != len(columns)), None)
        if wrong is not None:
            raise ValueError(f"table {title!r}: a row has {len(wrong)} cells, not {len(columns)}: {wrong}")
        if self.is_primary:
            record = {"step": int(step), "time": round(time.time(), 3), "title": title, "columns": list(columns)}
            self._append("samples.jsonl", {**record, "rows": plain})
        self.console.table(f"{title} (step {step})", columns, plain)

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Write `summary.json`, atomically."""
        self.begin()
        if self.is_primary:
            write_json_atomic(self.output_dir / "summary.json", dict(values))

    def close(self) -> None:
        """Close the files and write `report.html`. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for name in list(self._files):
            self._close_file(name)
        self._close_tensorboard()
        if self.is_primary and self._begun and (self.output_dir / "metrics.jsonl").exists():
            from jaxrlhf.runs.report import write_report

            write_report(self.output_dir)

    def _show(self, step: int, values: dict[str, float | int | None]) -> None:
        if self.console.quiet:
            return
        names = [name for name in self.headline if name in values]
        evaluation = [name for name in values if name.startswith("eval/") and name not in names]
        names = names + evaluation or list(values)[:SHOWN_WITHOUT_HEADLINE]
        bar = self.console.bar
        if bar is not None:
            headline = [name for name in self.headline if name in self.latest] or names
            text = " ".join(f"{_short(name)}={_shown(self.latest[name])}" for name in headline[:4])
            bar.set_postfix_str(text, refresh=False)
        if evaluation or step % self.logging_steps == 0:
            words = [f"{name} {_shown(values[name])}" for name in names]
            lead = f"step {step}" if bar is None or self.console.is_terminal else progress_line(bar, step)
            self.console.print(" · ".join([lead, *words]))

    def _append(self, name: str, record: dict) -> None:
        self.begin()
        if name not in self._files:
            self._files[name] = open(self.output_dir / name, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._files[name].write(_json_line(record))
        self._files[name].flush()

    def _close_file(self, name: str) -> None:
        if name in self._files:
            self._files.pop(name).close()

    def _event_writer(self) -> Any:
        self.begin()
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter

            folder = str(self.output_dir / "tensorboard")
            self._tensorboard = SummaryWriter(logdir=folder, purge_step=self._purge_step, flush_secs=10)
        return self._tensorboard

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def peak_memory_bytes() -> dict[str, int | None]:
    """Peak memory so far in bytes: `host` (resident, this process), `device` (largest of the local ones, or None)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in stats if entry and "peak_bytes_in_use" in entry]
    return {"host": host, "device": max(peaks, default=None)}


def what_is_there(folder: Path) -> list[str]:
    """Names of what an earlier run left in `folder`: records, checkpoints, weights. Settings alone do not count."""
    if not folder.is_dir():
        return []
    found = [name for name in (*RECORDS, *EXPORT_FILES) if (folder / name).exists()]
    return found + [path.name for path in list_checkpoints(folder)]


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; give a folder")
    found = what_is_there(folder)
    if found and not (resume or overwrite):
        shown = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
        raise InputError(
            f"output_dir {folder} already holds a run or a model ({shown}); choose another folder, "
            "continue it with --resume, or start over with --overwrite_output_dir"
        )


def _prepare_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            _cut_partial_lines(folder)
        elif overwrite:
            _delete_run(folder)
    except OSError as error:
        raise InputError(f"output_dir {folder} cannot be written: {error.strerror}") from error


def _delete_run(folder: Path) -> None:
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    old = [path for path in folder.iterdir() if FINAL.match(path.name) and path.is_dir()]  # unfinished ones too
    for path in [*old, folder / "tensorboard"]:
        if path.exists():
            shutil.rmtree(path)


def _cut_partial_lines(folder: Path) -> None:
    """End each .jsonl file after its last whole line, so that what is appended starts on a line of its own."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = folder / name
        if path.exists():
            text = path.read_bytes()
            whole = text.rfind(b"\n") + 1
            if whole < len(text):
                with open(path, "r+b") as file:
                    file.truncate(whole)


def _number(name: str, value: Any) -> float | int | None:
    if name in ("step", "time"):
        raise ValueError(f"a metric cannot be called {name!r}")
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool | int):
        return int(value)
    if not isinstance(value, float):
        raise TypeError(f"metric {name} must be a number, not {type(value).__name__}")
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _cell(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _json_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _shown(value: float | int | None) -> str:
    return "nan" if value is None else format_number(value)
