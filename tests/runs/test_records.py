"""Records of a run on a disk that cannot be written for a while."""

import errno
import io
import json
import os

import pytest
from disks import files_of_at_most

from jaxrlhf.config import files
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.distributed import ProcessConfig
from jaxrlhf.errors import StorageError
from jaxrlhf.runs import Run, TrackingConfig, records
from jaxrlhf.runs.records import Records


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Writes are tried again with every record, and reads without a pause."""
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))


def test_records_of_an_outage_are_written_after_it_in_order_and_whole(tmp_path):
    said = []
    kept = Records(tmp_path, said.append)
    kept.append("metrics.jsonl", {"step": 1})
    with files_of_at_most(16):  # in the middle of the second line
        for step in (2, 3):
            kept.append("metrics.jsonl", {"step": step})
            kept.append("samples.jsonl", {"step": step, "rows": ["ü" * 20]})
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
        assert [r["step"] for r in kept.read("metrics.jsonl")] == [1, 2, 3], "a reader of the run sees all of them"
    assert len(said) == 1 and "WARNING: metrics.jsonl cannot be written" in said[0], "once, however many fail"
    kept.append("metrics.jsonl", {"step": 4})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")] == [2, 3]
    assert len(said) == 2 and "can be written again: the 5 records that waited are written" in said[1]


def test_a_full_disk_does_not_end_a_run_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)
    stream = io.StringIO()
    run = Run(tmp_path, ProcessConfig(), stream=stream, tracking=TrackingConfig(("none",)))
    said = r"cannot write eval_baseline.json, metrics.jsonl.*no space left.* lost"
    with pytest.raises(StorageError, match=said), run:
        run.begin()
        os.symlink("/dev/full", tmp_path / "metrics.jsonl")
        for step in (1, 2):
            run.log(step, {"loss": 1.0})
        monkeypatch.setattr(records, "write_json_atomic", no_space)
        run.write_json("eval_baseline.json", {"scores": {}})
    assert stream.getvalue().count("WARNING: metrics.jsonl cannot be written (no space left on the disk)") == 1


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_of_an_outage_is_written_after_it(tmp_path, monkeypatch):
    kept = Records(tmp_path, lambda text: None)
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_json_atomic", no_space)
        kept.replace("scores.json", {"a": 1})
    assert not (tmp_path / "scores.json").exists()
    kept.append("metrics.jsonl", {"step": 1})
    assert json.loads((tmp_path / "scores.json").read_text()) == {"a": 1}


def test_records_beyond_the_memory_for_them_are_dropped_and_reported_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_WAITING", 40)
    kept = Records(tmp_path / "away", lambda text: None)
    for step in range(10):
        kept.append("metrics.jsonl", {"step": step})
    (tmp_path / "away").mkdir()
    with pytest.raises(StorageError, match=r"7 records of .* are lost"):
        kept.finish()
    assert [r["step"] for r in read_jsonl(tmp_path / "away" / "metrics.jsonl")] == [7, 8, 9]


def test_a_rewind_drops_what_waits_too(tmp_path):
    kept = Records(tmp_path, lambda text: None)
    kept.append("metrics.jsonl", {"step": 1})
    with files_of_at_most(12):
        kept.append("metrics.jsonl", {"step": 2})
        kept.append("metrics.jsonl", {"step": 3})
    assert [r["step"] for r in kept.rewind(2)] == [3]
    kept.append("metrics.jsonl", {"step": 3, "again": 1})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "again": 1}]


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_read_that_fails_while_a_server_is_away_is_tried_again(tmp_path, monkeypatch, number):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    failures = [OSError(number, os.strerror(number))]
    read = type(tmp_path).read_text

    def flaky(path, *args, **options):
        if failures:
            raise failures.pop()
        return read(path, *args, **options)

    monkeypatch.setattr(type(tmp_path), "read_text", flaky)
    assert Records(tmp_path, print).read("metrics.jsonl") == [{"step": 1}]
    failures += [OSError(number, os.strerror(number)) for _ in range(9)]
    with pytest.raises(StorageError, match=r"cannot read .*metrics.jsonl"):
        Records(tmp_path, print).read("metrics.jsonl")
