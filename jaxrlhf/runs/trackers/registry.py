"""The trackers of a run: which ones, what continues them after a resume, and what they are not told twice."""

import importlib.util
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from jaxrlhf.config import Settings, alias
from jaxrlhf.config.files import read_json, write_json_atomic
from jaxrlhf.errors import InputError
from jaxrlhf.runs.system import SystemMeter
from jaxrlhf.runs.trackers.background import Background
from jaxrlhf.runs.trackers.base import Cell, TrackedRun, Tracker

IDS = "trackers.json"
"""File of the run folder with what continues each tracker's run."""
FINISH_SECONDS = 30.0
"""Time that a tracker gets at the end of a run to send what it has."""


class Known(NamedTuple):
    """A tracker that `report_to` may name."""

    module: str
    tracker: str
    library: str
    extra: str | None = None
    """Extra of jaxrlhf that installs the library; None: it comes with jaxrlhf."""


TRACKERS = {
    "tensorboard": Known("jaxrlhf.runs.trackers.tensorboard_tracker", "TensorBoard", "tensorboardX"),
    "wandb": Known("jaxrlhf.runs.trackers.wandb_tracker", "WeightsAndBiases", "wandb", "wandb"),
    "trackio": Known("jaxrlhf.runs.trackers.trackio_tracker", "Trackio", "trackio", "trackio"),
    "mlflow": Known("jaxrlhf.runs.trackers.mlflow_tracker", "MLflow", "mlflow", "mlflow"),
}
"""By name; a further tracker is a class in a file of its own and an entry here and in `TrackingConfig`."""


@dataclass(frozen=True)
class TrackingConfig(Settings, may_change=True):
    """Trackers of the run."""

    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow", "none"], ...] = ("tensorboard",)
    """Trackers that get settings, metrics and samples, beside the files in output_dir; several, or none."""
    run_name: str | None = None
    """Name of the run in the trackers; default: the name of output_dir."""
    project: Annotated[str | None, alias("trackio_project", "wandb_project")] = None
    """Project of the run in wandb and trackio, experiment in mlflow; default: as the tracker's environment variable
    says, else jaxrlhf."""

    def check(self) -> None:
        if "none" in self.report_to and len(self.report_to) > 1:
            others = [name for name in self.report_to if name != "none"]
            raise InputError(f"report_to={' '.join(self.report_to)}: give none alone, or only {' '.join(others)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers, each once."""
        return tuple(dict.fromkeys(name for name in self.report_to if name != "none"))


class Trackers:
    """All trackers of one run. Nothing here waits for a server or ends the run, except `finish`, for a while.

    Args:
        config: Which trackers.
        run: The run; `run.known` is read from its folder.
        say: Prints a line.

    Raises:
        InputError: A library is missing, or a tracker refuses (`Tracker.check`).
    """

    def __init__(self, config: TrackingConfig, run: TrackedRun, say: Callable[[str], None]) -> None:
        self._classes = {name: _load(name) for name in config.names}
        self._run, self._say = run, say
        self._meter = SystemMeter()
        self._running: dict[str, Background] = {}
        self._ids: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._sent: set[tuple[int, str]] = set()
        self._rewound_to: int | None = None

    def rewind(self, step: int, sent: Iterable[tuple[int, str]]) -> None:
        """Continues a run from a checkpoint. Trackers at work that rewind begin anew from there.

        Args:
            step: The step of the checkpoint.
            sent: (step, metric or title of a table) of what was recorded after it, which the resumed run repeats.
        """
        self._rewound_to, self._sent = step, set(sent)
        for name, tracker in self._running.items():
            if tracker.rewinds:
                tracker.restart(replace(self._run, known=self._ids.get(name, {}), rewound_to=step))

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Passes on the metrics that are finite; those that are not are None."""
        finite = {name: value for name, value in metrics.items() if value is not None}
        system = self._meter.read() if self._classes else {}
        for tracker in self._started().values():
            own = finite if tracker.measures_system else finite | system
            new = own if tracker.rewinds else {n: v for n, v in own.items() if (step, n) not in self._sent}
            if new.keys() - system.keys():
                tracker.log(step, new)

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Passes on a table of samples."""
        for tracker in self._started().values():
            if tracker.rewinds or (step, title) not in self._sent:
                tracker.table(step, title, columns, rows)

    def finish(self, report: Path | None, failed: bool) -> None:
        """Ends the run in every tracker; waits at most `FINISH_SECONDS` for each."""
        for tracker in self._running.values():
            tracker.finish(report, failed)
        for tracker in self._running.values():
            tracker.wait(FINISH_SECONDS)
        self._running = {}

    def _started(self) -> dict[str, Background]:
        """The trackers at work; the first call starts them."""
        if self._classes and not self._running:
            path = self._run.folder / IDS
            self._ids = read_json(path, "delete it: the trackers then begin new runs") if path.exists() else {}
            for name, cls in self._classes.items():
                run = replace(self._run, known=self._ids.get(name, {}), rewound_to=self._rewound_to)
                self._running[name] = Background(name, cls(), run, self._say, self._keep)
        return self._running

    def _keep(self, name: str, known: dict[str, str]) -> None:
        """Writes down what continues the run of one tracker. Called from the trackers' threads."""
        with self._lock:
            self._ids[name] = known
            try:
                write_json_atomic(self._run.folder / IDS, self._ids)
            except OSError as error:
                self._say(f"{IDS} cannot be written ({error}); after a --resume, trackers may begin new runs")
        if "url" in known:
            self._say(f"{name}: {known['url']}")


def _load(name: str) -> type[Tracker]:
    """The class of a tracker that can be used. Raises InputError."""
    known = TRACKERS[name]
    if importlib.util.find_spec(known.library) is None:
        remedy = f'pip install "jaxrlhf[{known.extra}]"' if known.extra else f"pip install {known.library}"
        raise InputError(f"report_to={name} needs the package {known.library}: {remedy}")
    cls: Any = getattr(import_module(known.module), known.tracker)
    cls.check()
    return cls
