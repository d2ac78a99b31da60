"""One run at a time in a folder: refused, taken over, lost."""

import errno
import io
import os
import subprocess
import sys

import pytest

from jaxrlhf.distributed import ProcessConfig
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs import Run, lock

OTHER = """
import os, sys, time
from jaxrlhf.distributed import ProcessConfig
from jaxrlhf.runs.folder import Run
from jaxrlhf.runs.trackers import TrackingConfig
run = Run(sys.argv[1], ProcessConfig(), quiet=True, tracking=TrackingConfig(report_to=("none",)))  # no late files
run.log(1, {"loss": 1.0})
print("ready", flush=True)
sys.stdin.readline()
"""


def run_in(folder, **options):
    return Run(folder, ProcessConfig(), stream=io.StringIO(), **options)


@pytest.fixture
def other(tmp_path):
    """A run of another process in `tmp_path / "run"`."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", OTHER, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    with process:
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_whatever_the_flags_and_taken_over_once_its_run_was_killed(other, tmp_path):
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=rf"is in use by process {other.pid} on .*run.lock.*another folder"):
            run_in(tmp_path / "run", **options)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    other.kill()
    other.wait()
    assert (tmp_path / "run" / lock.LOCK).exists()
    with run_in(tmp_path / "run", resume=True) as run:
        run.rewind(1)
        run.log(2, {"loss": 1.0})
    assert not (tmp_path / "run" / lock.LOCK).exists()


def test_of_two_runs_that_prepare_at_once_the_later_one_to_begin_is_refused(tmp_path):
    first, second = run_in(tmp_path / "run"), run_in(tmp_path / "run")
    first.log(1, {"loss": 1.0})
    with pytest.raises(InputError, match="is in use by process"):
        second.log(1, {"loss": 1.0})
    third = run_in(tmp_path / "other")
    first.close()
    with run_in(tmp_path / "other") as run:
        run.log(1, {"loss": 1.0})
    with pytest.raises(InputError, match="already holds a run"):
        third.begin()


def write_foreign(folder, renew=None):
    """The lock of a process of another machine."""
    held = lock.FolderLock(folder)
    text = (folder / lock.LOCK).read_text()
    held.release()
    name = next(line for line in text.splitlines() if line.startswith("host="))
    (folder / lock.LOCK).write_text(text.replace(name, "host=elsewhere"))


def test_the_lock_of_another_machine_is_taken_over_when_nobody_renews_it_else_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.3)
    write_foreign(tmp_path)
    lock.FolderLock(tmp_path).release()
    write_foreign(tmp_path)
    looks = []

    def renewed(path):  # as if its holder had renewed it between the first look and the next
        looks.append(path)
        return len(looks)

    monkeypatch.setattr(lock, "_renewed", renewed)
    with pytest.raises(InputError, match=r"in use by process \d+ on elsewhere"):
        lock.FolderLock(tmp_path)


def test_a_run_that_lost_its_lock_ends_and_one_whose_storage_was_away_goes_on(tmp_path):
    run = run_in(tmp_path)
    run.log(1, {"loss": 1.0})
    held = run._lock
    held._note(lock.LeaseCompromise(held.path, "token", "refresh-failed"))
    run.log(2, {"loss": 1.0})
    assert held._lost is None and held._lease.is_locked, "the lock is still its own, and renewed again"
    (tmp_path / lock.LOCK).unlink()
    write_foreign(tmp_path)
    held._note(lock.LeaseCompromise(held.path, "token", "owner-changed"))
    with pytest.raises(StorageError, match=r"lost its lock .run.lock to process \d+ on elsewhere"):
        run.log(3, {"loss": 1.0})
    run.close()
    assert (tmp_path / lock.LOCK).exists(), "the lock of the other run stays"


@pytest.mark.parametrize(("task", "place"), [("unlink", os), ("_renewed", lock)])
@pytest.mark.parametrize("taken", [False, True])
def test_a_run_whose_disk_is_read_only_renews_its_lock_when_it_can_and_not_one_that_another_took(
    tmp_path, monkeypatch, task, place, taken
):
    run = run_in(tmp_path)
    run.log(1, {"loss": 1.0})
    held = run._lock

    def refused(path, *arguments, **options):
        if task == "_renewed":
            return None
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(place, task, refused)
        held._note(lock.LeaseCompromise(held.path, "token", "refresh-failed"))
        run.log(2, {"loss": 1.0})
        run.log(3, {"loss": 1.0})
        assert held._lost is not None
    if taken:
        held.path.unlink(missing_ok=True)
        write_foreign(tmp_path)
        with pytest.raises(StorageError, match=r"lost its lock .run.lock to process \d+ on elsewhere"):
            run.log(4, {"loss": 1.0})
        assert held.path.exists(), "the lock of the other run stays"
    else:
        run.log(4, {"loss": 1.0})
        assert held._lost is None and held._lease.is_locked and held.path.exists()
    run.close()
