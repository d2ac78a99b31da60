"""The guard of a run: it counts steps that could not be used, and ends the run after several in a row."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxrlhf.distributed import is_primary, to_host
from jaxrlhf.errors import TrainingDiverged
from jaxrlhf.runs import Run
from jaxrlhf.runs.checkpoints import latest_checkpoint

Metrics = dict[str, Any]


class Guard:
    """Counts steps whose loss or gradients are not finite, or whose batch has no score. Such steps change nothing."""

    def __init__(self, run: Run, limit: int, batch: Callable[[], dict[str, Any]]) -> None:
        self.run, self.limit, self.batch = run, limit, batch
        self.in_a_row = 0
        self.reason, self.unscored = "", False

    def check(self, metrics: Metrics, step: int) -> None:
        """Counts a step that skipped updates. Raises TrainingDiverged for another metric that is not finite."""
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
            left_out, self.reason = "its updates", "no response had a score"
        elif bad:
            self.reason = f"{', '.join(bad)} became non-finite"
        self.run.print(
            f"step {step}: skipped {left_out}, because {self.reason} ({self.in_a_row} such step"
            f"{'s' * (self.in_a_row > 1)} in a row; the run ends at {self.limit})"
        )

    @property
    def given_up(self) -> bool:
        return self.in_a_row >= self.limit

    def end(self, step: int) -> None:
        """Saves the newest batch for inspection and raises TrainingDiverged."""
        path = self.run.output_dir / f"nonfinite-step-{step}.npz"
        arrays = {name: np.asarray(value) for name, value in to_host(self.batch()).items()}
        if is_primary():
            np.savez(path, allow_pickle=False, **arrays)
        raise TrainingDiverged(
            f"step {step}: {self.reason} in {self.in_a_row} steps in a row; the batch is saved in {path}, and "
            f"checkpoint-{step} holds the model as it was before them. {self._advice()}"
        )

    def _advice(self) -> str:
        kept = latest_checkpoint(self.run.output_dir)
        go_on = f"--resume continues from {kept.name}" if kept else "no checkpoint was saved yet"
        if self.unscored:
            return f"See the messages of the reward functions above; {go_on}"
        return f"Lower the learning rate, lengthen the warm-up, or use --dtype float32; {go_on}"
