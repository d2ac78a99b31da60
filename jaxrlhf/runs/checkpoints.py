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
from collections.abc import Container
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.distributed import barrier, is_primary
from jaxrlhf.errors import InputError

FINAL = re.compile(r"checkpoint-(\d+)")
REPLACED = ".replaced"  # an older checkpoint of the same step, while the new one takes its name
UNFINISHED = (".unfinished", ".removing")
CONCURRENT_GB = 2  # host memory that may hold array copies while saving or restoring


def save_checkpoint(
    folder: str | Path,
    step: int,
    state: Any,
    metadata: dict,
    keep_last: int | None = None,
    keep: Container[int] = (),
) -> Path:
    """Write `folder/checkpoint-{step}/`, then remove all but the newest `keep_last` and `keep` of the steps up to it.

    `state`: pytree of jax.Arrays (typed PRNG keys too), numpy arrays and scalars, bools, ints, floats, strings, None.
    `metadata`: JSON values. `keep_last` None or 0 keeps every checkpoint. Blocks until the files are on disk; host
    memory stays within a few GB, as shards are copied out and written one after another. In a multi-process run every
    process calls it, with a shared file system. An exception or kill leaves older checkpoints as they were.
    """
    folder, step = Path(folder), int(step)
    json.dumps(metadata, allow_nan=False)  # fail before the slow part
    target = folder / f"checkpoint-{step}"
    work = folder / f"checkpoint-{step}{UNFINISHED[0]}"
    entries, arrays = _encode(state)
    if is_primary():
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        work.mkdir()
    barrier("checkpoint folder made")
    try:
        _write_arrays(work / "state", arrays)
    except (OSError, ValueError) as error:  # tensorstore tells a full disk as a ValueError
        reason = "no space left on the disk" if "No space left" in str(error) else str(error).splitlines()[0]
        raise InputError(f"cannot write the checkpoint {target}: {reason}; older checkpoints are kept") from error
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
    """The complete checkpoints of a run folder, by ascending step number; unfinished ones are left out."""
    folder = Path(folder)
    names = [path for path in folder.iterdir() if FINAL.fullmatch(path.name)] if folder.is_dir() else []
    complete = [path for path in names if (path / "metadata.json").is_file() and (path / "index.json").is_file()]
    return sorted(complete, key=checkpoint_step)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint with the highest step number, or None."""
    folder = Path(folder)
    if folder.is_dir() and is_primary():
        _take_back_replaced(folder)
    return (list_checkpoints(folder) or [None])[-1]


def checkpoint_step(path: str | Path) -> int:
    """The step number in a checkpoint folder's name. Raises InputError when the name is not `checkpoint-N`."""
    match = FINAL.fullmatch(Path(path).name)
    if match is None:
        raise InputError(f"{path} is not a checkpoint folder: its name must be checkpoint-N")
    return int(match[1])


def read_metadata(path: str | Path) -> dict:
    """The metadata saved with a checkpoint, and its `step`. Raises InputError when it is missing or damaged."""
    return _read_json(Path(path), "metadata.json", "step")


def restore_checkpoint(path: str | Path, like: Any, subtree: str = "") -> tuple[Any, dict]:
    """(state, metadata) of a checkpoint, each leaf placed straight to the sharding of its counterpart in `like`.

    `subtree`: only the part of the state at that path ("params", say); nothing else is read.

    `like`: pytree of arrays or `jax.ShapeDtypeStruct`s (without a sharding: the default device). The mesh may differ
    from the one it was saved from; values are bit-exact. Raises InputError listing the paths whose presence, shape or
    dtype differ, or naming a checkpoint that is missing, or damaged (files lost, cut or unreadable; no checksums).
    """
    path = Path(path)
    index, metadata = _read_json(path, "index.json", "leaves", "files"), read_metadata(path)
    prefix = f"{subtree}/" if subtree else ""
    saved = {entry["path"]: entry for entry in index["leaves"] if entry["path"].startswith(prefix)}
    leaves, treedef = _flatten(like)
    leaves = [(prefix + name, leaf) for name, leaf in leaves]
    _check_match(path, saved, {name: _describe(leaf) for name, leaf in leaves})
    if _sizes(path / "state") != index["files"]:
        raise InputError(f"the checkpoint {path} is damaged: its files are not those that were written; use another")
    wanted = {name: leaf for name, leaf in leaves if saved[name]["kind"] in ("array", "key")}
    try:
        arrays = _read_arrays(path / "state", wanted)
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # what orbax and tensorstore raise on bad files
        if isinstance(error, jax.errors.JaxRuntimeError):  # out of memory, say: not the checkpoint's fault
            raise
        raise InputError(f"the checkpoint {path} is damaged and cannot be restored: {error}; use another") from error
    restored = [_decode(saved[name], arrays.get(name), leaf) for name, leaf in leaves]
    return jax.tree_util.tree_unflatten(treedef, restored), metadata


def _flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Leaves with their `a/b/0` paths. None counts as a leaf, so that a lost optional part is noticed."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    leaves = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]
    if len({name for name, _ in leaves}) < len(leaves):
        raise ValueError("two leaves of the state have the same path; rename keys that contain '/'")
    return leaves, treedef


