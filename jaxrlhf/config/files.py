"""The cache folder; small text files: atomic writes (a reader sees the old content or the new), and JSON back."""

import errno
import json
import os
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


def read_json(path: str | Path, remedy: str = "the file may be truncated") -> dict[str, Any]:
    """The JSON object in a file. Raises InputError, which ends with `remedy`, when the file holds something else."""
    try:
        value = json.loads(retried(lambda: Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(value).__name__}; {remedy}")
    return value


def read_jsonl(path: str | Path) -> list[dict]:
    """The records of a .jsonl file. A last line cut short by a crash is left out.

    Raises InputError naming the file and line when any other line is not a JSON object.
    """
    text = retried(lambda: Path(path).read_text(encoding="utf-8", errors="replace"))
    records, lines = [], text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number} is not valid JSON; repair or delete that line") from error
        if not isinstance(record, dict):
            raise InputError(f"{path} line {number} is not a JSON object; repair or delete that line")
        records.append(record)
    return records
