"""The lock of a run's folder at a URL, beside that of its working folder: one run at a time writes there."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from jaxrlhf.config.remote import RemoteFolder
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs.lock import LOCK

RENEWED_EVERY = 20.0
LEASE_SECONDS = 90.0
"""Seconds without renewal after which a lock counts as left behind."""
LOOK = 3.0  # seconds between two looks at a lock that may be left behind


class RemoteLock:
    """The file `run.lock` at a URL, which names its holder and changes while the holder lives.

    Stores have no exclusive creation in common, so two runs that begin within the same second are told apart by who
    wrote last. Clocks are not compared.

    Args:
        remote: The folder.
        say: Prints a line.

    Raises:
        InputError: Another run holds the lock.
        StorageError: The store does not answer.
    """

    def __init__(self, remote: RemoteFolder, say: Callable[[str], None]) -> None:
        self.remote, self.say = remote, say
        self._own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        self._count = 0
        self._wait_for_holder()
        self._renew()
        if self._holder().get("id") != self._own["id"]:
            raise InputError(self._in_use(self._holder()))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="remote lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back. Where the store does not answer, the next run waits until the lock has run out."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            if self._holder().get("id") == self._own["id"]:
                self.remote.delete([LOCK])

    def _holder(self) -> dict:
        try:
            found = json.loads(self.remote.read(LOCK) or b"{}")
        except ValueError:  # half of a lock is one that no run renews
            return {"host": "an unknown host"}
        return found if isinstance(found, dict) else {}

    def _wait_for_holder(self) -> None:
        """Returns when no living run holds the lock."""
        first = self._holder()
        if not first or (first.get("host") == self._own["host"] and not _lives(first.get("process"))):
            return
        deadline = time.monotonic() + LEASE_SECONDS
        self.say(
            f"output_dir {self.remote.shown}: waiting at most {LEASE_SECONDS:.0f} s for the lock of {_name(first)}, "
            "which may be gone"
        )
        while time.monotonic() < deadline:
            time.sleep(LOOK)
            now = self._holder()
            if not now:
                return
            if now != first:
                raise InputError(self._in_use(now))

    def _in_use(self, holder: dict) -> str:
        return (
            f"output_dir {self.remote.shown} is in use by {_name(holder)}, which holds its lock {LOCK}. Wait for that "
            "run or stop it, or choose another folder"
        )

    def _renew(self) -> None:
        self._count += 1
        self.remote.write(LOCK, json.dumps(self._own | {"renewed": self._count}).encode())

    def _keep(self) -> None:
        while not self._end.wait(RENEWED_EVERY):
            with contextlib.suppress(StorageError):  # a store that is away takes no other run's lock either
                self._renew()


def _name(holder: dict) -> str:
    return f"process {holder.get('process')} on {holder.get('host')}"


def _lives(process: object) -> bool:
    try:
        os.kill(int(str(process)), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
