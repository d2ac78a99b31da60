"""A run whose output_dir is a URL works in a local folder: one for all processes, or one on each machine."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxrlhf.config.remote import cached, is_url
from jaxrlhf.distributed import barrier, gather, is_primary, joined
from jaxrlhf.errors import InputError
from jaxrlhf.runs.exchange import first, leaders_of
from jaxrlhf.runs.mirror import ID, Mirror

MARK = ".working-folder"
"""File in a working folder, whose files a run may remove."""
Config = TypeVar("Config")
Result = TypeVar("Result")


def works_locally(train: Callable[[Config], Result]) -> Callable[[Config], Result]:
    """Lets a function that trains take a config whose output_dir is a URL: it gets one with the working folder."""

    @wraps(train)
    def run(config: Any) -> Result:
        folder = config.folder
        if not is_url(folder.output_dir):
            return train(config)
        config = joined(config)
        working = Path(folder.working_dir) if folder.working_dir else cached(folder.output_dir, "runs")
        found = files_of_others(working) if folder.working_dir else None
        if problem := first(gather(f"looking at {working}", found)):
            raise InputError(problem)
        config = replace(config, folder=replace(folder, output_dir=str(working), url=folder.output_dir))
        if not is_primary():
            barrier("preparing the working folder")
            return _train_beside(train, config, working)
        mirror = Mirror(folder.output_dir, working, folder.remote_save_steps, _say)
        try:
            mirror.begin(folder.resume, folder.overwrite_output_dir)
            mark(working)
        except BaseException:
            mirror.release()
            raise
        barrier("preparing the working folder")
        with mirror:
            result = train(_with_leaders(config, working))
        _say(f"{mirror.remote.shown} has all files of the run")
        return result

    return run


def _train_beside(train: Callable[[Config], Result], config: Any, working: Path) -> Result:
    """Runs a process whose folder, if it is not process 0's, holds nothing after the run."""
    config = _with_leaders(config, working)
    leads_others = config.folder.leaders and config.folder.leaders[jax.process_index()] == jax.process_index()
    try:
        return train(config)
    finally:
        if leads_others:
            shutil.rmtree(working, ignore_errors=True)


def _with_leaders(config: Any, working: Path) -> Any:
    leaders, own = leaders_of(working), jax.process_index()
    if leaders[own] == own != 0:  # an earlier run may have left something
        shutil.rmtree(working)
        mark(working)
    return replace(config, folder=replace(config.folder, leaders=leaders if any(leaders) else ()))


def mark(working: Path) -> None:
    """Shows later runs that they may remove what the folder holds. Raises InputError where it cannot be written."""
    try:
        working.mkdir(parents=True, exist_ok=True)
        (working / MARK).touch()
    except OSError as error:
        raise InputError(f"working_dir {working} cannot be written ({error.strerror}); choose another") from error


def files_of_others(working: Path) -> str | None:
    """The problem with a folder that a user names and that holds files of no run; None for any other.

    A run removes what it finds in its working folder, so it must not begin there.
    """
    names = {path.name for path in working.iterdir()} if working.is_dir() else set()
    if not names or names & {MARK, ID}:
        return None
    return (
        f"working_dir {working} (process {jax.process_index()}) holds {min(names)}, which is of no earlier run, and a "
        "run removes what it finds there; name a folder that is empty or does not exist"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
