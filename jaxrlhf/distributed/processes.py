"""Several processes as one run: they find each other, agree, share values and end together.

`initialize` must come before the first use of a JAX device; the `jaxrlhf` commands call it. Everything else works in a
single process too, where it does nothing.
"""

import atexit
import dataclasses
import hashlib
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxrlhf.config import NonNegativeInt, PositiveInt, Settings, to_dict
from jaxrlhf.distributed.lifeline import Lifeline, delay_abort, join, leave
from jaxrlhf.distributed.meeting import split_address
from jaxrlhf.errors import InputError

PyTree = Any
Value = TypeVar("Value")
Config = TypeVar("Config", bound=Settings)

SEEN = 10.0  # seconds after which a shared file system shows what another machine has written
VERDICT = 5.0  # seconds in which the cause of a broken collective becomes known
MAY_DIFFER = ("data_cache_dir", "compilation_cache")  # settings that may differ between the processes

_lifeline: Lifeline | None = None


@dataclass(frozen=True)
class ProcessConfig(Settings, may_change=True):
    """Several processes. Slurm, Open MPI, indexed Kubernetes Jobs and TPU pods are detected; elsewhere give each
    process the first three."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, which listens there; default: $JAX_COORDINATOR_ADDRESS."""
    num_processes: PositiveInt | None = None
    """Number of processes of this run; 1 ignores a detected cluster; default: $JAX_NUM_PROCESSES."""
    process_id: NonNegativeInt | None = None
    """Number of this process, from 0; default: $JAX_PROCESS_ID."""
    local_device_ids: tuple[NonNegativeInt, ...] = ()
    """GPUs of this machine that this process uses; default: $JAX_LOCAL_DEVICE_IDS, else one per task under Slurm and
    Open MPI, else all."""
    initialization_timeout: PositiveInt = 300
    """Seconds to wait for the other processes at the start."""
    heartbeat_timeout: PositiveInt = 30
    """Seconds of silence after which a process counts as lost and the run stops."""

    def check(self) -> None:
        if self.coordinator_address is not None:
            split_address(self.coordinator_address)


def _from_environment(name: str) -> int | None:
    """Whole number in a variable, or None."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise InputError(f"${name}={text!r} must be a whole number")
    return int(text)


def detect(options: ProcessConfig) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Find how the processes connect: from flags, else the environment, else the cluster.

    Returns:
        Coordinator's address, number of processes, number of this process, local devices. None for each unknown.

    Raises:
        InputError: a cluster is found that cannot be used.
    """
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize detects and connects in one go

    address = options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    number = options.num_processes if options.num_processes is not None else _from_environment("JAX_NUM_PROCESSES")
    process = options.process_id if options.process_id is not None else _from_environment("JAX_PROCESS_ID")
    local = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = list(options.local_device_ids) or ([int(i) for i in local.split(",")] if local else None)
    in_pod, indexed = "KUBERNETES_SERVICE_HOST" in os.environ, "JOB_COMPLETION_INDEX" in os.environ
    if number == 1 or None not in (address, number, process) or (in_pod and not indexed):
        return address, number, process, devices
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            address, number, process, devices, None, options.initialization_timeout
        )
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise InputError(
            f"a cluster was detected, but not how its processes find each other ({error}); give --coordinator_address, "
            "--num_processes and --process_id, or --num_processes 1 for a run of this process alone"
        ) from error
    if in_pod and None in found[:3]:
        raise InputError(
            "this is a pod of an indexed Kubernetes Job, but the package `kubernetes` is missing (pip install "
            '"jax[k8s]"); or give --coordinator_address, --num_processes and --process_id ($JOB_COMPLETION_INDEX), or '
            "--num_processes 1 for a run of this process alone"
        )
    return found


