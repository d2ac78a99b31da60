"""Checkpoints of a run: list them, and restore one bit for bit on any mesh; `jaxrlhf.runs.saving` writes them.

Layout of `checkpoint-{step}/`: `state/` (the arrays, written by orbax, every process its own shards), `index.json`
(path, shape and dtype of every leaf, small Python values, size and checksum of every file), `metadata.json` (the
caller's; written last). A folder appears under its final name only when all of it is on disk.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.distributed import gather, is_primary
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs.checkpoint_index import (
    Leaf,
    PyTree,
    check_match,
    decode,
    describe,
    differing,
    flatten,
    migrated,
    unsealed,
)
from jaxrlhf.runs.storage import storage_errors

if TYPE_CHECKING:
    from orbax.checkpoint import PyTreeCheckpointHandler

Metadata = dict[str, Any]
"""Metadata of a checkpoint as JSON values: `step`, `identity`, `exports` and more."""
FINAL = re.compile(r"checkpoint-(\d+)")
REPLACED = ".replaced"  # an older checkpoint of the same step, while the new one takes its name
UNFINISHED = (".unfinished", ".removing")
ASIDE = ".aside"  # a later checkpoint, after the run has gone on from an earlier one
TEMPORARY = ".*.tmp"  # of write_text_atomic
CONCURRENT_GB = 2  # host memory that may hold array copies while restoring, or saving in the foreground
SHOWN_FILES = 4
DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError)  # what orbax and tensorstore raise on bad files


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Returns the complete checkpoints of a run folder by ascending step number."""
    folder = Path(folder)
    names = [path for path in folder.iterdir() if FINAL.fullmatch(path.name)] if folder.is_dir() else []
    complete = [path for path in names if (path / "metadata.json").is_file() and (path / "index.json").is_file()]
    return sorted(complete, key=checkpoint_step)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Returns the complete checkpoint with the highest step number, or None."""
    folder = Path(folder)
    if folder.is_dir() and is_primary():
        take_back_replaced(folder)
    return (list_checkpoints(folder) or [None])[-1]


def remove_checkpoints_after(folder: str | Path, step: int) -> None:
    """Deletes the checkpoints of later steps than `step`, the newest first. Raises StorageError."""
    with storage_errors(f"delete checkpoints in {folder}", "delete those of later steps, then continue with --resume"):
        for path in reversed(list_checkpoints(folder)):
            if checkpoint_step(path) > step:
                remove_checkpoint(path)


def checkpoint_step(path: str | Path) -> int:
    """Returns the step number in a checkpoint's name. Raises InputError when the name is not `checkpoint-N`."""
    match = FINAL.fullmatch(Path(path).name)
    if match is None:
        raise InputError(f"{path} is not a checkpoint folder: its name must be checkpoint-N")
    return int(match[1])


def read_metadata(path: str | Path) -> Metadata:
    """Returns the metadata of a checkpoint, and its `step`. Raises as `restore_checkpoint` does."""
    metadata = _read_json(Path(path), "metadata.json")
    try:
        metadata = unsealed(metadata)
    except ValueError as error:
        raise damaged(Path(path), f"metadata.json: {error}") from error
    if type(metadata.get("step")) is not int or metadata["step"] < 0:
        raise damaged(Path(path), "metadata.json has no step")
    for name in ("identity", "exports"):
        if not isinstance(metadata.get(name, {}), dict):
            raise damaged(Path(path), f"metadata.json: {name} is no object")
    return metadata


def restore_checkpoint(
    path: str | Path, like: PyTree, subtree: str = "", share: tuple[int, int] | None = None
) -> tuple[PyTree, Metadata]:
    """Restores a state bit for bit, each leaf straight to its sharding. The mesh may differ from that of the save.

    All processes of a run call it, and each checks the checksums of its share of the files.

    Args:
        path: The checkpoint.
        like: Pytree of arrays or `jax.ShapeDtypeStruct`s that gives structure, shapes, dtypes and shardings. A struct
            without a sharding stands for the default device.
        subtree: Path of the only part of the state to read, such as "params".
        share: Number of this process among those that read the same files, and their number; default: among all.

    Returns:
        The state and the metadata.

    Raises:
        InputError: There is no checkpoint, a newer version wrote it, or it does not fit `like`; the message lists the
            leaves that differ.
        StorageError: The checkpoint is damaged; the message names the file, and an older checkpoint.
    """
    path = Path(path)
    index, metadata = _read_index(path), read_metadata(path)
    prefix = f"{subtree}/" if subtree else ""
    saved = {entry["path"]: entry for entry in index["leaves"] if entry["path"].startswith(prefix)}
    leaves, treedef = flatten(like, prefix)
    check_match(path, saved, {name: describe(leaf) for name, leaf in leaves})
    _check_files(path, index, *(share or (jax.process_index(), jax.process_count())))
    wanted = {name: leaf for name, leaf in leaves if saved[name]["kind"] in ("array", "key")}
    try:
        arrays = _read_arrays(path / "state", wanted)
        restored = [decode(saved[name], arrays.get(name), leaf) for name, leaf in leaves]
    except jax.errors.JaxRuntimeError:  # such as out of memory: not the checkpoint's fault
        raise
    except DAMAGE as error:
        raise damaged(path, f"it cannot be restored: {error}") from error
    return jax.tree_util.tree_unflatten(treedef, restored), metadata


