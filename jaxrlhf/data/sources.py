"""Reads rows from files, folders and Hugging Face data sets, and splits them over the steps.

The standard library reads JSON and CSV, so that an error names the line and a CSV cell stays the text it is. The
`datasets` library reads Parquet files, `save_to_disk` folders and data sets of the hub.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import csv
import hashlib
import io
import json
import mmap
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.errors import InputError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
SHARES = {"sft": (0, 1), "reward": (1, 2), "ppo": (2, 3), "dpo": (1, 3)}
"""First and last (exclusive) share of `data_split` that each step trains on; dpo replaces reward and ppo."""
EVAL_NAMES = ("eval", "validation", "valid", "val", "dev", "test")  # in order of preference
SPLIT_WORDS = {"train": "train", "training": "train", "evaluation": "eval"} | {name: name for name in EVAL_NAMES}
DEMO_NAME = "demo"


class Rows:
    """A sequence of rows (mappings of field to value) that knows where each row came from.

    Args:
        rows: a list or a `datasets.Dataset`.
        name: the file or data set, for messages.
        unit: what a number counts: "line", "item" or "row".
        numbers: the number of each row, from 1. Default: its position.
    """

    def __init__(self, rows: Any, name: str, unit: str = "row", numbers: Sequence[int] | np.ndarray | None = None):
        self.rows, self.name, self.unit, self.numbers = rows, name, unit, numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]

    def where(self, i: int) -> str:
        """The place of row `i` for messages: `rows.jsonl line 3`."""
        return f"{self.name} {self.unit} {i + 1 if self.numbers is None else self.numbers[i]}"


class JsonLines(Rows):
    """Rows of a JSON-lines file, parsed on access: memory holds only where each line begins and ends."""

    def __init__(self, path: Path):
        spans, end = array("q"), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                start, end = end, end + len(line)
                if line.removeprefix(codecs.BOM_UTF8).strip():
                    parse_json(path, line, number)  # reports a bad line before any other row is tokenised
                    spans.extend((start, end, number))
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = np.array(spans).reshape(-1, 3)
        super().__init__(rows, str(path), "line", rows[:, 2])
        self.path = path

    def __getitem__(self, i: int) -> object:
        start, end, number = self.rows[i].tolist()
        return parse_json(self.path, self.bytes[start:end], number)


class JoinedRows(Rows):
    """Several `Rows` one after the other."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, i: int) -> tuple[Rows, int]:
        """The part that holds row `i`, and the row's position in it."""
        k = bisect.bisect_right(self.ends, i)
        return self.parts[k], i - (self.ends[k - 1] if k else 0)

    def __getitem__(self, i: int) -> object:
        part, j = self.locate(i)
        return part[j]

    def where(self, i: int) -> str:
        part, j = self.locate(i)
        return part.where(j)


def decode(path: Path, text: bytes, line: int = 1) -> str:
    """Decodes UTF-8, without a byte order mark. `line`: the number of the first line, for the InputError."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += text[: error.start].count(b"\n")
        raise InputError(f"{path} line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def parse_json(path: Path, text: bytes, line: int = 1) -> object:
    """Parses JSON. `line`: the number of the first line, for the InputError."""
    try:
        return json.loads(decode(path, text.rstrip(), line))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {line + error.lineno - 1}: not valid JSON ({error.msg} at column {error.colno}); correct the "
            "line, or delete it from a file with one JSON object per line"
        ) from error


def read_json(path: Path) -> Rows:
    """Reads a list of objects, or one object per line, whatever the file's suffix."""
    with open(path, "rb") as file:
        is_list = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if is_list:
        return Rows(parse_json(path, path.read_bytes()), str(path), "item")
    try:
        return JsonLines(path)
    except InputError as error:
        try:
            parse_json(path, path.read_bytes())
        except InputError:
            raise error from None
        raise InputError(f"{path}: holds one JSON object; give a list of objects, or one object per line") from error


