"""Resumes a run from a checkpoint (which one, what may differ, on other devices), or starts from its parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from flax.struct import PyTreeNode

from jaxrlhf.config import PathName, Settings
from jaxrlhf.config.remote import is_url
from jaxrlhf.config.secrets import redacted
from jaxrlhf.distributed import by_turns, from_primary
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs import Run
from jaxrlhf.runs.checkpoints import (
    FINAL,
    Metadata,
    latest_checkpoint,
    list_checkpoints,
    read_metadata,
    restore_checkpoint,
    set_aside,
)
from jaxrlhf.runs.mirror import fetch_checkpoint
from jaxrlhf.trainers.task import State, Task

Start = TypeVar("Start", bound=PyTreeNode)
Config = TypeVar("Config", bound=Settings)

Change = Literal[
    "learning_rate",
    "warmup_steps",
    "warmup_ratio",
    "lr_scheduler_type",
    "min_lr_ratio",
    "critic_learning_rate",
    "critic_warmup_steps",
    "critic_lr_scheduler_type",
    "max_grad_norm",
    "dtype",
    "max_steps",
]
FLAGS = {"total_steps": "max_steps"}  # names of a run's identity, where they differ from the setting's
TREES = ("params", "actor_params", "critic_params", "ema_params")
ROWS = ("global_batch_size", "rollout_batch_size")
"""Names of the rows of a step in the identity of a run."""


@dataclass(frozen=True)
class CheckpointOptions(Settings, may_change=True):
    """Going on from a checkpoint with other settings, and starting from one of another run."""

    allow_changes: tuple[Change, ...] = ()
    """With resume: settings that may differ from those of the run so far. max_steps also stands for num_train_epochs
    and total_episodes. Each change is printed and written to changes.jsonl."""
    init_from_checkpoint: PathName[str] = ""
    """Start a new run from the parameters of another run's checkpoint, with a new optimizer and from step 0."""
    init_params: tuple[str, ...] = ()
    """With init_from_checkpoint: the parameters to take, as NAME or NAME=NAME_IN_THE_CHECKPOINT, where NAME is params
    (sft, reward, dpo), actor_params, critic_params or ema_params; default: those that both have."""

    def check(self) -> None:
        if self.init_params and not self.init_from_checkpoint:
            raise InputError(f"init_params={' '.join(self.init_params)} requires init_from_checkpoint; name it")


def chosen(folder: Path, named: str) -> Path | None:
    """Returns the checkpoint that all processes go on from, as process 0 sees it.

    Args:
        folder: Folder of the run.
        named: Its name, number or path; empty: the newest.

    Raises:
        InputError: There is no such checkpoint in the folder.
    """

    def find() -> str | None:
        if not named:
            newest = latest_checkpoint(folder)
            return newest.name if newest else None
        path = folder / (f"checkpoint-{named}" if named.isdecimal() else named)
        if not FINAL.fullmatch(path.name) or (path.parent != folder and path.parent.resolve() != folder.resolve()):
            path = Path(named)
        names = [path.name for path in list_checkpoints(folder)]
        if path.name not in names or path.parent.resolve() != folder.resolve():
            raise InputError(
                f"resume_from_checkpoint={named}: output_dir {folder} has {', '.join(names) or 'no checkpoint'}; name "
                "one of them. To start a new run from another run's parameters, use init_from_checkpoint"
            )
        return path.name

    name = from_primary("looking for a checkpoint", find)
    return folder / name if name else None


def metadata_of(run: Run, path: Path) -> Metadata:
    """The metadata of a checkpoint of this run, on every process. Raises as `restore_checkpoint` does."""

    def read() -> tuple[str, Any]:
        try:
            return "", read_metadata(path)
        except (InputError, StorageError) as error:
            return type(error).__name__, str(error)

    error, found = from_primary(f"reading {path.name}", read)
    if error:
        raise (StorageError if error == StorageError.__name__ else InputError)(found)
    return found


