"""`index.json` of a checkpoint: what its leaves are, what its files must hold, and older formats of it."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from jaxrlhf.errors import InputError

PyTree: TypeAlias = Any
Leaf: TypeAlias = Any
"""jax.Array (typed PRNG keys too), jax.ShapeDtypeStruct, numpy array or scalar, bool, int, float, str, None."""
Entry: TypeAlias = dict[str, Any]
"""A leaf in index.json: kind, path, dtype, shape, and the value if it is small."""
Files: TypeAlias = dict[str, dict[str, Any]]
"""{path below `state/`: {"bytes": size, "xxh3": checksum, None when it is not known}}."""

FORMAT = 2
"""Format 1, of version 0.1.0, has the size of each file and no checksums."""
SEAL = "xxh3"  # the checksum of a JSON object, in itself
SCALARS = {"NoneType": type(None), "bool": bool, "int": int, "float": str, "str": str}  # types of "value" by kind
ARRAYS = ("array", "key", "numpy scalar")
SHOWN_DIFFERENCES = 20
_PROCESS = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")  # in the names of orbax's files
CHUNK = 16 << 20  # bytes read at a time
THREADS = 4


def flatten(tree: PyTree, prefix: str = "") -> tuple[list[tuple[str, Leaf]], Any]:
    """Leaves with their `a/b/0` paths. None counts as a leaf, so that a lost optional part shows."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    leaves = [(prefix + jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]
    if len({name for name, _ in leaves}) < len(leaves):
        raise ValueError("two leaves of the state have the same path; rename keys that contain '/'")
    return leaves, treedef


def describe(leaf: Leaf) -> Entry:
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


def encode(state: PyTree) -> tuple[list[Entry], dict[str, jax.Array | np.ndarray]]:
    """Index entries of all leaves, and {path: array} of the arrays. A typed key becomes its raw uint32 data."""
    entries, arrays = [], {}
    for name, leaf in flatten(state)[0]:
        entry = {"path": name, **describe(leaf)}
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


def decode(entry: Entry, array: Leaf, like: Leaf) -> Leaf:
    """The leaf of an entry; `array` is what its files hold, `like` the leaf that it replaces."""
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


def check_match(path: Path, saved: Mapping[str, Entry], expected: Mapping[str, Entry]) -> None:
    """Raises InputError listing the leaves whose kind, dtype or shape differ."""

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


def sealed(value: Mapping[str, object]) -> dict[str, object]:
    """A JSON object with its own checksum."""
    return {**value, SEAL: xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())}


def unsealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object without its checksum, if it has one. Raises ValueError when they do not fit."""
    plain = {key: item for key, item in value.items() if key != SEAL}
    if SEAL in value and value[SEAL] != sealed(plain)[SEAL]:
        raise ValueError("its content is not as it was written")
    return plain


def migrated(index: dict[str, Any], path: Path) -> dict[str, Any]:
    """The index in today's format.

    Raises:
        InputError: A newer version wrote it.
        ValueError: It is damaged; says what is wrong.
    """
    number, index = index.get("format"), unsealed(index)
    if type(number) is not int or number < 1:
        raise ValueError(f"format is {number!r}")
    if number > FORMAT:
        raise InputError(
            f"the checkpoint {path} has format {number}, and this version of jaxrlhf reads formats up to {FORMAT}: "
            "update jaxrlhf"
        )
    if number == 1 and isinstance(index.get("files"), dict):
        index = index | {"files": {name: {"bytes": size, "xxh3": None} for name, size in index["files"].items()}}
    check_index(index)
    return index


def check_index(index: Mapping[str, object]) -> None:
    """Raises ValueError naming the entry that is not what `encode` and `file_facts` write."""
    leaves, files = index.get("leaves"), index.get("files")
    if not isinstance(leaves, list) or not isinstance(files, dict):
        raise ValueError("leaves must be a list and files an object")
    for number, entry in enumerate(leaves):
        if not isinstance(entry, dict) or not _is_entry(entry):
            raise ValueError(f"leaf {number} is not an entry")
    if len({entry["path"] for entry in leaves}) < len(leaves):
        raise ValueError("two leaves have the same path")
    for name, facts in files.items():
        known = isinstance(facts, dict) and type(facts.get("bytes")) is int
        if not known or not isinstance(facts.get("xxh3"), str | None):
            raise ValueError(f"the entry of the file {name} has no size or a wrong checksum")


def _is_entry(entry: Entry) -> bool:
    kind = entry.get("kind")
    if not isinstance(entry.get("path"), str) or not isinstance(kind, str):
        return False
    if kind in SCALARS:
        return "value" in entry and type(entry["value"]) is SCALARS[kind]
    shape = entry.get("shape")
    if kind not in ARRAYS or not isinstance(entry.get("dtype"), str) or not isinstance(shape, list):
        return False
    texts = {"key": "impl", "numpy scalar": "bytes"}.get(kind, "dtype")
    return isinstance(entry.get(texts), str) and all(type(size) is int and size >= 0 for size in shape)


def sizes(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by relative path."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


def file_facts(folder: Path, names: Iterable[str]) -> Files:
    """Size and checksum (XXH3, 128 bits) of files below a folder. Raises OSError when one cannot be read."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(_facts, (folder / name for name in names)), strict=True))


def _facts(path: Path) -> dict[str, int | str]:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(CHUNK, max(os.path.getsize(path), 1))))
    total = 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            total += count
    return {"bytes": total, "xxh3": digest.hexdigest()}


def differing(folder: Path, expected: Files, share: int = 0, shares: int = 1) -> list[str]:
    """Names of files below a folder that are lost, extra, or not as they were written.

    Args:
        folder: Folder with the files.
        expected: Their facts.
        share: Number of the part of the files, of `shares`, whose content to check.
        shares: Number of parts.
    """
    found = sizes(folder) if folder.is_dir() else {}
    wrong = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != _size(expected, name)]
    names = [name for name in sorted(expected) if name not in wrong and expected[name]["xxh3"] is not None]
    facts = file_facts(folder, names[share::shares])
    return wrong + [name for name, fact in facts.items() if fact["xxh3"] != expected[name]["xxh3"]]


def is_own(name: str) -> bool:
    """True for the files below `state/` that this process has written; what belongs to no process is process 0's."""
    process = _PROCESS.search(name)
    return int(process[1] if process else 0) == jax.process_index()


def _size(files: Files, name: str) -> int | None:
    return files[name]["bytes"] if name in files else None
