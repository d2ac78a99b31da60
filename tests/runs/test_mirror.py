"""Runs whose output_dir is a URL, on a local S3 server: copied, continued elsewhere, refused, and failing stores."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys

import pytest

from jaxrlhf.commands.convert import ConvertConfig, convert
from jaxrlhf.config.remote import RemoteFolder, fetch
from jaxrlhf.data import read_tokenizer
from jaxrlhf.data.sources import resolve_source
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.models import read_config
from jaxrlhf.runs import mirror
from jaxrlhf.runs.lock import LOCK
from jaxrlhf.runs.mirror import Mirror
from jaxrlhf.runs.working_folder import files_of_others, mark, works_locally
from jaxrlhf.trainers.sft import SFTConfig, train_sft

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("moto") and importlib.util.find_spec("s3fs")), reason="needs moto and s3fs"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXRLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("jaxrlhf.config.remote.WAITS", ())
    monkeypatch.setattr("jaxrlhf.runs.mirror.LAST_SECONDS", 0.0)
    return tmp_path / "cache"


def names(url):
    return set(RemoteFolder(url).files())


def checkpoint(folder, step, best=None):
    path = folder / f"checkpoint-{step}"
    (path / "state").mkdir(parents=True)
    (path / "state" / "array").write_bytes(b"x" * step)
    (path / "index.json").write_text("{}")
    (path / "metadata.json").write_text(json.dumps({"step": step, "best_step": best}))


def run_of(url, folder, resume=False, overwrite=False, period=0, said=None):
    """A mirror that has begun, and does not look by itself."""
    found = Mirror(url, folder, period, (said if said is not None else []).append)
    try:
        found.begin(resume, overwrite)
    finally:
        found.release()
    return found


def first_run(url, folder, steps=(4, 8), best=None):
    """A run with checkpoints, copied."""
    folder.mkdir(exist_ok=True)
    run = run_of(url, folder)
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"step": 8}\n')
    for step in steps:
        checkpoint(folder, step, best)
    with run:
        pass
    return run


def test_all_files_of_a_run_get_to_the_url(url, tmp_path):
    first_run(url, tmp_path / "a")
    found = names(url)
    assert {"metrics.jsonl", "checkpoint-4/state/array", "checkpoint-8/metadata.json"} <= found
    assert RemoteFolder(url).read("checkpoint-8/state/array") == b"x" * 8


def test_what_is_still_being_written_is_not_copied(url, tmp_path):
    run = run_of(url, tmp_path / "a")
    checkpoint(tmp_path / "a", 2)
    (tmp_path / "a" / "checkpoint-2" / "metadata.json").unlink()
    checkpoint(tmp_path / "a", 4)
    (tmp_path / "a" / "checkpoint-4").rename(tmp_path / "a" / "checkpoint-4.unfinished")
    (tmp_path / "a" / ".export-3").mkdir()
    (tmp_path / "a" / ".export-3" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    run.copy()
    assert names(url) == {"metrics.jsonl", "remote.json"}


def test_a_copy_that_was_killed_leaves_no_checkpoint(url, tmp_path, monkeypatch):
    run = run_of(url, tmp_path / "a")
    checkpoint(tmp_path / "a", 4)
    put = run.remote.fs.put

    def killed(sources, targets):
        if any(target.endswith("metadata.json") for target in targets):
            raise ConnectionError("killed")
        put(sources, targets)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="killed"):
        patch.setattr(run.remote.fs, "put", killed)
        run.copy()
    assert "checkpoint-4/state/array" in names(url)
    run_of(url, tmp_path / "b", resume=True)
    assert names(url) == {"remote.json"} and not (tmp_path / "b").exists()


def test_removed_checkpoints_go_once_the_url_has_as_many_newer_ones(url, tmp_path):
    run = first_run(url, tmp_path / "a", steps=(2, 4))
    run.period = 4
    shutil.rmtree(tmp_path / "a" / "checkpoint-2")
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    checkpoint(tmp_path / "a", 6)
    checkpoint(tmp_path / "a", 7)
    run.copy()  # neither 6 nor 7 is a multiple of 4
    assert {p.step for p in run._points()} == {2, 4}
    checkpoint(tmp_path / "a", 8)
    shutil.rmtree(tmp_path / "a" / "checkpoint-6")
    run.copy()
    assert {p.step for p in run._points()} == {4, 8}
    checkpoint(tmp_path / "a", 9)
    shutil.rmtree(tmp_path / "a" / "checkpoint-7")
    run.copy(last=True)
    assert {p.step for p in run._points()} == {8, 9}
    assert {name.split("/")[0] for name in names(url) if "/" in name} == {"checkpoint-8", "checkpoint-9"}


def test_another_machine_continues_from_the_url(url, tmp_path):
    first_run(url, tmp_path / "a", steps=(4, 6, 8), best=4)
    run_of(url, tmp_path / "b", resume=True)
    found = {path.name for path in (tmp_path / "b").iterdir()}
    assert found == {"metrics.jsonl", "remote.json", "checkpoint-4", "checkpoint-8"}, "newest and best"
    assert (tmp_path / "b" / "checkpoint-8" / "state" / "array").read_bytes() == b"x" * 8


def test_older_checkpoints_at_the_url_stay_until_another_machine_has_saved_newer_ones(url, tmp_path):
    first_run(url, tmp_path / "a", steps=(4, 6, 8), best=8)
    run = run_of(url, tmp_path / "b", resume=True)
    run.copy(last=True)
    assert {p.step for p in run._points()} == {4, 6, 8}, "the newest may turn out to be damaged"
    checkpoint(tmp_path / "b", 10)
    run.copy()
    assert {p.step for p in run._points()} == {6, 8, 10}
    shutil.rmtree(tmp_path / "b" / "checkpoint-8")
    checkpoint(tmp_path / "b", 12)
    run.copy()
    assert {p.step for p in run._points()} == {10, 12}


def test_the_same_machine_continues_from_its_working_folder(url, tmp_path):
    first_run(url, tmp_path / "a")
    checkpoint(tmp_path / "a", 9)
    run = run_of(url, tmp_path / "a", resume=True)
    assert (tmp_path / "a" / "checkpoint-9").is_dir()
    run.copy()
    assert "checkpoint-9/metadata.json" in names(url)


def test_a_working_folder_of_another_run_is_not_continued(url, tmp_path):
    first_run(url, tmp_path / "a")
    first_run(f"{url}-other", tmp_path / "b", steps=(100,))
    run_of(url, tmp_path / "b", resume=True)
    assert {path.name for path in (tmp_path / "b").glob("checkpoint-*")} == {"checkpoint-8"}


def test_a_damaged_id_at_the_url_is_named_and_no_folder_is_removed(url, store, tmp_path):
    first_run(url, tmp_path / "a")
    store.pipe_file(f"{url}/remote.json", b'{"id": "0')
    with pytest.raises(InputError, match=r"remote.json is damaged; copy .* there"):
        run_of(url, tmp_path / "a", resume=True)
    assert (tmp_path / "a" / "checkpoint-8" / "metadata.json").exists()


def test_a_second_run_is_refused_and_an_overwriting_one_removes_the_first(url, tmp_path):
    first_run(url, tmp_path / "a")
    with pytest.raises(InputError, match=r"already holds a run.*checkpoint-4.*--overwrite_output_dir"):
        run_of(url, tmp_path / "b")
    run = run_of(url, tmp_path / "b", overwrite=True)
    assert "checkpoint-8/metadata.json" in names(url), "nothing is removed before the new run has written something"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text("")
    run.copy()
    assert names(url) == {"config.yaml", "remote.json"}


def test_a_store_that_fails_for_a_while_is_told_once_and_caught_up_with(url, tmp_path, monkeypatch):
    said = []
    run = run_of(url, tmp_path / "a", said=said)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("1")
    looks = iter([False, False, False, False, True])
    monkeypatch.setattr(run._end, "wait", lambda seconds: next(looks))
    calls, put = iter(range(4)), run.remote.fs.put

    def flaky(*paths):
        if next(calls) < 2:
            raise ConnectionError("500 Internal Server Error")
        put(*paths)

    monkeypatch.setattr(run.remote.fs, "put", flaky)
    run._watch()
    assert len(said) == 2 and "500 Internal Server Error" in said[0] and "The run goes on" in said[0]
    assert names(url) == {"metrics.jsonl", "remote.json"}


def test_a_full_disk_stops_the_copying_for_a_while_only(url, tmp_path, monkeypatch):
    said = []
    run = run_of(url, tmp_path / "a", said=said)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("1")
    looks = iter([False, False, False, True])
    monkeypatch.setattr(run._end, "wait", lambda seconds: next(looks))
    calls, write = iter(range(3)), mirror.write_json_atomic

    def full(path, value):
        if next(calls) < 2:
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(mirror, "write_json_atomic", full)
    run._watch()
    assert len(said) == 2 and "No space left on device" in said[0] and "takes the run's files again" in said[1]
    assert names(url) == {"metrics.jsonl", "remote.json"}


def test_the_end_of_a_run_waits_for_a_store_that_is_away(url, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.mirror.LAST_SECONDS", 60.0)
    monkeypatch.setattr("jaxrlhf.runs.mirror.LAST_PAUSE", 0.01)
    said, failures = [], iter(range(4))
    run = run_of(url, tmp_path / "a", said=said)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("1")
    put = run.remote.fs.put

    def flaky(*paths):
        if next(failures, 9) < 3:
            raise ConnectionError("503 Slow Down")
        put(*paths)

    monkeypatch.setattr(run.remote.fs, "put", flaky)
    with run:
        pass
    assert names(url) == {"metrics.jsonl", "remote.json"} and len(said) == 1


def test_a_store_that_fails_at_the_end_says_where_the_files_are(url, tmp_path, monkeypatch):
    run = run_of(url, tmp_path / "a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("1")

    def down(*paths):
        raise ConnectionError("503 Slow Down")

    told = rf"503 Slow Down.*{tmp_path}/a; the same command with --resume"
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=told), run:
        patch.setattr(run.remote.fs, "put", down)
    with run_of(url, tmp_path / "a", resume=True):
        pass
    assert "metrics.jsonl" in names(url)


def test_a_url_in_use_is_refused_and_a_lock_left_behind_is_taken_over(url, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.remote_lock.LOOK", 0.01)
    monkeypatch.setattr("jaxrlhf.runs.remote_lock.LEASE_SECONDS", 2.0)
    monkeypatch.setattr("jaxrlhf.runs.remote_lock.RENEWED_EVERY", 0.05)
    first = Mirror(url, tmp_path / "a", 0, print)
    first.begin(False, False)
    with pytest.raises(InputError, match=r"is in use by process \d+ on .* which holds its lock \.run\.lock"):
        run_of(url, tmp_path / "b", overwrite=True)
    first.release()
    assert not names(url)
    lock = json.dumps({"id": "other", "host": "elsewhere", "process": 1, "renewed": 3})
    RemoteFolder(url).write(LOCK, lock.encode())
    monkeypatch.setattr("jaxrlhf.runs.remote_lock.LEASE_SECONDS", 0.1)
    said = []
    run_of(url, tmp_path / "b", said=said)
    assert "process 1 on elsewhere, which may be gone" in said[0]


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(url, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.runs.remote_lock.LEASE_SECONDS", 1e9)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    lock = json.dumps({"id": "other", "host": socket.gethostname(), "process": process.pid, "renewed": 3})
    RemoteFolder(url).write(LOCK, lock.encode())
    run_of(url, tmp_path / "a")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket/run", "no such place|NoSuchBucket"),
        ("nonsense://bucket/run", "nonsense"),
        ("s3:///", "names no place"),
        ("s3://bucket/run[1]", "patterns"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_before_anything_is_done(store, url, message, tmp_path):
    with pytest.raises((InputError, StorageError), match=message):
        run_of(url, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_working_folder_with_files_of_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    config = SFTConfig.create(
        model_name_or_path="m", data_path="d", output_dir="s3://bucket/run", working_dir=str(tmp_path), resume=True
    )
    with pytest.raises(InputError, match=r"working_dir .* holds thesis.txt, which is of no earlier run"):
        works_locally(lambda config: pytest.fail("it began"))(config)
    assert (tmp_path / "thesis.txt").read_text() == "chapter 1"
    mark(tmp_path / "new")
    assert files_of_others(tmp_path / "new") is None and files_of_others(tmp_path / "none") is None


def test_models_and_tokenizers_are_read_from_urls(store, url, demo):
    store.put(f"{demo.lm}/", url, recursive=True)
    assert read_config(url) == read_config(demo.lm)
    assert read_tokenizer(url).get_vocab() == read_tokenizer(demo.lm).get_vocab()
    with pytest.raises(InputError, match="there is no model"):
        read_config(f"{url}-nothing")


@pytest.mark.long
def test_a_run_continues_on_another_machine_with_the_same_bits(store, url, demo, cache, no_report):
    def train(folder, **options):
        settings = {"model_name_or_path": demo.lm, "data_path": demo.train, "eval_data_path": demo.eval}
        settings |= {
            "data_cache_dir": demo.cache,
            "max_length": 48,
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 1e-3,
        }
        return train_sft(SFTConfig.create(**settings, max_eval_samples=8, output_dir=str(folder), **options))

    train(url)
    for path in store.find(f"{url}/checkpoint-4"):  # as if the machine had been lost before it was copied
        store.rm(path)
    wanted = store.cat_file(f"{url}/model.safetensors")
    store.rm(f"{url}/model.safetensors")
    shutil.rmtree(cache)
    train(url, resume=True)
    assert store.cat_file(f"{url}/model.safetensors") == wanted
    assert [r["step"] for r in map(json.loads, store.cat_file(f"{url}/metrics.jsonl").split(b"\n")[:-1])] == [
        0,
        1,
        2,
        3,
        4,
        4,
    ]
    assert f"output_dir: {url}" in store.cat_file(f"{url}/config.yaml").decode()


def test_models_are_converted_to_and_from_urls(store, url, demo, tmp_path):
    def to(path, output, **options):
        convert(ConvertConfig(input=path, output=output, verify=True, **options))

    to(demo.lm, f"{url}/run", source="hf", target="orbax")
    to(f"{url}/run", f"{url}/model", source="orbax", target="hf")
    to(f"{url}/run/checkpoint-0", str(tmp_path / "model"), source="orbax", target="hf")
    assert store.cat_file(f"{url}/model/model.safetensors") == (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="no complete checkpoint"):
        to(f"{url}/run/checkpoint-1", str(tmp_path / "other"), source="orbax", target="hf")


def test_data_at_a_url_is_the_same_as_in_a_file(store, url, demo, cache):
    def source(name):
        return resolve_source(name, cache)

    store.put(demo.train, f"{url}/rows/train.jsonl")
    for name in (f"{url}/rows/train.jsonl", f"{url}/rows", f"{url}/rows@train"):
        assert source(name).data("train")[0].read_bytes() == store.cat_file(f"{url}/rows/train.jsonl")
    with pytest.raises(InputError, match="no such file or folder; check the URL"):
        source(f"{url}/nothing")


def test_a_changed_file_is_fetched_again_and_the_others_are_not(store, url, cache):
    for name in ("a.json", "b.json"):
        store.pipe_file(f"{url}/{name}", b"1")
    folder = fetch(url, lambda found: found)
    (folder / "a.json").write_text("mine")
    store.pipe_file(f"{url}/b.json", b"22")
    fetch(url, lambda found: found)
    assert ((folder / "a.json").read_text(), (folder / "b.json").read_text()) == ("mine", "22")


@pytest.mark.parametrize("text", ["", "{", "[]", "\0"])
def test_files_whose_record_is_damaged_are_fetched_again(store, url, cache, text):
    store.pipe_file(f"{url}/a.json", b"1")
    folder = fetch(url, lambda found: found)
    (folder / "a.json").write_text("mine")
    folder.with_name(f"{folder.name}.json").write_text(text)
    fetch(url, lambda found: found)
    assert (folder / "a.json").read_text() == "1"
