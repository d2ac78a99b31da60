"""Steps during which a checkpoint is written in the background, against the steps around them, in one run.

    python benchmarks/async_saves.py --model_name_or_path SmolLM2-135M-Instruct --data_path demo

A language model is fine-tuned and saves a checkpoint every few steps. A step is "beside a save" when files were written
during all of it, "partly" when during a part of it, and otherwise "alone". The copy to host memory, for which training
waits, is timed by itself. With several values of --niceness, the saves take them in turns; 0 is the priority of the
step. Runs lie in runs/async_saves.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax

from jaxrlhf.bench.record import say, write
from jaxrlhf.runs import host_copies, pending_save, saving
from jaxrlhf.runs.records import read_records
from jaxrlhf.trainers.sft import SFTConfig, train_sft

RUN = Path("runs/async_saves")


class Save(NamedTuple):
    """When a save began and ended; Unix times."""

    niceness: int
    begin: float
    copied: float
    end: float


class Watched(pending_save.PendingSave):
    """A save that notes its times, and takes the next niceness."""

    saves: ClassVar[list[Save]] = []
    niceness: ClassVar[Iterator[int]] = itertools.cycle([host_copies.NICENESS])

    def write(self, arrays: Any, *, background: bool) -> None:
        host_copies.NICENESS = next(Watched.niceness)
        self.times = host_copies.NICENESS, time.time()
        super().write(arrays, background=background)
        self.copied = time.time()

    def _finish(self, checkpointer: Any) -> None:
        super()._finish(checkpointer)
        if self.in_background:
            while not hasattr(self, "copied"):
                time.sleep(0.01)
            Watched.saves.append(Save(*self.times, self.copied, time.time()))


def kind(begin: float, end: float, saves: list[Save]) -> str:
    """The name of a step from `begin` to `end`, with the niceness of the save during it."""
    for save in saves:
        shared = min(end, save.end) - max(begin, save.begin)
        if shared > 0:
            return f"{'beside a save' if shared > 0.95 * (end - begin) else 'partly'}, niceness {save.niceness}"
    return "alone"


def figures(path: Path, saves: list[Save]) -> dict[str, Any]:
    """Medians by kind of step, each relative to the steps alone."""
    steps: dict[str, list[float]] = {}
    records = [record for record in read_records(path) if "timing/step" in record]
    for record in records[2:]:  # the first one compiles
        seconds = record["timing/step"]
        steps.setdefault(kind(record["time"] - seconds, record["time"], saves), []).append(seconds)
    alone = statistics.median(steps["alone"])
    result: dict[str, Any] = {"steps": {}, "saves": {}}
    for name, seconds in sorted(steps.items()):
        median = statistics.median(seconds)
        rounded = [round(value, 3) for value in seconds]
        result["steps"][name] = {"median": round(median, 3), "ratio": round(median / alone, 3), "seconds": rounded}
    for niceness in sorted({save.niceness for save in saves}):
        own = [save for save in saves if save.niceness == niceness]
        result["saves"][f"niceness {niceness}"] = {
            "seconds of the copy": [round(save.copied - save.begin, 2) for save in own],
            "seconds of the writing": [round(save.end - save.copied, 2) for save in own],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data_path", nargs="+", default=["demo"])
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--save_steps", type=int, default=12)
    parser.add_argument("--niceness", type=int, nargs="+", default=[host_copies.NICENESS])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "async_saves.json")
    options = parser.parse_args()
    saving.PendingSave = Watched
    Watched.niceness = itertools.cycle(options.niceness)
    config = SFTConfig.create(
        model_name_or_path=options.model_name_or_path,
        data_path=options.data_path,
        max_length=options.max_length,
        packing=True,
        per_device_train_batch_size=options.rows,
        dtype=options.dtype,
        max_steps=(options.saves + 1) * options.save_steps,
        save_steps=options.save_steps,
        save_total_limit=1,
        max_eval_samples=4,
        learning_rate=1e-5,
        logging_steps=1,
        output_dir=str(RUN),
        overwrite_output_dir=True,
    )
    train_sft(config)
    result = figures(RUN / "metrics.jsonl", Watched.saves)
    for name, found in result["steps"].items():
        say(f"{name}: {found['median']:.2f} s, x {found['ratio']:.2f} ({len(found['seconds'])} steps)")
    for name, found in result["saves"].items():
        say(f"{name}: {found}")
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "model_name_or_path")}
    write(options.json, {"parameters": parameters(), "settings": settings} | result)


def parameters() -> int:
    """Number of parameters of the exported model."""
    from jaxrlhf.models import load_pretrained

    return sum(leaf.size for leaf in jax.tree.leaves(load_pretrained(str(RUN)).params))


if __name__ == "__main__":
    main()
