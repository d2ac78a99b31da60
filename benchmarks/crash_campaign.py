"""Kills training runs at chosen moments, resumes them, and compares every bit with a run that was left alone.

    python benchmarks/crash_campaign.py --kills 200 --out benchmarks/results/crash_campaign.json

A kill is SIGKILL, either before the k-th change to the file system (k drawn from all those of the whole run: opening a
file for writing, rename, removal, new folder), or at a drawn time, which also falls into what C++ code writes. In runs
of two processes one of them is killed, and the other must end by itself. Runs at an S3 URL resume in half of the trials
on "another machine": without the working folder.

After the resumes: exported models, optimizer state, all arrays of the last checkpoint and all metrics are compared with
those of the run that was left alone, bit for bit, and the folder must hold the same files.
"""

import argparse
import atexit
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_multi_thread_eigen=false"
)

# What a run imports: the children of this process find it there, and start in no time.
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import orbax.checkpoint  # noqa: F401
import tensorboardX  # noqa: F401
from transformers import AutoTokenizer  # noqa: F401

import jaxrlhf.commands.rlhf
import jaxrlhf.rl.run
import jaxrlhf.runs.report  # noqa: F401
from jaxrlhf.cli import main as jaxrlhf_main

FORK = multiprocessing.get_context("fork")
RUN_LIMIT = 300  # seconds after which a run, or a step of one, counts as hanging
PEER_LIMIT = 60  # seconds in which the other process of a killed one must end
KILLED = -signal.SIGKILL
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link")
TINY = ["--config_overrides", "n_embd=16,n_layer=2,n_head=2,n_positions=96"]
DATA = ["--data_path", "demo", "--data_split", "2,4,4", "--max_eval_samples", "8"]
LENGTH = [
    *("--max_steps", "6", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "4"),
    *("--logging_steps", "1", "--save_steps", "2", "--eval_steps", "3", "--save_total_limit", "2"),
]
COMMON = [*DATA, *LENGTH]
PROMPTS = ["--max_prompt_seq_len", "24"]
PPO = [*PROMPTS, "--max_new_tokens", "6"]
STEPS = {"sft": [], "reward": [], "ppo": ["--max_new_tokens", "6"]}
"""The steps of `rlhf`, with flags of their own."""
# Files whose names are drawn at random, or hold a time or a process.
DRAWN = ((r"/d/[0-9a-f]{32}", "/d/…"), (r"events\.out\.tfevents.*", "events"))
TIMES = re.compile(r"^(time|timing/.*|perf/.*|samples_per_second|seconds)$")


@dataclass(frozen=True)
class Case:
    """A kind of run."""

    trainer: str
    flags: tuple[str, ...] = ()
    processes: int = 1
    remote: bool = False
    apart: bool = False
    """Each process has a working folder of its own."""

    @property
    def name(self) -> str:
        parts = [self.trainer, *(flag.removeprefix("--") for flag in self.flags)]
        parts += [f"{self.processes} processes"] * (self.processes > 1)
        parts += ["S3"] * self.remote + ["own folders"] * self.apart
        return " ".join(parts)


def cases() -> list[Case]:
    """The kinds of runs: all trainers, ZeRO stages 0 to 3, LoRA, both ways of saving, processes, stores."""
    found = [Case(trainer, ("--zero_stage", stage)) for trainer in ("sft", "ppo") for stage in "0123"]
    found += [Case("reward"), Case("dpo"), Case("kto"), Case("distill"), Case("grpo", ("--samples_per_prompt", "2"))]
    found += [Case(trainer, ("--lora_r", "2")) for trainer in ("sft", "reward", "dpo")]
    found += [Case("ppo", ("--actor_lora_r", "2", "--enable_ema"))]
    found += [Case("sft", ("--no_async_save",)), Case("ppo", ("--no_async_save",))]
    found += [Case("sft", processes=2), Case("ppo", processes=2)]
    found += [Case("sft", remote=True), Case("ppo", remote=True), Case("sft", processes=2, remote=True)]
    found += [Case("sft", processes=2, remote=True, apart=True)]
    found += [Case("rlhf"), Case("rlhf", processes=2, remote=True, apart=True)]
    return found


class Place(NamedTuple):
    """The folders and the server of a campaign."""

    root: Path
    models: dict[str, Path]
    endpoint: str
    """Address of the S3 server."""