def damaged(path: Path, why: str) -> StorageError:
    """The error about a damaged checkpoint, with the newest older one in its folder."""
    step = checkpoint_step(path) if FINAL.fullmatch(path.name) else 0
    older = [other.name for other in list_checkpoints(path.parent) if checkpoint_step(other) < step]
    remedy = f"--resume_from_checkpoint {older[-1]} continues from an older one" if older else "there is no older one"
    return StorageError(f"the checkpoint {path} is damaged: {why}; {remedy}")


def _check_files(path: Path, index: Mapping[str, Any], share: int, shares: int) -> None:
    """Raises StorageError, on every process, naming the files that are not as they were written."""
    try:
        wrong = differing(path / "state", index["files"], share, shares)
    except OSError as error:
        wrong = [f"{error.filename} ({error.strerror})"]
    names = sorted({name for found in gather(f"checking the files of {path}", wrong) for name in found})
    if names:
        shown = ", ".join(f"state/{name}" for name in names[:SHOWN_FILES])
        more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
        raise damaged(path, f"not as they were written: {shown}{more}")


def _read_index(path: Path) -> dict[str, Any]:
    index = _read_json(path, "index.json")
    try:
        return migrated(index, path)
    except InputError:
        raise
    except ValueError as error:
        raise damaged(path, f"index.json: {error}") from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"there is no checkpoint {path}")
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is not a complete checkpoint: it has no {name}; use another") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"{name} is unreadable ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise damaged(path, f"{name} holds no JSON object")
    return content


def array_handler(
    arrays: Mapping[str, jax.Array | np.ndarray | jax.ShapeDtypeStruct], *, whole: bool = False, leader: int = 0
) -> "PyTreeCheckpointHandler":
    """Orbax's handler for {path: array}.

    Args:
        arrays: The arrays, or structs of them.
        whole: Copy all arrays to host memory at once when saving, as a save in the background must; otherwise one
            after another, within CONCURRENT_GB.
        leader: The process that makes folders.
    """
    import orbax.checkpoint as ocp

    # orbax refuses arrays larger than its limit, so the limit follows the largest one
    limit = max(CONCURRENT_GB, *(math.ceil(math.prod(a.shape) * a.dtype.itemsize / 1e9) + 1 for a in arrays.values()))
    return ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=limit,
        save_device_host_concurrent_gb=None if whole else limit,
        restore_concurrent_gb=limit,
        use_compression=False,  # it shrinks trained weights by a few per cent only, for several times the time
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=leader),
        enable_pinned_host_transfer=False,  # pinned memory is limited, and a whole state need not fit
    )


def _read_arrays(source: Path, wanted: Mapping[str, Leaf]) -> dict[str, jax.Array | np.ndarray]:
    """{path: array} with the placement of its counterpart in `wanted`."""
    import orbax.checkpoint as ocp

    arguments, structs = {}, {}
    for name, leaf in wanted.items():
        struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            struct = jax.eval_shape(jax.random.key_data, struct)
        structs[name] = struct
        sharding = _placement(leaf)
        if sharding is None:
            arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            arguments[name] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=struct.shape, dtype=struct.dtype)
    with ocp.Checkpointer(array_handler(structs)) as checkpointer:
        arrays = checkpointer.restore(
            source.absolute(), args=ocp.args.PyTreeRestore(item=structs, restore_args=arguments, partial_restore=True)
        )
    return {
        name: array if isinstance(wanted[name], np.ndarray) or isinstance(array, jax.Array) else jnp.asarray(array)
        for name, array in arrays.items()
    }


def _placement(leaf: Leaf) -> jax.sharding.Sharding | None:
    """The sharding to restore to; None for numpy arrays and for arrays not committed to a device.

    An uncommitted array may join computations on any mesh; committed to one device, it no longer could.
    """
    if isinstance(leaf, np.ndarray) or (isinstance(leaf, jax.Array) and not leaf.committed):
        return None
    return leaf.sharding


def take_back_replaced(folder: Path) -> None:
    """Gives an older checkpoint its name back when a kill fell between the two renames of its replacement."""
    for path in folder.glob(f"checkpoint-*{REPLACED}"):
        target = path.with_name(path.name.removesuffix(REPLACED))
        if target.exists():
            remove_checkpoint(path)
        else:
            os.rename(path, target)


def set_aside(folder: Path, step: int) -> list[str]:
    """Renames the checkpoints after `step`, so that none of them is taken for the newest; returns their names."""
    later = [path for path in list_checkpoints(folder) if checkpoint_step(path) > step]
    for path in later:
        remove_checkpoint(path.with_name(path.name + ASIDE))
        os.rename(path, path.with_name(path.name + ASIDE))
    return [path.name for path in later]


def clean_folder(folder: Path) -> None:
    """Removes what interrupted saves and writes left in a run's folder. Call it on process 0 while nothing is saved."""
    take_back_replaced(folder)
    for path in folder.glob("checkpoint-*"):
        if path.name.endswith(UNFINISHED):
            shutil.rmtree(path)
    for pattern in (TEMPORARY, f"*/{TEMPORARY}"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint such that no part of it looks like a complete one."""
    if path.exists():
        doomed = path.with_name(path.name + UNFINISHED[1])
        os.rename(path, doomed)
        shutil.rmtree(doomed)
