"""Reads rows from files, folders and Hugging Face data sets, and splits them over the steps.

JSON and CSV are read by the standard library, so that an error can name the line and a CSV cell stays the text it is;
Parquet files, `save_to_disk` folders and hub names are read through `datasets`.
"""

from __future__ import annotations

import bisect
import csv
import hashlib
import io
import json
import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxrlhf.errors import InputError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
SHARES = {"sft": (0, 1), "reward": (1, 2), "ppo": (2, 3), "dpo": (1, 3)}
"""From which to which of data_split's shares each step trains on; dpo stands in for reward and ppo."""
EVAL_NAMES = ("eval", "validation", "valid", "val", "dev", "test")  # in order of preference
DEMO_NAME = "demo"


class Rows(Protocol):
    """A sequence of rows (mappings of field to value) that can say where row `i` came from."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...

    def where(self, i: int) -> str: ...


class ListRows:
    """Rows held in memory: `rows[i]` stood at `numbers[i]` (a line or an item) of the file `path`."""

    def __init__(self, path: Path, rows: list, numbers: Sequence[int], unit: str):
        self.path, self.rows, self.numbers, self.unit = path, rows, numbers, unit

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]

    def where(self, i: int) -> str:
        return f"{self.path} {self.unit} {self.numbers[i]}"


class JsonLines:
    """Rows of a JSON-lines file, parsed when asked for: memory holds only where each line begins."""

    def __init__(self, path: Path):
        self.path = path
        starts, ends, numbers, position = [], [], [], 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                end = position + len(line)
                if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                    position, line = position + 3, line[3:]
                if line.strip():
                    parse_line(path, number, line)  # every line is checked before any step spends time on the others
                    starts.append(position)
                    ends.append(end)
                    numbers.append(number)
                position = end
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.starts, self.ends, self.numbers = np.array(starts), np.array(ends), np.array(numbers)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Any:
        return parse_line(self.path, int(self.numbers[i]), self.bytes[self.starts[i] : self.ends[i]])

    def where(self, i: int) -> str:
        return f"{self.path} line {self.numbers[i]}"


class TableRows:
    """Rows of a `datasets.Dataset`."""

    def __init__(self, name: str, dataset):
        self.name, self.dataset = name, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        return self.dataset[int(i)]

    def where(self, i: int) -> str:
        return f"{self.name} row {i + 1}"


class JoinedRows:
    """Several `Rows` one after the other."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, i: int) -> tuple[Rows, int]:
        k = bisect.bisect_right(self.ends, i)
        return self.parts[k], i - (self.ends[k - 1] if k else 0)

    def __getitem__(self, i: int) -> Any:
        part, j = self.locate(i)
        return part[j]

    def where(self, i: int) -> str:
        part, j = self.locate(i)
        return part.where(j)


def parse_line(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} line {number}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {number}: not valid JSON ({error.msg} at column {error.colno}); "
            "mend or delete that line (one JSON object a line)"
        ) from error


def decode_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path} line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def read_json(path: Path) -> Rows:
    """Rows of a JSON file, whatever its suffix: a list of objects, or one object a line."""
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        try:
            return JsonLines(path)
        except InputError:
            if not is_json_object(path):
                raise
        raise InputError(f"{path}: holds one JSON object; a list of rows or one row a line is needed")
    try:
        rows = json.loads(decode_text(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); mend the file"
        ) from error
    return ListRows(path, rows, range(1, len(rows) + 1), "item")


def is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(decode_text(path)), dict)
    except json.JSONDecodeError:
        return False


def read_csv(path: Path) -> Rows:
    rows, numbers = [], []
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 131,072 characters
    reader = csv.DictReader(io.StringIO(decode_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path} line {reader.line_num}: more cells than the header has columns; quote cells with commas"
                )
            rows.append({name: value for name, value in row.items() if value is not None})
            numbers.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: not valid CSV ({error}); mend the file") from error
    return ListRows(path, rows, numbers, "line")


def read_parquet(path: Path) -> Rows:
    import datasets
    import pyarrow

    try:
        return TableRows(str(path), datasets.Dataset.from_parquet(str(path)))
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError) as error:
        cause = error.__cause__ or error
        raise InputError(f"{path}: cannot be read as Parquet ({first_line(cause)}); write the file again") from error


def read_file(path: Path) -> Rows:
    """The rows of one file, by its suffix. Raises InputError naming the file (and line) when it holds none."""
    readers = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}
    try:
        rows = readers[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error
    if not len(rows):
        raise InputError(f"{path}: holds no rows; give a file with at least one")
    return rows


@dataclass(frozen=True)
class Source:
    """One place rows come from: its name as the user gave it and, per split, its files or its loaded data set."""

    name: str
    files: dict[str, tuple[Path, ...]]  # "train", and "eval" where the source has an evaluation split of its own
    datasets: dict[str, Any]

    def has(self, split: str) -> bool:
        return split in self.files or split in self.datasets

    def fingerprint(self, split: str) -> str:
        """A hash of the contents of a split; it does not parse the rows."""
        if split in self.datasets:
            return self.datasets[split]._fingerprint
        digest = hashlib.blake2b(digest_size=16)
        for path in self.files[split]:
            digest.update(hash_file(path).encode())
        return digest.hexdigest()

    def rows(self, split: str) -> Rows:
        if split in self.datasets:
            rows = TableRows(f"{self.name} ({split})", self.datasets[split])
            if not len(rows):
                raise InputError(f"data_path '{self.name}': its {split} split holds no rows")
            return rows
        parts = [read_file(path) for path in self.files[split]]
        return parts[0] if len(parts) == 1 else JoinedRows(parts)


def hash_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its rights"
        ) from error


