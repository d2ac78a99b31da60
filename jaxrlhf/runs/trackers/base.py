"""The protocol of a tracker, and the facts of a run that it gets."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

Cell: TypeAlias = str | float | int | None


@dataclass(frozen=True)
class TrackedRun:
    """The facts of a run that a tracker needs."""

    folder: Path
    name: str
    project: str | None
    """The project that `--project` names. None: the one of the tracker's own environment variable, else `jaxrlhf`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The settings as plain values, without secrets."""
    known: Mapping[str, str] = field(default_factory=dict)
    """The values that `start` returned when the run began; empty for a new run."""
    rewound_to: int | None = None
    """Step of the checkpoint that a resumed run goes on from."""


class Tracker(Protocol):
    """One place where runs are tracked. Its calls come from one thread, and may block or raise."""

    rewinds: bool
    """Drops what it has after `TrackedRun.rewound_to`. Others are not sent again what they have."""
    measures_system: bool
    """Measures memory and processor use itself."""

    @staticmethod
    def check() -> None:
        """Raises InputError where the tracker cannot be used, for want of a login say. Reaches for no server."""
        ...

    def start(self, run: TrackedRun) -> dict[str, str]:
        """Begins the run, or continues the one in `run.known`. Returns what continues it, with `url` if it has one."""
        ...

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Takes the finite metrics of a step. A step may come several times, with other metrics."""
        ...

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Takes a table of samples."""
        ...

    def finish(self, report: Path | None, failed: bool) -> None:
        """Takes the report, a page, and ends the run."""
        ...


def slug(title: str) -> str:
    """A title as a part of a name: `held-out samples` → `held-out-samples`."""
    return re.sub(r"[^\w.-]+", "-", title).strip("-")