def initialize(config: Settings | None = None, **options: object) -> bool:
    """Join the other processes of this run, when there are any. A second call only compares the settings.

    It must come before the first use of a JAX device. From here on the end of one process ends all (see `fail`), and a
    normal end waits for the others.

    Args:
        config: settings (a dataclass) that must be equal on all processes. Its part `process` says how to connect.
        options: fields of `ProcessConfig` that replace those of `config`, as in
            `coordinator_address="10.0.0.1:8476", num_processes=2, process_id=0`.

    Returns:
        True when there are other processes.

    Raises:
        InputError: on every process, when one does not come within `initialization_timeout`, or when settings or
            versions differ.
    """
    global _lifeline
    wanted = dataclasses.replace(getattr(config, "process", None) or ProcessConfig(), **options)
    if jax.distributed.is_initialized():
        check_same("settings", _facts(config))
        return True
    address, number, process, devices = detect(wanted)
    if number == 1 or (address, number, process) == (None, None, None):
        return False
    if address is None or number is None or process is None:
        missing = {"coordinator_address": address, "num_processes": number, "process_id": process}
        flags = ", ".join(f"--{name}" for name, value in missing.items() if value is None)
        raise InputError(f"several processes: {flags} missing (each process needs all three)")
    if not 0 <= process < number:
        raise InputError(f"process_id={process} must be from 0 to {number - 1}, as num_processes={number}")
    lifeline = join(address, number, process, wanted.initialization_timeout, wanted.heartbeat_timeout)
    problem = _differences("settings", lifeline.gather("comparing settings", _facts(config)))
    if problem:  # on every process
        lifeline.end()
        raise InputError(problem)
    # JAX's service takes any client. A port that only the processes know keeps other programs away from it.
    port = lifeline.gather("port of JAX's service", _service_port() if process == 0 else None)[0]
    _lifeline = lifeline
    sys.excepthook = _fail_on_uncaught
    delay_abort()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the training loop
    jax.distributed.initialize(
        f"{address.rpartition(':')[0]}:{port}",
        number,
        process,
        devices,
        cluster_detection_method="deactivate",
        initialization_timeout=wanted.initialization_timeout,
        # Longer than the lifeline's own watch, which names the process that is gone. JAX's would abort.
        heartbeat_timeout_seconds=max(100, 4 * wanted.heartbeat_timeout),
    )
    atexit.register(lifeline.end)
    if process > 0:
        logging.getLogger("jaxrlhf").setLevel(logging.ERROR)  # process 0 logs for all
    return True


def _service_port() -> int:
    """Port of JAX_COORDINATOR_BIND_ADDRESS, else a free one."""
    if bound := os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"):
        return split_address(bound)[1]
    with socket.create_server(("", 0)) as free:
        return free.getsockname()[1]


def joined(config: Config) -> Config:
    """Calls `initialize(config)`; returns the config without how processes connect, for `config.yaml`."""
    initialize(config)
    return cast(Config, dataclasses.replace(cast(Any, config), process=ProcessConfig()))


def is_primary() -> bool:
    """Return True on process 0, which writes and prints for all."""
    return jax.process_index() == 0


def fail(error: BaseException, status: int = 1) -> None:
    """End this process with `status`, after reporting the error to the others; returns where there are no others."""
    if _lifeline is None:
        return
    _lifeline.fail(f"{type(error).__name__}: {error}".strip()[:2000])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Python's own end would wait for the others in JAX's shutdown


def stop_all(reason: str) -> None:
    """End all processes of the run with status 75; the others print what they do, and all print `reason`."""
    if _lifeline is not None:
        _lifeline.stop(reason, stacks=True)
    leave(reason)


def _fail_on_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if _broke_a_collective(error):
        time.sleep(VERDICT)  # the lifeline learns which process is gone, and ends this one with that message
    traceback.print_exception(kind, error, trace)
    fail(error)


