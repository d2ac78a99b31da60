"""Console output: whole lines in a log file, one redrawn line on a terminal, and nothing that a text can inject."""

import io
import re
import time

import pytest
from rich.cells import cell_len

from jaxrlhf.config import Settings
from jaxrlhf.runs import Run, console


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """The lines that a person sees: of the escape codes, cursor movements and erasures are followed."""
        lines, row = [""], 0
        for code, text in re.findall(r"(\x1b\[[\d;?]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", self.getvalue()):
            if code == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif code == "\x1b[1A":
                row -= 1
            elif code == "\x1b[2K":
                lines[row] = ""
            lines[row] += text
        return [line.rstrip() for line in lines]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A terminal of 100 columns, whatever the tests run in."""
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)


class Clock:
    """A time that passes only when told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_status_says_what_goes_on_and_how_long_it_took():
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        screen = console.Console(stream=stream)
        with screen.status("compiling…") as notes:
            notes.append("most of it waiting")
        with pytest.raises(KeyError), screen.status("saving…"):
            raise KeyError
        with screen.status("loading…"):
            screen.print("a note")
    took = ["compiling… 0.0s, most of it waiting", "saving… failed after 0.0s", "a note", "loading… 0.0s"]
    first, *rest = plain.getvalue().splitlines()
    assert first == "compiling…" and rest == [took[0], "saving…", took[1], "loading…", *took[2:]]
    assert [line for line in terminal.screen() if line] == took
    assert "compiling…" in terminal.getvalue().split("compiling… 0.0s")[0], "the message shows during the block"


def test_progress_in_a_log_file_is_a_line_each_ten_seconds_with_rate_and_remaining_time(clock):
    stream = io.StringIO()
    with console.Console(stream=stream).progress(100, initial=1, description="sft") as bar:
        clock.now += 50  # the step that compiles
        bar.update()
        for step in range(3, 101):
            clock.now += 4
            bar.note = f"loss={step}"
            bar.update()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft 2/100"
    assert lines[1:3] == [
        "sft 5/100 · 4 s/step · 06:20 left · loss=5",
        "sft 8/100 · 4 s/step · 06:08 left · loss=8",
    ]
    assert len(lines) == 1 + 98 // 3 and not re.search(r"[\r\x1b]", stream.getvalue())


def test_progress_lines_stay_out_while_other_lines_come(clock):
    stream = io.StringIO()
    screen = console.Console(stream=stream)
    with screen.progress(10) as bar:
        for step in range(1, 11):
            clock.now += 9
            screen.print(f"a line {step}")
            bar.update()
    assert stream.getvalue().splitlines() == [f"a line {step}" for step in range(1, 11)]


def test_the_first_step_does_not_count_for_the_rate(clock):
    with console.Console(quiet=True).progress(7301) as bar:
        clock.now += 100
        bar.update()
        assert bar.line() == "step 1/7301"
        clock.now += 2
        bar.update(3)
        assert bar.line() == "step 4/7301 · 1.5 step/s · 1:21:04 left"
        assert bar.line(5) == "step 5/7301 · 1.5 step/s · 1:21:04 left"
    with console.Console(quiet=True).progress(None, description="rows", unit="row") as bar:
        for _ in bar.over("abc"):
            clock.now += 0.5
        assert bar.line() == "rows 3 · 2 row/s"


def test_progress_on_a_terminal_shows_the_latest_metrics_and_prints_above_the_bar(tmp_path):
    stream = Terminal()
    with Run(tmp_path, Settings(), stream=stream, headline=("loss",)) as run, run.progress(2, 0, "sft") as bar:
        run.log(1, {"loss": 0.125})
        bar.update()
        with run.status("saving…"):
            pass
    line, saved, last, report = (line for line in stream.screen() if line)
    assert line == "step 1 · loss 0.125" and saved == "saving… 0.0s"
    assert "sft 1/2 · " in last and last.endswith("loss=0.125")
    assert report.startswith("writing ") and "report.html" in report
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l"), "the cursor is visible"


def test_the_line_of_a_loop_that_ended_can_be_removed():
    stream = Terminal()
    screen = console.Console(stream=stream)
    with screen.progress(3, description="loading", transient=True) as bar:
        for _ in bar.over(range(3)):
            time.sleep(0)
    assert "loading" in stream.getvalue() and not any(stream.screen())


def test_a_dumb_terminal_is_written_to_as_a_file(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    screen = console.Console(stream=stream)
    with screen.progress(3), screen.status("compiling…"):
        screen.print("a note")
    assert stream.getvalue() == "compiling…\na note\ncompiling… 0.0s\n"


def test_tables_fit_the_width_and_cut_long_cells_in_the_middle(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [["word " * 200 + "end", 0.123456, "ok"], ["多" * 60, -1.0, "x\ny"]]
    stream = io.StringIO()
    console.Console(stream=stream).table("Title", ["prompt", "score", "note"], rows)
    lines = stream.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 60
    assert lines[0] == "Title" and lines[2].split() == ["prompt", "score", "note"]
    text = "\n".join(lines)
    assert "0.1235" in text and "…" in text and "end" in text and "x ↵ y" in text and len(lines) < 20


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_text_can_inject_neither_escape_codes_nor_markup(stream):
    evil = "[red]a[/red]\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e:smile:\ud800 {task}"
    harmless = "[red]a[/red]·[2J·]0;title··31m··:smile:· {task}"
    out = stream()
    screen = console.Console(stream=out)
    screen.print(evil)
    screen.table(evil, [evil], [[evil], ["[/]"]])
    with screen.progress(2, description=evil) as bar, screen.status(evil):
        bar.note = evil
    assert out.getvalue().count(harmless) >= 5 and "[/]" in out.getvalue()
    for bad in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\u202e", "\ud800", "\x1b[31m"):
        assert bad not in out.getvalue()
    if stream is io.StringIO:
        assert not re.search(r"[\x1b\r]", out.getvalue())
