"""Files at URLs such as s3://bucket/run or gs://bucket/model, through fsspec: listed, fetched, put, deleted."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from jaxrlhf.config.files import default_cache, write_json_atomic
from jaxrlhf.config.secrets import redacted
from jaxrlhf.errors import InputError, StorageError

T = TypeVar("T")

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://.+")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
"""Extra of jaxrlhf that brings the package of a protocol."""
WAITS = (1.0, 3.0, 10.0)
"""Seconds between attempts at a task that the store does not do. The packages themselves repeat sooner."""


def is_url(name: str | os.PathLike) -> bool:
    """True for a name with a protocol, such as s3://bucket/folder."""
    return URL.fullmatch(str(name)) is not None


class RemoteFolder:
    """A folder of files at a URL. Its methods repeat what fails for a while.

    Args:
        url: PROTOCOL://PATH of any file system that fsspec knows.

    Raises:
        InputError: fsspec does not know the protocol, its package is not installed, or the URL names no place.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url, protocol = url.rstrip("/"), url.partition("://")[0]
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            package = f'; pip install "jaxrlhf[{EXTRAS[protocol]}]"' if protocol in EXTRAS else ""
            raise InputError(f"{redacted(url)}: {error}{package}") from error
        except ValueError as error:
            raise InputError(f"{redacted(url)}: {error}; give a local folder or the URL of a store") from error
        if hasattr(self.fs, "auto_mkdir"):  # file systems with folders, such as file:// and sftp://
            self.fs.auto_mkdir = True
        self.root = str(root).rstrip("/")
        if not self.root:
            raise InputError(f"{redacted(url)} names no place in the store; give one, such as s3://bucket/folder")

    @property
    def shown(self) -> str:
        """The URL without secrets."""
        return redacted(self.url)

    def files(self) -> dict[str, str]:
        """Keys of all files below the folder by relative name; a file whose content changes gets another key."""

        def find() -> dict[str, str]:
            self.fs.invalidate_cache()
            found = self.fs.find(self.root, detail=True)
            return {path[len(self.root) + 1 :]: _key(info) for path, info in found.items() if path != self.root}

        try:
            return self._repeated("list", find)
        except FileNotFoundError:
            return {}

    def key(self) -> str | None:
        """The key of the file that the URL names; None when it names none."""

        def look() -> str | None:
            self.fs.invalidate_cache()
            return _key(self.fs.info(self.root)) if self.fs.isfile(self.root) else None

        return self._repeated("look at", look)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None when there is none."""
        try:
            return self._repeated(f"read {name} of", lambda: self.fs.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None

    def get(self, names: Iterable[str], target: Path) -> None:
        """Copies files into a local folder, under the same relative names."""
        names = list(names)
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            paths = [f"{self.root}/{name}" for name in names], [str(target / name) for name in names]
            self._repeated(f"fetch {_some(names)} from", lambda: self.fs.get(*paths))

    def put(self, source: Path, names: Iterable[str], under: str = "") -> list[str]:
        """Copies files of a local folder to the same relative names, or to those below `under`.

        Returns:
            The names of the files that were copied; one that disappears meanwhile is left out.
        """
        target = f"{self.root}/{under}" if under else self.root
        names = list(names)
        while names := [name for name in names if (source / name).is_file()]:
            paths = [str(source / name) for name in names], [f"{target}/{name}" for name in names]
            try:
                self._repeated(f"write {_some(names)} to", lambda paths=paths: self.fs.put(*paths))
                return names
            except FileNotFoundError as error:
                if all((source / name).is_file() for name in names):
                    raise StorageError(f"cannot write to {self.shown}: there is no such place") from error
        return []

    def write(self, name: str, content: bytes) -> None:
        """Writes a file."""
        try:
            self._repeated("write to", lambda: self.fs.pipe_file(f"{self.root}/{name}", content))
        except FileNotFoundError as error:
            raise StorageError(f"cannot write to {self.shown}: there is no such place") from error

    def delete(self, names: Iterable[str]) -> None:
        """Deletes files; those that are gone already do not matter."""
        paths = [f"{self.root}/{name}" for name in names]

        def remove() -> None:
            left = [path for path in paths if self.fs.exists(path)]
            if left:
                self.fs.rm(left)

        if paths:
            self._repeated("delete files of", remove)

    def _repeated(self, task: str, work: Callable[[], T]) -> T:
        """Does a task, again after WAITS where the store fails.

        Raises:
            FileNotFoundError: As the task raises it.
            StorageError: The store refuses or does not answer.
        """
        for wait in (*WAITS, None):
            try:
                return work()
            except FileNotFoundError:
                raise
            except Exception as error:  # each package has errors of its own
                reason = redacted((str(error) or type(error).__name__).splitlines()[0])
                if wait is None or isinstance(error, PermissionError):
                    raise StorageError(
                        f"cannot {task} {self.shown}: {reason}; check the URL, its credentials and the network"
                    ) from error
                time.sleep(wait)
        raise AssertionError  # the loop returns or raises


def fetch(url: str, choose: Callable[[Iterable[str]], Iterable[str]]) -> Path:
    """Copies files of a remote folder into the cache, unless they are there unchanged; returns the local folder.

    Args:
        url: The folder.
        choose: Selects from the relative names those to copy.

    Raises:
        StorageError: The store does not give them.
    """
    remote = RemoteFolder(url)
    keys = remote.files()
    return _fetched(remote, cached(url, "remote"), keys, sorted(choose(keys)))


def fetch_data(url: str) -> Path:
    """Copies a file, or all files of a folder, into the cache as `fetch` does; returns the local file or folder.

    Raises:
        InputError: There is none.
        StorageError: The store does not give it.
    """
    folder, _, name = url.rstrip("/").rpartition("/")
    key = RemoteFolder(url).key()
    if key is not None:
        return _fetched(RemoteFolder(folder), cached(url, "remote"), {name: key}, [name]) / name
    path = fetch(url, lambda names: names)
    if not any(path.iterdir()):
        raise InputError(f"{redacted(url)}: no such file or folder; check the URL")
    return path


def _fetched(remote: RemoteFolder, folder: Path, keys: Mapping[str, str], names: Sequence[str]) -> Path:
    """Brings `names` of the remote folder into the local one, and removes there what the remote one has no longer."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # other processes of this machine fetch the same
        had = _record(folder)
        changed = [name for name in names if had.get(name) != keys[name] or not (folder / name).is_file()]
        gone = had.keys() - keys.keys()
        kept = {name: key for name, key in had.items() if name not in gone and name not in changed}
        if gone or changed:
            write_json_atomic(_record_of(folder), kept)
            for name in gone:
                (folder / name).unlink(missing_ok=True)
            remote.get(changed, folder)
            write_json_atomic(_record_of(folder), kept | {name: keys[name] for name in changed})
    return folder


def cached(url: str, kind: str) -> Path:
    """The folder of the cache that stands for a URL."""
    plain = redacted(url.rstrip("/"))
    label = re.sub(r"[^\w.-]+", "-", plain.partition("://")[2])[-60:].strip("-")
    return default_cache() / kind / f"{label}-{hashlib.blake2b(url.rstrip('/').encode(), digest_size=6).hexdigest()}"


def _record(folder: Path) -> Mapping[str, str]:
    """Keys of the files that were copied completely; none where the record is damaged."""
    try:
        found = json.loads(_record_of(folder).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _record_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _key(info: Mapping[str, object]) -> str:
    """Size and version of a file, as the store reports them."""
    names = ("ETag", "etag", "md5Hash", "content_settings", "LastModified", "last_modified", "mtime", "created")
    version = next((info[name] for name in names if info.get(name)), "")
    return f"{info['size']} {version}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
