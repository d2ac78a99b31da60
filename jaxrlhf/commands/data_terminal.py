"""Prints the report of `jaxrlhf data`. Trained tokens are coloured on a terminal and in brackets elsewhere."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.box import HORIZONTALS
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jaxrlhf.commands.data_report import Inspection, Passage, Piece, Repeats, Row, RowsReport, SourceReport
from jaxrlhf.runs.console import plain_text

TRAINED, TRAINED_SPECIAL, SPECIAL = "green", "bold green", "magenta"
LONGEST_PIECE = 900  # characters; longer ones are cut in the middle
SIDE_BY_SIDE = 110  # columns of a terminal that shows two responses beside each other
HEIGHT = 3  # lines of a histogram
BLOCKS = " ▁▂▃▄▅▆▇█"
TITLES = {
    "equal_rows": "rows of training that repeat an earlier one",
    "equal_prompts": "rows of training whose prompt an earlier one has",
    "shared_prompts": "rows of evaluation whose prompt is also in training",
}
LABELS = {"train": "train", "eval": "eval"}
PADDING = {"batches": "in batches of {}", "packed": "when packed", "sorted": "when sorted by length"}


class View:
    """Prints to a stream.

    Args:
        stream: the destination.
    """

    def __init__(self, stream: TextIO) -> None:
        width = None if stream.isatty() else shutil.get_terminal_size((100, 24)).columns
        self.console = Console(file=stream, highlight=False, markup=False, emoji=False, width=width)
        self.coloured = self.console.color_system is not None and not os.environ.get("NO_COLOR")
        try:
            "⟦█".encode(stream.encoding or "utf-8")
            self.open, self.close, self.blocks = "⟦", "⟧", BLOCKS
        except (UnicodeEncodeError, LookupError):
            self.open, self.close, self.blocks = "[[", "]]", " .:-=+*%#"

    def print(self, *shown: RenderableType) -> None:
        self.console.print(*shown, soft_wrap=all(isinstance(item, str) for item in shown))

    def title(self, text: str) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold"))

    def indented(self, shown: RenderableType, by: int = 2) -> None:
        self.console.print(Padding(shown, (0, 0, 0, by), expand=False))

    def pieces(self, pieces: Sequence[Piece]) -> Text:
        """Tokens as text. Without colour, brackets stand around those that are trained on."""
        text = Text(overflow="fold")
        for trained, run in itertools.groupby(pieces, key=lambda piece: piece.trained):
            marks = trained and not self.coloured
            text.append(self.open if marks else "")
            for piece in run:
                style = SPECIAL if piece.special else ""
                if trained:
                    style = TRAINED_SPECIAL if piece.special else TRAINED
                text.append(plain_text(shortened(piece.text)), style=style)
            text.append(self.close if marks else "")
        return text


def print_inspection(found: Inspection, stream: TextIO | None = None) -> None:
    """Prints everything. `stream`: default standard output."""
    view = View(sys.stdout if stream is None else stream)
    part = f": the first {found.first:,} rows of each file or data set" if found.first else ""
    view.console.print(Text(f"What {found.step} sees of the data{part}", style="bold"))
    print_sources(view, found)
    print_rows(view, found)
    print_packed(view, found)
    print_counts(view, found)
    print_tokens(view, found)
    print_mixture(view, found)
    print_lengths(view, found)
    print_duplicates(view, found)


def print_sources(view: View, found: Inspection) -> None:
    """Prints the format and the splits of each source."""
    view.title("Sources")
    for source in found.sources:
        view.indented(Text.assemble((source.name, "bold"), f"  {source.path}"))
        for line in facts_of(source, found.step):
            view.indented(Text(line), 4)


def facts_of(source: SourceReport, step: str) -> Iterator[str]:
    """Returns the format, splits and steps of a source as lines of text."""
    if not source.recognised:
        yield f"not used by {step}: the mixture gives it to {', '.join(source.steps)}"
        return
    yield f"recognised as {source.recognised} (data_format {source.format})"
    if source.data_set:
        yield f"data set {source.data_set}, licence: {source.licence}"
    files = source.files if len(source.files) <= 3 else (*source.files[:2], f"{len(source.files) - 2} more")
    if source.train is None:
        yield f"evaluates on {', '.join(files)}"
    else:
        yield f"trains on {', '.join(files)}; evaluates on {source.evaluates_on}"
    yield f"serves {', '.join(source.steps)}"
    if source.template:
        yield f"has its own template: {source.template}"


def print_rows(view: View, found: Inspection) -> None:
    """The first rows of each source."""
    shown = [(source, row) for source in found.sources if source.train for row in source.train.rows]
    if not shown:
        return
    marks = "in green" if view.coloured else f"in {view.open} {view.close}"
    trained = f"; what is trained on is {marks}" if found.step != "ppo" else "; ppo trains on its own responses"
    view.title(f"Rows as the model sees them{trained}")
    for source, row in shown:
        tokens = sum(len(passage.ids) for passage in row.passages)
        marked = sum(sum(passage.mask) for passage in row.passages)
        facts = f"{tokens:,} tokens" + (f", {marked:,} trained on" if found.step != "ppo" else "")
        facts += f", {row.given}" if row.given else ""
        view.console.print()
        view.indented(Text.assemble((source.name, "bold"), f"  {near(row.place)}  ", (facts, "italic")))
        view.indented(drawn_row(view, row), 4)


def drawn_row(view: View, row: Row) -> RenderableType:
    """A row: its prompt, then the response, or both responses beside each other where there is room."""
    *before, last = row.passages
    pairs = [passage for passage in row.passages if passage.name in ("chosen", "rejected")]
    if len(pairs) < 2:
        return view.pieces([piece for passage in (*before, last) for piece in passage.pieces])
    prompt = [passage for passage in before if passage.name == "prompt"]
    parts: list[RenderableType] = [view.pieces(passage.pieces) for passage in prompt]
    if view.console.width >= SIDE_BY_SIDE:
        table = Table(box=HORIZONTALS, expand=True, pad_edge=False)
        for passage in pairs:
            table.add_column(heading(passage), ratio=1, overflow="fold")
        table.add_row(*(view.pieces(passage.pieces) for passage in pairs))
        return Group(*parts, table)
    for passage in pairs:
        parts += [Text(f"- {heading(passage)}", style="italic"), view.pieces(passage.pieces)]
    return Group(*parts)


def heading(passage: Passage) -> str:
    return f"{passage.name}, {len(passage.ids):,} tokens"


def shortened(text: str) -> str:
    """A text whose middle is cut out where it is long."""
    half = LONGEST_PIECE // 2
    if len(text) <= LONGEST_PIECE:
        return text
    return f"{text[:half]} … ({len(text) - 2 * half:,} characters) … {text[-half:]}"


def print_packed(view: View, found: Inspection) -> None:
    """The first packed row as a bar of segments, each with its length."""
    if not found.packed:
        return
    used = sum(segment.tokens for segment in found.packed)
    view.title(f"The first packed row: {len(found.packed)} segments, {used:,} of {found.packed_length:,} tokens")
    width = max(view.console.width - 16, 20)
    bar, rest = Text(no_wrap=True), found.packed_length - used
    for i, segment in enumerate(found.packed):
        cells = max(round(segment.tokens / found.packed_length * width) - 1, 1)
        label = str(segment.tokens) if len(str(segment.tokens)) <= cells else ""
        bar.append(label.center(cells), style=("black on green", "black on cyan")[i % 2])
        bar.append("|" if not view.coloured else " ")
    if rest:
        bar.append(f"{rest} padding")
    view.indented(bar)
    for segment in found.packed[:8]:
        words = (f"{segment.tokens:>6,} tokens", segment.name, near(segment.place))
        view.indented(Text("  ".join(filter(None, words))))
    if len(found.packed) > 8:
        view.indented(Text(f"{len(found.packed) - 8:>6,} more segments"))


def reports_of(found: Inspection) -> Iterator[tuple[SourceReport, str, RowsReport]]:
    """Each source with its training rows, then each with its evaluation rows."""
    for label in LABELS:
        for source in found.sources:
            if label in source.reports:
                yield source, label, source.reports[label]


def print_counts(view: View, found: Inspection) -> None:
    """Rows of each source, and why rows were left out or cut."""
    name, bound = found.bound
    view.title(f"Rows ({name} {bound})")
    rows = []
    for source, label, report in reports_of(found):
        counts = report.counts
        cut = counts["truncated_prompts"] + counts["truncated_responses"]
        numbers = (counts["rows"], counts["kept"], counts["skipped"], counts["dropped_too_long"], cut)
        rows.append((source.name, LABELS[label], *(f"{n:,}" for n in numbers)))
    print_table(view, ("source", "for", "rows", "kept", "skipped", "dropped", "cut"), rows)
    for source, label, report in reports_of(found):
        if report.counts["kept"] > report.counts["rows"]:
            view.indented(Text(f"{source.name} {LABELS[label]}: a row gives several examples"))
        for reason in report.reasons:
            more = ", …" if reason.rows > len(reason.places) else ""
            places = ", ".join(map(near, reason.places)) + more
            view.indented(Text(plain_text(f"{source.name} {LABELS[label]}, {reason.what}: {reason.rows:,} ({places})")))


def print_tokens(view: View, found: Inspection) -> None:
    """Tokens, lengths and padding of each source."""
    trained = found.step != "ppo"
    view.title("Tokens (mean, median and longest: of a sequence)")
    rows = []
    for source, label, report in reports_of(found):
        cells = [source.name, LABELS[label], f"{report.tokens:,}"]
        cells += [f"{report.trained_tokens / max(report.tokens, 1):.0%}"] if trained else []
        rows.append([*cells, f"{report.mean:,.0f}", f"{report.median:,.0f}", f"{report.longest:,}"])
    columns = ["source", "for", "tokens", *(["trained on"] if trained else []), "mean", "median", "longest"]
    print_table(view, columns, rows)
    view.title("Padding")
    ways = dict.fromkeys(way for _, _, report in reports_of(found) for way in report.padding)
    rows = [
        [source.name, LABELS[label], *(f"{report.padding[way]:.1%}" if way in report.padding else "-" for way in ways)]
        for source, label, report in reports_of(found)
    ]
    print_table(view, ["source", "for", *(PADDING[way].format(found.batch_size) for way in ways)], rows)


def print_mixture(view: View, found: Inspection) -> None:
    """The share that each of several sources gives."""
    shares = [(source.name, source.train.mixture) for source in found.sources if source.train and source.train.mixture]
    if len(shares) < 2:
        return
    view.title("Mixture")
    rows = [(name, "", f"{s.rows:.1%}", f"{s.tokens:.1%}", f"{s.passes:.2f}") for name, s in shares]
    unit = "of packed rows" if found.packed else "of rows"
    print_table(view, ("source", "", unit, "of tokens", "passes in an epoch"), rows)


def print_table(view: View, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first two columns are words and whose others are numbers."""
    table = Table(box=HORIZONTALS, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i > 0, overflow="fold")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns")
        table.add_row(*map(Text, row))
    view.indented(table)


