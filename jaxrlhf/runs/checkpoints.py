"""Sharded checkpoints: save a pytree atomically, find the newest complete one, restore it bit for bit on any mesh.

Layout of `checkpoint-{step}/`: `state/` (the arrays, written by orbax, every process its own shards), `index.json`
(path, shape and dtype of every leaf, and small Python values), `metadata.json` (the caller's; written last). A folder
appears under its final name only when all of it is on disk.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.distributed import barrier, is_primary
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs.storage import storage_errors

if TYPE_CHECKING:
    from orbax.checkpoint import Checkpointer

PyTree: TypeAlias = Any
Leaf: TypeAlias = Any
"""jax.Array (typed PRNG keys too), jax.ShapeDtypeStruct, numpy array or scalar, bool, int, float, str, None."""
Entry: TypeAlias = dict[str, Any]
"""A leaf in index.json: kind, path, dtype, shape, and the value if it is small."""

FINAL = re.compile(r"checkpoint-(\d+)")
REPLACED = ".replaced"  # an older checkpoint of the same step, while the new one takes its name
UNFINISHED = (".unfinished", ".removing")
CONCURRENT_GB = 2  # host memory that may hold array copies while saving or restoring
SHOWN_DIFFERENCES = 20


def save_checkpoint(
    folder: str | Path,
    step: int,
    state: PyTree,
    metadata: Mapping[str, object],
    keep_last: int | None = None,
    keep: Container[int | None] = (),
) -> Path:
    """Writes `folder/checkpoint-{step}/`, then removes older checkpoints.

    Blocks until the files are on disk. Host memory stays within a few GB, because shards are copied and written one
    after another. Every process of a run calls it, with a shared file system. An exception or a kill leaves older
    checkpoints as they were.

    Args:
        folder: Folder of the run.
        step: Number of finished steps.
        state: Pytree whose leaves are `Leaf`s.
        metadata: JSON values to store with it.
        keep_last: How many of the newest checkpoints up to `step` to keep. None or 0: all.
        keep: Steps whose checkpoints are kept in any case.

    Returns:
        The path of the checkpoint.

    Raises:
        StorageError: The checkpoint cannot be written.
    """
    folder, step = Path(folder), int(step)
    json.dumps(metadata, allow_nan=False)  # fail before the slow part
    target = folder / f"checkpoint-{step}"
    work = folder / f"checkpoint-{step}{UNFINISHED[0]}"
    entries, arrays = _encode(state)
    # tensorstore reports a full disk as a ValueError
    with storage_errors(f"write the checkpoint {target}", "older checkpoints are kept", ValueError):
        if is_primary():
            folder.mkdir(parents=True, exist_ok=True)
            _tidy(folder)
            work.mkdir()
        barrier("checkpoint folder made")
        _write_arrays(work / "state", arrays)
        if is_primary():
            write_json_atomic(work / "index.json", {"format": 1, "leaves": entries, "files": _sizes(work / "state")})
            write_json_atomic(work / "metadata.json", {**metadata, "step": step})
            if target.exists():
                os.rename(target, f"{target}{REPLACED}")
            os.rename(work, target)
            _fsync_folder(folder)
            _remove(Path(f"{target}{REPLACED}"))
            older = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= step]
            for path in older[: -keep_last if keep_last else 0]:
                if checkpoint_step(path) not in keep:
                    _remove(path)
    barrier("checkpoint complete")
    return target


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
        _take_back_replaced(folder)
    return (list_checkpoints(folder) or [None])[-1]


def remove_checkpoints_after(folder: str | Path, step: int) -> None:
    """Deletes the checkpoints of later steps than `step`, the newest first. Raises StorageError."""
    with storage_errors(f"delete checkpoints in {folder}", "delete those of later steps, then continue with --resume"):
        for path in reversed(list_checkpoints(folder)):
            if checkpoint_step(path) > step:
                _remove(path)


def checkpoint_step(path: str | Path) -> int:
    """Returns the step number in a checkpoint's name. Raises InputError when the name is not `checkpoint-N`."""
    match = FINAL.fullmatch(Path(path).name)
    if match is None:
        raise InputError(f"{path} is not a checkpoint folder: its name must be checkpoint-N")
    return int(match[1])


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Returns the metadata of a checkpoint, and its `step`. Raises as `restore_checkpoint` does."""
    return _read_json(Path(path), "metadata.json", "step")


def restore_checkpoint(path: str | Path, like: PyTree, subtree: str = "") -> tuple[PyTree, dict[str, Any]]:
    """Restores a state bit for bit, each leaf straight to its sharding. The mesh may differ from that of the save.

    Args:
        path: The checkpoint.
        like: Pytree of arrays or `jax.ShapeDtypeStruct`s that gives structure, shapes, dtypes and shardings. A struct
            without a sharding stands for the default device.
        subtree: Path of the only part of the state to read, such as "params".

    Returns:
        The state and the metadata.

    Raises:
        InputError: There is no checkpoint, or it does not fit `like`; the message lists the leaves that differ.
        StorageError: The checkpoint is damaged: files are lost, cut or unreadable. There are no checksums.
    """
    path = Path(path)
    index, metadata = _read_json(path, "index.json", "leaves", "files"), read_metadata(path)
    prefix = f"{subtree}/" if subtree else ""
    saved = {entry["path"]: entry for entry in index["leaves"] if entry["path"].startswith(prefix)}
    leaves, treedef = _flatten(like, prefix)
    _check_match(path, saved, {name: _describe(leaf) for name, leaf in leaves})
    if _sizes(path / "state") != index["files"]:
        raise StorageError(f"the checkpoint {path} is damaged: its files are not those that were written; use another")
    wanted = {name: leaf for name, leaf in leaves if saved[name]["kind"] in ("array", "key")}
    try:
        arrays = _read_arrays(path / "state", wanted)
    except jax.errors.JaxRuntimeError:  # such as out of memory: not the checkpoint's fault
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # orbax and tensorstore raise these on bad files
        raise StorageError(f"the checkpoint {path} is damaged and cannot be restored: {error}; use another") from error
    restored = [_decode(saved[name], arrays.get(name), leaf) for name, leaf in leaves]
    return jax.tree_util.tree_unflatten(treedef, restored), metadata


def _flatten(tree: PyTree, prefix: str = "") -> tuple[list[tuple[str, Leaf]], Any]:
    """Leaves with their `a/b/0` paths. None counts as a leaf, so that a lost optional part shows."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    leaves = [(prefix + jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]
    if len({name for name, _ in leaves}) < len(leaves):
        raise ValueError("two leaves of the state have the same path; rename keys that contain '/'")
    return leaves, treedef


