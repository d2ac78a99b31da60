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
        self._writer = SummaryWriter(logdir=str(run.folder / FOLDER), purge_step=purge, flush_secs=10)
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


def _markdown_cell(value: Cell) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "<br>")
