"""The loop around every trainer's step: resume, log, evaluate, checkpoint, stop cleanly, export."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Generic, NamedTuple

import jax

from jaxrlhf.config.secrets import redacted
from jaxrlhf.distributed import Watchdog, check_shared, from_primary, gather, is_primary, to_host
from jaxrlhf.errors import Interrupted, Preempted, SharedError, StorageError, TrainingDiverged
from jaxrlhf.models import ModelCard
from jaxrlhf.runs import Run, peak_memory_bytes
from jaxrlhf.runs.checkpoints import (
    checkpoint_step,
    list_checkpoints,
    remove_checkpoints_after,
)
from jaxrlhf.runs.records import Record
from jaxrlhf.runs.saving import Retention, Saver
from jaxrlhf.runs.system import MemoryRelief
from jaxrlhf.trainers.guards import Guard
from jaxrlhf.trainers.resuming import Change, restored, resume_or_start
from jaxrlhf.trainers.settings import RunConfig
from jaxrlhf.trainers.stopping import Reason, stop_requested
from jaxrlhf.trainers.task import Item, State, Task


class EvaluationStopped(Exception):
    """The run was asked to stop during an evaluation, and ends with an error of `kind`."""

    def __init__(self, kind: type[Interrupted]) -> None:
        super().__init__(kind)
        self.kind = kind


def fit(
    run: Run,
    config: RunConfig,
    task: Task[State],
    state: State,
    *,
    resume: bool,
    named: str = "",
    allowed: tuple[Change, ...] = (),
) -> State:
    """Runs the task from a checkpoint or from the start; returns the final state.

    Evaluates before the first and after the last step, and exports the model into the run folder at the end. A second
    SIGINT stops at once.

    Args:
        run: the folder and console of the run.
        config: its length, and when it evaluates and saves.
        task: the steps.
        state: the initial state; donated.
        resume: continue from a checkpoint.
        named: its name; empty: the newest.
        allowed: settings that may differ from those of the run so far.

    Raises:
        Interrupted: after SIGINT to any process; the current step, or batch of an evaluation, is finished and a
            checkpoint saved.
        Preempted: the same after SIGTERM, SIGUSR1 or the cloud's notice.
        SharedError: as the task raises it (by a reward function, say); a checkpoint is saved first.
        StorageError: when several checkpoints in a row, or the last one, cannot be written.
        TrainingDiverged: when several steps in a row had no finite update.
    """
    state, start = resume_or_start(run, task, state, resume, named, allowed)
    run.begin()
    if run.exchange is None:
        check_shared(run.output_dir, "config.yaml")
    begin, relief = time.monotonic(), MemoryRelief()
    with stop_requested() as stopped, run.progress(task.total_steps, start, task.name) as bar:
        loop = _Loop(run, config, task, start, stopped)
        with loop.watchdog, loop.saves_finished(), tracing(run, config.profiled) as trace:
            done = start
            if done < task.total_steps:
                task.prepare(state, loop.guard.plan(done))
            loop.evaluate_at_start(state)
            while done < task.total_steps:
                trace(done + 1)
                state, after = loop.step(state, done)
                bar.update(after - done)
                if after > done:
                    loop.finish_step(state, after)
                relief.after_step()
                done = after
    loop.newest = (None, task.total_steps)  # frees the memory of the last state, if another one is exported
    if config.export_best:
        state = loop.best_state(state)
    metrics = loop.export(state)
    seconds = time.monotonic() - begin
    run.write_summary(
        {"trainer": task.name, "title": task.title, "steps": task.total_steps, "seconds": round(seconds, 1), **metrics}
    )
    run.print(f"{task.name}: {task.total_steps - start} steps in {seconds:.1f}s → {run.output_dir}")
    return state


class _Loop(Generic[State]):
    """One pass through the steps of a task: what surrounds each of them."""

    def __init__(
        self, run: Run, config: RunConfig, task: Task[State], start: int, stopped: Callable[[], Reason]
    ) -> None:
        self.run, self.config, self.task, self.start, self.stopped = run, config, task, start, stopped
        self.best = best_before(run, task.best, start)
        self.best_before = self.best
        self.guard = Guard(run, config.guard, task.limits, task.last_batch)
        self.saver = Saver(
            run.output_dir,
            Retention(config.save_total_limit, config.keep_period),
            max_failures=config.max_failed_saves,
            say=run.print,
            exchange=run.exchange,
        )
        self.watchdog = Watchdog(config.watchdog, config.watchdog_floor, self.rescue)
        self.newest: tuple[State | None, int] = (None, start)

    def step(self, state: State, done: int) -> tuple[State, int]:
        """Runs the step after `done`; returns the state to go on from and the number of finished steps."""
        self.newest = (state, done)
        with self.watchdog.work("a step", f"step {done + 1}"), self.saved_before_errors(state, done):
            state, metrics = self.task.step(state, self.guard.plan(done))
            metrics = to_host(metrics)
        self.newest = (state, done + 1)
        metrics |= {"perf/peak_memory_gib": (peak_memory_bytes()["host"] or 0) / 2**30}
        self.guard.check(self.run.log(done + 1, metrics), done + 1)
        if self.guard.spiked:  # which checkpoints there are must not depend on how quick the disk is
            self.saver.wait()
        to = self.guard.way_back(done + 1)
        return (state, done + 1) if to is None else (self.roll_back(state, done + 1, to), to)

    def roll_back(self, state: State, step: int, to: int) -> State:
        """Returns the state of the checkpoint of step `to`; what came after it, up to `step`, is deleted."""
        path = self.run.output_dir / f"checkpoint-{to}"
        with self.run.status(f"restoring {path}…"):
            state, _ = restored(self.run, path, state)
        if is_primary():
            remove_checkpoints_after(self.run.output_dir, to)
        self.run.rewind(to, repeats=False)
        self.guard.rolled_back(step, to)
        self.best = self.best_before = best_before(self.run, self.task.best, to)
        return state

    def evaluate_at_start(self, state: State) -> None:
        """Evaluates before the first step, and after a resume what the stopped run did not get to."""
        if self.start == 0:
            self.evaluate(state, 0)
        elif self.is_evaluated_at(self.start) and not evaluated(self.run, self.start):
            value = self.evaluate(state, self.start)
            if self.best.is_worse_than(value, self.task.best[1]):
                self.best = Best(self.start, value)

    def is_evaluated_at(self, done: int) -> bool:
        """True for the steps after which an evaluation is due."""
        return done == self.task.total_steps or bool(self.config.eval_steps and done % self.config.eval_steps == 0)

    def finish_step(self, state: State, done: int) -> None:
        """Evaluates and saves where it is due; raises what ends the run after this step."""
        last, value = done == self.task.total_steps, None
        if self.is_evaluated_at(done):
            with self.saved_before_errors(state, done):
                value = self.evaluate(state, done)
        stop = self.asked_to_stop("ending a step")
        due = self.saver.retry_is_due or (self.config.save_steps and done % self.config.save_steps == 0)
        ends = last or stop is not None or self.guard.given_up
        # Between the first bad step and giving up nothing changes, and what was saved before is worth more.
        if ends or ((due or self.improves(value)) and not self.guard.in_a_row and not self.saver.holds_off):
            self.save(state, done, value, last=ends)
        if self.guard.given_up:
            self.guard.end(done)
        if stop and not last:
            raise stop(f"stopped after step {done}; continue with --resume")

    def evaluate(self, state: State, done: int) -> float | None:
        """Logs an evaluation; returns the metric that decides which is best. Raises Interrupted as `fit` does."""
        self.newest = (state, done)
        try:
            with self.watchdog.work("an evaluation", f"the evaluation after step {done}"):
                metrics = self.task.evaluate(state, done, self.watch)
        except EvaluationStopped as stop:
            if done > self.start and not self.guard.in_a_row:
                self.save(state, done, last=True)
            when = f"after step {done}" if done else "before the first step"
            raise stop.kind(f"stopped during the evaluation {when}; continue with --resume") from None
        self.run.log(done, {f"eval/{name}": value for name, value in metrics.items()})
        value = self.run.latest[f"eval/{self.task.best[0]}"]
        return None if value is None else float(value)

    def watch(self, batches: Iterable[Item], total: int) -> Iterator[Item]:
        with self.run.progress(total, description="evaluation", unit="batch", transient=True) as bar:
            for batch in bar.over(batches):
                if kind := self.asked_to_stop("evaluating a batch"):
                    raise EvaluationStopped(kind)
                with self.watchdog.work("a batch of an evaluation"):
                    yield batch

    def best_state(self, state: State) -> State:
        """The state of the best of the evaluated checkpoints; `state` where the last one is the best."""
        best = self.best.step
        if best in (None, self.task.total_steps):
            return state
        with self.run.status(f"restoring checkpoint-{best}, the best of the evaluated ones…"):
            return restored(self.run, self.run.output_dir / f"checkpoint-{best}", state)[0]

    def export(self, state: State) -> dict[str, Any]:
        """Exports the model into the run folder; returns the evaluations of the run. Raises StorageError."""
        run, task = self.run, self.task
        with run.status(f"exporting the model to {run.output_dir}…"), self.watchdog, self.watchdog.work("the export"):
            metrics = from_primary("reading the evaluations", lambda: evals(run, task.best, self.best.step))
            shown = metrics["eval_best" if self.config.export_best else "eval_after"]
            base, data = redacted((task.base_model, task.data_names))
            card = ModelCard(task.name, task.title, base, data, task.total_steps, shown)
            try:
                task.export(state, card)
            except StorageError as error:
                remedy = "free or repair the disk; --resume then exports the trained model from its last checkpoint"
                raise StorageError(f"{error}. To go on: {remedy}") from error
        return metrics

    def asked_to_stop(self, place: str) -> type[Interrupted] | None:
        """The error to end with when a process is asked to stop. All processes look at the pending save here too."""
        seen = gather(place, {"stop": self.stopped(), "save": self.saver.report()})
        self.saver.advance([process["save"] for process in seen])
        reasons = {process["stop"] for process in seen}
        return Interrupted if "interrupt" in reasons else Preempted if "preemption" in reasons else None

    def improves(self, value: float | None) -> bool:
        """True when the metric of an evaluation is better than that of every checkpoint."""
        if self.best.step in self.saver.failed:
            self.best = self.best_before
        return self.best.is_worse_than(value, self.task.best[1])

    def save(self, state: State, done: int, value: float | None = None, *, last: bool = False) -> None:
        """Saves the state, of which `value` is the metric; the last one of a run until it is written."""
        with self.watchdog.work("a save", f"the save of checkpoint-{done}"):
            self._save(state, done, value, last)

    def _save(self, state: State, done: int, value: float | None, last: bool) -> None:
        self.saver.wait()
        if self.improves(value):
            self.best_before, self.best = self.best, Best(done, value)
        if self.guard.given_up:  # the older ones may be of use
            self.saver.retention = Retention()
        metadata: dict[str, Any] = {"identity": redacted(self.task.identity), "exports": self.task.exports}
        metadata |= {"best_step": self.best.step, "devices": self.task.devices}
        background = self.config.async_save and not last
        with nullcontext() if background else self.run.status(f"saving checkpoint-{done}…"):
            self.saver.start(done, state, metadata, {self.best.step}, background=background)
            while last and self.saver.wait_for_retry():
                self.saver.start(done, state, metadata, {self.best.step}, background=False)

    @contextmanager
    def saves_finished(self) -> Iterator[None]:
        """Waits for the pending save at the end of the block, also after an error that all processes have."""
        try:
            yield
        except (KeyboardInterrupt, StorageError):
            self.saver.abandon()
            raise
        except Exception as error:  # whatever ends the run; it is raised again
            if jax.process_count() > 1 and not isinstance(error, Interrupted | SharedError | TrainingDiverged):
                self.saver.abandon()  # the others are elsewhere
                raise
            try:
                self.saver.wait()
            except StorageError as second:  # the user needs to see the error that ended the run
                self.run.print(f"WARNING: {second}")
            raise

    def is_worth_saving(self, state: State | None, done: int) -> bool:
        """True when the state has not been donated to a step, and no checkpoint has it."""
        usable = state is not None and not any(
            x.is_deleted() for x in jax.tree.leaves(state) if isinstance(x, jax.Array)
        )
        if not usable or done <= self.start:
            return False
        saved = from_primary(
            "listing checkpoints", lambda: [*map(checkpoint_step, list_checkpoints(self.run.output_dir))]
        )
        return done not in saved

    def rescue(self, kind: str) -> str:
        """Saves a checkpoint while the main thread is stuck in work of a kind, if that can be; returns what it did."""
        state, done = self.newest
        if kind == "a save" or state is None or not self.is_worth_saving(state, done):
            return "no checkpoint was saved: there is none to save, or the state is in use"
        self._save(state, done, None, last=True)
        return f"checkpoint-{done} was saved"

    @contextmanager
    def saved_before_errors(self, state: State, done: int) -> Iterator[None]:
        try:
            yield
        except SharedError:
            self.saver.wait()
            if self.is_worth_saving(state, done):
                self.save(state, done, last=True)
            raise


def _evaluations(run: Run) -> list[Record]:
    """Records of this run's evaluations, resumed parts included: `step`, and metrics by name."""
    records = [r for r in run.metrics() if any(k.startswith("eval/") for k in r)]
    return [
        {"step": r["step"]} | {k.removeprefix("eval/"): v for k, v in r.items() if k.startswith("eval/")}
        for r in records
    ]