def _describe(leaf: Leaf) -> Entry:
    """The kind of a leaf, and shape and dtype of an array."""
    if isinstance(leaf, np.generic):
        kind = "numpy scalar"
    elif isinstance(leaf, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        kind = "key" if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else "array"
    elif leaf is None or isinstance(leaf, bool | int | float | str):
        return {"kind": type(leaf).__name__}
    else:
        raise TypeError(f"a checkpoint cannot hold a {type(leaf).__name__}")
    return {"kind": kind, "dtype": leaf.dtype.name, "shape": list(leaf.shape)}


def _encode(state: PyTree) -> tuple[list[Entry], dict[str, jax.Array | np.ndarray]]:
    """Index entries of all leaves, and {path: array} of the arrays. A typed key becomes its raw uint32 data."""
    entries, arrays = [], {}
    for name, leaf in _flatten(state)[0]:
        entry = {"path": name, **_describe(leaf)}
        if entry["kind"] == "key":
            arrays[name] = jax.random.key_data(leaf)
            entry["impl"] = str(jax.random.key_impl(leaf))
        elif entry["kind"] == "array":
            arrays[name] = leaf
        elif entry["kind"] == "numpy scalar":
            entry["bytes"] = leaf.tobytes().hex()
        else:
            entry["value"] = leaf.hex() if entry["kind"] == "float" else leaf
        entries.append(entry)
    if not arrays:
        raise ValueError("the state to save holds no arrays")
    return entries, arrays


def _decode(entry: Entry, array: Any, like: Leaf) -> Leaf:
    kind = entry["kind"]
    if kind == "numpy scalar":
        return np.frombuffer(bytes.fromhex(entry["bytes"]), dtype=np.dtype(entry["dtype"]))[0]
    if kind == "float":
        return float.fromhex(entry["value"])
    if kind == "key":
        return jax.random.wrap_key_data(array, impl=entry["impl"])
    if kind == "array" and getattr(like, "weak_type", False) and array.ndim == 0:
        # A weakly typed scalar promotes differently from a strong one, so a resumed run could differ in the last bit.
        weak = jnp.asarray(array.item())
        return jax.device_put(weak, array.sharding) if array.committed else weak
    return array if kind == "array" else entry["value"]


def _check_match(path: Path, saved: dict[str, Entry], expected: dict[str, Entry]) -> None:
    def words(entry: Entry) -> str:
        shape = f"[{','.join(map(str, entry['shape']))}]" if "shape" in entry else entry.get("kind", "nothing")
        return f"{entry.get('dtype', '')}{shape}"

    pairs = [(name, saved.get(name, {}), expected.get(name, {})) for name in sorted(saved.keys() | expected.keys())]
    wrong = [
        f"  {name}: checkpoint has {words(old)}, expected {words(new)}"
        for name, old, new in pairs
        if any(old.get(key) != new.get(key) for key in ("kind", "dtype", "shape"))
    ]
    if wrong:
        more = len(wrong) - SHOWN_DIFFERENCES
        count = f"{len(wrong)} of {len(pairs)} entries differ"
        text = f"the checkpoint {path} does not fit this model and optimizer, {count}:"
        raise InputError("\n".join([text, *wrong[:SHOWN_DIFFERENCES], *([f"  … and {more} more"] if more > 0 else [])]))


def _checkpointer(arrays: Mapping[str, Any]) -> "Checkpointer":
    import orbax.checkpoint as ocp

    # orbax refuses arrays larger than its limit, so the limit follows the largest one
    limit = max(CONCURRENT_GB, *(math.ceil(math.prod(a.shape) * a.dtype.itemsize / 1e9) + 1 for a in arrays.values()))
    # compression shrinks trained weights by a few per cent only, for several times the time
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit, restore_concurrent_gb=limit, use_compression=False)
    return ocp.Checkpointer(handler)


