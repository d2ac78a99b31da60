"""Records of a run's folder: while a file cannot be written, what belongs into it waits in memory."""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.config.files import read_jsonl, write_json_atomic, write_text_atomic
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs.storage import reason_of, storage_errors

Record = dict[str, Any]
"""A line of a file of records: its `step`, and values by name."""
JSONL = ("metrics.jsonl", "samples.jsonl")
MAX_WAITING = 64 * 2**20  # bytes of records that wait in memory; of more, the oldest are dropped
RETRY_SECONDS = 5.0  # between two tries, as one try may take long on a network file system
REMEDY = "free or repair the disk, then continue the run with --resume"


def read_records(path: str | Path) -> list[Record]:
    """The records of a run's .jsonl file, as `read_jsonl`.

    Raises InputError also when a record has no `step`.
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        if type(record.get("step")) is not int:
            raise InputError(f"{path} record {number} has no step; repair or delete that line")
    return records


class Records:
    """Files of a folder that grow record by record: the .jsonl files of a run, say.

    A disk that is full, read-only or away does not end a run: records wait in memory until a later one can be written.
    `say` gets one line when that begins and one when it is over.

    Args:
        folder: The folder.
        say: Prints a line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._size = self._lost = 0
        self._whole: dict[str, int] = {}
        self._files: dict[str, object] = {}
        self._failed_at: float | None = None

    def append(self, name: str, record: Mapping[str, object]) -> None:
        """Adds a record to the file `name`, now or when it can be written again."""
        self.append_bytes(name, json_line(record).encode())

    def append_bytes(self, name: str, data: bytes) -> None:
        """Adds bytes to the file `name`, all of them or, for now, none."""
        self._waiting.append((name, data))
        self._size += len(data)
        self._try_to_write(name)
        while self._size > MAX_WAITING:
            self._size -= len(self._waiting.popleft()[1])
            self._lost += 1

    def replace(self, name: str, value: object) -> None:
        """Writes a JSON file atomically, now or when it can be written again."""
        self._files[name] = value
        self._try_to_write(name)

    def finish(self) -> None:
        """Writes what waits. Raises StorageError when that fails, or when records were dropped."""
        names = ", ".join(sorted({*self._files, *(name for name, _ in self._waiting)}))
        with storage_errors(f"write {names} in {self.folder}", f"{len(self._waiting)} records are lost"):
            self._write()
        if self._lost:
            raise StorageError(
                f"{self._lost} records of {self.folder} are lost: the disk could not be written for so long that they "
                "no longer fitted in memory"
            )

    def cut_partial_lines(self) -> None:
        """Cuts each file after its last whole line, so that the next record starts on a line of its own."""
        for path in (self.folder / name for name in JSONL):
            if path.is_file():
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def read(self, name: str) -> list[Record]:
        """Returns the records of a file, with those that wait in memory. Raises StorageError."""
        path = self.folder / name
        with storage_errors(f"read {path}", REMEDY):
            records = read_records(path) if path.exists() else []
        return records + [json.loads(line) for other, line in self._waiting if other == name]

    def rewind(self, step: int) -> list[Record]:
        """Drops the records after `step`; returns them. Raises StorageError."""
        dropped: list[Record] = []
        for name in JSONL:
            records = self.read(name)
            kept = [record for record in records if record["step"] <= step]
            dropped += [record for record in records if record["step"] > step]
            if records:
                text = "".join(map(json_line, kept))
                with storage_errors(f"rewind {name} in {self.folder}", REMEDY):
                    write_text_atomic(self.folder / name, text)
            self._waiting = deque(item for item in self._waiting if item[0] != name)
            self._whole.pop(name, None)
        self._size = sum(len(line) for _, line in self._waiting)
        return dropped

    def _try_to_write(self, name: str) -> None:
        """Writes what waits. A failure is printed, the first one of several in a row."""
        if self._failed_at is not None and time.monotonic() - self._failed_at < RETRY_SECONDS:
            return
        try:
            self._write()
        except OSError as error:
            if self._failed_at is None:
                self._say(
                    f"WARNING: {name} cannot be written ({reason_of(error)}). The run goes on and keeps its records in "
                    f"memory until it can; free or repair the disk of {self.folder}"
                )
            self._failed_at = time.monotonic()

    def _write(self) -> None:
        """Writes what waits, in order."""
        count = len(self._waiting)
        for name, value in list(self._files.items()):
            write_json_atomic(self.folder / name, value)
            del self._files[name]
        while self._waiting:
            name, data = self._waiting[0]
            self._write_bytes(name, data)
            self._waiting.popleft()
            self._size -= len(data)
        if self._failed_at is not None:
            self._failed_at = None
            self._say(f"the disk of {self.folder} can be written again: the {count} records that waited are written")

    def _write_bytes(self, name: str, data: bytes) -> None:
        # A failed write may leave a part of the record, and on network file systems it may fail only when the file is
        # closed. The next one first cuts the file to what was whole.
        with open(self.folder / name, "ab", buffering=0) as file:
            if name in self._whole:
                file.truncate(self._whole[name])
            self._whole[name] = file.seek(0, os.SEEK_END)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        del self._whole[name]


def json_line(record: Mapping[str, object]) -> str:
    """A record as a line of a .jsonl file."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
