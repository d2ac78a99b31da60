"""Damaged and hostile inputs: flags of every command, files of every kind, requests to the server.

    python benchmarks/fuzz_inputs.py [--kinds rows.jsonl GGUF] [--values 15] [--seed 0] [--json results/fuzz.json]

Every case is a real command line (or request), run in a worker process that is killed when it takes too long. A good
end is an error of a named kind (exit status 2 or 74) that names the field or the file, with nothing written. An input
that is accepted counts as well unless it must be refused: `harmless` in `fuzz_damage.Damage`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz_damage import UNDAMAGED
from fuzz_words import Case

LIMIT = 120.0
"""Seconds after which a case counts as hanging."""
GOOD = ("refused", "accepted")
VERDICTS = (*GOOD, "swallowed", "too strict", "unnamed", "trace", "hang", "crash", "wrote")


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        verdict: "refused" with a named error, or "accepted" where harmless. The others are defects: "swallowed",
            accepted and must be refused; "too strict", refused and undamaged; "unnamed", a message that names neither
            field nor file; "trace", "hang" and "crash"; "wrote", with files left behind.
        detail: the message or the end of the trace.
    """

    kind: str
    case: str
    verdict: str
    detail: str = ""
    seconds: float = 0.0


class Cases:
    """All cases by number; the same in every process that is given the same arguments.

    Args:
        inputs: folder of good inputs of every kind, which the first process makes.
        kinds: names of kinds; empty: all.
        values: values that are replaced in each JSON file.
        seed: of the damages.
        flags: words of flags are cases too.
    """

    def __init__(self, inputs: Path, kinds: Sequence[str], values: int, seed: int, flags: bool) -> None:
        from fuzz_kinds import KINDS, make_inputs
        from fuzz_words import flag_cases, request_cases

        if not inputs.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                make_inputs(inputs)

        self.inputs = inputs
        self.entries: list[Case] = []
        for name, kind in KINDS.items():
            if not kinds or name in kinds:
                rng = random.Random(f"{seed} {name}")
                found = kind.damages(inputs, rng, values)
                self.entries += [(name, damage.name, partial(self.damaged, kind, damage)) for damage in found]
        words = [*request_cases(), *(flag_cases() if flags else ())]
        self.entries += [case for case in words if not kinds or case[0] in kinds]

    def run(self, number: int, scratch: Path) -> Outcome:
        """Runs one case in a folder of its own."""
        kind, name, run = self.entries[number]
        start = time.monotonic()
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        verdict, detail = run(scratch)
        shown = detail if len(detail) < 800 else f"{detail[:400]} … {detail[-400:]}"
        return Outcome(kind, name, verdict, shown, round(time.monotonic() - start, 3))

    def damaged(self, kind: Any, damage: Any, scratch: Path) -> tuple[str, str]:
        """Damages a copy of the inputs and runs the command that reads it."""
        inputs, outputs = scratch / "in", scratch / "out"
        shutil.copytree(self.inputs, inputs)
        point_to(inputs, self.inputs)
        damage.change(inputs / kind.file)
        before = listing(inputs)
        names = [
            *kind.names,
            f"{inputs}/",
            Path(kind.file).name,
            *Path(kind.file).parts[:-1],
            *damage.name.partition(":")[0].split("."),
        ]
        verdict, detail = run_command(kind.words(inputs, outputs), names)
        left = listing(inputs) - before
        if verdict == "accepted":
            left = {name for name in left if "EXECUTED" in name}
        else:
            left |= listing(outputs)
            left = {name for name in left if not name.startswith(("cache", "records/"))}  # a run that goes on writes
        if left:
            return "wrote", f"{sorted(left)} {detail}"
        if damage.name == UNDAMAGED and verdict != "accepted":
            return "too strict", detail
        if verdict == "accepted" and not damage.harmless:
            return "swallowed", detail
        return verdict, detail


def point_to(inputs: Path, original: Path) -> None:
    """Makes the YAML files of copied inputs name the copies."""
    for path in inputs.glob("*.yaml"):
        path.write_text(path.read_text(encoding="utf-8").replace(str(original), str(inputs)), encoding="utf-8")


def listing(folder: Path) -> set[str]:
    """The paths of everything below a folder."""
    walk = os.walk(folder)
    return {os.path.relpath(os.path.join(at, name), folder) for at, folders, files in walk for name in folders + files}


