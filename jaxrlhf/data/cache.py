"""The cache of tokenised data and of the demo: its folder, keys, and files that appear only when complete."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxrlhf.errors import InputError


def check_writable(folder: Path) -> None:
    """Makes the cache folder. Raises InputError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"data_cache_dir '{folder}': cannot be written ({error.strerror or error}); free space there, or choose "
            "another folder"
        ) from error


def hash_json(value: object) -> str:
    """Hashes a JSON value. The order of keys does not matter."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def created(target: Path) -> Iterator[Path]:
    """Yields a temporary path at which the block creates a file or a folder, then moves it to `target`.

    Readers see all of it or nothing. When another process creates the target first, that one stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield temporary
        try:
            os.replace(temporary, target)
        except OSError:
            if not target.exists():
                raise
