"""The guard of a run: it leaves out steps whose numbers cannot be trusted, and ends the run after several of them."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from jaxrlhf.config import NonNegativeInt, Positive, PositiveInt, Settings
from jaxrlhf.distributed import from_primary, is_primary, to_host
from jaxrlhf.errors import TrainingDiverged
from jaxrlhf.runs import Run
from jaxrlhf.runs.checkpoints import checkpoint_step, latest_checkpoint, list_checkpoints
from jaxrlhf.runs.records import Record

Metrics: TypeAlias = Mapping[str, Any]
"""Metrics as they are recorded: numbers, None for one that is not finite."""
Limits: TypeAlias = dict[str, np.float32]
"""Values of metrics above which an update changes nothing: arguments of a jitted step."""
History: TypeAlias = Mapping[str, Sequence[float]]
"""Values of each metric in the last `WINDOW` steps."""

WINDOW = 128  # steps that limits are computed from
FIRST = 20  # steps before there are limits
LEAST_SPREAD = 0.02  # of the median: the spread of a metric that hardly moves


@dataclass(frozen=True)
class GuardConfig(Settings, may_change=True):
    """Steps whose numbers cannot be trusted."""

    max_skipped_steps: PositiveInt = 3
    """End the run after this many steps in a row without a usable update; such steps change nothing."""
    on_spike: Literal["none", "skip", "rollback"] = "none"
    """When loss or gradient norm is far above its last values, or the KL explodes. skip: the update changes nothing;
    rollback: go back to a checkpoint and go on with the data after the spike."""
    spike_threshold: Positive = 6.0
    """A loss or gradient norm is a spike when it is this many robust standard deviations above the running median."""
    rollback_steps: PositiveInt = 100
    """With on_spike rollback: the steps to go back at least; the oldest checkpoint where none is old enough."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks of a run; at the next spike it ends."""
    deterministic_check: NonNegativeInt = 0
    """Every so many steps, run one twice and compare both results, and the copies of the parameters, bit for bit: a
    difference is a device that computes wrongly, and ends the run. 0: never."""


class StepPlan(NamedTuple):
    """The demands of a run on one step."""

    index: int
    """Number of the step, from 0."""
    batch: int
    """Number of its batch: `index`, plus the batches that rollbacks have left out."""
    limits: Limits | None = None
    """None: no limits."""
    twice: bool = False
    """Run it twice and compare."""


def robust_limit(values: Sequence[float], threshold: float, updates: int = 1) -> float:
    """The largest value of a metric that is no spike; infinite before there are `FIRST` values.

    It is `median + threshold · spread`, with the spread 1.4826 times the median distance from the median, which for
    normal values is their standard deviation. Unlike mean and deviation, both ignore earlier spikes.

    Args:
        values: Of the last steps.
        threshold: In spreads.
        updates: Number of updates that each value is the mean of. A single one spreads wider.
    """
    if len(values) < FIRST:
        return math.inf
    middle = median(values)
    spread = 1.4826 * median(abs(value - middle) for value in values) * math.sqrt(updates)
    return middle + threshold * max(spread, LEAST_SPREAD * abs(middle))


