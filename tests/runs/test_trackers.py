"""Trackers, each against its real library: what they show of a run and of a resumed one, and failures."""

import dataclasses
import io
import json
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from disks import files_of_at_most

from jaxrlhf import config
from jaxrlhf.errors import InputError
from jaxrlhf.runs import Run, TrackingConfig, records
from jaxrlhf.runs.saving import save_checkpoint
from jaxrlhf.runs.trackers import background, registry, tensorboard_tracker

NAMES = ("tensorboard", "wandb", "trackio", "mlflow")
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass(frozen=True)
class Settings(config.Settings):
    """Settings."""

    learning_rate: float = 1e-4
    """Learning rate."""
    data_path: str = ""
    """Data."""


@pytest.fixture(autouse=True)
def report(monkeypatch):
    """Runs write a page without curves."""

    def write(folder):
        (folder / "report.html").write_text("<p>report</p>")
        return folder / "report.html"

    monkeypatch.setattr("jaxrlhf.runs.report.write_report", write)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Every library keeps its runs in this test's folder and reaches for no server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def run_in(folder, *names, settings=Settings(), stream=None, **options):
    tracking = TrackingConfig(names, run_name="my-run", project="my-project")
    return Run(folder, settings, tracking=tracking, stream=stream or io.StringIO(), **options)


def log_steps(run, first, last, sign=1):
    if first == 1:
        run.log(0, {"eval/loss": 9.0})
    for step in range(first, last + 1):
        run.log(step, {"loss": sign * step / 2, "bad": float("nan")})
        if step % 2 == 0:
            run.log(step, {"eval/loss": sign * step / 4})
            run.table("held-out samples", ("prompt", "response", "score", "length"), [["p|q", "r\ns", 0.5, 3]], step)


def resumed_run(folder, *names, between=lambda: None):
    """Steps 1 to 5, then from the checkpoint of step 3 again up to 6; the second time with other values."""
    folder.mkdir()
    with run_in(folder, *names) as run:
        log_steps(run, 1, 5)
    save_checkpoint(folder, 3, {"w": np.zeros(2)}, {})
    between()
    with run_in(folder, *names, resume=True) as run:
        run.rewind(3)
        log_steps(run, 4, 6, sign=-1)


ONCE = {"loss": {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0, 5: 2.5, 6: -3.0}, "eval/loss": {0: 9.0, 2: 0.5, 4: 1.0, 6: -1.5}}
"""What trackers that keep what they have show of `resumed_run`."""
REPLACED = {"loss": {**ONCE["loss"], 4: -2.0, 5: -2.5}, "eval/loss": {**ONCE["eval/loss"], 4: -1.0}}
"""The same of TensorBoard, which drops what is done again."""


# ---- what each library has


def test_tensorboard_drops_what_a_resumed_run_does_again_also_after_the_clock_was_set_back(tmp_path, monkeypatch):
    def set_clock_back():
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 9999)

    resumed_run(tmp_path / "run", "tensorboard", between=set_clock_back)
    values, texts = read_events(tmp_path / "run")
    assert {name: values[name] for name in REPLACED} == REPLACED and "bad" not in values
    assert values["system/memory_gib"][6] > 0
    assert '"learning_rate": 0.0001' in texts["config/text_summary"]
    assert "| p\\|q | r<br>s | 0.5 | 3 |" in texts["samples/held-out-samples/text_summary"]


def test_tensorboard_drops_what_a_run_that_goes_back_does_again(tmp_path):
    with run_in(tmp_path / "run", "tensorboard") as run:
        log_steps(run, 1, 5)
        run.rewind(3, repeats=False)
        log_steps(run, 4, 6, sign=-1)
    values, _ = read_events(tmp_path / "run")
    assert {name: values[name] for name in REPLACED} == REPLACED


def test_tensorboard_has_the_events_of_an_outage_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.0)
    done = threading.Event()
    log = tensorboard_tracker.TensorBoard.log

    def log_and_say(self, step, metrics):
        log(self, step, metrics)
        if step == 2:
            done.set()

    monkeypatch.setattr(tensorboard_tracker.TensorBoard, "log", log_and_say)
    with run_in(tmp_path / "run", "tensorboard") as run:
        with files_of_at_most(250):
            for step in (1, 2):
                run.log(step, {"loss": float(step)})
            assert done.wait(30)
        run.log(3, {"loss": 3.0})
    assert read_events(tmp_path / "run")[0]["loss"] == {1: 1.0, 2: 2.0, 3: 3.0}