def restored(run: Run, path: Path, like: State) -> tuple[State, Metadata]:
    """A checkpoint of this run, as `restore_checkpoint` gives it."""
    if run.exchange is None:
        return restore_checkpoint(path, like)
    with run.exchange.at_hand(path):
        return restore_checkpoint(path, like, share=run.exchange.share)


def resume_or_start(
    run: Run, task: Task[State], state: State, resume: bool, named: str = "", allowed: tuple[Change, ...] = ()
) -> tuple[State, int]:
    """Returns the state to go on from and the number of finished steps.

    Args:
        run: The folder and console.
        task: A `Task`.
        state: The initial state, whose structure the checkpoint must have.
        resume: Go on from a checkpoint, where there is one.
        named: As `chosen` takes it.
        allowed: Settings that may have changed.

    Raises:
        InputError: The checkpoint is of a run with other settings, or does not fit the state.
        StorageError: The checkpoint is damaged.
    """
    path = chosen(run.output_dir, named) if resume else None
    if path is None:
        if resume:
            run.print(f"resume: no checkpoint in {run.output_dir}, starting from the beginning")
            run.rewind(-1)
        return state, 0
    changes = changes_since(path, metadata_of(run, path), task, allowed)
    with run.status(f"restoring {path}…"):
        state, metadata = restored(run, path, state)
    step = metadata["step"]
    run.rewind(step)
    later = from_primary("setting later checkpoints aside", lambda: set_aside(run.output_dir, step))
    if later:
        run.print(f"resume: {', '.join(later)}: set aside, because the run goes on from {path.name}")
    if changes:
        shown = "; ".join(f"{name} {then!r} → {now!r}" for name, (then, now) in changes.items())
        run.print(f"resume: changed from step {step + 1} on: {shown}")
        run.record_changes(step, changes)
    return state, step


def changes_since(
    path: Path, metadata: Mapping[str, Any], task: Task, allowed: tuple[Change, ...]
) -> dict[str, tuple[object, object]]:
    """{setting: (then, now)} of what differs from the run that a checkpoint belongs to.

    Raises:
        InputError: Something differs that neither keeps the past as it was nor is allowed to.
    """
    before, step = task.defaults | metadata.get("identity", {}), metadata["step"]
    changes: dict[str, tuple[Any, Any]] = {
        name: (before.get(name), value) for name, value in redacted(task.identity).items() if before.get(name) != value
    }
    devices = metadata.get("devices")
    if devices not in (None, task.devices):
        changes.pop("micro_batches", None)  # as `same_rows` has set them
    then, now = changes.get("total_steps", (None, step))
    if now < step:
        raise InputError(f"cannot resume {path}: it is at step {step}, and the run would have {now} steps; give more")
    refused = {name: change for name, change in changes.items() if FLAGS.get(name, name) not in allowed}
    if isinstance(then, int) and then < now and task.same_past(then):
        refused.pop("total_steps", None)
    if refused:
        shown = "; ".join(f"{name}: {old!r} then, {new!r} now" for name, (old, new) in refused.items())
        text = f"cannot resume {path}, the run would not be the same one: {shown}. Restore these settings, "
        able: list[str] = [FLAGS.get(name, name) for name in refused]
        if all(name in get_args(Change) for name in able):
            why = (
                "; with another number of steps, the learning rates of the schedule change"
                if "total_steps" in refused
                else ""
            )
            text += f"or allow the change with --allow_changes {' '.join(able)}{why}, "
        raise InputError(f"{text}or start a new run in another folder")
    return changes