def resolve_source(name: str, cache_dir: Path) -> Source:
    """Find what `name` stands for: `demo`, a file, a folder, a `save_to_disk` folder, or a hub name (`name:config`).

    Raises InputError when there is nothing there, naming what was looked for.
    """
    if name == DEMO_NAME:
        from jaxrlhf.data.demo import materialize_demo

        demo = materialize_demo(cache_dir)
        return Source(name, {"train": (demo.train,), "eval": (demo.eval,)}, {})
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"data_path '{name}': unknown kind of file; use one of {', '.join(SUFFIXES)}")
        check_not_empty(path)
        return Source(name, {"train": (path,)}, {})
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return load_saved(name, path)
        return Source(name, files_by_split(name, path), {})
    if looks_like_path(name):
        raise InputError(f"data_path '{name}': no such file or folder; check the path")
    return load_hub(name)


def looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in SUFFIXES


def check_not_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; give a file with at least one row")


def split_of(relative: Path) -> str | None:
    """The split a file's name (or its folder's name) tells: "train", one of EVAL_NAMES, or None."""
    words = re.findall(r"[a-z]+", str(relative.with_suffix("")).lower())
    for word in reversed(words):
        if word in ("train", "training"):
            return "train"
        if word in (*EVAL_NAMES, "evaluation"):
            return "eval" if word == "evaluation" else word
    return None


def files_by_split(name: str, folder: Path) -> dict[str, tuple[Path, ...]]:
    """Sort a folder's data files into "train" and "eval" by their names; without such names all are for training."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not files:
        raise InputError(f"data_path '{name}': the folder holds no {', '.join(SUFFIXES)} file; put the data there")
    groups: dict[str | None, list[Path]] = {}
    for path in files:
        groups.setdefault(split_of(path.relative_to(folder)), []).append(path)
    # Files named for no split are training rows only where none is named for training, so that a stray
    # description file beside train.jsonl is not taken for data.
    train = groups.get("train") or groups.get(None)
    evaluation = next((groups[split] for split in EVAL_NAMES if split in groups), None)
    if not train:
        raise InputError(
            f"data_path '{name}': the folder holds only evaluation files ({evaluation[0].name}); "
            "add a train file, or give the folder as eval_data_path"
        )
    result = {"train": tuple(train)}
    if evaluation:
        result["eval"] = tuple(evaluation)
    for path in (path for paths in result.values() for path in paths):
        check_not_empty(path)
    return result


def load_saved(name: str, path: Path) -> Source:
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"data_path '{name}': the saved data set cannot be read ({first_line(error)}); save it again"
        ) from error
    return datasets_by_split(name, loaded)


def load_hub(name: str) -> Source:
    """Load a hub data set by `name` or `name:config`."""
    import datasets

    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"data_path '{name}': neither a file or folder here nor a data set that can be loaded from the hub "
            f"({first_line(error)}); check the name, the network, or give a local file"
        ) from error
    return datasets_by_split(name, loaded)


def datasets_by_split(name: str, loaded) -> Source:
    if not isinstance(loaded, dict):
        return Source(name, {}, {"train": loaded})
    if "train" not in loaded:
        raise InputError(f"data_path '{name}': has no 'train' split (it has {', '.join(loaded)}); name one 'train'")
    result = {"train": loaded["train"]}
    evaluation = next((split for split in EVAL_NAMES if split in loaded), None)
    if evaluation:
        result["eval"] = loaded[evaluation]
    return Source(name, {}, result)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]


def parse_split(data_split: str) -> tuple[float, float, float] | None:
    """Parse `2,4,4` into the three steps' weights; the empty string (no split: each step uses all rows) gives None."""
    if not data_split:
        return None
    try:
        weights = tuple(float(part) for part in data_split.split(","))
    except ValueError:
        weights = ()
    if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(
            f"data_split '{data_split}': three numbers, the shares of sft, reward and ppo, are needed, such as 2,4,4"
        )
    return weights


def split_indices(
    n: int, step: str, *, data_split: str, held_out: float, seed: int, name: str = "the data"
) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers of a source that `step` trains on, and those held out for evaluation in every step.

    One permutation keyed by `seed` is cut into contiguous slices: first the held-out rows, then one slice a step. So
    the steps' training rows are disjoint (dpo has those of reward and ppo) and, with the held-out rows, complete; no
    row is trained on in one step and evaluated in another. `held_out` is a fraction (at least one row is taken), or 0
    for none.
    """
    order = np.random.default_rng(seed).permutation(n)
    n_eval = max(1, round(n * held_out)) if held_out else 0
    if n_eval >= n:
        raise InputError(f"{name} has {n} row(s), too few to hold out {n_eval} for evaluation; give eval_data_path")
    evaluation, train = order[:n_eval], order[n_eval:]
    weights = parse_split(data_split)
    if weights is not None:
        ends = np.round(np.cumsum((0.0, *weights)) / sum(weights) * len(train)).astype(int)
        first, last = SHARES[step]
        train = train[ends[first] : ends[last]]
    return np.sort(train), np.sort(evaluation)