class Kill(NamedTuple):
    """The moment of a kill, in one of the processes."""

    change: int = 0
    """Before this change of the file system, counted from 1; 0: at a time."""
    seconds: float = 0.0
    process: int = 0


class Ended(NamedTuple):
    statuses: list[int | None]
    """Exit statuses by process; None for one that hangs."""
    seconds: float
    changes: int
    """Changes of the file system by process 0."""
    peers: float
    """Seconds from the kill until the last process ended."""


def work(argv: Sequence[str], place: Path, log: Path, kill_at: int, counter: Any, environment: dict[str, str]) -> None:
    """Body of a process: runs the command in the folder `place`, and kills itself before the change `kill_at`."""
    os.environ.update(environment)
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    watched = str(log.parent)

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not isinstance(arguments[0], str):
            return
        if not os.path.abspath(arguments[0]).startswith(watched):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        counter.value += 1
        if counter.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        status = jaxrlhf_main(list(argv))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    atexit._run_exitfuncs()  # which multiprocessing leaves out; processes tell each other that they end
    os._exit(status or 0)


def run(case: Case, folder: Path, place: Place, kill: Kill | None = None, resume: bool = False) -> Ended:
    """Runs a case in `folder` until it ends or is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    output = f"s3://bucket/{folder.name}" if case.remote else str(folder / "run")
    argv = [case.trainer, *words(case, place), *case.flags, "--output_dir", output]
    argv += ["--working_dir", "run"] * case.remote + ["--resume"] * resume
    argv += ["--compilation_cache", str(place.root / "xla")]
    environment = {"JAXRLHF_CACHE": str(place.root / "cache")}
    environment |= {"AWS_ENDPOINT_URL": place.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "crash-campaign", "AWS_SECRET_ACCESS_KEY": "crash-campaign"}
    if case.processes > 1:
        environment |= {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=2", "count=1")}
        argv += ["--coordinator_address", f"127.0.0.1:{free_port()}", "--num_processes", str(case.processes)]
    begin, children, counters = time.monotonic(), [], []
    for i in range(case.processes):
        own = argv + (["--process_id", str(i), "--heartbeat_timeout", "20"] if case.processes > 1 else [])
        counters.append(FORK.Value("i", 0))
        change = kill.change if kill and kill.process == i else 0
        own_folder = folder / f"machine-{i}" if case.apart and i else folder
        arguments = (own, own_folder, folder / f"log-{i}.txt", change, counters[-1], environment)
        children.append(FORK.Process(target=work, args=arguments))
        children[-1].start()
    killed, limit = None, RUN_LIMIT * (len(STEPS) if case.trainer == "rlhf" else 1)
    while any(child.is_alive() for child in children):
        now = time.monotonic()
        if kill and killed is None:
            victim = children[kill.process]
            if not kill.change and now - begin > kill.seconds and victim.is_alive():
                os.kill(victim.pid, signal.SIGKILL)
            if victim.exitcode is not None:
                killed = now
        if now - begin > limit or (killed is not None and now - killed > PEER_LIMIT):
            hanging = [child.is_alive() for child in children]
            for child in children:
                child.kill()
                child.join()
            statuses = [None if h else c.exitcode for h, c in zip(hanging, children, strict=True)]
            return Ended(statuses, now - begin, counters[0].value, now - (killed or now))
        time.sleep(0.01)
    end = time.monotonic()
    return Ended([child.exitcode for child in children], end - begin, counters[0].value, end - (killed or end))


def words(case: Case, place: Place) -> list[str]:
    """Data, length and models of a case as flags."""
    base, reward = (str(place.models[name]) for name in ("sft", "reward"))
    if case.trainer == "rlhf":
        flags = [*DATA, "--actor_model_name_or_path", base, "--max_length", "48", *PROMPTS]
        for step, own in STEPS.items():
            flags += [f"--{step}.{word[2:]}" if word.startswith("--") else word for word in [*LENGTH, *own]]
        return flags
    if case.trainer in ("ppo", "grpo"):
        return [*COMMON, "--actor_model_name_or_path", base, "--reward_model_name_or_path", reward, *PPO]
    teacher = ["--teacher_model_name_or_path", base] if case.trainer == "distill" else []
    return [*COMMON, "--model_name_or_path", base, *teacher, "--max_length", "48"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@dataclass
class Outcome:
    """Remains of a finished run: hashes of its files by name, metrics, and the names of all files."""

    bits: dict[str, str] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)


def outcome(folder: Path) -> Outcome:
    """Reads a run's folder, in a process of its own: reading a checkpoint starts JAX."""
    receive, send = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: send.send(_outcome(folder / "run")))
    child.start()
    send.close()
    try:
        return receive.recv()
    finally:
        child.join()