def same_rows(config: Config, run: Run, rows: int, devices: int) -> Config:
    """The config with micro-batches that keep the rows of a step, when the resumed run had other devices.

    Args:
        config: A trainer's config.
        run: The folder and console.
        rows: Rows of a step, as the config has them.
        devices: Devices that they are split over.

    Raises:
        InputError: The rows cannot be split over the devices.
    """
    folder: Any = config.folder  # type: ignore[attr-defined]
    path = chosen(run.output_dir, folder.resume_from_checkpoint) if folder.resume else None
    metadata = metadata_of(run, path) if path else {}
    before = next((n for name in ROWS if isinstance(n := metadata.get("identity", {}).get(name), int)), rows)
    if path is None or before == rows or metadata.get("devices") in (None, devices):
        return config
    size, parts = config.value("per_device_train_batch_size"), config.value("gradient_accumulation_steps")
    split = rows // (size * parts)  # devices × minibatches
    place = f"{path.name} has {before} rows per step, of {metadata['devices']} devices"
    if before % split:
        raise InputError(
            f"cannot resume {path} on {devices} devices: {place}, and {before} is no multiple of {split}"
            f"{f' ({devices} devices × {split // devices} minibatches)' if split > devices else ''}. Use a number of "
            f"devices that divides {before // (split // devices)}, or a smaller mesh_data × mesh_fsdp × mesh_expert"
        )
    per_device = before // split
    fitting = next(n for n in range(min(size, per_device), 0, -1) if per_device % n == 0)
    new = {"per_device_train_batch_size": fitting, "gradient_accumulation_steps": per_device // fitting}
    if hasattr(config, "rollout"):
        new["per_device_score_batch_size"] = 0
    text = config.value("per_device_ptx_batch_size") if hasattr(config, "ptx") else 0
    if text:
        blocks = metadata["identity"]["pretraining_text"][-1]
        new["per_device_ptx_batch_size"], rest = divmod(blocks, split * new["gradient_accumulation_steps"])
        if rest:
            raise InputError(
                f"cannot resume {path} on {devices} devices: its {blocks} blocks of pretraining text per step do not "
                "divide among them; use as many devices as before"
            )
    flags = ", ".join(f"--{name} {value}" for name, value in new.items())
    run.print(f"resume: {place}; on {devices} devices, {flags} keep the step the same")
    return config.replace(**new)


def start_from(run: Run, options: CheckpointOptions, state: Start, resume: bool) -> Start:
    """The initial state of a run with the parameters that `init_from_checkpoint` names; not when it is resumed.

    Raises:
        InputError: There is no such checkpoint, or its parameters do not fit.
        StorageError: The checkpoint is damaged.
    """
    source = options.init_from_checkpoint
    if not source or (resume and chosen(run.output_dir, "")):
        return state
    path = by_turns(f"fetching {source}", lambda: str(_located(source)))
    names = {name for name in TREES if getattr(state, name, None) is not None}
    there = read_metadata(path).get("exports", {})
    pairs = dict(_pair(text) for text in options.init_params) or {
        name: name for name in TREES if name in names & there.keys()
    }
    wrong = [
        name if name == other else f"{name}={other}"
        for name, other in pairs.items()
        if name not in names or other not in there
    ]
    if wrong or not pairs:
        raise InputError(
            f"init_params={' '.join(wrong or options.init_params) or 'none'}: this run has {', '.join(sorted(names))}, "
            f"and {path} has {', '.join(there) or 'no parameters'}; name pairs of them, as in params=actor_params"
        )
    if "ema_params" in names and "actor_params" in pairs:
        pairs.setdefault("ema_params", pairs["actor_params"])
    with run.status(f"taking {', '.join(pairs)} from {path}…"):
        new = {name: restore_checkpoint(path, getattr(state, name), other)[0] for name, other in pairs.items()}
    return state.replace(**new)


def _pair(text: str) -> tuple[str, str]:
    name, _, other = text.partition("=")
    return name, other or name


def _located(source: str) -> Path:
    if is_url(source):
        return fetch_checkpoint(source)
    path = Path(source) if FINAL.fullmatch(Path(source).name) else latest_checkpoint(source)
    if path is None or not path.is_dir():
        raise InputError(f"init_from_checkpoint={source}: there is no checkpoint; name a checkpoint or a run's folder")
    return path