def _describe(leaf: Any) -> dict:
    """What identifies a leaf: kind, and shape and dtype of arrays (of the raw uint32 data for typed keys)."""
    if leaf is None or (isinstance(leaf, bool | int | float | str) and not isinstance(leaf, np.generic)):
        return {"kind": type(leaf).__name__}
    if isinstance(leaf, np.generic):
        return {"kind": "numpy scalar", "dtype": leaf.dtype.name, "shape": []}
    if isinstance(leaf, np.ndarray | jax.Array | jax.ShapeDtypeStruct):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return {"kind": "key", "dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        return {"kind": "array", "dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}
    raise TypeError(f"a checkpoint cannot hold a {type(leaf).__name__}")


def _encode(state: Any) -> tuple[list[dict], dict[str, Any]]:
    """Index entries of all leaves, and the arrays among them as {path: array} with typed keys as raw uint32 data."""
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
        elif entry["kind"] == "float":
            entry["value"] = leaf.hex()
        else:
            entry["value"] = leaf
        entries.append(entry)
    return entries, arrays


def _decode(entry: dict, array: Any, like: Any) -> Any:
    kind = entry["kind"]
    if kind == "numpy scalar":
        return np.frombuffer(bytes.fromhex(entry["bytes"]), dtype=np.dtype(entry["dtype"]))[0]
    if kind == "float":
        return float.fromhex(entry["value"])
    if kind == "key":
        return jax.random.wrap_key_data(array, impl=entry["impl"])
    if kind == "array" and getattr(like, "weak_type", False) and array.ndim == 0:
        # A weakly typed scalar promotes differently from a strong one, so a resumed run could differ in the last bit.
        return (
            jax.device_put(jnp.asarray(array.item()), array.sharding) if array.committed else jnp.asarray(array.item())
        )
    return array if kind == "array" else entry["value"]


def _check_match(path: Path, saved: dict[str, dict], expected: dict[str, dict]) -> None:
    def words(entry: dict | None) -> str:
        if entry is None:
            return "nothing"
        shape = f"[{','.join(map(str, entry['shape']))}]" if "shape" in entry else entry["kind"]
        return f"{entry['dtype']}{shape}" if "dtype" in entry else shape

    def key(entry: dict | None) -> tuple:
        return () if entry is None else (entry["kind"], entry.get("dtype"), tuple(entry.get("shape", ())))

    names = sorted(saved.keys() | expected.keys())
    wrong = [name for name in names if key(saved.get(name)) != key(expected.get(name))]
    if wrong:
        lines = [f"  {n}: checkpoint has {words(saved.get(n))}, expected {words(expected.get(n))}" for n in wrong[:20]]
        more = [f"  … and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        count = f"{len(wrong)} of {len(names)} entries differ"
        text = f"the checkpoint {path} does not fit this model and optimizer, {count}:"
        raise InputError("\n".join([text, *lines, *more]))


def _checkpointer(arrays: dict[str, Any]) -> Any:
    import orbax.checkpoint as ocp

    # orbax refuses arrays larger than its limit, so the limit follows the largest one
    limit = max(CONCURRENT_GB, *(math.ceil(math.prod(a.shape) * a.dtype.itemsize / 1e9) + 1 for a in arrays.values()))
    # trained weights shrink by a few per cent only, for several times the time
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit, restore_concurrent_gb=limit, use_compression=False)
    return ocp.Checkpointer(handler)


def _write_arrays(target: Path, arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    if not arrays:
        raise ValueError("the state to save holds no arrays")
    with _checkpointer(arrays) as checkpointer:
        checkpointer.save(target.absolute(), args=ocp.args.PyTreeSave(arrays))


def _read_arrays(source: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """{path: array} restored to the placement of its counterpart in `wanted`."""
    import orbax.checkpoint as ocp

    arguments, structs = {}, {}
    for name, leaf in wanted.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            struct = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        else:
            struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
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
        name: jnp.asarray(array)
        if arguments[name].restore_type is np.ndarray and not isinstance(wanted[name], np.ndarray)
        else array
        for name, array in arrays.items()
    }


def _placement(leaf: Any) -> Any:
    """The sharding to restore to; None for numpy arrays and for arrays not committed to a device.

    An uncommitted array may join computations on any mesh; committed to one device, it no longer could.
    """
    if isinstance(leaf, np.ndarray) or (isinstance(leaf, jax.Array) and not leaf.committed):
        return None
    return leaf.sharding


def _read_json(path: Path, name: str, *keys: str) -> dict:
    if not path.is_dir():
        raise InputError(f"there is no checkpoint {path}")
    try:
        content = json.loads((path / name).read_text(encoding="utf-8"))
        return content | {key: content[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the checkpoint {path} is incomplete or damaged: {name} is unreadable; use another"
        ) from error


def _sizes(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by relative path."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def _take_back_replaced(folder: Path) -> None:
    """Give an older checkpoint its name back when a kill fell between the two renames of its replacement."""
    for path in folder.glob(f"checkpoint-*{REPLACED}"):
        target = path.with_name(path.name.removesuffix(REPLACED))
        if target.exists():
            _remove(path)
        else:
            os.rename(path, target)


def _tidy(folder: Path) -> None:
    """Remove what interrupted saves left behind."""
    _take_back_replaced(folder)
    for ending in UNFINISHED:
        for path in folder.glob(f"checkpoint-*{ending}"):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that no part of it can be taken for a complete one."""
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
