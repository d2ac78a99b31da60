"""Hugging Face checkpoint folders on disk: reading tensors by name, and writing safetensors one tensor at a time."""

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxrlhf.config.files import is_plain_name, read_json
from jaxrlhf.config.model_folder import ADAPTER_CONFIG, adapter_base, is_adapter
from jaxrlhf.config.remote import is_url
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.models.hf.gguf import is_gguf
from jaxrlhf.models.hf.hub import download, download_url
from jaxrlhf.models.hf.tensor_source import TensorSource, all_finite, refuse
from jaxrlhf.models.hf.torch_files import open_bin

CONFIG = "config.json"
_SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"
FLOATS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
}


def find_model_folder(name_or_path: str | os.PathLike) -> Path:
    """Returns the local folder of a model: the path itself, or that of a URL or a hub name, downloaded or cached.

    It holds a config.json, or the adapter_config.json of an adapter. A GGUF file stands for itself.

    Raises:
        InputError: Neither exists, or the folder has no config.json.
    """
    if is_url(name_or_path):
        return download_url(str(name_or_path))
    path = Path(name_or_path)
    if is_gguf(path):
        return path
    if path.is_dir():
        if not (path / CONFIG).is_file() and not is_adapter(path):
            raise InputError(_without_config(path))
        return path
    text = str(name_or_path)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(f"model folder {text} does not exist (or is not a folder)")
    return download(text)


def _without_config(folder: Path) -> str:
    """Says what a folder without config.json is, and how one that a run has written becomes a model."""
    convert = f"`jaxrlhf convert --input {folder} --from orbax --output FOLDER --to hf"
    tokenizer = "--tokenizer_name_or_path MODEL`, with the model that the run started from as MODEL"
    if (folder / "metadata.json").is_file():
        if (folder.parent / CONFIG).is_file():
            return f"{folder} is a checkpoint; the model of its run is {folder.parent}. For an earlier one: {convert}`"
        return f"{folder} is a checkpoint; make a model folder of it with {convert} {tokenizer}"
    if any(folder.glob("checkpoint-*/metadata.json")):
        return (
            f"{folder} has checkpoints and no model, because its run has not ended; go on with --resume, or make a "
            f"model folder of the newest checkpoint with {convert} {tokenizer}"
        )
    return f"model folder {folder} has no {CONFIG}; it must be a Hugging Face model folder"


def base_folder(folder: Path) -> Path:
    """Returns the folder that describes a model: the base model's for an adapter, any other one itself.

    Raises:
        InputError: The base of an adapter is not there, or is an adapter too.
    """
    if not is_adapter(folder):
        return folder
    name = adapter_base(folder)
    try:
        base = find_model_folder(name)
    except InputError as error:
        raise InputError(
            f"{folder} is an adapter of the base model {name!r}, which is needed too: {error}. Put it there, or set "
            f"base_model_name_or_path in {folder / ADAPTER_CONFIG}"
        ) from error
    if is_adapter(base):
        raise InputError(
            f"{folder} is an adapter of {name!r}, which is an adapter too; merge that one first, with "
            f"jaxrlhf convert --input {name} --to hf"
        )
    return base


