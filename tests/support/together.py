"""Processes and threads that a test starts together, and that meet at a port of this machine."""

import os
import socket
import subprocess
import threading
import time

from jaxrlhf.distributed import lifeline
from jaxrlhf.distributed.processes import _differences
from jaxrlhf.errors import InputError

DEADLINE = 240  # seconds after which a test gives up on its processes


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_all(commands, environment=None, seconds=DEADLINE):
    """(statuses, outputs) of commands started together; none outlives the call, nor `seconds` by much."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    workers = [subprocess.Popen(c, env=os.environ | (environment or {}), **options) for c in commands]
    outputs = [""] * len(workers)

    def read(i):
        outputs[i] = workers[i].communicate()[0]

    readers = [threading.Thread(target=read, args=(i,)) for i in range(len(workers))]
    try:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(seconds)
    finally:
        for worker in workers:
            worker.kill()
    return [worker.wait() for worker in workers], outputs


def meet(*greetings, timeout=20.0, address=None):
    """Error of `join` per process when these (number, process, facts) come together; None where it succeeds."""
    address, errors = address or f"127.0.0.1:{free_port()}", [None] * len(greetings)

    def come(i, number, process, facts):
        try:
            line = lifeline.join(address, number, process, timeout, 30.0)
            facts = line.gather("comparing facts", facts)
            line.end()
            errors[i] = _differences("settings", facts)
        except InputError as error:
            errors[i] = str(error)

    threads = [threading.Thread(target=come, args=(i, *greeting)) for i, greeting in enumerate(greetings)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    return errors


def call(port, data=b""):
    """A stranger's connection to the port, as soon as something listens there."""
    while True:
        try:
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.sendall(data)
            return stranger
        except ConnectionRefusedError:
            time.sleep(0.05)
