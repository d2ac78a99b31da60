"""Several processes of one run on this machine: lines with a prefix, signals to all, and one that fails ends all.

    python scripts/launch/local.py --processes 8 -- jaxrlhf sft ...                   one process per GPU
    python scripts/launch/local.py --processes 2 --cpu_devices 4 -- jaxrlhf sft ...   on CPUs, 4 devices in each process

Normally one process drives all GPUs of a machine; this is for trying out what a cluster does. Exits with the status of
the process that failed first, 0 when none did.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from typing import TextIO

PATIENCE = 45  # seconds that the others have to end by themselves once one has failed
LOST = 75  # status of a process that ends because another one is gone


def take(argv: list[str]) -> tuple[dict[str, int], list[str]]:
    """({"processes": …, "cpu_devices": …}, the command after `--`). SystemExit with the usage for anything else."""
    if "--" not in argv:
        raise SystemExit(__doc__)
    own, command = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options, tokens = {}, iter(own)
    for token in tokens:
        name, equals, value = token.partition("=")
        value = value if equals else next(tokens, "")
        if name not in ("--processes", "--cpu_devices") or not value.isdecimal() or int(value) < 1:
            raise SystemExit(
                f"{token} {value}: --processes and --cpu_devices take a whole number of 1 or more\n{__doc__}"
            )
        options[name[2:]] = int(value)
    if "processes" not in options or not command:
        raise SystemExit(__doc__)
    return options, command


def environment(process: int, processes: int, port: int, cpu_devices: int | None) -> dict[str, str]:
    """Variables that tell process `process` of the others, and which devices are its own."""
    values = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
        "PYTHONUNBUFFERED": "1",
    }
    if cpu_devices is None:
        return os.environ | values | {"JAX_LOCAL_DEVICE_IDS": str(process)}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cpu_devices}".strip()
    return os.environ | values | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def copy_lines(source: TextIO, prefix: str) -> None:
    for line in source:
        sys.stdout.write(prefix + line)
        sys.stdout.flush()


def main(argv: list[str]) -> int:
    options, command = take(argv)
    number = options["processes"]
    os.environ.setdefault("JAXRLHF_TOKEN", secrets.token_hex(16))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            command,
            env=environment(i, number, port, options.get("cpu_devices")),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches them once, from here
        )
        for i in range(number)
    ]

    def send_all(signum: int, _frame: object = None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, send_all)
    copiers = [
        threading.Thread(target=copy_lines, args=(worker.stdout, f"[{i}] "), daemon=True)
        for i, worker in enumerate(workers)
    ]
    for copier in copiers:
        copier.start()
    ended = threading.Condition()
    statuses: dict[int, int] = {}

    def watch(i: int) -> None:
        status = workers[i].wait()
        with ended:
            statuses[i] = status
            ended.notify_all()

    for i in range(number):
        threading.Thread(target=watch, args=(i,), daemon=True).start()
    with ended:
        while len(statuses) < number and not any(statuses.values()):
            ended.wait(1)  # with a limit, so that signals are handled in between
        for last in (signal.SIGTERM, signal.SIGKILL):
            if not ended.wait_for(lambda: len(statuses) == number, PATIENCE):
                send_all(last)
        ended.wait_for(lambda: len(statuses) == number)
    for copier in copiers:
        copier.join(5)
    failed = sorted((status for status in statuses.values() if status), key=lambda status: status == LOST)
    return 0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
