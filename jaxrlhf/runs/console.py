"""What a run shows while it works: lines, a progress bar, timed status messages, tables; fit for terminals and logs."""

import contextlib
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from tqdm import tqdm

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal
CELL_LINES = 6  # longer table cells are cut in the middle


class Console:
    """Prints to `stream` (default: stderr); on a terminal with a redrawn progress bar, elsewhere whole lines only."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self.is_terminal = bool(getattr(self.stream, "isatty", lambda: False)())
        self.bar: tqdm | None = None
        self.last_print = 0.0
        self._line_is_open = False

    def print(self, text: str) -> None:
        """Print `text` as whole lines, above the progress bar where there is one."""
        if self.quiet:
            return
        self._end_open_line()
        if self.bar is not None and self.is_terminal:
            self.bar.clear()
        self.stream.write(text + "\n")
        self.stream.flush()
        self.last_print = time.monotonic()
        if self.bar is not None and self.is_terminal:
            self.bar.refresh()

    @contextlib.contextmanager
    def status(self, message: str) -> Iterator[None]:
        """Say what is being done, and afterwards how long it took: `compiling train step… 12.3s`."""
        begin = time.monotonic()
        same_line = self.is_terminal and self.bar is None and not self.quiet
        if same_line:
            self._end_open_line()
            self.stream.write(message)
            self.stream.flush()
            self._line_is_open = True
        else:
            self.print(message)
        outcome = "failed after "
        try:
            yield
            outcome = ""
        finally:
            took = f"{outcome}{time.monotonic() - begin:.1f}s"
            if same_line and self._line_is_open:
                self._line_is_open = False
                self.stream.write(f" {took}\n")
                self.stream.flush()
            else:
                self.print(f"{message} {took}")

    @contextlib.contextmanager
    def progress(self, total: int | None, initial: int = 0, description: str = "") -> Iterator[tqdm]:
        """A progress bar with rate and remaining time; call `.update()` per step. Plain lines where no terminal is."""
        kind = tqdm if self.is_terminal else _PlainBar
        options = {"mininterval": 0.1} if self.is_terminal else {"mininterval": PLAIN_INTERVAL, "console": self}
        self._end_open_line()
        self.last_print = time.monotonic()
        outer = self.bar
        self.bar = bar = kind(
            total=total,
            initial=initial,
            desc=description or None,
            unit="step",
            miniters=1,
            smoothing=0,  # the average rate: steps are alike, and the first one, which compiles, is left out of it
            dynamic_ncols=True,
            file=self.stream,
            disable=self.quiet,
            **options,
        )
        try:
            yield bar
        finally:
            bar.close()
            self.bar = outer

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print rows under a title, wrapped to the terminal's width."""
        self.print(format_table(title, columns, rows, shutil.get_terminal_size((100, 24)).columns))

    def _end_open_line(self) -> None:
        if self._line_is_open:
            self.stream.write("\n")
            self._line_is_open = False


class _PlainBar(tqdm):
    """Progress as whole lines, for log files: one each `PLAIN_INTERVAL` seconds in which nothing else was printed."""

    def __init__(self, *args: Any, console: Console, **options: Any):
        self.console = console
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        under_way = self.n > self.initial and (self.total is None or self.n < self.total)
        if under_way and not self.disable and time.monotonic() - self.console.last_print >= PLAIN_INTERVAL:
            self.console.print(progress_line(self) + (f" · {self.postfix}" if self.postfix else ""))
        return True

    def clear(self, nolock: bool = False) -> None:
        """Nothing to clear: lines stay."""

    def close(self) -> None:
        """End the bar without drawing it once more."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def progress_line(bar: tqdm, done: int | None = None) -> str:
    """`train 12/100 · 1.31 step/s · 01:07 left`, from a tqdm bar; `done` where the count is ahead of the bar's."""
    values = bar.format_dict
    done = values["n"] if done is None else done
    rate = values["rate"] or (values["n"] - values["initial"]) / max(values["elapsed"], 1e-9)
    parts = [f"{bar.desc.removesuffix(': ')} " if bar.desc else ""]
    parts[0] += f"{done}/{values['total']}" if values["total"] is not None else f"{done}"
    if rate:
        parts.append(f"{rate:.3g} step/s" if rate >= 1 else f"{1 / rate:.3g} s/step")
        if values["total"] is not None:
            parts.append(f"{tqdm.format_interval(max(0, values['total'] - done) / rate)} left")
    return " · ".join(parts)


def format_number(value: Any) -> str:
    """A number with four significant digits; other values as they are."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def format_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = 100) -> str:
    """A text table of at most `width` columns; long cells are wrapped, very long ones cut in the middle."""
    cells = [[_one_line(format_number(value)) for value in row] for row in rows]
    header = [str(column) for column in columns]
    natural = [max([_width(header[i]), *(_width(row[i]) for row in cells)]) for i in range(len(header))]
    widths = _share_width(natural, width - 2 * (len(header) - 1))
    rule = "─" * min(width, sum(widths) + 2 * (len(widths) - 1))
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    lines = [title, rule, *_format_row(header, widths, numeric), rule]
    wrapped = [_format_row(row, widths, numeric) for row in cells]
    spaced = any(len(row) > 1 for row in wrapped)  # a blank line keeps wrapped rows apart
    for number, row in enumerate(wrapped):
        lines += [""] * (spaced and number > 0) + row
    return "\n".join([*lines, rule])


def _format_row(cells: list[str], widths: list[int], numeric: list[bool]) -> list[str]:
    columns = [_wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for number in range(max(map(len, columns))):
        parts = []
        for column, width, right in zip(columns, widths, numeric, strict=True):
            text = column[number] if number < len(column) else ""
            space = " " * max(0, width - _width(text))
            parts.append(space + text if right else text + space)
        lines.append("  ".join(parts).rstrip())
    return lines


def _share_width(natural: list[int], available: int) -> list[int]:
    """Narrow columns get what they need; the others share the rest evenly (8 at least)."""
    widths, left = [0] * len(natural), available
    for place, i in enumerate(sorted(range(len(natural)), key=lambda i: natural[i])):
        widths[i] = max(min(natural[i], left // (len(natural) - place)), min(8, natural[i]))
        left -= widths[i]
    return widths


def _wrap(text: str, width: int) -> list[str]:
    wide = _width(text) != len(text)
    lines = textwrap.wrap(text, max(1, width // 2 if wide else width), break_on_hyphens=False) or [""]
    if len(lines) > CELL_LINES:
        lines = [*lines[: CELL_LINES // 2], "…", *lines[-(CELL_LINES // 2 - 1) :]]
    return lines


def _one_line(text: str) -> str:
    text = text.strip().replace("\r\n", "\n").replace("\n", " ↵ ").replace("\t", " ")
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cf") else "·" for c in text)


def _width(text: str) -> int:
    """Terminal columns that `text` takes: East Asian wide characters two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)
