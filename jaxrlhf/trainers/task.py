"""A trainer, as the loop around its steps sees it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from jaxrlhf.models import ModelCard
from jaxrlhf.trainers.guards import History, StepPlan

State = TypeVar("State")
Item = TypeVar("Item")
Metrics = dict[str, Any]


class Watch(Protocol):
    """Passes on the batches of an evaluation: shows its progress, and ends it when the run is asked to stop."""

    def __call__(self, batches: Iterable[Item], total: int) -> Iterator[Item]:
        """Yields `batches`, of which there are `total`."""
        ...


def unwatched(batches: Iterable[Item], total: int) -> Iterator[Item]:
    """Yields the batches and does nothing else."""
    yield from batches


class Task(Protocol[State]):
    """A trainer, as the loop sees it.

    Everything random in a step is a function of its number, so that a resumed run repeats what an uninterrupted one
    does.
    """

    name: str
    """Name of the trainer in records."""
    title: str
    """Name of the training in reports and model cards."""
    total_steps: int
    base_model: str
    """Model that the exported one was trained from."""
    data_names: tuple[str, ...]
    """Data sets, for the model card."""
    identity: dict[str, Any]
    """Settings and data, as JSON values, that a run and its resumption must share."""
    defaults: dict[str, Any]
    """Defaults of the settings in `identity`. They stand for settings that an older checkpoint does not have."""
    exports: dict[str, Any]
    """For `convert`, per model in the state: {path of its parameters: {"head": …, "config": HF config}}."""
    best: tuple[str, int]
    """The metric of an evaluation that decides which checkpoint is best, and 1 (higher is better) or -1."""
    devices: int
    """Devices that the rows of a batch are split over."""

    def prepare(self, state: State, plan: StepPlan) -> None:
        """Begins to compile the programs of the first step, in threads."""
        ...

    def step(self, state: State, plan: StepPlan) -> tuple[State, Metrics]:
        """Runs a step; returns the new state and its metrics."""
        ...

    def limits(self, history: History) -> dict[str, float]:
        """Values of metrics above which an update is a spike, given those of the last steps: always the same names."""
        ...

    def evaluate(self, state: State, done: int, watch: Watch = unwatched) -> Metrics:
        """Evaluates after `done` steps; returns metrics without the prefix `eval/`. `watch` gets its batches."""
        ...

    def export(self, state: State, card: ModelCard) -> None:
        """Writes the trained models into the folder of the run."""
        ...

    def last_batch(self) -> Mapping[str, object]:
        """Arrays of the newest step, for a person who wants to know why it could not be used."""
        ...

    def same_past(self, steps: int) -> bool:
        """True when a run of `steps` steps in all has the learning rates of this one, as far as it goes."""
        ...
