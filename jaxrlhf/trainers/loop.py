"""The loop around every trainer's step: resume, log, evaluate, checkpoint, stop cleanly, export."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.checkpoints import latest_checkpoint, restore_checkpoint, save_checkpoint
from jaxrlhf.distributed import check_shared, from_primary, gather, to_host
from jaxrlhf.errors import InputError
from jaxrlhf.files import read_jsonl
from jaxrlhf.models import ModelCard
from jaxrlhf.runs import Run, peak_memory_bytes
from jaxrlhf.trainers.settings import RunConfig

PyTree = Any
Metrics = dict[str, Any]


class Interrupted(Exception):
    """The user or the cluster asked the run to stop; a checkpoint was saved first."""


@dataclass(frozen=True)
class Task:
    """What a trainer gives the loop.

    `step(state, i)` runs step i (from 0) and returns the new state and its metrics; everything random in it must be a
    function of i, so that a resumed run repeats what an uninterrupted one does. `identity` holds what must be equal
    between a run and its resumption.
    """

    name: str
    total_steps: int
    step: Callable[[PyTree, int], tuple[PyTree, Metrics]]
    evaluate: Callable[[PyTree, int], Metrics]
    export: Callable[[PyTree, ModelCard], None]
    base_model: str
    """What the exported model was trained from."""
    identity: dict[str, Any]
    exports: dict[str, Any]
    """For `convert`, per model in the state: {path of its parameters: {"head": …, "config": HF config}}."""


def resume_or_start(run: Run, config: RunConfig, task: Task, state: PyTree) -> tuple[PyTree, int]:
    """The state to go on from and the number of finished steps."""
    path = newest(run) if config.resume else None
    if path is None:
        if config.resume:
            run.print(f"resume: no checkpoint in {run.output_dir}, starting from the beginning")
            run.rewind(-1)
        return state, 0
    with run.status(f"restoring {path}…"):
        state, metadata = restore_checkpoint(path, state)
    changed = [
        f"{name}: {metadata['identity'].get(name)!r} then, {value!r} now"
        for name, value in task.identity.items()
        if metadata["identity"].get(name) != value
    ]
    if changed:
        raise InputError(
            f"cannot resume {path}, the run would not be the same one: {'; '.join(changed)}. Restore these settings, "
            "or start a new run in another folder"
        )
    run.rewind(metadata["step"])
    return state, metadata["step"]


def newest(run: Run) -> Path | None:
    """The checkpoint that all processes go on from: the newest that process 0 sees."""
    name = from_primary("looking for a checkpoint", lambda: getattr(latest_checkpoint(run.output_dir), "name", None))
    return run.output_dir / name if name else None


def fit(run: Run, config: RunConfig, task: Task, state: PyTree) -> PyTree:
    """Run the task from its newest checkpoint (with `resume`) or from the start; returns the final state.

    Evaluates before the first and after the last step, exports the model into the run folder at the end. On SIGINT or
    SIGTERM (to any process) the current step is finished, a checkpoint saved and Interrupted raised; a second SIGINT
    stops at once.
    """
    state, start = resume_or_start(run, config, task, state)
    run.begin()
    check_shared(run.output_dir, "config.yaml")
    begin = time.monotonic()

    def evaluate(step: int) -> None:
        run.log(step, {f"eval/{name}": value for name, value in task.evaluate(state, step).items()})

    def save(step: int) -> None:
        with run.status(f"saving checkpoint-{step}…"):
            metadata = {"identity": task.identity, "exports": task.exports}
            save_checkpoint(run.output_dir, step, state, metadata, config.save_total_limit)

    if start == 0:
        evaluate(0)
    with stop_requested() as stopped, run.progress(task.total_steps, start, task.name) as bar:
        for step in range(start, task.total_steps):
            state, metrics = task.step(state, step)
            metrics = to_host(metrics)
            done = step + 1
            check_finite(metrics, done, run)
            run.log(done, metrics | {"perf/peak_memory_gib": peak_memory_bytes()["host"] / 2**30})
            bar.update()
            if step == start:  # the step that compiles would spoil the rate and the remaining time
                bar.initial, bar.start_t = bar.n, time.time()
            last = done == task.total_steps
            if last or (config.eval_steps and done % config.eval_steps == 0):
                evaluate(done)
            stop = any(gather("ending a step", stopped()))
            if last or stop or (config.save_steps and done % config.save_steps == 0):
                save(done)
            if stop and not last:
                raise Interrupted(f"stopped after step {done}; continue with --resume")
    with run.status(f"exporting the model to {run.output_dir}…"):
        figures = from_primary("reading the evaluations", lambda: evals(run))
        data = tuple(config.data_path)
        task.export(state, ModelCard(task.name, task.base_model, data, task.total_steps, figures["eval_after"]))
    seconds = time.monotonic() - begin
    run.write_summary({"trainer": task.name, "steps": task.total_steps, "seconds": round(seconds, 1), **figures})
    run.print(f"{task.name}: {task.total_steps - start} steps in {seconds:.1f}s → {run.output_dir}")
    return state


def evals(run: Run) -> dict[str, dict[str, float]]:
    """The figures of the first and of the last evaluation of this run, resumed parts included."""
    records = [r for r in read_jsonl(run.output_dir / "metrics.jsonl") if any(k.startswith("eval/") for k in r)]
    figures = [{k.removeprefix("eval/"): v for k, v in r.items() if k.startswith("eval/")} for r in records]
    return {"eval_before": figures[0], "eval_after": figures[-1]}


def check_finite(metrics: Metrics, step: int, run: Run) -> None:
    """Stop on a loss or gradient that is not finite, before it is saved anywhere."""
    bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    if bad:
        kept = latest_checkpoint(run.output_dir)
        go_on = f"--resume continues from {kept.name}" if kept else "no checkpoint was saved yet"
        raise InputError(
            f"step {step}: {', '.join(bad)} became non-finite; training cannot go on. Lower the learning rate, "
            f"lengthen the warm-up, or use --dtype float32; {go_on}"
        )


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM only set a flag (returned by the call); a second SIGINT interrupts."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return

    def handle(number: int, _frame: Any) -> None:
        if flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Announce:
    """Calls a jitted function and says "compiling…" the first time it meets new shapes of its positional arguments."""

    def __init__(self, run: Run | None, name: str, function: Callable[..., Any]) -> None:
        self.run, self.name, self.function = run, name, function
        self.seen: set[tuple] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shapes = tuple((x.shape, str(x.dtype)) if hasattr(x, "dtype") else x for x in jax.tree.leaves(args))
        if self.run is None or shapes in self.seen:
            return self.function(*args, **kwargs)
        self.seen.add(shapes)
        with self.run.status(f"compiling {self.name}…"):
            return jax.block_until_ready(self.function(*args, **kwargs))