def run_command(command: Any, names: Sequence[str]) -> tuple[str, str]:
    """Runs a command line or a call in this process. `names`: the message must hold one of them.

    Returns:
        The verdict, and what was printed.
    """
    from jaxrlhf.cli import main
    from jaxrlhf.errors import RunError

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(command) if isinstance(command, list) else command() or 0
    except RunError as error:
        status, _ = error.status, said.write(f"jaxrlhf: error: {error}")
    except BaseException:  # whatever it is: a command line must not raise it
        return "trace", f"{said.getvalue()[-200:]}\n{traceback.format_exc(limit=-4)}"
    text = said.getvalue()
    if status == 0:
        return "accepted", text
    if status not in (2, 74) or "Traceback" in text:
        return "trace", f"exit status {status}: {text}"
    message = text[text.rfind("jaxrlhf: error:") :]
    return ("refused" if any(name in message for name in names) else "unnamed"), message


def work(pipe: Connection, arguments: dict[str, Any], scratch: Path) -> None:
    """Runs the cases whose numbers come through the pipe."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    cases = Cases(**arguments)
    pipe.send([(kind, name) for kind, name, _ in cases.entries])
    while (number := pipe.recv()) is not None:
        pipe.send(cases.run(number, scratch))


class Worker:
    """A process that runs cases, and is replaced when one hangs or kills it. `cases`: kind and name of each."""

    def __init__(self, arguments: dict[str, Any], scratch: Path) -> None:
        self.arguments, self.scratch = arguments, scratch
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, self.arguments, self.scratch), daemon=True)
        self.process.start()
        other.close()
        self.cases: list[tuple[str, str]] = self.pipe.recv()

    def run(self, number: int, limit: float) -> Outcome | str:
        """The outcome of a case, or "hang" or "crash"."""
        self.pipe.send(number)
        problem = "hang"
        if self.pipe.poll(limit):
            with contextlib.suppress(EOFError):
                return self.pipe.recv()
            problem = "crash"
        self.stop()
        self.start()
        return problem

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def run_all(
    kinds: Sequence[str], values: int, seed: int, limit: float, every: int = 1, flags: bool = True
) -> Iterator[Outcome]:
    """Runs the cases, or only each so-manieth (`every`), each for at most `limit` seconds. The rest as in `Cases`."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        arguments = {
            "inputs": Path(folder) / "inputs",
            "kinds": tuple(kinds),
            "values": values,
            "seed": seed,
            "flags": flags,
        }
        worker = Worker(arguments, Path(folder) / "scratch")
        try:
            for number, (kind, name) in enumerate(worker.cases):
                if number % every == seed % every:
                    outcome = worker.run(number, limit)
                    yield Outcome(kind, name, outcome, "", limit) if isinstance(outcome, str) else outcome
        finally:
            worker.stop()


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts of the verdicts by kind."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        counts[outcome.kind][outcome.verdict] += 1
        counts["all"][outcome.verdict] += 1
    counts["all"] = counts.pop("all")
    lines = ["| kind | cases | " + " | ".join(VERDICTS) + " |", "|---|--:" + "|--:" * len(VERDICTS) + "|"]
    for kind, own in counts.items():
        lines.append(f"| {kind} | {own.total()} | " + " | ".join(str(own[verdict]) for verdict in VERDICTS) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=(), help="only these kinds")
    parser.add_argument("--values", type=int, default=15, help="values replaced in each JSON file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="run only each so-manieth case")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which a case hangs")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "fuzz.json")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    options = parser.parse_args()
    start, outcomes = time.monotonic(), []
    for outcome in run_all(options.kinds, options.values, options.seed, options.limit, options.every):
        outcomes.append(outcome)
        if options.verbose or outcome.verdict not in GOOD:
            print(f"{outcome.verdict}: {outcome.kind}: {outcome.case}: {outcome.detail.strip()}\n", flush=True)
    print(table(outcomes))
    defects = [asdict(outcome) for outcome in outcomes if outcome.verdict not in GOOD]
    kinds = dict.fromkeys(outcome.kind for outcome in outcomes)
    counts = {kind: collections.Counter(o.verdict for o in outcomes if o.kind == kind) for kind in kinds}
    command = " ".join(["python benchmarks/fuzz_inputs.py", *sys.argv[1:]])
    record = {"command": command, "seed": options.seed, "cases": len(outcomes)}
    record |= {"seconds": round(time.monotonic() - start), "python": platform.python_version(), "counts": counts}
    options.json.write_text(json.dumps(record | {"defects": defects}, indent=2) + "\n", encoding="utf-8")
    print(f"{len(outcomes)} cases, {len(defects)} defects, {record['seconds']} s → {options.json}")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