def _outcome(folder: Path) -> Outcome:
    import numpy as np
    import orbax.checkpoint as ocp

    from jaxrlhf.config.files import read_jsonl

    result = Outcome()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            result.bits[name] = hashlib.blake2b(path.read_bytes()).hexdigest()
        for pattern, plain in DRAWN:
            name = re.sub(pattern, plain, name)
        result.files.add(name)
    for path in sorted(folder.rglob("checkpoint-*")):
        point = path.relative_to(folder).as_posix()
        leaves = json.loads((path / "index.json").read_text())["leaves"]
        result.bits[f"{point} index"] = json.dumps(leaves, sort_keys=True)
        names = [leaf["path"] for leaf in leaves if leaf["kind"] in ("array", "key")]
        whole = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(
                (path / "state").absolute(), args=ocp.args.PyTreeRestore(item=whole, restore_args=whole)
            )
        for name in names:
            result.bits[f"{point} {name}"] = hashlib.blake2b(arrays[name].tobytes()).hexdigest()
    result.records = [
        {name: value for name, value in record.items() if not TIMES.match(name) and "peak_memory" not in name}
        for path in sorted(folder.rglob("metrics.jsonl"))
        for record in read_jsonl(path)
    ]
    return result


def differences(wanted: Outcome, found: Outcome, *, newest_only: bool = False) -> list[str]:
    """Differences from the run that was left alone, in words.

    Args:
        wanted: the run that was left alone.
        found: the run that was killed.
        newest_only: older checkpoints may be at the URL alone: a machine with an empty disk fetches the newest.
    """
    bits, files = dict(wanted.bits), set(wanted.files)
    if newest_only:
        held = {name.split()[0] for name in bits if "checkpoint-" in name}
        newest: dict[str, str] = {}  # by the folder of the run
        for point in sorted(held, key=lambda name: int(name.rpartition("-")[2])):
            newest[point.rpartition("/")[0]] = point
        absent = held - set(newest.values()) - {name.split()[0] for name in found.bits}
        bits = {name: value for name, value in bits.items() if name.split()[0] not in absent}
        files = {name for name in files if not name.startswith(tuple(f"{point}/" for point in absent))}
    names = sorted(bits.keys() | found.bits.keys())
    text = [f"other bits: {name}" for name in names if bits.get(name) != found.bits.get(name)]
    if wanted.records != found.records:
        text.append(f"other metrics: {len(wanted.records)} records, {len(found.records)} found")
    text += [f"left over: {name}" for name in sorted(found.files - files)]
    return text + [f"missing: {name}" for name in sorted(files - found.files)]


