"""Time in which the processes of a large run meet and share a value, and the threads of the hub.

    python benchmarks/meeting.py --processes 64

All processes are forks on this machine, without devices, so only the connections are measured.
"""

import argparse
import os
import socket
import threading
import time

from jaxrlhf.distributed.lifeline import join


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=64)
    number = parser.parse_args().processes
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    begin = time.monotonic()
    children = []
    for process in range(1, number):
        child = os.fork()
        if child == 0:
            line = join(address, number, process, timeout=120, silence=30)
            line.gather("numbers", process)
            line.end()
            os._exit(0)
        children.append(child)
    line = join(address, number, 0, timeout=120, silence=30)
    met = time.monotonic()
    values = line.gather("numbers", 0)
    shared = time.monotonic()
    threads = threading.active_count()
    line.end()
    assert values == list(range(number)) and all(os.waitpid(child, 0)[1] == 0 for child in children)
    print(f"{number} processes: met in {met - begin:.2f} s, shared a value in {1e3 * (shared - met):.0f} ms")
    print(f"threads of the hub: {threads}, of which {threads - 1} for connections")


if __name__ == "__main__":
    main()