def read_csv(path: Path) -> Rows:
    """Reads a CSV file with a header; cells stay text, and a row without a cell lacks the field."""
    rows, numbers = [], []
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 131,072 characters
    reader = csv.DictReader(io.StringIO(decode(path, path.read_bytes()), newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise InputError(
                    f"{path} line {reader.line_num}: more cells than the header has columns; quote cells with commas"
                )
            rows.append({name: value for name, value in row.items() if value is not None})
            numbers.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num}: not valid CSV ({error}); correct the file") from error
    return Rows(rows, str(path), "line", numbers)


def read_parquet(path: Path) -> Rows:
    """Opens a Parquet file through `datasets`, which maps it into memory."""
    import datasets

    with loading(f"{path}: cannot be read as Parquet", "write the file again"):
        return Rows(datasets.Dataset.from_parquet(str(path)), str(path))


READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".parquet": read_parquet}


def read_file(path: Path) -> Rows:
    """The rows of one file, by its suffix. Raises InputError naming the file (and line) when it holds none."""
    with reading(path):
        rows = READERS[path.suffix.lower()](path) if path.stat().st_size else None
    if not rows:
        raise InputError(f"{path}: holds no rows; give a file with at least one")
    return rows


def hash_file(path: Path) -> str:
    """Hashes a file's bytes. Raises InputError when it cannot be read."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error


@contextlib.contextmanager
def loading(problem: str, remedy: str) -> Iterator[None]:
    """Turns the errors of `datasets` into an InputError: `problem` (cause); `remedy`."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ArrowException, DatasetsError) as error:
        cause = (error.__cause__ if isinstance(error, DatasetGenerationError) else None) or error
        raise InputError(f"{problem} ({first_line(cause)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 300 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
        name: the source as the user gave it.
        splits: the list of files or the `datasets.Dataset` of "train", and of "eval" where the source has its own
            evaluation split.
    """

    name: str
    splits: Mapping[str, Any]
    _rows: dict[str, Rows] = field(default_factory=dict, repr=False)

    @property
    def evaluation_split(self) -> str:
        """The split to evaluate on when the source serves for evaluation only."""
        return "eval" if "eval" in self.splits else "train"

    def identities(self, split: str) -> set[Path | str]:
        """The files of a split, or the data set's fingerprint."""
        data = self.splits[split]
        return {path.resolve() for path in data} if isinstance(data, list) else {data._fingerprint}

    def fingerprint(self, split: str) -> str:
        """Hashes the contents of a split without parsing its rows."""
        data = self.splits[split]
        if not isinstance(data, list):
            return data._fingerprint
        return hashlib.blake2b("".join(map(hash_file, data)).encode(), digest_size=16).hexdigest()

    def rows(self, split: str) -> Rows:
        """The rows of a split, read on the first call. Raises InputError when there are none."""
        if split not in self._rows:
            data = self.splits[split]
            if isinstance(data, list):
                parts = [read_file(path) for path in data]
                self._rows[split] = parts[0] if len(parts) == 1 else JoinedRows(parts)
            else:
                self._rows[split] = Rows(data, f"{self.name} ({split})")
                if not len(data):
                    raise InputError(f"data_path '{self.name}': its {split} split holds no rows; give another data set")
        return self._rows[split]


def resolve_source(name: str, cache_dir: Path) -> Source:
    """Finds the source that `name` stands for.

    Args:
        name: `demo`, a file, a folder, a `save_to_disk` folder, or a data set of the hub (`name` or `name:config`).
        cache_dir: folder for the demo data.

    Raises:
        InputError: there is no such source; the message names what was looked for.
    """
    if name == DEMO_NAME:
        from jaxrlhf.data.demo import materialize_demo

        demo = materialize_demo(cache_dir)
        return Source(name, {"train": [demo.train], "eval": [demo.eval]})
    path = Path(name).expanduser()
    is_data_file = path.suffix.lower() in SUFFIXES
    if path.is_file():
        if not is_data_file:
            raise InputError(f"data_path '{name}': unknown kind of file; use one of {', '.join(SUFFIXES)}")
        return Source(name, {"train": [path]})
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if path.is_dir() and not saved:
        return Source(name, files_by_split(name, path))
    if not saved and (is_data_file or looks_like_path(name)):
        raise InputError(f"data_path '{name}': no such file or folder; check the path")

    import datasets

    if saved:
        with loading(f"data_path '{name}': the saved data set cannot be read", "save it again"):
            loaded = datasets.load_from_disk(str(path))
    else:
        repository, _, config = name.partition(":")
        with loading(
            f"data_path '{name}': neither a file or folder here nor a data set that the hub gives",
            "check the name and the network, or give a local file",
        ):
            loaded = datasets.load_dataset(repository, config or None)
    return Source(name, datasets_by_split(name, loaded))


def looks_like_path(name: str) -> bool:
    """True when `name` cannot be a name on the hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def files_by_split(name: str, folder: Path) -> dict[str, object]:
    """Sorts a folder's data files into "train" and "eval" by their names; without such names all are for training."""
    groups: dict[str | None, list[Path]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts):
            words = re.findall(r"[a-z]+", str(relative.with_suffix("")).lower())
            split = next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), None)
            groups.setdefault(split, []).append(path)
    if not groups:
        raise InputError(f"data_path '{name}': the folder holds no {', '.join(SUFFIXES)} file; put the data there")
    # Files named for no split are training rows only where none is named for training, so that a stray
    # description file beside train.jsonl is not taken for data.
    train = groups.get("train") or groups.get(None)
    if not train:
        (first, *_), *_ = groups.values()
        raise InputError(
            f"data_path '{name}': the folder holds only evaluation files ({first.name}); add a train file, or give the "
            "folder as eval_data_path"
        )
    return with_evaluation(train, groups)


