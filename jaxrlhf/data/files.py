"""Tables of rows: one for each file or data set, read by `datasets`.

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
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.config.files import check_regular, parse_json
from jaxrlhf.data.cache import created
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Row = Mapping[str, Any]
"""A row of data: its values by column."""
JSON, CSV = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
KINDS = (*JSON, *CSV, ".parquet", ".arrow", ".txt")
COMPRESSED = ("", ".gz", ".zst", ".bz2")
MAX_GROWTH, SMALL = 200, 10**8
"""A compressed file of text grows at most this many times, or has at most this many bytes."""


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

    def each(self, count: int | None = None) -> Iterator[Row]:
        """The rows as columns, or the first of them. A streamed file is read here, so its faults show here."""
        with loading(f"{self.name}: cannot be read", "copy it again, text as UTF-8"):
            yield from self.dataset if count is None else self.dataset.take(count)

    def head(self, count: int) -> list[Any]:
        """The first rows, without blank lines."""
        columns: dict[str, list[Any]] = {}
        for row in self.each(count):
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        return [row for row in self.parse(columns) if row is not None] if columns else []


def parse_line(text: str, where: Callable[[], str]) -> Any:
    """Parses a line of JSON; None for a blank one. Raises InputError with the place that `where()` names."""
    text = text.lstrip("\ufeff")
    if not text.strip():
        return None
    try:
        return parse_json(text)
    except ValueError as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
        )
        raise InputError(
            f"{where()}: not valid JSON ({reason}); correct the line, or delete it from a file with one JSON object "
            "per line"
        ) from error


def table_of_rows(rows: Sequence[object], name: str, unit: str, numbers: Sequence[int] | None = None) -> Table:
    """A table of JSON values that are in memory."""
    import datasets

    return Table(datasets.Dataset.from_dict({"text": [json.dumps(row) for row in rows]}), name, unit, True, numbers)


def suffix_of(path: Path | str) -> str:
    """The kind of a file by its name, without the compression: `.jsonl` of `rows.jsonl.gz`. Empty for other files."""
    name = Path(path).name.lower()
    return next((kind for kind in KINDS for end in COMPRESSED if name.endswith(kind + end)), "")


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a file for reading bytes, uncompressed. Raises InputError naming the file when it cannot be read."""
    import fsspec

    with reading(path), fsspec.open(str(path), "rb", compression=compression_of(path)) as file:
        raw: Any = file
        yield io.BufferedReader(raw)  # the reader of zstandard gives no lines


def compression_of(path: Path) -> str | None:
    """The name that fsspec has for a file's compression."""
    return {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(path.suffix.lower())


def check_compressed(path: Path) -> None:
    """Raises InputError for a compressed file that grows beyond measure, or that is cut off."""
    sizes = _sizes_of_zstandard(path) if compression_of(path) == "zstd" else _sizes_of_stream(path)
    bound, size = max(MAX_GROWTH * path.stat().st_size, SMALL), 0
    for part in sizes:
        size += part
        if size > bound:
            raise InputError(
                f"{path}: grows to more than {MAX_GROWTH} times its size, which no text does; if it is meant so, "
                "uncompress it"
            )


def _sizes_of_stream(path: Path) -> Iterator[int]:
    """Bytes of one part after the other of a .gz or .bz2 file."""
    with open_file(path) as file:
        while part := file.read(1 << 20):
            yield len(part)


def _sizes_of_zstandard(path: Path) -> Iterator[int]:
    """Bytes of one part after the other of a .zst file. A file that is cut off ends there without a word for its
    readers, so this looks at its frames."""
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{path}: .zst needs the package zstandard; install it, or give the file as .gz") from error
    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    with reading(path), open(path, "rb") as file:
        try:
            while chunk := file.read(1 << 14):  # may become thousands of times as large
                while chunk:
                    yield len(frame.decompress(chunk))
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
        check_regular(path)
        yield
    except EOFError as error:
        raise InputError(f"{path}: is cut off ({error}); copy or download it again") from error
    except zlib.error as error:
        raise InputError(f"{path}: cannot be read ({error}); copy or download it again") from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error


@contextlib.contextmanager
def loading(problem: str, remedy: str) -> Iterator[None]:
    """Turns the errors of `datasets` into an InputError: `problem` (cause); `remedy`."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except InputError:
        raise
    except Exception as error:  # datasets and pyarrow raise many kinds for damaged files
        cause = (error.__cause__ if isinstance(error, DatasetGenerationError) else None) or error
        if isinstance(cause, EOFError):
            raise InputError(f"{problem} (it is cut off: {first_line(cause)}); copy or download it again") from error
        raise InputError(f"{problem} ({first_line(cause)}); {remedy}") from error


def check_arrow(path: Path) -> None:
    """Raises InputError for a damaged Arrow file. Readers trust its offsets, so a wrong one ends the process."""
    import pyarrow

    problem = f"{path}: cannot be read as Arrow"
    with loading(problem, "write the file again"), reading(path), pyarrow.memory_map(str(path)) as source:
        try:
            batches = iter(pyarrow.ipc.open_stream(source))
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        for batch in batches:
            batch.validate(full=True)


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
    if compression_of(path) and not streaming:
        check_compressed(path)
    if kind in JSON:
        table = _read_json(path, cache, streaming)
    elif kind in CSV:
        table = _read_csv(path, cache, streaming)
    else:
        options = {"sample_by": "document"} if kind == ".txt" else {}
        reader = {".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}[kind]
        plain = path if kind == ".txt" else _uncompressed(path, kind, cache)
        if kind == ".arrow":
            check_arrow(plain)
        table = Table(_load(reader, plain, cache, streaming, **options), str(path))
    if not streaming and not len(table.dataset):
        raise InputError(f"{path}: holds no rows; give a file with at least one")
    return table


def _load(reader: str, path: Path, cache: Path, streaming: bool, **options: Any) -> Dataset | IterableDataset:
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
    first = next((text for text in (row["text"] for row in table.each(100)) if text.strip()), None)
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
        return parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); correct the file"
        ) from error
    except ValueError as error:
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
