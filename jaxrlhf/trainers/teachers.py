"""A teacher's most likely tokens of all rows in a folder: one run writes them, others then need no teacher."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.files import read_json, write_json_atomic
from jaxrlhf.data import Data
from jaxrlhf.data.batches import TokenValues
from jaxrlhf.data.cache import created
from jaxrlhf.data.files import hash_file
from jaxrlhf.distributed import gather
from jaxrlhf.errors import InputError
from jaxrlhf.trainers.references import scored
from jaxrlhf.trainers.supervised import Batch

ABOUT = "about.json"
KINDS = {"ids": np.int32, "logps": np.float32}


def attach_teacher(
    data: Data,
    folder: Path,
    settings: Mapping[str, object],
    score: Callable[[Batch], dict[str, jax.Array]],
    rows: int,
    mesh: Mesh,
) -> None:
    """Adds the teacher's most likely tokens to the batches of the data, from a folder that is written if it is missing.

    Args:
        data: rows of SFT.
        folder: of these rows alone.
        settings: what the log-probs depend on, besides the teacher and the rows.
        score: of a placed batch, `ids` and `logps` `[B, T, K]`.
        rows: rows that are scored at a time.
        mesh: where they are scored.

    Raises:
        InputError: the folder belongs to other rows or settings, or was changed since it was written.
    """
    about = {**settings, "rows": data.key, "units": len(data), "packed": data.bins is not None}
    starts = np.cumsum([0, *data.lengths(np.arange(len(data))).sum(axis=0)])
    if not all(gather("looking for the teacher's log-probs", folder.exists())):
        with created(folder) as temporary:
            temporary.mkdir()
            _write(temporary, data, starts, score, rows, mesh)
            seal(temporary, about)
    values = read_teacher(folder, about, int(starts[-1]))
    data.token_values = {f"teacher_{name}": TokenValues(x, starts) for name, x in values.items()}


def _write(
    folder: Path,
    data: Data,
    starts: np.ndarray,
    score: Callable[[Batch], dict[str, jax.Array]],
    rows: int,
    mesh: Mesh,
) -> None:
    """Scores all units, and writes `ids.npy` and `logps.npy`, `[tokens, K]`, one unit after the other."""
    files: dict[str, Any] = {}
    for units, found in scored(data, score, rows, mesh):
        for name, kind in KINDS.items():
            if name not in files:
                shape = (int(starts[-1]), found[name].shape[-1])
                files[name] = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape)
            for unit, values in zip(units, found[name], strict=True):
                begin, end = starts[unit], starts[unit + 1]
                files[name][begin:end] = values[: end - begin]
    for file in files.values():
        file.flush()


def seal(folder: Path, about: Mapping[str, object]) -> None:
    """Writes the settings and the hashes of the arrays beside them."""
    hashes = {name: hash_file(folder / f"{name}.npy") for name in KINDS}
    write_json_atomic(folder / ABOUT, {"about": about, "hashes": hashes})


def read_teacher(folder: Path, about: Mapping[str, object], tokens: int) -> dict[str, np.ndarray]:
    """Opens `ids` int32 and `logps` float32 `[tokens, K]` of a folder, after a comparison of settings and hashes.

    Raises InputError as `attach_teacher` does.
    """
    remedy = "delete the folder, and a run with the teacher writes it again"
    record = read_json(folder / ABOUT, remedy)
    before, hashes = record.get("about"), record.get("hashes")
    if not isinstance(before, dict) or not isinstance(hashes, dict):
        raise InputError(f"{folder / ABOUT}: has no `about` and `hashes`; {remedy}")
    if differing := [name for name, value in about.items() if before.get(name) != value]:
        shown = ", ".join(f"{name} ({before.get(name)} then, {about[name]} now)" for name in differing)
        raise InputError(f"teacher_log_probs: {folder} was written with other settings: {shown}; name another folder")
    found = {}
    for name, kind in KINDS.items():
        path = folder / f"{name}.npy"
        if not path.is_file() or hash_file(path) != hashes.get(name):
            raise InputError(f"teacher_log_probs: {path} is missing or damaged; {remedy}")
        found[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        if found[name].dtype != kind or found[name].shape[:1] != (tokens,):
            raise InputError(f"teacher_log_probs: {path} does not hold {tokens} tokens; {remedy}")
    return found
