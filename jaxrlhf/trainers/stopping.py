"""Why a run is asked to stop: Ctrl-C, a signal of the scheduler, or the cloud's notice that the machine goes away."""

import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

Reason = Literal["", "interrupt", "preemption"]
"""Empty: nobody asks. interrupt: the user does. preemption: the machine or its time ends, and the run goes on later."""

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: Slurm's --signal=USR1@120
POLL = 5.0  # seconds between two questions to the metadata server
ANSWER = 3.0  # seconds in which it must answer
PRODUCT = Path("/sys/class/dmi/id/product_name")
NOTICES = {"preempted": ("TRUE",), "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",)}
"""Values of the instance's metadata that announce its end. https://cloud.google.com/compute/docs/metadata"""


@contextmanager
def stop_requested() -> Iterator[Callable[[], Reason]]:
    """Yields a function that says whether and why the run should stop. A second SIGINT interrupts at once."""
    interrupted, preempted = threading.Event(), threading.Event()

    def reason() -> Reason:
        return "interrupt" if interrupted.is_set() else "preemption" if preempted.is_set() else ""

    def handle(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            preempted.set()
        elif interrupted.is_set():
            raise KeyboardInterrupt
        else:
            interrupted.set()

    with notice_watched(preempted):
        if threading.current_thread() is not threading.main_thread():
            yield reason
            return
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, *PREEMPTION)}
        try:
            yield reason
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def notice_watched(preempted: threading.Event) -> Iterator[None]:
    """Sets `preempted` when Google's metadata server announces the end of this machine; elsewhere it does nothing."""
    host, ended = metadata_host(), threading.Event()
    if host is None:
        yield
        return
    thread = threading.Thread(target=_watch, args=(host, preempted, ended), name="preemption notice", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def metadata_host() -> str | None:
    """Host of the metadata server on a machine of Google Compute Engine, TPU VMs too; None elsewhere."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    try:
        on_google = PRODUCT.read_text().strip() == "Google Compute Engine"
    except OSError:  # no such file outside of Linux on a PC
        on_google = False
    return "metadata.google.internal" if on_google else None


def _watch(host: str, preempted: threading.Event, ended: threading.Event) -> None:
    answered = False
    while not ended.is_set() and not preempted.is_set():
        try:
            if any(_ask(host, name) in values for name, values in NOTICES.items()):
                preempted.set()
            answered = True
        except (OSError, ValueError):  # a server that has answered before may be busy
            if not answered:
                return
        ended.wait(POLL)


def _ask(host: str, name: str) -> str:
    url = f"http://{host}/computeMetadata/v1/instance/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=ANSWER) as answer:
            return answer.read(100).decode("ascii").strip().upper()
    except urllib.error.HTTPError as error:  # not every machine has every value
        error.close()
        return ""