def _write_arrays(target: Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    with _checkpointer(arrays) as checkpointer:
        checkpointer.save(target.absolute(), args=ocp.args.PyTreeSave(arrays))


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
    with _checkpointer(structs) as checkpointer:
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


def _read_json(path: Path, name: str, *keys: str) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"there is no checkpoint {path}")
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
        return content | {key: content[key] for key in keys}
    except FileNotFoundError as error:
        raise InputError(f"{path} is not a complete checkpoint: it has no {name}; use another") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the checkpoint {path} is damaged: {name} is unreadable; use another") from error


def _sizes(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by relative path."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def _take_back_replaced(folder: Path) -> None:
    """Gives an older checkpoint its name back when a kill fell between the two renames of its replacement."""
    for path in folder.glob(f"checkpoint-*{REPLACED}"):
        target = path.with_name(path.name.removesuffix(REPLACED))
        if target.exists():
            _remove(path)
        else:
            os.rename(path, target)


def _tidy(folder: Path) -> None:
    """Removes the remains of interrupted saves."""
    _take_back_replaced(folder)
    for path in folder.glob("checkpoint-*"):
        if path.name.endswith(UNFINISHED):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Deletes a checkpoint such that no part of it looks like a complete one."""
    if path.exists():
        doomed = path.with_name(path.name + UNFINISHED[1])
        os.rename(path, doomed)
        shutil.rmtree(doomed)


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