def print_lengths(view: View, found: Inspection) -> None:
    """A histogram of the lengths of each source's training rows."""
    view.title("Lengths of training rows in tokens")
    for source in found.sources:
        if source.train is None or not any(source.train.histogram):
            continue
        highest = f"  highest bar: {max(source.train.histogram):,} rows"
        view.indented(Text.assemble((source.name, "bold"), highest))
        for line in histogram(source.train.histogram, view.blocks):
            view.indented(Text(line, style="green"))
        last = f"{found.edges[-1]:,}"
        view.indented(Text(f"0{last.rjust(2 * (len(found.edges) - 1) - 1)}"))


def histogram(counts: Sequence[int], blocks: str) -> list[str]:
    """Bars as lines of blocks, two columns a bar. A bar that is not empty shows at least the smallest block."""
    full, highest = len(blocks) - 1, max(counts)
    eighths = [-(-count * HEIGHT * full // highest) for count in counts]
    lines = []
    for line in reversed(range(HEIGHT)):
        parts = [blocks[min(max(height - line * full, 0), full)] for height in eighths]
        lines.append("".join(part * 2 for part in parts).rstrip())
    return [line for line in lines if line]


def print_duplicates(view: View, found: Inspection) -> None:
    """Rows that occur more than once."""
    view.title("Duplicates")
    for name, title in TITLES.items():
        view.indented(Text(f"{found.duplicates[name].rows:>7,} {title}"))
        for line in details_of(found.duplicates[name]):
            view.indented(Text(line), 10)


def details_of(repeats: Repeats) -> Iterator[str]:
    """The sources of repeated rows, and the first example."""
    if repeats.rows:
        yield ", ".join(f"{name}: {rows:,}" for name, rows in repeats.sources.items())
        earlier, later = repeats.examples[0]
        yield f"the first: {near(later)} repeats {near(earlier)}"


def near(place: str) -> str:
    """A place without the folders before the file."""
    return place.rpartition("/")[2]
