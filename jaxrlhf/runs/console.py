"""Console output of a run: lines, progress, timed status messages and tables, on a terminal or in a log file."""

import contextlib
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO, TypeVar

from rich.box import HORIZONTALS
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from jaxrlhf.config.secrets import redacted

PLAIN_INTERVAL = 10.0  # seconds between progress lines in a log file
CELL_LINES = 6  # longer table cells are cut in the middle
BAR_WIDTH = 24

Item = TypeVar("Item")


class Progress:
    """Progress of a loop: steps done, their rate, the remaining time and a note.

    `Console.progress` makes it. A terminal shows it as one line that is redrawn. A log file gets a line for each
    `PLAIN_INTERVAL` seconds in which nothing else is printed.
    """

    def __init__(self, console: "Console", total: int | None, initial: int, description: str, unit: str):
        self.total, self.done, self.unit = total, initial, unit
        self.description = description or unit
        self.note = ""
        """Text at the end of the line, such as the latest metrics."""
        self._console = console
        self._first: tuple[int, float] | None = None
        self._latest = 0.0

    def update(self, steps: int = 1) -> None:
        """Counts finished steps. The rate is measured from the first call on, because the first step compiles."""
        self.done += steps
        self._latest = time.monotonic()
        if self._first is None:
            self._first = (self.done, self._latest)
        silent = self._latest - self._console.last_print >= PLAIN_INTERVAL
        if silent and not self._console.is_terminal and (self.total is None or self.done < self.total):
            self._console.print(self._with_note())

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and counts each after its use."""
        for item in items:
            yield item
            self.update()

    def line(self, done: int | None = None) -> str:
        """Formats the progress: `sft 12/100 · 1.31 step/s · 01:07 left`.

        Args:
            done: Steps to show, for a step that is not counted yet. Default: the steps counted so far.
        """
        done = self.done if done is None else done
        parts = [f"{self.description} {done}" if self.total is None else f"{self.description} {done}/{self.total}"]
        first, begin = self._first or (self.done, self._latest)
        if self.done > first:
            rate = (self.done - first) / max(self._latest - begin, 1e-9)
            parts.append(f"{rate:.3g} {self.unit}/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}")
            if self.total is not None:
                parts.append(f"{format_duration(max(0, self.total - done) / rate)} left")
        return " · ".join(parts)

    def _with_note(self) -> str:
        return " · ".join([self.line(), self.note]) if self.note else self.line()

    def __rich__(self) -> Table:
        text = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        grid = Table.grid(Column(width=BAR_WIDTH), text, padding=(0, 1), expand=True)
        grid.add_row(ProgressBar(self.total, self.done), Text(plain_text(self._with_note())))
        return grid


class Console:
    """Prints to a terminal or a log file.

    A terminal shows a redrawn progress line and a spinner. A log file gets whole lines without escape codes. Control
    characters in texts are replaced, so that a model's output cannot change the terminal; rich markup is not read.

    Args:
        quiet: Print nothing.
        stream: Destination. Default: stderr.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self.is_terminal = self.stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self.bar: Progress | None = None
        self.last_print = time.monotonic()
        self._rich = RichConsole(
            file=self.stream,
            quiet=quiet,
            force_terminal=self.is_terminal,
            force_jupyter=False,
            width=None if self.is_terminal else shutil.get_terminal_size((100, 24)).columns,
        )

    def print(self, text: str) -> None:
        """Prints `text` as whole lines, above the progress line on a terminal; secrets in it are replaced."""
        self.last_print = time.monotonic()
        self._rich.print(Text(plain_text(redacted(text))), soft_wrap=True)

    @contextlib.contextmanager
    def status(self, message: str) -> Iterator[list[str]]:
        """Shows what a block does, and afterwards how long it took: `restoring checkpoint-20… 12.3s`.

        Yields a list; the block may add notes, which are shown after the time.
        """
        if not self.is_terminal:
            self.print(message)
        begin, outcome, notes = time.monotonic(), "failed after ", []
        try:
            with self._live(Spinner("dots", Text(plain_text(message))), transient=True):
                yield notes
            outcome = ""
        finally:
            self.print(", ".join([f"{message} {outcome}{time.monotonic() - begin:.1f}s", *notes]))

    @contextlib.contextmanager
    def progress(
        self, total: int | None, initial: int = 0, description: str = "", unit: str = "step", transient: bool = False
    ) -> Iterator[Progress]:
        """Shows the progress of a loop that calls `.update()` for each step.

        Args:
            total: Steps in all, None if unknown.
            initial: Steps done before.
            description: Name of the loop. Default: the unit.
            unit: Name of a step.
            transient: Remove the line from the terminal at the end.
        """
        outer, self.bar = self.bar, Progress(self, total, initial, description, unit)
        self.last_print = time.monotonic()
        try:
            with self._live(self.bar, transient):
                yield self.bar
        finally:
            self.bar = outer

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Prints rows under a title. Long cells are wrapped, very long ones cut in the middle."""
        limit = CELL_LINES * self._rich.width // len(columns)
        cells = [[_cell(value, limit) for value in row] for row in rows]
        longest = [max(map(cell_len, column)) for column in zip(map(plain_text, columns), *cells, strict=True)]
        is_wrapped = sum(longest) + 2 * len(columns) > self._rich.width
        table = Table(box=HORIZONTALS, pad_edge=False, collapse_padding=True, leading=int(is_wrapped))
        for i, name in enumerate(columns):
            is_numeric = all(isinstance(row[i], int | float) for row in rows)
            justify = "right" if is_numeric else "left"
            table.add_column(Text(plain_text(name)), justify=justify, no_wrap=is_numeric, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        self.print(title)
        self._rich.print(table)

    @contextlib.contextmanager
    def _live(self, shown: RenderableType, transient: bool) -> Iterator[None]:
        """Keeps `shown` on the last line of a terminal."""
        if self.quiet or not self.is_terminal:
            yield
            return
        redirect = self.stream is sys.stderr  # warnings then appear above the line
        with Live(shown, console=self._rich, transient=transient, redirect_stdout=False, redirect_stderr=redirect):
            self._rich.show_cursor(True)  # a killed process must not leave it hidden
            yield


def format_number(value: object) -> str:
    """Formats a float with four significant digits, and other values as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float) -> str:
    """Formats seconds as `MM:SS`, from an hour on as `H:MM:SS`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def plain_text(text: str) -> str:
    """Replaces characters that control a terminal; newlines and tabs stay."""
    text = text.replace("\r\n", "\n")
    return "".join("·" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t" else c for c in text)


def _cell(value: object, limit: int) -> str:
    """One line of at most about `limit` characters, cut in the middle."""
    text = plain_text(format_number(value).strip()).replace("\n", " ↵ ").replace("\t", " ")
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