def evaluated(run: Run, step: int) -> bool:
    return from_primary("looking for an evaluation", lambda: any(r["step"] == step for r in _evaluations(run)))


@contextmanager
def tracing(run: Run, steps: range) -> Iterator[Callable[[int], None]]:
    """Traces `steps` with JAX's profiler into the folder `profile` of the run, on process 0.

    Yields a function to call before each step with its number, counted from 1.
    """
    folder, active = run.output_dir / "profile", False

    def stop() -> None:
        nonlocal active
        if active:
            active = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:  # a full disk, say, must not end the run
                run.print(f"WARNING: the profile is not written: {error}")
            else:
                run.print(f"profile: {folder}; xprof --logdir {folder} shows it")

    def before(step: int) -> None:
        nonlocal active
        if step not in steps:
            stop()
        elif not active and is_primary():
            jax.profiler.start_trace(folder)
            active = True

    try:
        yield before
    finally:
        stop()


class Best(NamedTuple):
    """Step and metric of the best evaluation that has a checkpoint; the earliest of equal ones."""

    step: int | None = None
    value: float | None = None

    def is_worse_than(self, value: float | None, sign: int) -> bool:
        return value is not None and (self.value is None or sign * value > sign * self.value)


def best_before(run: Run, metric: tuple[str, int], done: int) -> Best:
    """Returns the best of the steps up to `done` that have a checkpoint."""
    name, sign = metric

    def find() -> Best:
        best, kept = Best(), {checkpoint_step(path) for path in list_checkpoints(run.output_dir)}
        for record in _evaluations(run) if done else ():
            known = 0 < record["step"] <= done and record["step"] in kept
            if known and best.is_worse_than(record.get(name), sign):
                best = Best(record["step"], record[name])
        return best

    step, value = from_primary("looking for the best evaluation", lambda: list(find()))
    return Best(None if step is None else int(step), value)


def evals(run: Run, best: tuple[str, int], step: int | None) -> dict[str, Any]:
    """Metrics of the first, the last and the best evaluation of this run."""
    records = _evaluations(run)
    chosen = next((r for r in records if r["step"] == step), records[-1])
    plain = [{k: v for k, v in r.items() if k != "step"} for r in (records[0], records[-1], chosen)]
    named = dict(zip(("eval_before", "eval_after", "eval_best"), plain, strict=True))
    return named | {"best_step": chosen["step"], "best_by": best[0]}
