"""The loop around every trainer's step: resume, log, evaluate, checkpoint, stop cleanly, export."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.distributed import check_shared, from_primary, gather, is_primary, to_host
from jaxrlhf.errors import InputError, Interrupted, SharedError, TrainingDiverged
from jaxrlhf.models import ModelCard
from jaxrlhf.runs import Run, peak_memory_bytes
from jaxrlhf.runs.checkpoints import (
    checkpoint_step,
    latest_checkpoint,
    list_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from jaxrlhf.trainers.settings import RunConfig

PyTree = Any
Metrics = dict[str, Any]


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
    best: tuple[str, int]
    """The figure of an evaluation that says which checkpoint is best, and 1 (higher is better) or -1."""
    last_batch: Callable[[], dict[str, Any]]
    """The arrays of the newest step, for a person who wants to know why it could not be used."""


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
    stops at once. A checkpoint is saved before a SharedError too, that of a reward function say.
    """
    state, start = resume_or_start(run, config, task, state)
    run.begin()
    check_shared(run.output_dir, "config.yaml")
    begin = time.monotonic()

    def evaluate(step: int) -> None:
        run.log(step, {f"eval/{name}": value for name, value in task.evaluate(state, step).items()})

    def save(step: int, keep_last: int) -> None:
        with run.status(f"saving checkpoint-{step}…"):
            metadata = {"identity": task.identity, "exports": task.exports}
            save_checkpoint(run.output_dir, step, state, metadata, keep_last, keep={best.step})

    @contextmanager
    def saved_before_errors(done: int) -> Iterator[None]:
        try:
            yield
        except SharedError:
            usable = not any(x.is_deleted() for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
            if done > start and usable and done not in map(checkpoint_step, list_checkpoints(run.output_dir)):
                save(done, config.save_total_limit)
            raise

    best = best_before(run, task.best, start)
    if start == 0 or (start == task.total_steps and not evaluated(run, start)):
        evaluate(start)
    guard = Guard(run, config.max_skipped_steps, task.last_batch)
    with stop_requested() as stopped, run.progress(task.total_steps, start, task.name) as bar:
        for step in range(start, task.total_steps):
            with saved_before_errors(step):
                state, metrics = task.step(state, step)
            metrics = to_host(metrics)
            done = step + 1
            run.log(done, metrics | {"perf/peak_memory_gib": peak_memory_bytes()["host"] / 2**30})
            guard.check(metrics, done)
            bar.update()
            last = done == task.total_steps
            value = None
            if last or (config.eval_steps and done % config.eval_steps == 0):
                with saved_before_errors(done):
                    evaluate(done)
                value = run.latest[f"eval/{task.best[0]}"]
            improved = best.is_worse_than(value, task.best[1])
            stop = any(gather("ending a step", stopped()))
            due = improved or (config.save_steps and done % config.save_steps == 0)
            # Between the first bad step and giving up nothing changes, and what was saved before is worth more.
            if last or stop or guard.given_up or (due and not guard.in_a_row):
                best = Best(done, value) if improved else best
                save(done, 0 if guard.given_up else config.save_total_limit)
            if guard.given_up:
                guard.end(done)
            if stop and not last:
                raise Interrupted(f"stopped after step {done}; continue with --resume")
    if config.export_best and best.step not in (None, task.total_steps):
        with run.status(f"restoring checkpoint-{best.step}, the best of the evaluated ones…"):
            state, _ = restore_checkpoint(run.output_dir / f"checkpoint-{best.step}", state)
    with run.status(f"exporting the model to {run.output_dir}…"):
        figures = from_primary("reading the evaluations", lambda: evals(run, task.best, best.step))
        data = tuple(config.data_path)
        shown = figures["eval_best" if config.export_best else "eval_after"]
        task.export(state, ModelCard(task.name, task.base_model, data, task.total_steps, shown))
    seconds = time.monotonic() - begin
    run.write_summary({"trainer": task.name, "steps": task.total_steps, "seconds": round(seconds, 1), **figures})
    run.print(f"{task.name}: {task.total_steps - start} steps in {seconds:.1f}s → {run.output_dir}")
    return state


def _evaluations(run: Run) -> list[dict[str, Any]]:
    """The records of this run's evaluations, resumed parts included: `step`, and figures by their names."""
    records = [r for r in read_jsonl(run.output_dir / "metrics.jsonl") if any(k.startswith("eval/") for k in r)]
    return [
        {"step": r["step"]} | {k.removeprefix("eval/"): v for k, v in r.items() if k.startswith("eval/")}
        for r in records
    ]


def evaluated(run: Run, step: int) -> bool:
    return from_primary("looking for an evaluation", lambda: any(r["step"] == step for r in _evaluations(run)))


class Best(NamedTuple):
    """The step whose evaluation was the best of those with a checkpoint, and its figure; the earliest of equal ones."""

    step: int | None = None
    value: float | None = None

    def is_worse_than(self, value: float | None, sign: int) -> bool:
        return value is not None and (self.value is None or sign * value > sign * self.value)


def best_before(run: Run, figure: tuple[str, int], done: int) -> Best:
    """The best among the steps that a resumed run has behind it, up to `done`."""
    name, sign = figure

    def find() -> Best:
        best, kept = Best(), {checkpoint_step(path) for path in list_checkpoints(run.output_dir)}
        for record in _evaluations(run) if done else ():
            known = 0 < record["step"] <= done and record["step"] in kept
            if known and best.is_worse_than(record.get(name), sign):
                best = Best(record["step"], record[name])
        return best

    return Best(*from_primary("looking for the best evaluation", lambda: list(find())))


def evals(run: Run, best: tuple[str, int], step: int | None) -> dict[str, Any]:
    """The figures of the first, the last and the best evaluation of this run."""
    records = _evaluations(run)
    chosen = next((r for r in records if r["step"] == step), records[-1])
    plain = [{k: v for k, v in r.items() if k != "step"} for r in (records[0], records[-1], chosen)]
    named = dict(zip(("eval_before", "eval_after", "eval_best"), plain, strict=True))
    return named | {"best_step": chosen["step"], "best_by": best[0]}


class Guard:
    """Watches for losses and gradients that are not finite, and for batches without any score; the step has left the
    model as it was before them."""

    def __init__(self, run: Run, limit: int, batch: Callable[[], dict[str, Any]]) -> None:
        self.run, self.limit, self.batch = run, limit, batch
        self.in_a_row = 0
        self.reason, self.unscored = "", False

    def check(self, metrics: Metrics, step: int) -> None:
        """Count a step that skipped updates; TrainingDiverged for a metric that is not finite though none was skipped."""
        bad = [name for name, value in metrics.items() if not math.isfinite(float(value))]
        skipped, self.unscored = int(metrics["guard/skipped_updates"]), bool(metrics.get("guard/unscored", False))
        if not skipped and not self.unscored:
            self.in_a_row = 0
            if bad:
                raise TrainingDiverged(f"step {step}: {', '.join(bad)} became non-finite; {self._advice()}")
            return
        self.in_a_row += 1
        left_out, self.reason = f"{skipped} update{'s' * (skipped > 1)}", "a loss or gradient became non-finite"
        if self.unscored:
            left_out, self.reason = "its updates", "no answer had a score"
        elif bad:
            self.reason = f"{', '.join(bad)} became non-finite"
        self.run.print(
            f"step {step}: {left_out} left out, because {self.reason} ({self.in_a_row} such step"
            f"{'s' * (self.in_a_row > 1)} in a row; the run ends at {self.limit})"
        )

    @property
    def given_up(self) -> bool:
        return self.in_a_row >= self.limit

    def end(self, step: int) -> None:
        """Save the newest batch for inspection and raise TrainingDiverged."""
        path = self.run.output_dir / f"nonfinite-step-{step}.npz"
        arrays = {name: np.asarray(value) for name, value in to_host(self.batch()).items()}
        if is_primary():
            np.savez(path, **arrays)
        raise TrainingDiverged(
            f"step {step}: {self.reason} in {self.in_a_row} steps in a row; the batch is saved in {path}, and "
            f"checkpoint-{step} holds the model as it was before them. {self._advice()}"
        )

    def _advice(self) -> str:
        kept = latest_checkpoint(self.run.output_dir)
        go_on = f"--resume continues from {kept.name}" if kept else "no checkpoint was saved yet"
        if self.unscored:
            return f"What the reward functions said stands above; {go_on}"
        return f"Lower the learning rate, lengthen the warm-up, or use --dtype float32; {go_on}"


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
