"""The report of `jaxrlhf data` as plain values. `inspection.py` makes it; terminal, page and JSON show it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind, decoded."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Passage:
    """Tokens of a prompt, a response or a text; `mask` is 1 at those that are trained on."""

    name: str
    ids: tuple[int, ...]
    mask: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Row:
    """One row as the model sees it; `given` is what the loss reads besides tokens: a label, a margin."""

    place: str
    passages: tuple[Passage, ...]
    given: str = ""


@dataclass(frozen=True)
class Reason:
    """Why rows were left out or cut, how many, and where the first ones stand."""

    what: str
    rows: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """The share of a source in the training stream.

    Attributes:
        rows: share of the rows, or of the packed rows.
        tokens: share of the tokens.
        passes: times that its rows are seen while the stream takes as many rows as all sources have.
    """

    rows: float
    tokens: float
    passes: float


@dataclass(frozen=True)
class RowsReport:
    """The rows of one source in the training or in the evaluation data.

    Attributes:
        counts: rows given, kept, skipped, dropped and cut.
        reasons: of the skipped, dropped and cut rows.
        tokens: tokens of all kept rows.
        trained_tokens: those that are trained on.
        mean, median, longest: tokens of a sequence.
        histogram: sequences whose length lies in each interval of `Inspection.edges`.
        padding: share of positions without a token, by the way that batches are made.
        mixture: how much of the training stream the source gives; None in evaluation data.
        rows: the first rows as the model sees them.
    """

    counts: dict[str, int]
    reasons: tuple[Reason, ...]
    tokens: int
    trained_tokens: int
    mean: float
    median: float
    longest: int
    histogram: tuple[int, ...]
    padding: dict[str, float]
    mixture: Share | None
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SourceReport:
    """One source: what was recognised, and its rows.

    Attributes:
        name, path: as in the metrics, and as the user gave it.
        recognised: the format in words; empty where the step does not read the source.
        format: its name, as in `data_format`.
        files: the files or the split that training reads.
        data_set, licence: of a named data set.
        steps: the steps that the source serves.
        template: the source's own template.
        evaluates_on: where its evaluation rows come from.
        train, evaluation: its rows.
    """

    name: str
    path: str
    recognised: str = ""
    format: str = ""
    files: tuple[str, ...] = ()
    data_set: str = ""
    licence: str = ""
    steps: tuple[str, ...] = ()
    template: str = ""
    evaluates_on: str = ""
    train: RowsReport | None = None
    evaluation: RowsReport | None = None

    @property
    def reports(self) -> dict[str, RowsReport]:
        """The reports that there are, by "train" and "eval"."""
        found = {"train": self.train, "eval": self.evaluation}
        return {label: report for label, report in found.items() if report is not None}


@dataclass(frozen=True)
class Repeats:
    """Rows that repeat another: how many, of which sources, and examples as pairs of places."""

    rows: int
    sources: dict[str, int]
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Segment:
    """One sequence in a packed row; `name` is chosen or rejected in a pair, else empty."""

    place: str
    name: str
    tokens: int


@dataclass(frozen=True)
class Inspection:
    """Everything that `jaxrlhf data` shows.

    Attributes:
        step: the step that reads the data.
        sources: each source.
        edges: bounds of the histograms' intervals, in tokens.
        bound: the setting that bounds a row's length, and its value.
        batch_size: rows of the batches whose padding is counted.
        packed: the first packed row of training, by segments; empty without packing.
        packed_length: tokens that a packed row holds.
        duplicates: `equal_rows` and `equal_prompts` in training; `shared_prompts` of evaluation and training.
        first: rows of each file that were read of a stream; 0: all.
    """

    step: str
    sources: tuple[SourceReport, ...]
    edges: tuple[int, ...]
    bound: tuple[str, int]
    batch_size: int
    packed: tuple[Segment, ...]
    packed_length: int
    duplicates: dict[str, Repeats]
    first: int = 0

    def as_dict(self) -> dict[str, object]:
        """The values for JSON."""
        return dataclasses.asdict(self)
