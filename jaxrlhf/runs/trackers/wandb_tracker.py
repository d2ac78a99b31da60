"""Weights & Biases. Its environment variables (WANDB_MODE, WANDB_ENTITY, WANDB_BASE_URL …) apply."""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jaxrlhf.config.secrets import redacted
from jaxrlhf.errors import InputError
from jaxrlhf.runs.trackers.base import Cell, TrackedRun, slug

WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
"""Modes in which nothing is sent."""
START_SECONDS = 25
"""Time that the server has to answer; below what the end of a run waits for."""


class WeightsAndBiases:
    """Metrics over the run's own step, settings, tables of samples and the report as a page."""

    rewinds = False
    measures_system = True
    _run: Any

    @staticmethod
    def check() -> None:
        wandb = import_module("wandb")

        settings: Any = wandb.setup().settings
        credentials = settings.api_key or getattr(settings, "identity_token_file", None)
        if settings.mode in WITHOUT_LOGIN or credentials or _in_netrc(settings.base_url):
            return
        raise InputError(
            "report_to=wandb: no login was found; run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline "
            "to keep the run on this machine"
        )

    def start(self, run: TrackedRun) -> dict[str, str]:
        wandb = import_module("wandb")

        project = run.project or os.environ.get("WANDB_PROJECT") or "jaxrlhf"
        # Its metadata holds the command line, and its copy of the console what is printed.
        hide = redacted(sys.argv) != sys.argv
        settings = wandb.Settings(console="off", silent=True, x_disable_meta=hide, init_timeout=START_SECONDS)
        identity = {"id": run.known["id"], "resume": "allow"} if "id" in run.known else {}
        self._run = wandb.init(
            project=project, name=run.name, dir=run.folder, config=dict(run.config), settings=settings, **identity
        )
        # An axis of our own: a resumed run may log a step for which something is there already.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        url = {"url": self._run.url} if self._run.url else {}
        return {"id": self._run.id, **url}

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        self._run.log({**metrics, "step": step})

    def table(self, step: int, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        wandb = import_module("wandb")

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({f"samples/{slug(title)}": table, "step": step})

    def finish(self, report: Path | None, failed: bool) -> None:
        wandb = import_module("wandb")

        if report is not None:
            self._run.log({"report": wandb.Html(str(report), inject=False)})
        self._run.finish(exit_code=int(failed))


def _in_netrc(url: str) -> bool:
    """True if the .netrc file has an entry for the server."""
    import netrc
    from urllib.parse import urlsplit

    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return path.exists() and netrc.netrc(path).authenticators(urlsplit(url).hostname or "") is not None
    except (netrc.NetrcParseError, OSError):  # wandb cannot read it either
        return False