def _broke_a_collective(error: BaseException) -> bool:
    """Return True for the errors with which JAX reports that another process has left a collective."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in str(error))


def gather(what: str, value: Value) -> list[Value]:
    """Collect `value` (JSON) of every process, in their order. All call it at the same place; `what` names the wait."""
    if jax.process_count() == 1:
        return [value]
    if _lifeline is not None:
        return _lifeline.gather(what, value)
    from jax.experimental import multihost_utils  # the user called jax.distributed.initialize

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, np.ravel(sizes), strict=True)]


def barrier(what: str) -> None:
    """Wait until all processes are here."""
    gather(what, None)


def from_primary(what: str, make: Callable[[], Value]) -> Value:
    """Call `make` on process 0 only; returns its result (JSON) on every process."""
    return cast(Value, gather(what, make() if is_primary() else None)[0])


def by_turns(what: str, make: Callable[[], Value]) -> Value:
    """Return `make()` on every process, such that no two of a machine write the same files at once.

    Process 0 comes first, then one process of each other machine, then the rest, which find the files of the others.
    """
    hosts = gather(what, os.uname().nodename)
    own = jax.process_index()
    turn = 0 if own == 0 else 1 if hosts.index(hosts[own]) == own else 2
    for _ in range(turn):
        barrier(what)
    result = make()
    for _ in range(turn, 3):
        barrier(what)
    return result


def check_same(what: str, values: Mapping[str, object]) -> None:
    """Raise InputError, on every process, with the entries that differ between processes, and who has which."""
    if jax.process_count() > 1:
        problem = _differences(what, gather(f"comparing {what}", values))
        if problem:
            raise InputError(problem)


def seen(paths: Sequence[Path]) -> list[bool]:
    """Return which files this process sees. A network file system gets SEEN seconds to show all of them."""
    deadline = time.monotonic() + SEEN
    while not all(found := [path.exists() for path in paths]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def check_shared(folder: Path, name: str) -> None:
    """Raise InputError when a process does not see the file `name`, which process 0 has written to `folder`."""
    barrier(f"writing {folder / name}")
    sees = gather(f"looking for {folder / name}", seen([folder / name])[0])
    if not all(sees):
        raise InputError(
            f"output_dir {folder}: process {', '.join(str(i) for i, saw in enumerate(sees) if not saw)} does not see "
            "what process 0 writes there; all write checkpoints, so it must be on a file system that all share, or at "
            "a URL, such as s3://bucket/run"
        )


def to_host(tree: PyTree) -> PyTree:
    """Return the tree with whole numpy arrays on every process. All call it at the same place."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(x: jax.Array | np.ndarray | float) -> np.ndarray | float:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return jax.device_get(x)

    return jax.tree.map(whole, tree)


def _facts(config: Settings | None) -> dict[str, object]:
    """Collect what must be equal on all processes: versions, our source, settings."""
    digest = hashlib.blake2b(digest_size=8)
    for name, path in _sources(Path(__file__).parents[1]):
        digest.update(name.encode() + path.read_bytes())
    facts: dict[str, object] = {f"version of {name}": version(name) for name in ("jax", "jaxlib", "jaxrlhf")}
    facts["source of jaxrlhf"] = digest.hexdigest()
    own = {f.name for f in dataclasses.fields(ProcessConfig)} | set(MAY_DIFFER)
    settings = flatten_dict({} if config is None else to_dict(config), sep=".")
    return facts | {name: value for name, value in settings.items() if name not in own}


def _sources(root: Path) -> list[tuple[str, Path]]:
    """List the package's files by name, each once. In a clone, three subfolders are links."""
    files = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    return sorted((path.relative_to(root).as_posix(), path) for path in files if path.suffix == ".py")


def _differences(what: str, values: Sequence[Mapping[str, object]]) -> str | None:
    """Text with the entries that differ and who has which value; None when all are equal."""
    values = json.loads(json.dumps(values))
    lines = []
    for name in dict.fromkeys(name for entry in values for name in entry):
        holders: dict[str, list[int]] = {}
        for process, entry in enumerate(values):
            holders.setdefault(json.dumps(entry[name]) if name in entry else "nothing", []).append(process)
        if len(holders) > 1:
            lines.append(f"  {name}: " + ", ".join(f"{shown} on {_on(who)}" for shown, who in holders.items()))
    more = [f"  … and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n".join([f"the processes have different {what}:", *lines[:20], *more]) if lines else None


def _on(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"process{'es' * (len(processes) > 1)} {shown}"
