"""Sources of rows: files, folders, globs, saved data sets and data sets of the hub, all read by `datasets`.

JSON lines go through the `text` reader of `datasets`, one row a line: its JSON reader refuses files whose rows differ
in their fields or types, and fills the fields of nested objects with nulls. Rows are parsed where they are used.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.data.cache import created
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from jaxrlhf.data.registry import NamedDataset

JSON, CSV = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
KINDS = (*JSON, *CSV, ".parquet", ".arrow", ".txt")
COMPRESSED = ("", ".gz", ".zst", ".bz2")
EVAL_NAMES = ("eval", "validation", "valid", "val", "dev", "test")  # in order of preference
TRAIN_NAMES = ("train", "training")
DEMO_NAME = "demo"


@dataclass(frozen=True)
class Table:
    """Rows of one file or data set.

    Attributes:
        dataset: a `datasets.Dataset` or, streamed, an `IterableDataset`.
        name: the file or data set, for messages.
        unit: what a row number counts: "line", "item" or "row".
        is_json: the rows are JSON texts in the column `text`.
        numbers: the number of each row, from 1, where it is not the row's position.
    """

    dataset: Any
    name: str
    unit: str = "row"
    is_json: bool = False
    numbers: Sequence[int] | None = None

    def where(self, i: int) -> str:
        """The place of row `i` for messages: `rows.jsonl line 3`."""
        return f"{self.name} {self.unit} {i + 1 if self.numbers is None else self.numbers[i]}"

    def parse(self, batch: Mapping[str, Sequence[Any]], first: int = 0) -> list[Any]:
        """The rows of a batch of columns; None for a blank line. `first`: the number of the batch's first row.

        Raises InputError for a line that is not valid JSON.
        """
        if self.is_json:
            return [parse_line(text, lambda j=j: self.where(first + j)) for j, text in enumerate(batch["text"])]
        names = list(batch)
        return [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def rows(self, indices: Sequence[int]) -> list[Any]:
        """The rows with these numbers, from 0."""
        batch = self.dataset[list(indices)]
        if self.is_json:
            return [parse_line(text, lambda i=i: self.where(i)) for i, text in zip(indices, batch["text"], strict=True)]
        return self.parse(batch)

    def head(self, count: int) -> list[Any]:
        """The first rows, without blank lines."""
        columns: dict[str, list[Any]] = {}
        for row in self.dataset.take(count):
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        return [row for row in self.parse(columns) if row is not None] if columns else []


def parse_line(text: str, where: Any) -> Any:
    """Parses a line of JSON; None for a blank one. Raises InputError with the place that `where()` names."""
    text = text.lstrip("\ufeff")
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
        )
        raise InputError(
            f"{where()}: not valid JSON ({reason}); correct the line, or delete it from a file with one JSON object "
            "per line"
        ) from error


def table_of_rows(rows: Sequence[Any], name: str, unit: str, numbers: Sequence[int] | None = None) -> Table:
    """A table of JSON values that are in memory."""
    import datasets

    return Table(datasets.Dataset.from_dict({"text": [json.dumps(row) for row in rows]}), name, unit, True, numbers)


def suffix_of(path: Path | str) -> str:
    """The kind of a file by its name, without the compression: `.jsonl` of `rows.jsonl.gz`. Empty for other files."""
    name = Path(path).name.lower()
    return next((kind for kind in KINDS for end in COMPRESSED if name.endswith(kind + end)), "")


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Opens a file for reading bytes, uncompressed. Raises InputError naming the file when it cannot be read."""
    import fsspec

    with reading(path), fsspec.open(str(path), "rb", compression=compression_of(path)) as file:
        raw: Any = file
        yield io.BufferedReader(raw)  # the reader of zstandard gives no lines


