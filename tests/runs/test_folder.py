"""Run folders: refused, resumed, rewound, and readable after a crash."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import config
from jaxrlhf.config import files, load_yaml
from jaxrlhf.config.files import read_jsonl, write_json_atomic, write_text_atomic
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs import Run, peak_memory_bytes
from jaxrlhf.runs.checkpoints import list_checkpoints
from jaxrlhf.runs.saving import save_checkpoint


@dataclasses.dataclass(frozen=True)
class Settings(config.Settings):
    """Settings."""

    learning_rate: float = 1e-4
    """Learning rate."""


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """These tests are about the folder; drawing the report has its own."""
    written = []
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", written.append)
    return written


def run_in(folder, **options):
    return Run(folder, Settings(), stream=options.pop("stream", io.StringIO()), **options)


def records(folder, name="metrics.jsonl"):
    return [{k: v for k, v in record.items() if k != "time"} for record in read_jsonl(folder / name)]


def event_steps(folder):
    """(tag, step) of every scalar in the event files, read with tensorboardX's own message types."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length (8), its checksum (4), payload, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_a_run_writes_config_metrics_events_samples_summary_and_report(tmp_path, no_report):
    with run_in(tmp_path / "run") as run:
        run.log(1, {"loss": jnp.float32(1.5), "count": np.int64(3), "bad": float("nan"), "huge": float("inf")})
        run.log(1, {"eval/loss": 1 / 3})
        run.table("Samples", ["prompt", "score"], [["a\nb", np.float32(0.5)], ["c", None]], step=1)
        run.write_summary({"seconds": 1.0})
        folder = run.output_dir
    assert load_yaml(Settings, folder / "config.yaml") == Settings()
    assert records(folder) == [
        {"step": 1, "loss": 1.5, "count": 3, "bad": None, "huge": None},
        {"step": 1, "eval/loss": 0.3333333},
    ]
    assert records(folder, "samples.jsonl") == [
        {"step": 1, "title": "Samples", "columns": ["prompt", "score"], "rows": [["a\nb", 0.5], ["c", None]]}
    ]
    own = [event for event in event_steps(folder) if not event[0].startswith(("config/", "system/"))]
    assert own == [("loss", 1), ("count", 1), ("eval/loss", 1), ("samples/Samples/text_summary", 1)]
    assert json.loads((folder / "summary.json").read_text()) == {"seconds": 1.0}
    assert no_report == [folder]


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "model.safetensors"])
def test_a_folder_that_holds_a_run_or_model_is_refused_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=rf"{name}.*--resume.*--overwrite_output_dir"):
        run_in(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_with_only_checkpoints_is_refused_and_a_foreign_file_is_not_a_run(tmp_path):
    save_checkpoint(tmp_path / "a", 1, {"w": jnp.zeros(2)}, {})
    with pytest.raises(InputError, match="checkpoint-1"):
        run_in(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    run_in(tmp_path / "b").close()
    with pytest.raises(InputError, match="is a file"):
        run_in(tmp_path / "b" / "notes.txt")


def test_overwrite_removes_the_old_run_but_not_the_exported_model_or_other_files(tmp_path):
    with run_in(tmp_path) as run:
        run.log(1, {"loss": 1.0})
    save_checkpoint(tmp_path, 1, {"w": jnp.zeros(2)}, {})
    for name in ("model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("kept")
    before = sorted(path.name for path in tmp_path.iterdir())
    run_in(tmp_path, overwrite=True).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "a run that never began deletes nothing"
    with run_in(tmp_path, overwrite=True) as run:
        run.begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model.safetensors", "notes.txt"]


def test_settings_of_a_run_that_never_began_are_not_written_and_do_not_block_the_next(tmp_path):
    run_in(tmp_path / "new").close()
    assert not (tmp_path / "new").exists()
    (tmp_path / "config.yaml").write_text("")
    run_in(tmp_path).close()


def test_resume_appends_after_rewinding_to_the_checkpoint(tmp_path):
    with run_in(tmp_path) as run:
        for step in (1, 2, 3):
            run.log(step, {"loss": float(step)})
            run.table("Samples", ["n"], [[step]], step)
    save_checkpoint(tmp_path, 2, {"w": jnp.zeros(2)}, {})
    with run_in(tmp_path, resume=True) as run:
        run.rewind(2)
        run.log(3, {"loss": 30.0})
        run.log(4, {"loss": 40.0})
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    assert [record["step"] for record in records(tmp_path, "samples.jsonl")] == [1, 2]
    assert len(list_checkpoints(tmp_path)) == 1


def test_times_of_records_do_not_jump_with_the_clock(tmp_path, monkeypatch):
    with run_in(tmp_path) as run:
        run.log(1, {"loss": 1.0})
        for step, jump in ((2, -7200), (3, 7200)):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1e9 + jump)
            run.log(step, {"loss": 1.0})
            run.table("Samples", ["n"], [[step]], step)
    times = [r["time"] for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert times == sorted(times) and times[-1] - times[0] < 60
    assert times[0] <= read_jsonl(tmp_path / "samples.jsonl")[-1]["time"] < times[0] + 60


def test_a_line_cut_short_by_a_crash_is_left_out_and_appending_goes_on(tmp_path):
    with run_in(tmp_path) as run:
        run.log(1, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    with run_in(tmp_path, resume=True) as run:
        run.log(2, {"loss": 2.0})
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"x\.jsonl line 2 is not valid JSON"):
        read_jsonl(tmp_path / "x.jsonl")


def test_everything_logged_survives_a_killed_process(tmp_path):
    code = (
        "import os, sys; from jaxrlhf.distributed import ProcessConfig; from jaxrlhf.runs.folder import Run\n"
        "run = Run(sys.argv[1], ProcessConfig(), quiet=True)\n"
        "run.log(1, {'loss': 1.0}); run.table('t', ['n'], [[1]], 1); run.log(2, {'loss': 2.0}); os._exit(9)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "run"], env=environment).returncode == 9
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    assert len(records(tmp_path / "run", "samples.jsonl")) == 1


def test_a_crashed_run_writes_its_report_and_raises_its_own_error(tmp_path, no_report, monkeypatch):
    with pytest.raises(ZeroDivisionError), run_in(tmp_path / "a") as run:
        run.log(1, {"loss": 1.0})
        raise ZeroDivisionError
    assert no_report == [tmp_path / "a"]

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr("jaxrlhf.runs.report.write_report", fail)
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), run_in(tmp_path / "b", stream=stream) as run:
        run.log(1, {"loss": 1.0})
        raise ZeroDivisionError
    assert "report.html" in stream.getvalue() and "disk full" in stream.getvalue()
    with pytest.raises(StorageError, match=r"report\.html.*disk full"), run_in(tmp_path / "c") as run:
        run.log(1, {"loss": 1.0})


def test_a_summary_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path):
    with run_in(tmp_path) as run, pytest.raises(StorageError, match=r"summary.json.*--resume"):
        run.begin()
        (tmp_path / "summary.json").mkdir()
        run.write_summary({"seconds": 1.0})


def test_a_folder_that_cannot_be_made_is_the_users_input(tmp_path):
    (tmp_path / "file").write_text("")
    with run_in(tmp_path / "file" / "run") as run, pytest.raises(InputError, match="output_dir"):
        run.begin()


def test_console_lines_come_every_logging_steps_and_for_every_evaluation(tmp_path):
    stream = io.StringIO()
    with run_in(tmp_path, stream=stream, logging_steps=2, headline=("loss",)) as run:
        for step in (1, 2, 3):
            run.log(step, {"other": 5.0, "loss": step / 3})
        run.log(3, {"eval/loss": 0.25})
    lines = stream.getvalue().splitlines()
    assert lines[:-2] == ["step 2 · loss 0.6667", "step 3 · eval/loss 0.25"]
    assert lines[-2] == f"writing {tmp_path / 'report.html'}…" and lines[-1].startswith(lines[-2])
    assert len(records(tmp_path)) == 4


def test_quiet_prints_nothing_but_records_all(tmp_path):
    stream = io.StringIO()
    with run_in(tmp_path, stream=stream, quiet=True) as run, run.progress(2) as bar, run.status("compiling…"):
        run.log(1, {"loss": 1.0})
        run.table("t", ["a"], [[1]], 1)
        bar.update()
    assert stream.getvalue() == "" and len(records(tmp_path)) == 1


def test_metrics_that_are_not_numbers_are_refused(tmp_path):
    with run_in(tmp_path) as run:
        with pytest.raises(TypeError, match="metric loss"):
            run.log(1, {"loss": "low"})
        with pytest.raises(ValueError, match="row has 1 cells, not 2"):
            run.table("t", ["a", "b"], [["x"]], 1)


def test_peak_memory_is_in_bytes():
    assert 2**26 < peak_memory_bytes()["host"] < 2**40


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json_atomic(path, {"a": float("nan")})

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomic(path, "new")
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
