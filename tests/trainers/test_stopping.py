"""What stops a run: signals, and the notice of Google's metadata server."""

import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxrlhf.errors import Interrupted, Preempted
from jaxrlhf.trainers import stopping
from jaxrlhf.trainers.stopping import metadata_host, stop_requested


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """A machine that is not Google's."""
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(stopping, "PRODUCT", tmp_path / "product_name")


@pytest.fixture
def server(monkeypatch):
    """A metadata server; yields the values that it answers, and the names that it was asked for."""
    values, asked = {"preempted": "FALSE"}, []

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            known = name in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(values.get(name, "").encode())
            asked.append(self.path)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{httpd.server_port}")
    monkeypatch.setattr(stopping, "POLL", 0.01)
    yield values, asked
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def watching():
    return [t for t in threading.enumerate() if t.name == "preemption notice"]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([signal.SIGTERM], "preemption"),
        ([signal.SIGUSR1], "preemption"),
        ([signal.SIGINT], "interrupt"),
        ([signal.SIGTERM, signal.SIGINT], "interrupt"),
        ([], ""),
    ],
)
def test_a_signal_gives_the_reason_to_stop(numbers, reason):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with stop_requested() as stopped:
        for number in numbers:
            signal.raise_signal(number)
        assert stopped() == reason and not watching()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), stop_requested():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("name", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_a_notice_of_the_metadata_server_stops_the_run(server, name, value):
    values, asked = server
    with stop_requested() as stopped:
        (thread,) = watching()
        while len(asked) < 4:
            thread.join(0.01)
        assert stopped() == "", "nothing is announced"
        values[name] = value
        thread.join(10)
        assert stopped() == "preemption"
    assert {path for path in asked} == {f"/computeMetadata/v1/instance/{n}" for n in ("preempted", "maintenance-event")}


def test_the_watch_ends_with_the_block_and_without_an_answer(server, monkeypatch):
    with stop_requested():
        (thread,) = watching()
    thread.join(10)
    assert not thread.is_alive()
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")  # nothing listens there
    with stop_requested() as stopped:
        for thread in watching():
            thread.join(10)
        assert not watching() and stopped() == ""


def test_a_machine_of_google_is_known_by_its_firmware():
    assert metadata_host() is None
    stopping.PRODUCT.write_text("Google Compute Engine\n")
    assert metadata_host() == "metadata.google.internal"


def test_launchers_start_a_preempted_run_again_but_not_an_interrupted_one():
    assert (Preempted.status, Interrupted.status) == (75, 130) and issubclass(Preempted, Interrupted)
