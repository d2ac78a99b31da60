"""The processes of a run: how they meet, what they agree on, and who is gone."""

from jaxrlhf.distributed.lifeline import LOST
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
    "LOST",
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
