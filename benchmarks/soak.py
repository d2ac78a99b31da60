"""A long PPO run with a fault every few steps: nothing may be lost, and memory, threads and files must not grow.

    python benchmarks/soak.py --steps 2000 --out benchmarks/results/soak.json --plot docs/benchmarks/soak.svg

The faults, in turn: the reward function raises, ends its process, or sleeps beyond its limit; the tracker's files
cannot be written; the disk of the run is full for 10 s (a file fills a small tmpfs, which needs root); the process is
stopped (SIGSTOP) for 30 s; the S3 server answers 500 for 45 s. The run evaluates, saves checkpoints and copies them to
the S3 server all the time.
"""

import argparse
import contextlib
import http.client
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from crash_campaign import COMMON, PPO, free_port, prepare, s3_server, working_folder

from jaxrlhf.config.files import read_jsonl

REWARD = '''
import os, time
from pathlib import Path

FAULT = Path(__file__).with_name("reward_fault")

def score(prompts, responses, **columns):
    """Share of vowels; one call fails in the way that the file names."""
    if FAULT.exists():
        fault = FAULT.read_text()
        FAULT.unlink()
        if fault == "raises":
            raise RuntimeError("as asked")
        if fault == "exits":
            os._exit(3)
        time.sleep(60)
    return [sum(c in "aeiou" for c in text) / (len(text) + 1) for text in responses]
'''
FAULTS = ("reward raises", "reward exits", "reward sleeps", "tracker down", "disk full", "stopped", "S3 500s")
DISK_MIB = 256
SECONDS = {"disk full": 10, "stopped": 30, "S3 500s": 45, "tracker down": 10}


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server, or answers 500 while `failing`."""

    daemon_threads = True
    failing = False
    refused = 0

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        super().__init__(("127.0.0.1", free_port()), Passing)


class Passing(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.failing:
            self.server.refused += 1
            self._answer(500, [], b"")
            return
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name != "Connection"}
        connection.request(self.command, self.path, body, headers)
        response = connection.getresponse()
        self._answer(response.status, response.getheaders(), response.read())
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        length = dict((name.lower(), value) for name, value in headers).get("content-length", str(len(body)))
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a small file system at a folder; yields whether that was possible."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


class Soak:
    """A run, what is done to it, and what it uses."""

    def __init__(self, root: Path, disk: Path, faults: list[str], proxy: Proxy) -> None:
        self.root, self.disk, self.proxy, self.faults = root, disk, proxy, faults
        self.samples: list[dict[str, float]] = []
        self.injected: list[dict[str, Any]] = []
        self.lasting: list[threading.Thread] = []

    def begin(self, steps: int, models: dict[str, Path]) -> subprocess.Popen:
        (self.root / "reward.py").write_text(REWARD)
        common = dict(zip(COMMON[::2], COMMON[1::2], strict=True))
        common |= {"--max_steps": str(steps), "--save_steps": "20", "--eval_steps": "50", "--logging_steps": "50"}
        argv = [sys.executable, "-m", "jaxrlhf", "ppo", *(word for pair in common.items() for word in pair), *PPO]
        argv += ["--actor_model_name_or_path", str(models["sft"]), "--reward_model_name_or_path", str(models["reward"])]
        argv += ["--reward_functions", f"{self.root / 'reward.py'}:score", "--reward_time_limit", "5"]
        argv += ["--output_dir", "s3://bucket/soak", "--working_dir", str(self.disk / "run")]
        argv += ["--max_failed_saves", "10", "--learning_rate", "1e-6"]
        environment = os.environ | {
            "JAXRLHF_CACHE": str(self.root / "cache"),
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*self.proxy.server_address),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "soak-of-jaxrlhf",
            "AWS_SECRET_ACCESS_KEY": "soak-of-jaxrlhf",
        }
        log = open(self.root / "log.txt", "w")  # noqa: SIM115 - the child keeps it
        return subprocess.Popen(argv, stdout=log, stderr=log, env=environment)

    def inject(self, name: str, process: subprocess.Popen, step: int) -> None:
        """Does one fault. One that lasts goes on in a thread, and steps and other faults meanwhile."""
        self.injected.append({"step": step, "fault": name})
        kind, _, how = name.partition(" ")
        if kind == "reward":
            (self.root / "reward_fault").write_text(how)
        elif name == "stopped":
            process.send_signal(signal.SIGSTOP)
            time.sleep(SECONDS[name])
            process.send_signal(signal.SIGCONT)
        else:
            before = [thread for thread in self.lasting if thread.name == name]
            thread = threading.Thread(target=self._last, args=(name, before), name=name)
            self.lasting.append(thread)
            thread.start()

    def _last(self, name: str, before: list[threading.Thread]) -> None:
        """Does one lasting fault, after earlier ones of its name."""
        for thread in before:
            thread.join()
        if name == "S3 500s":
            self.proxy.failing = True
            time.sleep(SECONDS[name])
            self.proxy.failing = False
        elif name == "disk full":
            with self._full_disk():
                time.sleep(SECONDS[name])
        else:
            folder = self.disk / "run" / "tensorboard"
            folder.rename(folder.with_name("tensorboard-away"))
            folder.write_text("in the way")
            time.sleep(SECONDS[name])
            folder.unlink()
            folder.with_name("tensorboard-away").rename(folder)

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        path = self.disk / "filler"
        with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 2**16)
        yield
        path.unlink()

    def sample(self, process: subprocess.Popen, step: int) -> None:
        """Memory, threads and open files of the run's process, and its children's number."""
        run = psutil.Process(process.pid)
        with run.oneshot():
            self.samples.append(
                {
                    "step": step,
                    "memory_mib": run.memory_info().rss / 2**20,
                    "threads": run.num_threads(),
                    "files": run.num_fds(),
                    "children": len(run.children(recursive=True)),
                }
            )

    def steps_done(self) -> int:
        path = self.disk / "run" / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError):
            lines = path.read_bytes().rsplit(b"\n", 3)
            return max((json.loads(line)["step"] for line in lines[1:] if line), default=0)
        return 0

    def drive(self, process: subprocess.Popen, steps: int, every: int) -> int:
        """Injects faults and takes samples until the run ends; returns its status."""
        next_fault, number, sampled = every, 0, -1
        while process.poll() is None:
            done = self.steps_done()
            if done >= sampled + 5:
                sampled = done
                with contextlib.suppress(psutil.Error):  # it may just have ended
                    self.sample(process, done)
            if next_fault <= done < steps:
                name = self.faults[number % len(self.faults)]
                print(f"step {done}: {name}", flush=True)
                self.inject(name, process, done)
                number, next_fault = number + 1, next_fault + every
            time.sleep(0.05)
        for thread in self.lasting:
            thread.join()
        return process.returncode


def growth(samples: list[dict[str, float]], name: str) -> dict[str, float]:
    """The median of a figure in the first and in the last fifth of the samples, those of the first steps aside."""
    after = min(100, samples[-1]["step"] / 2)
    values = [s[name] for s in samples if s["step"] >= after]
    part = max(1, len(values) // 5)
    first, last = sorted(values[:part])[part // 2], sorted(values[-part:])[part // 2]
    return {"first": round(first, 1), "last": round(last, 1), "ratio": round(last / max(first, 1e-9), 3)}


def plot(soak: Soak, path: Path) -> None:
    """Draws memory, threads and files over the steps, with the faults."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(8, 6), sharex=True)
    for axis, (name, label) in zip(
        axes, (("memory_mib", "memory, MiB"), ("threads", "threads"), ("files", "open files")), strict=True
    ):
        axis.plot([s["step"] for s in soak.samples], [s[name] for s in soak.samples], linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        for fault in soak.injected:
            axis.axvline(fault["step"], color="0.85", linewidth=0.6, zorder=0)
    axes[-1].set_xlabel("PPO step (grey: a fault)")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between faults")
    parser.add_argument("--faults", nargs="*", help="only faults whose name begins with one of these words")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--plot", type=Path, help="SVG file for the curves")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(working_folder(options.keep))
        proxy = Proxy(stack.enter_context(s3_server()))
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        place = prepare(root, "")
        has_disk = stack.enter_context(small_disk(root / "disk"))
        faults = [name for name in FAULTS if has_disk or name != "disk full"]
        if options.faults:
            faults = [name for name in faults if name.startswith(tuple(options.faults))]
        soak = Soak(root, root / "disk", faults, proxy)
        begin = time.monotonic()
        process = soak.begin(options.steps, place.models)
        stack.callback(process.kill)
        status = soak.drive(process, options.steps, options.every)
        records = read_jsonl(soak.disk / "run" / "metrics.jsonl") if (soak.disk / "run").exists() else []
        if options.keep:
            shutil.copytree(soak.disk, root / "kept", dirs_exist_ok=True)
    trained = [r["step"] for r in records if "objective/scores" in r or "guard/unscored" in r]
    missing = sorted(set(range(1, options.steps + 1)) - set(trained))
    result = {
        "steps": options.steps,
        "status": status,
        "seconds": round(time.monotonic() - begin),
        "steps missing": missing,
        "steps twice": len(trained) - len(set(trained)),
        "faults": {name: sum(f["fault"] == name for f in soak.injected) for name in soak.faults},
        "responses without a score": sum(r.get("rewards/failures", 0) for r in records),
        "requests refused": proxy.refused,
        **{name: growth(soak.samples, name) for name in ("memory_mib", "threads", "files", "children")},
    }
    print(json.dumps(result, indent=1))
    if options.plot:
        plot(soak, options.plot)
    from jaxrlhf.bench.record import write  # after all forks: it loads JAX

    write(options.out, result | {"samples": soak.samples, "injected": soak.injected})
    sys.exit(bool(status or missing or result["steps twice"]))


if __name__ == "__main__":
    main()
