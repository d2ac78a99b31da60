"""TensorBoard: event files in the folder `tensorboard` of the run.

tensorboardX makes the events; `Records` writes them. tensorboardX's own writer ends at the first failed write, and then
keeps the process from ending.
"""

import json
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxrlhf.runs.records import Records
from jaxrlhf.runs.trackers.base import Cell, TrackedRun, slug

FOLDER = "tensorboard"
EVENTS = "events.out.tfevents."


class TensorBoard:
    """Scalars, settings and tables as text. It draws the curves of the report itself."""

    rewinds = True
    measures_system = False
    _records: Records
    _name: str

    @staticmethod
    def check() -> None:
        """Needs no login."""

    def start(self, run: TrackedRun) -> dict[str, str]:
        from tensorboardX.proto.event_pb2 import SessionLog  # type: ignore[attr-defined] - made by protobuf

        folder = run.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._records = Records(folder, lambda text: None)  # metrics.jsonl reports a disk that cannot be written
        self._name = _next_name(folder)
        self._write(0, file_version="brain.Event:2")
        if run.rewound_to is None:
            settings = json.dumps(run.config, indent=2, ensure_ascii=False)
            self._text("config", f"```\n{settings}\n```", 0)
        else:  # TensorBoard drops what it has from this step on
            self._write(run.rewound_to + 1, session_log=SessionLog(status=SessionLog.START))
        return {}

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined] - made by protobuf

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        self._write(step, summary=Summary(value=values))

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)
        self._text(f"samples/{slug(title)}", text, step)

    def finish(self, report: Path | None, failed: bool) -> None:
        self._records.finish()

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboardX import summary

        self._write(step, summary=summary.text(tag, text))

    def _write(self, step: int, **content: object) -> None:
        """Adds an event to the file, as a TFRecord."""
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined] - made by protobuf
        from tensorboardX.record_writer import masked_crc32c

        data = Event(wall_time=time.time(), step=step, **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
        self._records.append_bytes(self._name, length + next(sums) + data + next(sums))


def _next_name(folder: Path) -> str:
    """The name of a new event file: the time in seconds, and at least one more than in older names.

    TensorBoard reads the files in the order of their names. With the time alone, the events of a run that is resumed
    within a second, or after the clock was set back, would come before those that they replace.
    """
    older = [path.name.removeprefix(EVENTS).partition(".")[0] for path in folder.glob(f"{EVENTS}*")]
    stamp = max([int(time.time()), *(int(text) + 1 for text in older if text.isdecimal())])
    return f"{EVENTS}{stamp:010d}.{socket.gethostname()}"


def _markdown_cell(value: Cell) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "<br>")