def compression_of(path: Path) -> str | None:
    """The name that fsspec has for a file's compression."""
    return {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(path.suffix.lower())


def check_complete(path: Path) -> None:
    """Raises InputError when a .zst file is cut off: its readers end there without a word."""
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{path}: .zst needs the package zstandard; install it, or give the file as .gz") from error
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    with reading(path), open(path, "rb") as file:
        try:
            while chunk := file.read(1 << 20):
                while chunk:
                    frame.decompress(chunk)
                    begun, chunk = not frame.eof, frame.unused_data
                    if frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
        except zstandard.ZstdError as error:
            raise InputError(f"{path}: cannot be read ({first_line(error)}); copy or download it again") from error
    if begun:
        raise InputError(f"{path}: is cut off; copy or download it again")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the errors of reading a file into an InputError that names it."""
    try:
        yield
    except EOFError as error:
        raise InputError(f"{path}: is cut off ({error}); copy or download it again") from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error


@contextlib.contextmanager
def loading(problem: str, remedy: str) -> Iterator[None]:
    """Turns the errors of `datasets` into an InputError: `problem` (cause); `remedy`."""
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ArrowException, DatasetsError) as error:
        cause = (error.__cause__ if isinstance(error, DatasetGenerationError) else None) or error
        if isinstance(cause, EOFError):
            raise InputError(f"{problem} (it is cut off: {first_line(cause)}); copy or download it again") from error
        raise InputError(f"{problem} ({first_line(cause)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, at most 300 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def read_file(path: Path, cache: Path, streaming: bool = False) -> Table:
    """Opens the rows of one file, by its suffix. Raises InputError naming the file when it holds none."""
    kind = suffix_of(path)
    with reading(path):
        size = path.stat().st_size
    if not size:
        raise InputError(f"{path}: holds no rows; give a file with at least one")
    if compression_of(path) == "zstd" and not streaming:
        check_complete(path)
    if kind in JSON:
        table = _read_json(path, cache, streaming)
    elif kind in CSV:
        table = _read_csv(path, cache, streaming)
    else:
        options = {"sample_by": "document"} if kind == ".txt" else {}
        reader = {".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}[kind]
        plain = path if kind == ".txt" else _uncompressed(path, kind, cache)
        table = Table(_load(reader, plain, cache, streaming, **options), str(path))
    if not streaming and not len(table.dataset):
        raise InputError(f"{path}: holds no rows; give a file with at least one")
    return table


def _load(reader: str, path: Path, cache: Path, streaming: bool, **options: Any) -> Any:
    """The one data set that a reader of `datasets` makes of a file."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    names = {"parquet": "Parquet", "arrow": "Arrow", "csv": "CSV", "text": "text"}
    with loading(f"{path}: cannot be read as {names[reader]}", "write the file again"):
        try:
            return datasets.load_dataset(
                reader,
                data_files=glob.escape(str(path)),
                split="train",
                cache_dir=str(cache),
                streaming=streaming,
                **options,
            )
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, UnicodeDecodeError):
                raise _not_utf8(path) from error
            raise


def _uncompressed(path: Path, kind: str, cache: Path) -> Path:
    """The file itself or, for a compressed one, its uncompressed copy in the cache, which is read at random."""
    if compression_of(path) is None:
        return path
    target = cache / "uncompressed" / f"{hash_file(path)}{kind}"
    if not target.exists():
        with created(target) as temporary, open_file(path) as file, open(temporary, "wb") as copy:
            shutil.copyfileobj(file, copy)
    return target


def _not_utf8(path: Path) -> InputError:
    """The error for a file that is not UTF-8, with the line."""
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return InputError(f"{path} line {number}: not UTF-8 text ({error.reason}); save the file as UTF-8")
    return InputError(f"{path}: not UTF-8 text; save the file as UTF-8")


def _read_json(path: Path, cache: Path, streaming: bool) -> Table:
    """One object a line, or a list of objects, whatever the file's suffix."""
    with open_file(path) as file:
        start = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        items = _parse_whole(path)
        if not items:
            raise InputError(f"{path}: holds no rows; give a file with at least one")
        table = table_of_rows(items, str(path), "item")
        return Table(table.dataset.to_iterable_dataset(), table.name, "item", True) if streaming else table
    table = Table(_load("text", path, cache, streaming), str(path), "line", True)
    first = next((text for text in (row["text"] for row in table.dataset.take(100)) if text.strip()), None)
    if first is None:
        raise InputError(f"{path}: holds no rows; give a file with at least one")
    with contextlib.suppress(InputError):
        parse_line(first, lambda: "")
        return table
    _check_not_one_object(path)
    return table


def _parse_whole(path: Path) -> Any:
    """The JSON value that a whole file holds."""
    with open_file(path) as file:
        content = file.read()
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); correct the file"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; deep nesting
        raise InputError(f"{path}: not usable JSON ({first_line(error)}); correct the file") from error


def _check_not_one_object(path: Path) -> None:
    """Raises InputError when a file holds one JSON object over several lines instead of one a line."""
    try:
        whole = _parse_whole(path)
    except InputError:
        return  # the bad line is reported where the rows are read
    lists = [name for name, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    hint = f"its rows seem to be the list '{lists[0]}': save that list alone" if lists else "save a list of objects"
    fields = ", ".join(whole) if isinstance(whole, dict) else type(whole).__name__
    raise InputError(f"{path}: holds one JSON object (fields: {fields}); {hint}, or one object per line")


def _read_csv(path: Path, cache: Path, streaming: bool) -> Table:
    """A CSV file with a header. Cells stay the text that they are."""
    import datasets

    with open_file(path) as file:
        text = (line.decode("utf-8-sig", errors="replace") for line in file)
        first = next(text, "")
        separator = "\t" if suffix_of(path) == ".tsv" else max(",;\t", key=first.count)
        reader = csv.reader((line for part in ([first], text) for line in part), delimiter=separator)
        try:
            header, row = next(reader, []), next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path} line {reader.line_num}: not valid CSV ({error}); correct the file") from error
    names = [name.strip() for name in header]
    if row is None:
        raise InputError(f"{path}: holds no rows; give a file with at least one")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: its header has the column '{twice[0]}' twice; rename one of them")
    if len(row) > len(names):
        raise InputError(
            f"{path} line {reader.line_num}: more cells than the header has columns; quote cells with '{separator}'"
        )
    features = datasets.Features({name: datasets.Value("string") for name in names})
    options: dict[str, Any] = {"sep": separator, "features": features, "keep_default_na": False, "names": names}
    return Table(_load("csv", path, cache, streaming, header=0, **options), str(path))