def fingerprint(folder: Path, blocks: int = 64, size: int = 4096) -> dict[str, str]:
    """Hashes the config and weights of a model or adapter folder, by file name.

    Each hash covers the length and `blocks` evenly spread blocks of `size` bytes. Two models that were trained
    differently differ everywhere, so these blocks are enough to tell them apart.
    """
    hashes = {}
    patterns = (CONFIG, "model*.safetensors*", "pytorch_model*.bin*", "adapter_*")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        length = path.stat().st_size
        digest = hashlib.blake2b(str(length).encode(), digest_size=8)
        with open(path, "rb") as file:
            for start in sorted({(length - size) * i // (blocks - 1) for i in range(blocks)} if length > size else {0}):
                file.seek(start)
                digest.update(file.read(size))
        hashes[path.name] = digest.hexdigest()
    return hashes


def open_checkpoint(folder: Path) -> TensorSource:
    """Opens `model.safetensors`, a sharded index, or an old `pytorch_model.bin` (through torch's safe unpickler).

    Raises:
        InputError: Files are missing or damaged.
    """
    for source in _formats(folder):
        return source()
    raise InputError(f"model folder {folder} holds no weights ({_SAFETENSORS} or {_BIN}, whole or with an index)")


def second_format(folder: Path) -> TensorSource | None:
    """The weights of a folder in the format that `open_checkpoint` does not choose; None without such files.

    Raises:
        InputError: As `open_checkpoint`.
    """
    others = list(_formats(folder))[1:]
    return others[0]() if others else None


def _formats(folder: Path) -> Iterator[Callable[[], TensorSource]]:
    """The functions that open the weights in a folder, one per format; the preferred one comes first."""
    for single, opener in ((_SAFETENSORS, open_safetensors), (_BIN, open_bin)):
        index = folder / f"{single}.index.json"
        if index.is_file():
            yield partial(_open_shards, index, opener)
        elif (folder / single).is_file():
            yield partial(opener, folder / single)


def _open_shards(index: Path, opener: Callable[[Path], TensorSource]) -> TensorSource:
    """Opens the files of an index, which must stand beside it and hold exactly the tensors that it lists."""
    folder, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map; download the checkpoint again")
    outside = sorted({repr(f) for f in weight_map.values() if not is_plain_name(f)})
    if outside:
        raise InputError(f"{index} names files outside its folder: {', '.join(outside)}; it must name files beside it")
    files = sorted(set(weight_map.values()))
    absent = [f[:100] for f in files if not os.path.isfile(folder / f)]
    if absent:
        raise InputError(f"{index} names files that are not in {folder}: {', '.join(absent)}")
    sources = {f: opener(folder / f) for f in files}
    held = {name: f for f, source in sources.items() for name in source.shapes}
    problems = [
        f"missing {name}: listed in {f}, which does not hold it"
        for name, f in sorted(weight_map.items())
        if name not in sources[f].shapes
    ]
    problems += [
        f"{name} is in {f}, but not in the index" for name, f in sorted(held.items()) if name not in weight_map
    ]
    refuse(f"{index} does not fit its files; download the checkpoint again", problems)
    readers = {name: sources[f] for name, f in weight_map.items()}
    shapes = {name: source.shapes[name] for name, source in readers.items()}
    return TensorSource(
        str(folder), shapes, lambda name: readers[name].read(name), peek=lambda name: readers[name].peek(name)
    )


def open_safetensors(path: Path) -> TensorSource:
    """Opens one safetensors file; InputError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
            dtypes = {name: found.get_dtype() for name, found in slices.items()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); it may be truncated") from error

    def get(name: str, rows: slice | None) -> np.ndarray:
        if dtypes[name].startswith(("F8_", "F6_", "F4")):
            raise InputError(f"{path}: tensor {name} is {dtypes[name]}; quantised checkpoints are not supported")
        # Opened each time: a file that stays mapped would count in full as this process's memory.
        with safe_open(str(path), framework="np") as file:
            return file.get_tensor(name) if rows is None or not shapes[name] else file.get_slice(name)[rows]

    return TensorSource(
        str(path), shapes, lambda name: get(name, None), metadata, peek=lambda name: get(name, slice(0, 1))
    )


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to write, which `make` computes when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_checkpoint(
    folder: Path,
    tensors: Iterable[TensorToWrite],
    dtype: np.dtype,
    max_shard_bytes: int = 5 * 2**30,
    taken: Collection[str] = (),
) -> None:
    """Writes `model.safetensors`, or shards with an index, with one tensor in memory at a time.

    Args:
        folder: An existing folder.
        tensors: In the order of the files.
        dtype: Of all tensors in the files.
        max_shard_bytes: Largest shard; a checkpoint that fits in one is a single file.
        taken: Names of shards of an older export, which the new shards avoid. Its index then stays valid until the new
            index replaces it.

    Raises:
        InputError: `dtype` cannot be exported, or values are not finite in it.
    """
    dtype = np.dtype(dtype)
    if dtype not in FLOATS:
        raise InputError(f"dtype {dtype} cannot be exported; one of {[str(d) for d in FLOATS]} can")
    shards: list[list[TensorToWrite]] = [[]]
    size = total = 0
    for tensor in tensors:
        own = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + own > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + own, total + own
    if len(shards) == 1:
        _write_safetensors(folder / _SAFETENSORS, shards[0], dtype)
        return
    weight_map = {}
    stem = "model-b" if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in taken) else "model"
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard, dtype)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{_SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def indexed_shards(folder: Path) -> set[str]:
    """Returns the files that the folder's safetensors index names; none without a readable index."""
    try:
        return set(read_json(folder / f"{_SAFETENSORS}.index.json")["weight_map"].values())
    except (InputError, KeyError, AttributeError):
        return set()


def _write_safetensors(path: Path, tensors: list[TensorToWrite], dtype: np.dtype) -> None:
    # The safetensors library needs all tensors in memory at once. Its format (8-byte length, JSON header, tensors end
    # to end) can be written one tensor at a time.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {"dtype": FLOATS[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors:
            array = _converted(tensor, dtype)
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _converted(tensor: TensorToWrite, dtype: np.dtype) -> np.ndarray:
    made = tensor.make()
    if made.shape != tensor.shape:
        raise ValueError(f"{tensor.name}: made {made.shape}, declared {tensor.shape}")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(made, dtype=dtype)
    if not all_finite(array):
        if all_finite(made):
            raise InputError(f"{tensor.name} holds values too large for {dtype}; export as bfloat16 or float32")
        raise InputError(f"{tensor.name} holds NaN or infinite values: the model has diverged and is not exported")
    return array


def replace_files(staging: Path, folder: Path) -> None:
    """Moves a finished export into `folder` (`move_files`), then deletes stale weights."""
    names = move_files(staging, folder)
    stale = [p for p in folder.glob("model*.safetensors*") if p.name not in names]
    stale += [p for p in folder.glob("pytorch_model*.bin*") if p.name not in names]
    for path in sorted(stale, key=lambda p: p.suffix != ".json"):  # an index goes before its shards
        path.unlink()


def move_files(staging: Path, folder: Path) -> list[str]:
    """Moves files into `folder`, weights first and config.json last; returns their names.

    Each file replaces its old version in one rename, and the index comes after its shards. So at any time a reader
    finds the old weights or the new ones, never a mixture. All of them are on disk before the first one moves.

    Raises:
        StorageError: The storage failed when some files were moved already.
        OSError: It failed before.
    """
    names = sorted(
        (p.name for p in staging.iterdir()),
        key=lambda name: (name == CONFIG, "safetensors" not in name, name.endswith(".json"), name),
    )
    for path in staging.rglob("*"):  # a network file system may report a full disk only now
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for i, name in enumerate(names):
        try:
            if (staging / name).is_dir():  # of a tokenizer; a rename replaces no folder
                shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(staging / name, folder / name)
        except OSError as error:
            if i == 0:
                raise
            raise StorageError(
                f"cannot write the model to {folder}: {error.strerror or error}; {', '.join(names[:i])} are new, "
                f"{', '.join(names[i:])} are not: write it again"
            ) from error
    return names


@contextmanager
def staged(folder: Path, name: str) -> Iterator[Path]:
    """Gives a new folder inside `folder` to write to before files are moved into place, and deletes it at the end.

    Args:
        folder: The export; created if it does not exist.
        name: The new folder's name begins with it. Leftovers of interrupted exports are deleted.

    Raises:
        StorageError: Writing fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{name}-*"):
            shutil.rmtree(left)
        staging = folder / f"{name}-{os.getpid()}"
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except StorageError:
        raise
    except Exception as error:  # tokenizers and safetensors have their own for a full disk: "… (os error 28)"
        if not isinstance(error, OSError) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write the model to {folder}: {reason}; the files there are unchanged") from error