def trial(case: Case, place: Place, folder: Path, reference: Ended, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kills a run `kills` times, then lets it end; returns what happened."""
    moments, peers, failures = [], 0.0, []
    for number in range(kills):
        process = draw.randrange(case.processes)
        at_change = draw.random() < 0.7
        change = draw.randint(1, reference.changes) if at_change and process == 0 else 0
        kill = Kill(change, draw.uniform(0.2, reference.seconds) if not change else 0.0, process)
        ended = run(case, folder, place, kill, resume=number > 0)
        peers = max(peers, ended.peers)
        if None in ended.statuses:
            failures.append(f"hangs after {kill}")
        if ended.statuses[process] != KILLED:
            if set(ended.statuses) != {0}:
                failures.append(f"status {ended.statuses} instead of a kill")
            break  # the run was quicker than the kill
        moments.append(kill._asdict())
        if case.remote and draw.random() < 0.5:
            shutil.rmtree(folder / "run", ignore_errors=True)
    last = run(case, folder, place, resume=True)
    if set(last.statuses) != {0}:
        failures.append(f"the resumed run ends with status {last.statuses}")
    return {"case": case.name, "kills": moments, "peers": round(peers, 1), "failures": failures}


@contextlib.contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """A folder to work in: `keep`, or a new one that is deleted at the end, by this process and none that it forks."""
    root = (keep or Path(tempfile.mkdtemp())).resolve()
    try:
        yield root
    finally:
        if keep is None:
            shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """A local S3 server with a bucket; yields its address. Nothing is started where moto is not installed."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        address = f"http://127.0.0.1:{port}"
        import urllib.request

        for _ in range(100):
            try:
                request = urllib.request.Request(f"{address}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def prepare(root: Path, endpoint: str) -> Place:
    """Makes tiny models to start from."""
    root.mkdir(parents=True, exist_ok=True)
    place = Place(root, {name: root / "models" / name for name in ("sft", "reward")}, endpoint)
    start = Case("sft", ("--model_type", "gpt2", *TINY, "--tokenizer_name_or_path", "demo"))
    environment = {"JAXRLHF_CACHE": str(root / "cache")}
    for trainer in ("sft", "reward"):
        own = [*start.flags] if trainer == "sft" else ["--model_name_or_path", str(place.models["sft"])]
        argv = [trainer, *COMMON, "--max_length", "48", *own, "--output_dir", str(place.models[trainer])]
        log = root / f"{trainer}.txt"
        child = FORK.Process(target=work, args=(argv, root, log, 0, FORK.Value("i", 0), environment))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"preparing {trainer} failed: {log.read_text()[-2000:]}")
    return place


def campaign(chosen: Sequence[Case], kills: int, seed: int, root: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs trials over all cases in turn until `kills` kills have fallen; returns the counts and every trial."""
    draw = random.Random(seed)
    with s3_server() as endpoint:
        place = prepare(root, endpoint)
        wanted: dict[str, tuple[Ended, Outcome]] = {}
        trials: list[dict[str, Any]] = []
        for number in itertools.count():
            case = chosen[number % len(chosen)]
            if case.name not in wanted:
                folder = root / f"alone-{number}"
                first = run(case, folder, place)
                if set(first.statuses) != {0}:
                    raise SystemExit(f"{case.name} fails when it is left alone: see {folder}")
                run_again = run(case, root / f"again-{number}", place)  # its programs are compiled now
                wanted[case.name] = run_again, outcome(folder)
            reference, expected = wanted[case.name]
            folder = root / f"trial-{number}"
            result = trial(case, place, folder, reference, draw.choice((1, 1, 2, 3)), draw)
            if not result["failures"]:
                result["failures"] = differences(expected, outcome(folder), newest_only=case.apart)
            trials.append(result)
            done = sum(len(t["kills"]) for t in trials)
            say(f"{done}/{kills} kills · {case.name}: {'; '.join(result['failures'][:3]) or 'the same bits'}")
            if result["failures"]:
                shutil.copytree(folder, root / "failed" / folder.name, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            if done >= kills:
                return summary(trials, seed)


def summary(trials: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Counts over all trials."""
    table = []
    for name in dict.fromkeys(t["case"] for t in trials):
        own = [t for t in trials if t["case"] == name]
        kinds = [failure.split(":")[0].split(" after")[0] for t in own for failure in t["failures"]]
        table.append(
            {
                "case": name,
                "trials": len(own),
                "kills": sum(len(t["kills"]) for t in own),
                "failures": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
                "seconds until the other process ended": max(t["peers"] for t in own),
            }
        )
    failed = [t for t in trials if t["failures"]]
    return {"seed": seed, "kills": sum(r["kills"] for r in table), "failed": failed, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="*", help="only cases whose name holds one of these texts")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    chosen = [c for c in cases() if not options.cases or any(text in c.name for text in options.cases)]
    if not chosen:
        raise SystemExit(f"no case is named like {options.cases}; the cases: {', '.join(c.name for c in cases())}")
    with working_folder(options.keep) as root:
        result = campaign(chosen, options.kills, options.seed, root, lambda text: print(text, flush=True))
    width = max(len(row["case"]) for row in result["table"])
    print(f"{'case':{width}}  trials  kills  failures")
    for row in result["table"]:
        print(f"{row['case']:{width}}  {row['trials']:6}  {row['kills']:5}  {row['failures'] or 0}")
    from jaxrlhf.bench.record import write  # after all forks: it loads JAX

    write(options.out, result)
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