class Guard:
    """Counts steps that changed nothing: values not finite, a batch without a score, a spike.

    Its state is a function of metrics.jsonl, so that a resumed run goes on as an uninterrupted one.

    Args:
        run: The run; rewound to the checkpoint that it goes on from.
        config: The settings.
        limits: From the history of metrics to what `StepPlan.limits` holds.
        batch: Returns the arrays of the newest batch.
    """

    def __init__(
        self,
        run: Run,
        config: GuardConfig,
        limits: Callable[[History], dict[str, float]],
        batch: Callable[[], Mapping[str, object]],
    ) -> None:
        self.run, self.config, self.batch = run, config, batch
        self._limits_of = limits
        self.reason, self.unscored = "", False
        self.rollbacks = self.left_out = 0
        self.recall()

    def recall(self) -> None:
        """Reads what metrics.jsonl has of the last steps and of rollbacks."""
        self.in_a_row, self.spiked, self.limits = 0, False, {}
        self.history: dict[str, deque[float]] = {}
        steps, events = from_primary("reading the last metrics", self._recorded)
        for record in steps:
            self._count(record)
        for event in events:
            self.rollbacks, self.left_out = int(event["guard/rollbacks"]), int(event["guard/left_out_batches"])

    def _recorded(self) -> list[list[Record]]:
        records = self.run.metrics()
        steps = [record for record in records if "guard/skipped_updates" in record]
        return [steps[-WINDOW:], [record for record in records if "guard/rollbacks" in record]]

    def plan(self, index: int) -> StepPlan:
        """The plan of step `index`."""
        every, limits = self.config.deterministic_check, None
        if self.config.on_spike != "none":
            self.limits = self._limits_of(self.history)
            limits = {name: np.float32(value) for name, value in self.limits.items()}
        return StepPlan(index, index + self.left_out, limits, bool(every) and (index + 1) % every == 0)

    def check(self, metrics: Metrics, step: int) -> None:
        """Counts a step that skipped updates. Raises TrainingDiverged for another metric that is not finite.

        Args:
            metrics: As they are recorded.
            step: The number of finished steps.
        """
        bad = [name for name, value in metrics.items() if value is None]
        left_out = self._count(metrics)
        if not left_out:
            if bad:
                raise TrainingDiverged(f"step {step}: {', '.join(bad)} became non-finite; {self._advice()}")
            return
        text = "its updates" if self.unscored else f"{left_out} update{'s' * (left_out > 1)}"
        if self.unscored:
            self.reason = "no response had a score"
        elif self.spiked:
            self.reason = self._spike(metrics)
        else:
            self.reason = f"{', '.join(bad) or 'a loss or gradient'} became non-finite"
        self.run.print(
            f"step {step}: skipped {text}, because {self.reason} ({self.in_a_row} such step"
            f"{'s' * (self.in_a_row > 1)} in a row; the run ends at {self.config.max_skipped_steps})"
        )

    def _count(self, metrics: Metrics) -> int:
        """Counts a step; returns the updates that it left out."""
        for name, value in metrics.items():
            if value is not None:
                self.history.setdefault(name, deque(maxlen=WINDOW)).append(float(value))
        spikes = int(metrics.get("guard/spike") or 0)
        self.unscored, self.spiked = bool(metrics.get("guard/unscored")), spikes > 0
        left_out = spikes + int(metrics["guard/skipped_updates"] or 0)
        self.in_a_row = self.in_a_row + 1 if left_out or self.unscored else 0
        return max(left_out, int(self.unscored))

    def _spike(self, metrics: Metrics) -> str:
        over = [(name, metrics.get(name), limit) for name, limit in self.limits.items()]
        said = [f"{name}={value:.4g} is above {limit:.4g}" for name, value, limit in over if value and value > limit]
        return " and ".join(said) or "the loss or gradient of an update is far above that of the last steps"

    def way_back(self, step: int) -> int | None:
        """The step of the checkpoint to go back to after `step`; None to go on."""
        if not (self.spiked and self.config.on_spike == "rollback") or self.given_up:
            return None

        def find() -> int | None:
            saved = [checkpoint_step(path) for path in list_checkpoints(self.run.output_dir)]
            saved = [number for number in saved if number < step]
            old = [number for number in saved if number <= step - self.config.rollback_steps]
            return max(old, default=min(saved, default=None))

        found = from_primary("looking for a checkpoint to go back to", find)
        if found is None:
            self.run.print(f"step {step}: there is no checkpoint to go back to yet; see --save_steps")
        return found

    def rolled_back(self, step: int, to: int) -> None:
        """Records that the run goes on from the checkpoint of step `to`, without the batches up to `step`.

        The records were rewound to `to`.
        """
        left_out, rollbacks = self.left_out + step - to, self.rollbacks + 1
        event = {"guard/spike": 1, "guard/rollbacks": rollbacks, "guard/left_out_batches": left_out}
        self.run.log(to, event | {"guard/rolled_back_from": step})
        self.recall()
        self.run.print(
            f"step {step}: back to checkpoint-{to}; the {step - to} batches since then are left out (rollback "
            f"{rollbacks} of {self.config.max_rollbacks})"
        )

    @property
    def given_up(self) -> bool:
        used_up = self.spiked and self.config.on_spike == "rollback" and self.rollbacks >= self.config.max_rollbacks
        return used_up or self.in_a_row >= self.config.max_skipped_steps

    def end(self, step: int) -> None:
        """Saves the newest batch for inspection and raises TrainingDiverged."""
        path = self.run.output_dir / f"{'spike' if self.spiked else 'nonfinite'}-step-{step}.npz"
        arrays = {name: np.asarray(value) for name, value in to_host(self.batch()).items()}
        saved = f"the batch is saved in {path}"
        if is_primary():
            try:
                np.savez(path, allow_pickle=False, **arrays)
            except OSError as error:
                saved = f"the batch could not be saved ({error})"
        when = f"in {self.in_a_row} steps in a row" if self.in_a_row > 1 else f"after {self.rollbacks} rollbacks"
        raise TrainingDiverged(
            f"step {step}: {self.reason} {when}; {saved}, and checkpoint-{step} holds the model as it was before. "
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        def newest() -> str:
            kept = latest_checkpoint(self.run.output_dir)
            return kept.name if kept else ""

        name = from_primary("looking for a checkpoint", newest)
        go_on = f"--resume continues from {name}" if name else "no checkpoint was saved yet"
        if self.unscored:
            return f"See the messages of the reward functions above; {go_on}"
        remedy, names = "Lower the learning rate, lengthen the warm-up, or use --dtype float32", "warmup_steps dtype"
        if self.spiked:
            remedy = (
                "Lower the learning rate or max_grad_norm, or go back further (--on_spike rollback --rollback_steps N)"
            )
            names = "max_grad_norm"
        return f"{remedy}; {go_on}, and --allow_changes learning_rate {names} lets these change"
