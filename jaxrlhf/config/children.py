"""Child processes that end with their parent, however it ends."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1

_parent: int | None = None
"""The process whose forked children end with it."""


def end_with(parent: int) -> None:
    """Makes this process end when `parent` does: at once where Linux offers it, and now if it has gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _forked() -> None:
    global _parent
    if _parent is not None:
        parent, _parent = _parent, None
        end_with(parent)


@contextlib.contextmanager
def children_end() -> Iterator[None]:
    """Children that the block forks end with this process: those of a killed one would wait for work forever."""
    global _parent
    _parent = os.getpid()
    try:
        yield
    finally:
        _parent = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