def datasets_by_split(name: str, loaded: object) -> dict[str, object]:
    """The "train" and, where there is one, the "eval" part of a `datasets.Dataset` or `DatasetDict`."""
    if not isinstance(loaded, dict):
        return {"train": loaded}
    if "train" not in loaded:
        raise InputError(f"data_path '{name}': has no 'train' split (it has {', '.join(loaded)}); name one 'train'")
    return with_evaluation(loaded["train"], loaded)


def with_evaluation(train: object, splits: Mapping[Any, object]) -> dict[str, object]:
    """`train`, and the first of EVAL_NAMES among the splits as "eval"."""
    evaluation = next((splits[name] for name in EVAL_NAMES if name in splits), None)
    return {"train": train} | ({} if evaluation is None else {"eval": evaluation})


def parse_split(data_split: str) -> tuple[float, ...] | None:
    """Parses `2,4,4` into the shares of sft, reward and ppo. None for the empty string: each step uses all rows."""
    if not data_split:
        return None
    try:
        weights = tuple(map(float, data_split.split(",")))
    except ValueError:
        weights = ()
    if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(f"data_split '{data_split}': must be three shares, of sft, reward and ppo, such as 2,4,4")
    return weights


def split_indices(
    n: int, step: str, *, data_split: str, held_out: float, seed: int, name: str = "the data"
) -> tuple[np.ndarray, np.ndarray]:
    """Splits a source's rows into those that a step trains on and those that every step evaluates on.

    One permutation keyed by `seed` is cut into contiguous slices: first the held-out rows, then one slice per step.
    The steps' training rows are disjoint (dpo has those of reward and ppo) and, with the held-out rows, complete. No
    row is trained on in one step and evaluated on in another.

    Args:
        n: number of rows.
        step: "sft", "reward", "ppo" or "dpo".
        data_split: shares of the steps; see `parse_split`.
        held_out: fraction of the rows to evaluate on (at least one row), or 0.
        seed: key of the permutation.
        name: the source, for messages.

    Returns:
        Sorted row numbers (int64) to train on and to evaluate on.
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
