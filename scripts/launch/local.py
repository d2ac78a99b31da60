"""Runs a command as several processes of one run on this machine; when one fails, all end.

    python scripts/launch/local.py --processes 8 -- jaxrlhf sft ...                   one process per GPU
    python scripts/launch/local.py --processes 2 --cpu_devices 4 -- jaxrlhf sft ...   on CPUs, 4 devices in each process

One process can drive all GPUs of a machine: use this script to try a cluster's behaviour. Each process's lines have its
number as prefix, and all processes get SIGINT, SIGTERM and SIGUSR1. The exit status is that of the process that failed
first, else 0.
"""

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from typing import TextIO

PATIENCE = 45  # seconds for the other processes to end once one has failed
LOST = 75  # status of a process that ends because another one is gone, or the machine goes (jaxrlhf.errors)


def count(text: str) -> int:
    """Reads a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, found {text!r}")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the options and the command after `--`. Raises SystemExit with the usage for anything else."""
    parser = argparse.ArgumentParser("local.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=count, required=True, help="number of processes")
    parser.add_argument("--cpu_devices", type=count, help="run on CPUs, with so many devices in each process")
    parser.add_argument("command", nargs="+", help="the command and its arguments, after --")
    return parser.parse_args(argv)


def environment(process: int, processes: int, port: int, cpu_devices: int | None) -> dict[str, str]:
    """The environment of a process: how it finds the others, and which devices it uses."""
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
    """Copies lines to the standard output with a prefix."""
    for line in source:
        sys.stdout.write(prefix + line)
        sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Starts the processes, waits for them, and returns the exit status."""
    options = parse(argv)
    number = options.processes
    os.environ.setdefault("JAXRLHF_TOKEN", secrets.token_hex(16))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            options.command,
            env=environment(i, number, port, options.cpu_devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # the terminal sends Ctrl-C to this script only
        )
        for i in range(number)
    ]

    def send_all(signum: int, _frame: object = None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
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
            ended.wait(1)  # a time limit lets Python handle signals
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