def hash_file(path: Path) -> str:
    """Hashes a file's bytes. Raises InputError when it cannot be read."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
        name: the source as the user gave it.
        splits: the files, or the `datasets.Dataset`, of "train" and "eval", where the source has them.
        cache: folder for what `datasets` reads.
        streaming: rows are read as they are needed.
    """

    name: str
    splits: Mapping[str, Any]
    cache: Path
    streaming: bool = False
    _tables: dict[str, list[Table]] = field(default_factory=dict, repr=False)

    def data(self, split: str) -> Any:
        """The files or the data set of a split. Raises InputError when the source has none."""
        if split not in self.splits:
            raise InputError(
                f"data_path '{self.name}': has only evaluation data; add training data, or give it as eval_data_path"
            )
        return self.splits[split]

    def identities(self, split: str) -> set[Path | str]:
        """The files of a split, or the data set's fingerprint."""
        data = self.data(split)
        return {path.resolve() for path in data} if isinstance(data, list) else {data._fingerprint}

    def fingerprint(self, split: str) -> str:
        """Hashes the contents of a split without parsing its rows."""
        data = self.data(split)
        if not isinstance(data, list):
            return data._fingerprint
        return hashlib.blake2b("".join(map(hash_file, data)).encode(), digest_size=16).hexdigest()

    def tables(self, split: str) -> list[Table]:
        """The tables of a split, opened on the first call. Raises InputError when one holds no rows."""
        if split not in self._tables:
            data = self.data(split)
            if isinstance(data, list):
                self._tables[split] = [read_file(path, self.cache, self.streaming) for path in data]
            else:
                if not self.streaming and not len(data):
                    raise InputError(f"data_path '{self.name}': its {split} split holds no rows")
                self._tables[split] = [Table(data, f"{self.name} ({split})")]
        return self._tables[split]


