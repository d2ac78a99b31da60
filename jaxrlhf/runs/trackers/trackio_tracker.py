"""Trackio, a local or Hugging Face-hosted dashboard. Its variables (TRACKIO_DIR, TRACKIO_SPACE_ID …) apply."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from jaxrlhf.runs.trackers.base import Cell, TrackedRun, slug


class Trackio:
    """Metrics, settings, tables of samples and the report as a page."""

    rewinds = False
    measures_system = True
    _run: Any
    _last = 0

    @staticmethod
    def check() -> None:
        """Local runs need no login."""

    def start(self, run: TrackedRun) -> dict[str, str]:
        trackio = import_module("trackio")

        project = run.project or os.environ.get("TRACKIO_PROJECT") or "jaxrlhf"
        # Trackio continues a run by its name, so the name is made unique.
        name = run.known.get("id") or f"{run.name}-{uuid4().hex[:6]}"
        project = run.known.get("project", project)
        resume = "allow" if run.known else "never"
        self._run = trackio.init(project=project, name=name, config=dict(run.config), resume=resume, embed=False)
        url = {"url": str(self._run.url)} if self._run.url else {}
        return {"id": name, "project": project, **url}

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        self._last = max(self._last, step)
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        trackio = import_module("trackio")

        table = trackio.Table(columns=list(columns), data=[list(row) for row in rows])
        self._run.log({f"samples/{slug(title)}": table}, step=step)

    def finish(self, report: Path | None, failed: bool) -> None:
        trackio = import_module("trackio")

        if report is not None:
            self._run.log({"report": trackio.Html(report)}, step=self._last)
        self._run.finish()
