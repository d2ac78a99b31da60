"""Parts that both sides of the comparisons with TRL share: rewards, the turns they take, and the form of a job.

Imports nothing of the package, whose dependencies the peer's environment lacks: only the file of the demo data.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

DEMO = Path(__file__).resolve().parents[1] / "jaxrlhf" / "data" / "demo.py"
BEFORE, AFTER = "Human: ", " Assistant:"  # of the default prompt template


def quality(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """`demo_quality` of each response, -2 to 5; prompts as rendered. Raises KeyError for what is no demo question."""
    questions = [prompt.strip().removeprefix(BEFORE).removesuffix(AFTER) for prompt in prompts]
    return [_demo().demo_quality(q, r) for q, r in zip(questions, responses, strict=True)]


def brief(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for a response of at most 20 words, less as it grows to 80 words, 0 from there on; texts or messages."""
    texts = [response if isinstance(response, str) else response[-1]["content"] for response in completions]
    return [1 - min(max(len(text.split()) - 20, 0) / 60, 1.0) for text in texts]


def _demo() -> ModuleType:
    name = "compare_trl_demo"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, DEMO)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # its dataclasses look it up
        spec.loader.exec_module(module)
    return sys.modules[name]


class Turns:
    """Iterations in turns with the other side: one begins when `commands` has a line, and is timed.

    Without `commands`, nothing is waited for.
    """

    def __init__(self, commands: IO[str] | None = None, replies: IO[str] | None = None) -> None:
        self.commands, self.replies = commands, replies
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        """CPU seconds of all threads, which another load on the machine changes little."""
        self._began: tuple[float, float] | None = None

    def begin(self) -> None:
        """End the iteration at hand, wait, begin the next."""
        self.end()
        if self.commands is not None:
            print("ready", file=self.replies, flush=True)
            if not self.commands.readline():
                raise SystemExit("the other end is gone")
        self._began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began[0])
            self.cpu_seconds.append(time.process_time() - self._began[1])
            self._began = None


def main(run: Callable[[dict[str, Any], Turns], dict[str, Any]]) -> None:
    """Do the job in the file that the command names. Standard output is for the turns; what is printed goes to stderr.

    A job holds `settings`, `seed`, the folders `actor` and `value` (the starts), `trained` (where the policy goes), and
    the files `prompts` (ids and mask `[iterations, batch, prompt length]`, padded on the left) and `result`.
    """
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        turns = Turns(sys.stdin, replies)
        result = run(job, turns)
        turns.end()
        result |= {"seconds": turns.seconds, "cpu_seconds": turns.cpu_seconds}
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
        print("done", file=replies, flush=True)
