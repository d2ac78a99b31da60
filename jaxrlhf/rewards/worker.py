"""Program of the process in which one reward function runs; started by `jaxrlhf.rewards.processes`.

It imports the function, describes it, and answers requests until its connection closes. Requests are pickled; replies
are JSON, so that nothing that the function's process makes is unpickled by the trainer.
"""

import contextlib
import faulthandler
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from jaxrlhf.config.children import end_with
from jaxrlhf.config.imports import exception_line
from jaxrlhf.errors import InputError
from jaxrlhf.rewards.arguments import Samples
from jaxrlhf.rewards.calls import call_captured
from jaxrlhf.rewards.functions import RewardFunction, load_function

STACKS = signal.SIGUSR1
"""Signal that prints the stacks of all threads, also while C code holds the interpreter."""


def main(descriptor: int, spec: str, parent: int, memory: int) -> None:
    """Serves one reward function.

    Args:
        descriptor: of the connection to the trainer.
        spec: the function, as in the flag `reward_functions`.
        parent: process number of the trainer.
        memory: bytes that this process may allocate; 0: no limit.
    """
    confine(parent, memory)
    connection, own = Connection(descriptor), os.getpid()
    try:
        function = load_function(spec)
    except InputError as error:
        reply(connection, {"refused": str(error)})
        os._exit(0)
    except BaseException as error:  # whatever the user's code raises, KeyboardInterrupt too
        reply(connection, {"refused": f"reward function {spec!r}: importing it failed: {exception_line(error)}"})
        os._exit(0)
    reply(connection, description(function))
    while True:
        try:
            name, samples = connection.recv()
        except (EOFError, OSError):  # the trainer is gone, or needs the function no more
            os.killpg(0, signal.SIGKILL)  # with the processes that the function has started
        try:
            answer = {"outcome": call_captured(name, function, Samples(*samples))}
        except InputError as error:
            answer = {"refused": str(error)}
        if os.getpid() != own:  # the function has forked, and this is the copy
            os._exit(0)
        reply(connection, answer)


def confine(parent: int, memory: int) -> None:
    """Makes this process end with the trainer, print stacks on request, and be the first that lacks memory."""
    faulthandler.enable()
    faulthandler.register(STACKS, all_threads=True)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    end_with(parent)
    # RLIMIT_DATA counts what the process can write to. RLIMIT_AS would count what libraries only reserve.
    for limit, value in ((resource.RLIMIT_CORE, 0), *([(resource.RLIMIT_DATA, memory)] if memory else ())):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def description(function: RewardFunction) -> dict[str, object]:
    """The fields of `RewardFunction` without the function and its signature, as JSON values."""
    return {
        "name": function.name,
        "columns": dict(function.columns),
        "optional": function.optional,
        "options": dict(function.options),
        "wanted": function.wanted,
        "needs_ids": function.needs_ids,
    }


def reply(connection: Connection, message: Mapping[str, object]) -> None:
    connection.send_bytes(json.dumps(message).encode())