@contextlib.contextmanager
def named_as(prefix: str) -> Iterator[None]:
    """Errors about a data_path name the setting that the path comes from: `eval_` or `ptx_` before data_path."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise (InputError(prefix + text) if text.startswith("data_path ") else error) from error.__cause__


def resolve_source(
    name: str, cache: Path, *, split: str = "", named: NamedDataset | None = None, streaming: bool = False
) -> Source:
    """Finds the source that `name` stands for.

    Args:
        name: `demo`, a file, a glob, a folder, a `save_to_disk` folder, or a data set of the hub; each with `@split`
            where it has several, the hub's also with `:config`.
        cache: the cache folder.
        split: the split to train on, where the name does not say it.
        named: the declaration of a named data set.
        streaming: read rows as they are needed.

    Raises:
        InputError: there is no such source; the message names what was looked for.
    """
    store = cache / "datasets"
    if name == DEMO_NAME:
        from jaxrlhf.data.demo import materialize_demo

        demo = materialize_demo(cache)
        return Source(name, {"train": [demo.train], "eval": [demo.eval]}, store, streaming)
    plain, _, wanted = (name, "", "") if Path(name).expanduser().exists() else name.rpartition("@")
    plain, wanted = (plain, wanted or split) if plain else (name, split)
    path = Path(plain).expanduser()
    if named and (Path(named.path).expanduser().exists() or suffix_of(named.path) or looks_like_path(named.path)):
        plain, path = named.path, Path(named.path).expanduser()  # a declaration may name a local file
    if path.is_file():
        if not suffix_of(path):
            endings = f"{', '.join(KINDS)}, each also {', '.join(COMPRESSED[1:])}"
            raise InputError(f"data_path '{name}': unknown kind of file; use one of {endings}")
        return Source(name, {"train": [path]}, store, streaming)
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if path.is_dir() and not saved:
        found = [p for p in path.rglob("*") if p.is_file() and suffix_of(p)]
        visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        groups = _by_split(name, visible, path)
        return Source(name, choose_splits(name, groups, *_named_splits(named, groups, wanted)), store, streaming)
    if any(sign in plain for sign in "*?["):
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file() and suffix_of(p)]
        return Source(name, choose_splits(name, _by_split(name, found, path.parent), wanted), store, streaming)
    if not saved and (suffix_of(path) or looks_like_path(plain)):
        raise InputError(f"data_path '{name}': no such file or folder; check the path")
    groups = _load_saved(name, path, streaming) if saved else _load_hub(name, plain, named, streaming)
    return Source(name, choose_splits(name, groups, *_named_splits(named, groups, wanted)), store, streaming)


def _named_splits(named: NamedDataset | None, groups: Mapping[str, Any], wanted: str) -> tuple[str, str]:
    """The split to train on, and the one to evaluate on, as a declaration has them; empty: where it does not say."""
    if named is None:
        return wanted, ""
    return wanted or (named.split if named.split in groups else ""), named.eval_split


def _load_saved(name: str, folder: Path, streaming: bool) -> dict[str, Any]:
    """The splits of a `save_to_disk` folder."""
    import datasets

    with loading(f"data_path '{name}': the saved data set cannot be read", "save it again"):
        loaded: Any = datasets.load_from_disk(str(folder))
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {key: part.to_iterable_dataset() for key, part in parts.items()} if streaming else parts


def _load_hub(name: str, plain: str, named: NamedDataset | None, streaming: bool) -> dict[str, Any]:
    """The splits of a data set of the hub: `owner/name` or `owner/name:config`."""
    import datasets

    repository, _, config = plain.partition(":")
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    if named:
        repository, config = named.path, config or named.config
        options |= {key: value for key in ("revision", "data_dir") if (value := getattr(named, key))}
    with loading(
        f"data_path '{name}': neither a file or folder here nor a data set that the hub gives",
        "check the name and the network, or give a local file",
    ):
        loaded: Any = datasets.load_dataset(repository, config or None, **options)
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def looks_like_path(name: str) -> bool:
    """True when `name` cannot be a name on the hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _by_split(name: str, files: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split that their names or folders say; those that say none are under the empty name."""
    if not files:
        raise InputError(f"data_path '{name}': holds no {', '.join(KINDS)} file; put the data there")
    groups: dict[str, list[Path]] = {}
    for path in sorted(files):
        try:
            relative = path.relative_to(root)
        except ValueError:
            relative = Path(path.name)
        groups.setdefault(_split_name(relative), []).append(path)
    return groups


def _split_name(path: Path) -> str:
    """The split that a file's name or one of its folders says: `train_sft` of `train_sft-00000-of-00003.parquet`."""
    stem = path.name.lower()[: path.name.lower().rindex(suffix_of(path))]
    for part in (stem, *(p.lower() for p in reversed(path.parts[:-1]))):
        plain = re.sub(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?([-_.][0-9a-f]{16})?$", "", part)
        words = re.findall(r"[a-z]+", plain)
        if any(word in (*TRAIN_NAMES, *EVAL_NAMES, "evaluation") for word in words):
            return plain.replace("training", "train").replace("evaluation", "eval")
    return ""


def _role(split: str) -> str:
    """ "train", "eval", or the empty string, by the words in a split's name."""
    words = re.findall(r"[a-z]+", split.lower())
    named = [w for w in words if w in (*TRAIN_NAMES, *EVAL_NAMES)]
    if not named:
        return ""
    return "train" if named[-1] in TRAIN_NAMES else "eval"


def choose_splits(name: str, groups: Mapping[str, Any], wanted: str = "", evaluation: str = "") -> dict[str, Any]:
    """The split to train on as "train", and the one to evaluate on as "eval", where there are such.

    Args:
        name: the source, for messages.
        groups: the data of each split by its name; the empty name for data without one.
        wanted: the split to train on; empty: the only one that there is for training.
        evaluation: the split to evaluate on; empty: the one that belongs to the split to train on.

    Raises:
        InputError: `wanted` does not exist, or several splits could be meant.
    """
    listed = ", ".join(key or "(without a name)" for key in groups)
    if wanted and wanted not in groups:
        raise InputError(f"data_path '{name}': has no split '{wanted}'; it has {listed}")
    training = [wanted] if wanted else [key for key in groups if _role(key) == "train"]
    training = training or [key for key in groups if not _role(key)]
    if len(training) > 1:
        raise InputError(
            f"data_path '{name}': has several splits to train on: {', '.join(training)}; choose one with "
            f"{name}@{training[0]}"
        )
    start = training[0] if training else ""
    chosen = {"train": groups[start]} if training else {}
    partners = [start.replace("train", kind) for kind in EVAL_NAMES if "train" in start]
    partners += [*EVAL_NAMES, *(key for key in groups if not training and _role(key) == "eval")]
    found = [key for key in ([evaluation] if evaluation else partners) if key in groups and key != start]
    return chosen | ({"eval": groups[found[0]]} if found else {})