def read_events(folder):
    """Values and texts in the event files, as TensorBoard reads them: {tag: {step: value}}, {tag: text}."""
    from tensorboardX.proto.event_pb2 import Event

    values, texts = {}, {}
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length (8), its checksum (4), payload, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            if event.HasField("session_log"):  # what TensorBoard does when a writer purges
                values = {n: {s: v for s, v in steps.items() if s < event.step} for n, steps in values.items()}
            for value in event.summary.value:
                if value.HasField("tensor"):
                    texts[value.tag] = value.tensor.string_val[0].decode()
                else:
                    values.setdefault(value.tag, {})[event.step] = round(value.simple_value, 4)
            data = data[16 + length :]
    return values, texts


def wandb_records(data):
    """The records of a .wandb file, a LevelDB log: blocks of 32 KiB with pieces of checksum, length, type, content."""
    place, record = 7, b""  # after the file's header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield record
            record = b""


def test_wandb_continues_one_run_and_gets_each_metric_of_a_step_once(tmp_path, places):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    def keep_first():
        wandb.teardown()  # a resume is another process
        # wandb names the folder by the second, and both runs may begin in one.
        (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
        folder.rename(folder.with_name("offline-run-0"))

    resumed_run(tmp_path / "run", "wandb", between=keep_first)
    wandb.teardown()  # only then its files are complete
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    values, ids, settings, exits = {}, set(), {}, []
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        for record in map(Record.FromString, wandb_records(path.read_bytes())):
            if record.HasField("run"):
                ids.add((record.run.run_id, record.run.project, record.run.display_name))
                settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("exit"):
                exits.append(record.exit.exit_code)
            row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            for name in (name for name in row if name != "step" and name[0] != "_"):
                if "step" in row:
                    assert row["step"] not in values.setdefault(name, {}), f"{name} twice"
                    values[name][row["step"]] = row[name]
    assert ids == {(known["id"], "my-project", "my-run")} and exits == [0, 0]
    assert settings["learning_rate"] == 1e-4
    assert {name: values[name] for name in ONCE} == ONCE and "bad" not in values
    assert sorted(values["samples/held-out-samples"]) == [2, 4, 6]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/html/report*.html"))


def test_trackio_continues_one_run_and_gets_each_metric_of_a_step_once(tmp_path, places, monkeypatch):
    trackio = pytest.importorskip("trackio")
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        for name, place in {"TRACKIO_DIR": "trackio", "MEDIA_DIR": "trackio/media"}.items():  # read at import
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / place)
    (tmp_path / "trackio").mkdir()
    resumed_run(tmp_path / "run", "trackio")
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())["trackio"]
    storage = trackio.sqlite_storage.SQLiteStorage
    assert storage.get_runs("my-project") == [known["id"]] and known["id"].startswith("my-run-")
    values = {}
    for row in storage.get_logs("my-project", known["id"]):
        for name in row.keys() - {"step", "timestamp"}:
            assert row["step"] not in values.setdefault(name, {}), f"{name} twice"
            values[name][row["step"]] = row[name]
    assert {name: values[name] for name in ONCE} == ONCE and "bad" not in values
    assert sorted(values["samples/held-out-samples"]) == [2, 4, 6]
    assert "report" in values
    assert storage.get_run_config("my-project", known["id"])["learning_rate"] == 1e-4


def test_mlflow_continues_one_run_and_gets_each_metric_of_a_step_once(tmp_path, places):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    resumed_run(tmp_path / "run", "mlflow")
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("my-project")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.run_name, found.info.status) == (known["id"], "my-run", "FINISHED")
    assert found.data.params["learning_rate"] == "0.0001"
    histories = {name: client.get_metric_history(known["id"], name) for name in (*ONCE, "system/memory_gib")}
    assert {name: [(m.step, m.value) for m in histories[name]] for name in ONCE} == {
        name: list(values.items()) for name, values in ONCE.items()
    }
    assert histories["system/memory_gib"][-1].value > 0
    artifacts = [f.path for folder in ("", "samples") for f in client.list_artifacts(known["id"], folder)]
    assert "report.html" in artifacts
    assert [p for p in artifacts if p.endswith(".json")] == [f"samples/held-out-samples-{n}.json" for n in (2, 4, 6)]


# ---- what goes wrong


