"""The processes of a run: they meet, agree, share values, and learn of a loss."""

from jaxrlhf.distributed.processes import (
    ProcessConfig,
    barrier,
    by_turns,
    check_same,
    check_shared,
    fail,
    from_primary,
    gather,
    initialize,
    is_primary,
    joined,
    stop_all,
    to_host,
)
from jaxrlhf.distributed.watchdog import Watchdog

__all__ = [
    "ProcessConfig",
    "Watchdog",
    "barrier",
    "by_turns",
    "check_same",
    "check_shared",
    "fail",
    "from_primary",
    "gather",
    "initialize",
    "is_primary",
    "joined",
    "stop_all",
    "to_host",
]
