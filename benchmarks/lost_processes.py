"""Kills, stops or cuts off one process of a run, measures when the others end, and resumes.

    sudo python benchmarks/lost_processes.py --out benchmarks/results/lost_processes.json

Each process has a network namespace of its own, joined by a bridge; "cut" takes its cable out, so that nothing arrives
and nothing is refused. That needs Linux and root; without them, --ways kill stop works in one namespace.
"""

import argparse
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LIMIT = 60  # seconds in which the other processes must end
PATIENCE = 300  # seconds for anything else
LOST, STOPPED = 75, 130
COMMAND = (
    "-m jaxrlhf sft --data_path demo --data_split 2,4,4 --max_eval_samples 8 --max_length 48 --logging_steps 1 "
    "--per_device_train_batch_size 2 --per_device_eval_batch_size 4 --model_type gpt2 --tokenizer_name_or_path demo "
    "--config_overrides n_embd=16,n_layer=2,n_head=2,n_positions=96 --max_steps 100000 --save_steps 5"
)
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
    "HF_HUB_OFFLINE": "1",
    "JAXRLHF_TOKEN": "lost-processes",
}


class Network:
    """Hosts 10.99.0.1, …, each a namespace that a sleeping process holds; without namespaces, this machine."""

    def __init__(self, hosts: int, holders: Sequence[subprocess.Popen]) -> None:
        self.bridge, *self.hosts = [str(holder.pid) for holder in holders] or [""] * (hosts + 1)
        if not holders:
            return
        self.inside(self.bridge, "ip link add br0 type bridge")
        self.inside(self.bridge, "ip link set br0 up")
        for i, host in enumerate(self.hosts):
            self.inside(self.bridge, f"ip link add cable{i} type veth peer name eth0 netns {host}")
            self.inside(self.bridge, f"ip link set cable{i} master br0 up")
            self.inside(host, f"ip addr add {self.address(i)}/24 dev eth0")
            for device in ("eth0", "lo"):
                self.inside(host, f"ip link set {device} up")
            self.inside(host, f"hostname {self.address(i)}")  # collectives look their own address up

    def address(self, host: int) -> str:
        return f"10.99.0.{host + 1}" if self.bridge else "127.0.0.1"

    def command(self, host: int) -> list[str]:
        """Words before a command that runs on a host."""
        return ["nsenter", "--target", self.hosts[host], "--net", "--uts"] if self.bridge else []

    def plug(self, host: int, way: str) -> None:
        """Takes a host's cable out ("down") or puts it back ("up")."""
        if self.bridge:
            self.inside(self.bridge, f"ip link set cable{host} {way}")

    @staticmethod
    def inside(holder: str, words: str) -> None:
        subprocess.run(["nsenter", "--target", holder, "--net", "--uts", *words.split()], check=True)


@contextlib.contextmanager
def network(hosts: int, namespaces: bool) -> Iterator[Network]:
    holders = []
    try:
        for _ in range(hosts + 1 if namespaces else 0):
            holders.append(
                subprocess.Popen(["unshare", "--net", "--uts", "sh", "-c", "echo up; exec sleep 1d"], stdout=-1)
            )
            holders[-1].stdout.readline()  # it is in its namespaces
        yield Network(hosts, holders)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def start(net: Network, processes: int, port: int, folder: Path, flags: Sequence[str]) -> list[subprocess.Popen]:
    """Starts a run of `processes` processes in `folder`; their output goes to log-I.txt."""
    command = [sys.executable, *COMMAND.split(), "--output_dir", str(folder / "run"), *flags]
    command += ["--coordinator_address", f"{net.address(0)}:{port}", "--num_processes", str(processes)]
    workers = []
    for i in range(processes):
        with (folder / f"log-{i}.txt").open("a") as log:
            own = [*net.command(i), *command, "--process_id", str(i)]
            workers.append(subprocess.Popen(own, env=os.environ | SETTINGS, stdout=log, stderr=log))
    return workers


def wait_all(workers: Sequence[subprocess.Popen], limit: float) -> tuple[list[int | None], float]:
    """Exit statuses (None: still running after `limit` seconds), and the seconds until the last one ended."""
    begin = time.monotonic()
    while any(worker.poll() is None for worker in workers) and time.monotonic() - begin < limit:
        time.sleep(0.05)
    return [worker.poll() for worker in workers], time.monotonic() - begin


def trial(way: str, processes: int, victim: int, folder: Path, namespaces: bool) -> dict[str, Any]:
    """One loss and the resume after it; `failures` is empty when all is well."""
    folder.mkdir(parents=True)
    with network(processes, namespaces) as net:
        workers = start(net, processes, 9876, folder, [])
        try:
            moves(folder / "run", workers, 10)
            lose(way, net, victim, workers[victim])
            others = [worker for i, worker in enumerate(workers) if i != victim]
            statuses, seconds = wait_all(others, LIMIT)
            failures = [f"the others end with {statuses}"] * (set(statuses) != {LOST})
            net.plug(victim, "up")
            workers[victim].send_signal(signal.SIGCONT)
            own, _ = wait_all([workers[victim]], LIMIT)
            failures += [f"the lost process ends with {own[0]}"] * (own[0] != (-9 if way == "kill" else LOST))
            said = [reasons(folder / f"log-{i}.txt") for i in range(processes) if i != victim]
            failures += [f"no reason in {text!r}" for text in said if f"process {victim} of {processes}" not in text]
            workers = start(net, processes, 9877, folder, ["--resume"])
            moves(folder / "run", workers, newest(folder / "run") + 5)
            workers[victim].send_signal(signal.SIGTERM)
            statuses, _ = wait_all(workers, LIMIT)
            failures += [f"the resumed run ends with {statuses}"] * (set(statuses) != {STOPPED})
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    facts = {"way": way, "processes": processes, "victim": victim, "seconds": round(seconds, 1), "reason": said[0]}
    return facts | {"failures": failures}


def lose(way: str, net: Network, victim: int, worker: subprocess.Popen) -> None:
    if way == "cut":
        net.plug(victim, "down")
    else:
        worker.send_signal(signal.SIGKILL if way == "kill" else signal.SIGSTOP)


def moves(run: Path, workers: Sequence[subprocess.Popen], step: int) -> None:
    """Waits until the run has a checkpoint of this step or a later one."""
    begin = time.monotonic()
    while newest(run) < step:
        if any(worker.poll() is not None for worker in workers) or time.monotonic() - begin > PATIENCE:
            raise SystemExit(f"the run does not go on: see {run.parent}")
        time.sleep(0.05)


def newest(run: Path) -> int:
    steps = [int(m.group(1)) for p in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return max(steps, default=0)


def reasons(log: Path) -> str:
    """The last line in which a process says why it ends."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("jaxrlhf: ")]
    return lines[-1] if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=("kill", "stop", "cut"), default=("kill", "stop", "cut"))
    parser.add_argument("--processes", nargs="+", type=int, default=(2, 4))
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.keep or Path(temporary)).resolve()
        for way, processes in itertools.product(options.ways, options.processes):
            for victim in (0, processes - 1):
                folder = root / f"{way}-{victim}-of-{processes}"
                results.append(trial(way, processes, victim, folder, "cut" in options.ways))
                facts = results[-1]
                print(
                    f"{way} process {victim} of {processes}: the others ended after {facts['seconds']} s; "
                    f"{'; '.join(facts['failures']) or 'resumed'}",
                    flush=True,
                )
    from jaxrlhf.bench.record import write  # after all forks: it loads JAX

    write(options.out, {"trials": results})
    sys.exit(any(facts["failures"] for facts in results))


if __name__ == "__main__":
    main()
