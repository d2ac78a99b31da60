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
    to_host,
)

__all__ = [
    "ProcessConfig",
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
    "to_host",
]
