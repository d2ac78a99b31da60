"""The cache folder; text and JSON files: written atomically (old content or new, never a part), read with limits.

Files come from anywhere. `read_text` opens regular files of a bounded size only: a pipe would block and a device never
end. `parse_json` bounds what makes programs fail later: nesting, numbers of thousands of digits, text that no file can
hold.
"""

import errno
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jaxrlhf.errors import InputError

Value = TypeVar("Value")

PASSING = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN}
)
"""Errors with which a network file system answers while its server is away for a moment."""
PAUSES = (0.5, 2.0, 5.0)  # seconds before each further try
MAX_TEXT = 2**29
"""Bytes of the largest text file that is read as a whole; the largest published tokenizers have about 2**25."""
MAX_DEPTH = 100
"""Lists and objects inside each other."""


def default_cache() -> Path:
    """The cache folder where no other is given: $JAXRLHF_CACHE, else ~/.cache/jaxrlhf."""
    return Path(os.environ.get("JAXRLHF_CACHE") or "~/.cache/jaxrlhf").expanduser()


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` through a temporary file in the same folder and `os.replace`.

    The folder is created if needed. Raises OSError when it cannot be written; `path` is then as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = os.stat(path).st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json_atomic(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON to `path`, atomically. Raises ValueError for NaN and infinities."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def retried(action: Callable[[], Value]) -> Value:
    """Calls `action`, again after a pause when it raises one of `PASSING`. The last error is raised."""
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(pause)
    return action()


def check_output(path: str | Path | None, option: str) -> None:
    """Raises InputError unless a result can be written to `path`, where one is named; makes its folder."""
    if not path:
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be written ({error}); name a file in another folder") from error
    if path.is_dir():
        raise InputError(f"{option}: {path} is a folder; name a file in it")


def check_regular(path: str | Path, most: int | None = None) -> None:
    """Raises OSError unless `path` is a regular file, of at most `most` bytes."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise OSError(None, f"it is {what}, not a file")
    if most is not None and found.st_size > most:
        raise OSError(None, f"it has {found.st_size:,} bytes; at most {most:,} are read")


def read_text(path: str | Path, most: int = MAX_TEXT) -> str:
    """The text (UTF-8) of a file. Raises OSError, or ValueError for other bytes and for a path that can be none."""
    check_regular(path, most)
    return Path(path).read_text(encoding="utf-8")


def is_plain_name(name: object) -> bool:
    """True for the name of a file that lies beside the one that names it, not above, below or elsewhere."""
    return isinstance(name, str) and Path(name).name == name != ".." and "\0" not in name and bool(name)


def parse_json(text: str) -> Any:
    """The JSON value that a text holds. Raises ValueError with a reason for a message."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise ValueError("it holds a number of thousands of digits") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value


def check_unicode(value: object) -> None:
    """Raises ValueError for a JSON value with half of a surrogate pair (`"\\ud800"`), which no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ValueError(f"it holds {half}, half of a surrogate pair, which is no character") from error


def _depth(value: object) -> int:
    """The depth of lists and objects that stand inside each other."""
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        depth += 1
        level = [item for inner in level for item in (inner.values() if isinstance(inner, dict) else inner)]
    return depth


def read_json(path: str | Path, remedy: str = "the file may be truncated") -> dict[str, Any]:
    """The JSON object in a file. Raises InputError, which ends with `remedy`, when the file holds something else."""
    try:
        value = parse_json(retried(lambda: read_text(path)))
        check_unicode(value)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(value).__name__}; {remedy}")
    return value


def read_jsonl(path: str | Path) -> list[dict]:
    """The records of a .jsonl file. A last line cut short by a crash is left out.

    Raises InputError naming the file and line when any other line is not a JSON object.
    """

    def read() -> str:
        check_regular(path)
        return Path(path).read_text(encoding="utf-8", errors="replace")

    try:
        lines = retried(read).split("\n")
    except OSError as error:
        if error.errno in PASSING:  # the storage's fault
            raise
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number} is not valid JSON; repair or delete that line") from error
        if not isinstance(record, dict):
            raise InputError(f"{path} line {number} is not a JSON object; repair or delete that line")
        records.append(record)
    return records
