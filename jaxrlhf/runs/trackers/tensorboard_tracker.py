"""TensorBoard: event files in the folder `tensorboard` of the run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrlhf.runs.trackers.base import Cell, TrackedRun, slug

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FOLDER = "tensorboard"


class TensorBoard:
    """Scalars, settings and tables as text. It draws the curves of the report itself."""

    rewinds = True
    measures_system = False
    _writer: "SummaryWriter"

    @staticmethod
    def check() -> None:
        """Needs no login."""

    def start(self, run: TrackedRun) -> dict[str, str]:
        from tensorboardX import SummaryWriter

        purge = None if run.rewound_to is None else run.rewound_to + 1
        folder = run.folder / FOLDER
        older = sorted(path.name for path in folder.glob("events.*"))
        # Files are named by the second at which they are begun, and two may be begun in one.
        suffix = f".{len(older)}" if older else ""
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10, filename_suffix=suffix)
        if older:
            _make_last(folder, older)
        if purge is None:
            settings = json.dumps(run.config, indent=2, ensure_ascii=False)
            self._writer.add_text("config", f"```\n{settings}\n```", 0)
        return {}

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)
        self._writer.add_text(f"samples/{slug(title)}", text, step)

    def finish(self, report: Path | None, failed: bool) -> None:
        self._writer.close()


def _make_last(folder: Path, older: Sequence[str]) -> None:
    """Renames the newest event file such that it sorts after the older ones, as TensorBoard reads them in that order.

    Else a clock that was set back would put the events of a resumed run before those that they replace.
    """
    (new,) = {path.name for path in folder.glob("events.*")} - set(older)
    prefix, _, rest = new.partition(".tfevents.")
    last = older[-1].partition(".tfevents.")[2].partition(".")[0]
    stamp, _, host = rest.partition(".")
    if new < older[-1] and last.isdecimal():
        (folder / new).rename(folder / f"{prefix}.tfevents.{int(last) + 1:0{len(stamp)}d}.{host}")


def _markdown_cell(value: Cell) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "<br>")
