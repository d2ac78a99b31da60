"""Runs at a URL on machines that share no folder: parts of checkpoints travel through a local S3 server."""

import importlib.util
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from together import DEADLINE, free_port, run_all

from jaxrlhf.config.remote import RemoteFolder
from jaxrlhf.errors import StorageError
from jaxrlhf.runs import checkpoint_index, exchange
from jaxrlhf.runs.checkpoints import list_checkpoints
from jaxrlhf.runs.exchange import Exchange, leaders_of
from jaxrlhf.runs.pending_save import PendingSave


class Processes:
    """Threads in the place of the processes of a run, for `jaxrlhf.runs.exchange`."""

    def __init__(self, number, patch):
        self.number, self.own, self.values = number, threading.local(), [None] * number
        self.meeting = threading.Barrier(number)
        fake = SimpleNamespace(process_index=lambda: self.own.index, process_count=lambda: number)
        for module in (exchange, checkpoint_index):
            patch.setattr(module, "jax", fake)
        patch.setattr(exchange, "gather", self.gather)
        patch.setattr(exchange, "barrier", lambda what: self.gather(what, None))
        patch.setattr(exchange, "is_primary", lambda: self.own.index == 0)
        patch.setattr(exchange, "from_primary", self.from_primary)

    def gather(self, what, value):
        self.values[self.own.index] = value
        self.meeting.wait(60)
        values = list(self.values)
        self.meeting.wait(60)
        return values

    def from_primary(self, what, make):
        return self.gather(what, make() if self.own.index == 0 else None)[0]

    def run(self, body):
        """Calls `body(index)` for each process; returns the results, with a StorageError in place of one."""
        results = [None] * self.number

        def work(index):
            self.own.index = index
            try:
                results[index] = body(index)
            except StorageError as error:
                results[index] = error

        threads = [threading.Thread(target=work, args=(index,)) for index in range(self.number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def together_at(tmp_path, monkeypatch):
    """Runs a body with the exchange and the folder of each of three processes; the second has a machine for itself."""
    monkeypatch.setattr("jaxrlhf.distributed.processes.SEEN", 0.0)
    monkeypatch.setattr("jaxrlhf.config.remote.WAITS", ())
    run = Processes(3, monkeypatch)
    url = f"memory://{tmp_path.name}/run"
    folders = [tmp_path / name / "run" for name in ("a", "b", "a")]

    def start(body):
        def begin(index):
            leaders = leaders_of(folders[index])
            return body(index, Exchange(url, folders[index], leaders), folders[index])

        return run.run(begin)

    return SimpleNamespace(start=start, url=url, folders=folders)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_processes_that_see_one_folder_have_the_lowest_of_them_as_leader(together_at):
    def look(index, found, folder):
        return found.leader, found.leads, found.is_apart, found.share

    assert together_at.start(look) == [(0, True, False, (0, 2)), (1, True, True, (0, 1)), (0, False, False, (1, 2))]
    assert not files(together_at.folders[0]) and not files(together_at.folders[1])


def test_a_process_sends_its_own_files_and_process_0_gets_them(together_at):
    def save(index, found, folder):
        written = f"ocdbt.process_{index}/d/1", f"array_metadatas/process_{index}", "_METADATA", "ocdbt.process_7/d"
        for name in written:
            (folder / "new" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "new" / name).write_text(f"{name} of {index}")
        name = found.new_name()
        sent = found.send(folder / "new", name) if found.is_apart else {}
        exchange.barrier("sent")
        if index == 0:
            found.collect(folder / "new", name)
        return sorted(sent)

    own = ["array_metadatas/process_1", "ocdbt.process_1/d/1"]
    assert together_at.start(save) == [[], own, []]
    assert set(own) < set(files(together_at.folders[0] / "new"))
    assert (together_at.folders[0] / "new" / "_METADATA").read_text().endswith(("of 0", "of 2"))
    assert not RemoteFolder(together_at.url).files()


def checkpoint(folder, content="1"):
    (folder / "checkpoint-4" / "state" / "d").mkdir(parents=True)
    for name in ("state/d/x", "index.json", "metadata.json"):
        (folder / "checkpoint-4" / name).write_text(content)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_checkpoint_is_on_every_machine_while_it_is_read(together_at, is_there):
    def restore(index, found, folder):
        if index == 0:
            checkpoint(folder)
            if is_there:
                RemoteFolder(together_at.url).put(
                    folder, [f"checkpoint-4/{name}" for name in files(folder / "checkpoint-4")]
                )
        with found.at_hand(folder / "checkpoint-4"):
            seen = files(folder)
        return seen

    names = ["checkpoint-4/index.json", "checkpoint-4/metadata.json", "checkpoint-4/state/d/x"]
    assert together_at.start(restore) == [names] * 3
    assert files(together_at.folders[0]) == names and not files(together_at.folders[1])
    assert sorted(RemoteFolder(together_at.url).files()) == (names if is_there else [])


def test_a_store_that_fails_is_an_error_of_every_process(together_at, monkeypatch):
    def restore(index, found, folder):
        if index == 0:
            checkpoint(folder)
        found.bring(folder / "checkpoint-4")

    def fails(*args):
        raise ConnectionError("503 Slow Down")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.get", fails)
    errors = together_at.start(restore)
    assert all("503 Slow Down" in str(error) for error in errors) and len(errors) == 3
    assert not RemoteFolder(together_at.url).files()


def test_a_checkpoint_without_a_part_that_was_sent_is_not_completed(tmp_path):
    save = PendingSave(tmp_path / "checkpoint-4", 4, [], {}, ())
    (save.work / "state").mkdir(parents=True)
    files = {"ocdbt.process_1/d/1": {"bytes": 1, "xxh3": "0"}}
    assert "ocdbt.process_1/d/1 is not in" in save.publish(files)
    assert not list_checkpoints(tmp_path)


NEEDS_S3 = pytest.mark.skipif(
    not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")), reason="needs moto and s3fs"
)
FLAGS = os.environ.get("XLA_FLAGS", "").replace("device_count=8", "device_count=4")


def places_of(demo):
    return {name: getattr(demo, name) for name in ("train", "eval", "cache", "lm", "reward")}


def commands_of(role, demo, folder):
    common = [sys.executable, str(Path(processes.__file__)), role, f"127.0.0.1:{free_port()}", "2"]
    return [[*common, str(i), json.dumps(places_of(demo)), str(folder)] for i in range(2)]


@NEEDS_S3
@pytest.mark.long
def test_machines_without_a_common_folder_go_on_from_the_url_with_the_same_bits(store, url, demo, tmp_path):
    def launch(role, folders):
        for process in range(2):
            (tmp_path / f"{folders}-{process}").mkdir()
        return run_all(commands_of(role, demo, tmp_path), {"XLA_FLAGS": FLAGS, "RUN_URL": url})

    statuses, outputs = launch("apart", "machine")
    assert statuses == [75, -9], "\n".join(outputs)
    assert "checkpoint-1: 503 Slow Down; training goes on" in outputs[0]
    left = [json.loads((tmp_path / f"process-{i}.json").read_text()) for i in range(2)]
    assert left == [["work"], []]
    statuses, outputs = launch("again", "new")
    assert statuses == [0, 0], "\n".join(outputs)
    assert "fetching the run from" in outputs[0] and "checkpoint-2" in outputs[0]
    for name in ("model.safetensors", "tokenizer.json"):
        assert store.cat_file(f"{url}/killed/{name}") == store.cat_file(f"{url}/whole/{name}")
    found = [{path.split("/", 3)[3] for path in store.find(f"{url}/{run}")} for run in ("whole", "killed")]
    assert not any(".parts" in name or ".unfinished" in name for name in found[0] | found[1])


@NEEDS_S3
@pytest.mark.long
def test_all_three_steps_go_on_from_the_url_when_a_machine_of_the_second_and_of_the_third_is_lost(
    store, url, demo, tmp_path
):
    def launch(run, machine, step="", victim=0):
        environment = {"XLA_FLAGS": FLAGS, "RUN_URL": f"{url}/{run}", "MACHINE": machine}
        environment |= {"STEP": step, "VICTIM": str(victim)}
        return run_all(commands_of("steps", demo, tmp_path), environment, 3 * DEADLINE)

    def weights(run):
        names = [path for path in store.find(f"{url}/{run}") if path.endswith(".safetensors")]
        return {name.split(f"/{run}/")[1]: store.cat_file(name) for name in names}

    lost = [("first", "reward", 1, [75, -9]), ("second", "ppo", 0, [-9, 75]), ("third", "", 0, [0, 0])]
    for machine, step, victim, expected in lost:
        statuses, outputs = launch("killed", machine, step, victim)
        assert statuses == expected, "\n".join(outputs)
    assert "finished before" in outputs[0] and "fetching the run from" in outputs[0]
    statuses, outputs = launch("whole", "alone")
    assert statuses == [0, 0], "\n".join(outputs)
    found = weights("killed")
    assert found == weights("whole") and {name.split("/")[0] for name in found} == {"sft", "reward", "ppo"}
    names = [{path.split(f"/{run}/")[1] for path in store.find(f"{url}/{run}")} for run in ("killed", "whole")]
    assert {name for name in names[0] ^ names[1] if "tensorboard" not in name and "/state/" not in name} == set()