class Broken:
    """A tracker that starts, and loses its server at step 2."""

    rewinds, measures_system = False, True

    def __init__(self):
        self.calls = []

    def start(self, run):
        return {"id": "7", "url": "https://user:pass@host/runs/7"}

    def log(self, step, metrics):
        self.calls.append(step)
        if step == 2:
            raise ConnectionError("no route to https://user:pass@host?token=abc\nmore")

    table = finish = lambda self, *args: self.calls.append("other")


@pytest.fixture
def replace_trackers(monkeypatch):
    """Puts trackers in the place of those that the names stand for."""

    def put(**trackers):
        monkeypatch.setattr(registry, "_load", lambda name: lambda: trackers[name])

    return put


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(tmp_path, replace_trackers):
    tracker, stream = Broken(), io.StringIO()
    replace_trackers(wandb=tracker)
    with run_in(tmp_path / "run", "wandb", stream=stream) as run:
        log_steps(run, 1, 5)
    assert tracker.calls == [0, 1, 2]
    said = [line for line in stream.getvalue().splitlines() if line.startswith("wandb:")]
    assert said == [
        "wandb: https://***@host/runs/7",
        "wandb: no route to https://***@host?token=***; the run goes on without it, its files are complete",
    ]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_tracker_that_hangs_costs_the_steps_nothing_and_the_end_a_bounded_time(
    tmp_path, replace_trackers, monkeypatch
):
    release, stream, tracker = threading.Event(), io.StringIO(), Broken()
    tracker.start = lambda run: release.wait(60) and {}
    replace_trackers(mlflow=tracker)
    monkeypatch.setattr(registry, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(background, "QUEUE_SIZE", 3)
    with run_in(tmp_path / "run", "mlflow", stream=stream) as run:
        log_steps(run, 1, 5)
    release.set()
    said = [line for line in stream.getvalue().splitlines() if line.startswith("mlflow:")]
    assert len(said) == 2 and "too slow" in said[0] and "not everything is sent" in said[1]


def test_other_processes_than_the_first_start_no_tracker(tmp_path, replace_trackers, monkeypatch):
    tracker = Broken()
    replace_trackers(wandb=tracker)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with run_in(tmp_path / "run", "wandb") as run:
        log_steps(run, 1, 2)
    assert tracker.calls == [] and not (tmp_path / "run").exists()


# ---- what is refused before training


def test_an_unknown_tracker_and_none_beside_others_are_refused():
    with pytest.raises(InputError, match=r"report_to='tensorbord' must be one of tensorboard, wandb, .*none"):
        config.parse(TrackingConfig, ["--report_to", "tensorbord"], "x", "")
    with pytest.raises(InputError, match=r"report_to=wandb none: give none alone, or only wandb"):
        config.parse(TrackingConfig, ["--report_to", "wandb", "none"], "x", "")
    assert config.parse(TrackingConfig, ["--report_to", "none"], "x", "").names == ()
    assert config.parse(TrackingConfig, ["--report_to", "mlflow,wandb", "--trackio_project", "p"], "x", "").names == (
        "mlflow",
        "wandb",
    )


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_library_is_refused_with_the_pip_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda library: None)
    with pytest.raises(
        InputError, match=rf'report_to={name} needs the package {name}: pip install "jaxrlhf\[{name}\]"'
    ):
        run_in(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_refused_before_the_run_begins(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    with pytest.raises(InputError, match=r"no login was found; run `wandb login` or set WANDB_API_KEY, or set WANDB"):
        run_in(tmp_path / "run", "wandb")
    assert not (tmp_path / "run").exists()
    host = urlsplit(wandb.setup().settings.base_url).hostname
    (tmp_path / "netrc").write_text(f"machine {host} login user password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    run_in(tmp_path / "run", "wandb").close()
    wandb.teardown()


def test_secrets_reach_neither_the_records_nor_a_tracker(tmp_path, replace_trackers, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker, stream = Broken(), io.StringIO()
    tracker.start = lambda run: tracker.calls.append(dict(run.config)) or {}
    replace_trackers(wandb=tracker)
    path = f"https://me:pw@host/{KEY}?token=abcdefgh&split=train"
    with run_in(tmp_path / "run", "wandb", settings=Settings(data_path=path), stream=stream) as run:
        run.print(f"reading {path}")
        run.log(1, {"loss": 1.0})
    hidden = "https://***@host/***?token=***&split=train"
    assert tracker.calls[0]["data_path"] == hidden
    assert config.load_yaml(Settings, tmp_path / "run" / "config.yaml").data_path == hidden
    assert f"reading {hidden}" in stream.getvalue()
