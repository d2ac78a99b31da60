"""The lock of a run's folder: one run at a time writes there.

The file `.run.lock` names the process that holds it, and a thread renews it. filelock's lease needs only that files can
be created exclusively and renamed, so it works on network file systems; it compares no clocks. A lock is taken over

- at once, when its process ran on this machine and is gone (process id, start time and boot are compared);
- else after `LEASE_SECONDS` in which it was watched and not renewed.
"""

import contextlib
import os
import socket
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from jaxrlhf.errors import InputError, StorageError

LOCK = ".run.lock"
LEASE_SECONDS = 30.0
"""Seconds without renewal after which the lock of another machine counts as left behind. All runs must agree on it."""


class FolderLock:
    """The lock of a folder, held from here to `release`.

    Args:
        folder: An existing folder.

    Raises:
        InputError: Another run holds it.
        OSError: The lock cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._lease = SoftFileLease(
            self.path, lease_duration=LEASE_SECONDS, thread_local=False, on_compromise=self._note
        )
        self._lost: LeaseCompromise | None = None
        self._renews = False
        self._acquire()

    def check(self) -> None:
        """Raises StorageError when this run has lost the lock: after it was stopped for long, say.

        While the storage is away, nothing is known and nothing is raised.
        """
        if self._lost is None or not self.path.parent.exists():
            return
        if self.path.exists() and _renewed(self.path) is None:  # it cannot be read
            return
        is_own = self.path.exists() and self._lease.is_lock_held_by_us
        if self._lost.reason == "refresh-failed" and (is_own or self._renews):
            self._renews = True
            try:
                self._lease.release(force=True)  # a lease that was not renewed once is renewed no more
                self._lease.acquire(timeout=0)
                self._lost, self._renews = None, False
                return
            except OSError as error:
                if not isinstance(error, Timeout) or not self.path.exists():  # else another run holds it
                    return  # the storage is read-only, say; the next check tries again
        raise StorageError(
            f"output_dir {self.path.parent}: this run has lost its lock {LOCK} to {self._holder() or 'nobody'}: it was "
            "not renewed in time, or the file was deleted; the run ends, so that no two runs write to one folder"
        )

    def release(self) -> None:
        """Gives the lock back. Where the storage is away the file stays; the next run takes it over."""
        with contextlib.suppress(OSError):
            self._lease.release(force=True)

    def _note(self, lost: LeaseCompromise) -> None:
        self._lost = lost

    def _acquire(self) -> None:
        renewed, tries = _renewed(self.path), 0

        def is_alive() -> bool:
            """True for a holder that renews its lock, and on this machine for each that the lease has not removed."""
            nonlocal tries
            tries += 1
            owner = self._lease.owner
            is_local = owner is not None and owner.hostname == socket.gethostname()
            return (is_local and tries > 2) or _renewed(self.path) not in (renewed, None)

        try:
            self._lease.acquire(timeout=LEASE_SECONDS + 5, poll_interval=0.1, cancel_check=is_alive)
        except Timeout:
            raise InputError(
                f"output_dir {self.path.parent} is in use by {self._holder() or 'another run'}, which holds its lock "
                f"{LOCK}. Wait for that run or stop it, or choose another folder"
            ) from None

    def _holder(self) -> str | None:
        owner = self._lease.owner
        return None if owner is None else f"process {owner.pid} on {owner.hostname}"


def _renewed(path: Path) -> int | None:
    """When the lock was renewed, by the clock of the storage; None without a lock."""
    try:
        with open(path, "rb") as file:  # opening makes a network file system ask its server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None
