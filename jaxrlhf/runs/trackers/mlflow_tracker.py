"""MLflow. Its environment variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME …) apply."""

import os
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from jaxrlhf.runs.trackers.base import Cell, TrackedRun, slug

MAX_PARAM = 500
"""Characters of a setting; older servers take no more."""
PARAMS_PER_CALL = 100


class MLflow:
    """Metrics, settings as parameters, and tables of samples and the report as artifacts."""

    rewinds = False
    measures_system = False
    _client: Any
    _id: str

    @staticmethod
    def check() -> None:
        """Servers that want a login say so when the run starts."""

    def start(self, run: TrackedRun) -> dict[str, str]:
        self._client = import_module("mlflow").MlflowClient()
        if "id" in run.known:
            self._id = run.known["id"]
            self._client.update_run(self._id, status="RUNNING")
            return dict(run.known)
        name = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "jaxrlhf"
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        self._log_params(run.config)
        return {"id": self._id}

    def _log_params(self, config: Mapping[str, object]) -> None:
        param = import_module("mlflow.entities").Param

        values = flatten_dict(dict(config), sep=".").items()
        params = [param(name, str(value)[:MAX_PARAM]) for name, value in values]
        for first in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(self._id, params=params[first : first + PARAMS_PER_CALL])

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        metric = import_module("mlflow.entities").Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [metric(name, value, now, step) for name, value in metrics.items()])

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        cells = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        self._client.log_table(self._id, cells, f"samples/{slug(title)}-{step}.json")

    def finish(self, report: Path | None, failed: bool) -> None:
        if report is not None:
            self._client.log_artifact(self._id, str(report))
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")
