"""The copy of a run's folder at a URL: a thread keeps the URL's files like those of the local folder.

Checkpoints are copied from hard links, so that the run may remove them meanwhile. Their metadata.json is copied last
and deleted first: a checkpoint without it is incomplete. Records are copied before the checkpoints they belong to.
"""

import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jaxrlhf.config.files import read_json, write_json_atomic
from jaxrlhf.config.remote import RemoteFolder, fetch
from jaxrlhf.config.secrets import redacted
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs.checkpoints import FINAL
from jaxrlhf.runs.exchange import PARTS
from jaxrlhf.runs.folder import EXPORT_FILES, RECORDS, check_unused
from jaxrlhf.runs.lock import LOCK
from jaxrlhf.runs.remote_lock import RemoteLock

INTERVAL = 30.0
"""Seconds between two looks for new files."""
LAST_SECONDS, LAST_PAUSE = 300.0, 10.0
"""Seconds for which the end of a run waits for a store that fails, and between attempts."""
ID = "remote.json"
"""File by which a working folder and a URL show that they hold the same run."""
LINKS = ".copying"
PATTERN = frozenset("*?[")
RANKS = (0, 1, 2)
COMPLETE = "metadata.json"
BEST = "best_step"
"""Entry of a checkpoint's metadata: the step of the best checkpoint at that time."""


@contextmanager
def copied_to(url: str) -> Iterator[Path]:
    """Yields a new local folder, whose files are copied to a URL at the end of the block.

    Raises:
        InputError: The URL cannot be used.
        StorageError: The store does not take the files.
    """
    remote = RemoteFolder(url)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield folder
        names = [path.relative_to(folder).as_posix() for path in _files(folder)]
        for rank in RANKS:
            remote.put(folder, [name for name in names if _rank(name) == rank])


def fetch_checkpoint(url: str) -> Path:
    """Returns the local copy of a checkpoint at a URL: the one that it names, or the newest of the run that it names.

    Raises:
        InputError: There is no complete checkpoint.
        StorageError: The store does not give it.
    """
    run, _, last = url.rstrip("/").rpartition("/")
    named = FINAL.fullmatch(last)
    found: list[Point] = []

    def choose(names: Iterable[str]) -> list[str]:
        points = [p for p in _complete(names) if not p.run and (not named or p.step == int(named[1]))]
        found.extend(sorted(points)[-1:])
        return [name for name in names if _point_of(name) in found]

    folder = fetch(run if named else url, choose)
    if not found:
        raise InputError(f"{redacted(url)}: there is no complete checkpoint; check the URL")
    return folder / found[0].name


class Point(NamedTuple):
    """A checkpoint's place below the output_dir: the folder of its run, "" for the output_dir itself, and its step."""

    run: str
    step: int

    @property
    def name(self) -> str:
        return str(PurePosixPath(self.run) / f"checkpoint-{self.step}")


class Mirror:
    """Copies a working folder to a URL while a block runs, and once more at its end.

    Args:
        url: Where the run's files belong.
        folder: The working folder.
        period: Steps between the checkpoints that are copied; 0: all of them. The newest is copied at the end.
        say: Prints a line.

    Raises:
        InputError: The URL cannot be used.
        StorageError: The store does not answer; at the end of the block, it does not take the run's files.
    """

    def __init__(self, url: str, folder: Path, period: int, say: Callable[[str], None]) -> None:
        if not PATTERN.isdisjoint(url):
            raise InputError(f"output_dir {redacted(url)}: fsspec takes *, ? and [ for patterns; choose another name")
        self.remote, self.folder, self.period, self.say = RemoteFolder(url), folder, period, say
        self._there: set[str] = set()
        self._copied: dict[str, tuple[int, int]] = {}  # size and time of change of plain files
        self._left: set[Point] = set()
        """Checkpoints that the URL had and that were not fetched."""
        self._counts: Counter[str] = Counter()
        """Checkpoints that the URL had, by run."""
        self._replaces = self._failing = False
        self._lock: RemoteLock | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mirror", daemon=True)

    def begin(self, resume: bool, overwrite: bool) -> None:
        """Brings the working folder to where the run begins: empty, as the run left it, or as the URL has it.

        Raises:
            InputError: The URL holds a run, and it is neither continued nor overwritten.
        """
        self._lock = RemoteLock(self.remote, self.say)
        names = set(self.remote.files()) - {LOCK}
        parts = _parts(names)
        self._there = names - parts
        marks = (*RECORDS, *EXPORT_FILES)
        found = {name for name in self._there if PurePosixPath(name).name in marks} | {p.name for p in self._points()}
        if not (resume or overwrite):
            check_unused(self.remote.shown, sorted(found))
        self.remote.delete(parts)
        for point in {point for name in self._there if (point := _point_of(name))} - self._points():
            self._delete_checkpoint(point)  # its copy was interrupted
        self._replaces = overwrite
        if resume and (not found or self._is_same_run()):
            return
        if self.folder.exists():
            shutil.rmtree(self.folder)
        if resume:
            self._fetch()

    def release(self) -> None:
        """Gives the lock at the URL back."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end.set()
        self._thread.join()
        try:
            self._copy_at_last()
        except StorageError as second:
            text = f"{second}. The run's files are in {self.folder}; the same command with --resume copies them"
            if error is None:
                raise StorageError(text) from second
            self.say(text)  # the user needs to see the error that ended the run
        finally:
            self.release()

    def copy(self, last: bool = False) -> None:
        """Copies what is new, then deletes at the URL what the run has removed.

        Args:
            last: The run has ended; its newest checkpoint is copied, whatever the step.

        Raises:
            StorageError: The store does not take it, or the working folder cannot be read or written at the moment.
        """
        try:
            self._copy(last)
        except StorageError:
            raise
        except OSError as error:  # a full disk, or a file that the run has just removed
            raise StorageError(f"the working folder {self.folder} cannot be copied: {error}") from error

    def _copy(self, last: bool) -> None:
        if not any(path.name != ID for path in _files(self.folder)):
            return
        if self._replaces:
            self._delete_overwritten()
        if not (self.folder / ID).exists():
            write_json_atomic(self.folder / ID, {"id": uuid.uuid4().hex})
        kept = _complete(path.relative_to(self.folder).as_posix() for path in _files(self.folder))
        self._copy_plain()
        newest = {max(point for point in kept if point.run == run) for run in {point.run for point in kept}}
        for point in sorted(kept - self._points()):
            if not self.period or point.step % self.period == 0 or (last and point in newest):
                self._copy_checkpoint(point)
        self._delete_removed(kept)

    def _copy_at_last(self) -> None:
        """Copies what is left, again for LAST_SECONDS while the store fails. Raises StorageError."""
        deadline = time.monotonic() + LAST_SECONDS
        while True:
            try:
                self.copy(last=True)
                return self.remote.delete(_parts(self.remote.files()))
            except StorageError as error:
                if time.monotonic() + LAST_PAUSE > deadline:
                    raise
                if not self._failing:
                    self.say(f"{error}. The run has ended; its files are copied as soon as possible")
                self._failing = True
                time.sleep(LAST_PAUSE)

    def _watch(self) -> None:
        while not self._end.wait(INTERVAL):
            try:
                self.copy()
            except StorageError as error:  # the copy at the end of the run raises it
                if not self._failing:
                    self.say(f"{error}. The run goes on; its files are in {self.folder}, and are copied when possible")
                self._failing = True
            else:
                if self._failing:
                    self.say(f"{self.remote.shown} takes the run's files again")
                self._failing = False

    def _points(self) -> set[Point]:
        return _complete(self._there)

    def _copy_plain(self) -> None:
        """Copies records and exports, the latter in the order in which `replace_files` puts them in place."""
        states = {}
        for path in _files(self.folder):
            name = path.relative_to(self.folder).as_posix()
            if _point_of(name) is None:
                status = path.stat()
                states[name] = (status.st_size, status.st_mtime_ns)
        changed = [name for name, state in states.items() if self._copied.get(name) != state]
        for rank in RANKS:
            names = self.remote.put(self.folder, sorted(name for name in changed if _rank(name) == rank))
            self._copied.update((name, states[name]) for name in names)
            self._there.update(names)
        gone = self._copied.keys() - states.keys()
        self.remote.delete(gone)
        self._there -= gone
        for name in gone:
            del self._copied[name]

    def _copy_checkpoint(self, point: Point) -> None:
        links = self.folder / LINKS
        shutil.rmtree(links, ignore_errors=True)
        try:
            shutil.copytree(self.folder / point.name, links, copy_function=_link)
        except (FileNotFoundError, shutil.Error):  # the run has removed it meanwhile
            return
        names = [path.relative_to(links).as_posix() for path in links.rglob("*") if path.is_file()]
        if COMPLETE in names:
            self.remote.put(links, sorted(name for name in names if name != COMPLETE), under=point.name)
            self.remote.put(links, [COMPLETE], under=point.name)
            self._there.update(f"{point.name}/{name}" for name in names)
        shutil.rmtree(links)

    def _delete_removed(self, kept: set[Point]) -> None:
        """Deletes checkpoints that the run has removed, once as many newer ones are at the URL as the run keeps."""
        there = self._points()
        for point in sorted(there - kept):
            newer = [other for other in there if other.run == point.run and other.step > point.step]
            count = sum(other.run == point.run for other in kept)
            if point in self._left:  # it was not removed; should the newest be damaged, it is needed
                count = max(count, self._counts[point.run])
            if newer and len(newer) >= count:
                self._delete_checkpoint(point)

    def _delete_checkpoint(self, point: Point) -> None:
        names = self._names_of(point)
        self.remote.delete(name for name in names if name.endswith(f"/{COMPLETE}"))
        self.remote.delete(names)
        self._there -= names

    def _delete_overwritten(self) -> None:
        """Deletes records and checkpoints of the run that this one replaces; its model stays for now."""
        for point in {point for name in self._there if (point := _point_of(name))}:
            self._delete_checkpoint(point)
        records = {name for name in self._there if PurePosixPath(name).name in (*RECORDS, ID)}
        self.remote.delete(records)
        self._there -= records
        self._replaces = False

    def _names_of(self, point: Point) -> set[str]:
        return {name for name in self._there if _point_of(name) == point}

    def _is_same_run(self) -> bool:
        path = self.folder / ID
        try:
            there = json.loads(self.remote.read(ID) or b"{}")
        except ValueError as error:
            raise InputError(
                f"{self.remote.shown}/{ID} is damaged; copy {path} there if {self.folder} holds this run, or delete "
                "both, and the run is fetched from the URL"
            ) from error
        return path.is_file() and read_json(path) == there

    def _fetch(self) -> None:
        """Fetches records and models, and of each run the newest checkpoint and the best."""
        self.say(f"resume: fetching the run from {self.remote.shown}")
        plain = {name for name in self._there if _point_of(name) is None}
        self.remote.get(plain, self.folder)
        for name in plain:
            status = (self.folder / name).stat()
            self._copied[name] = (status.st_size, status.st_mtime_ns)
        points = self._points()
        self._left, self._counts = set(points), Counter(point.run for point in points)
        for run in {point.run for point in points}:
            newest = max(point for point in points if point.run == run)
            self._fetch_checkpoint(newest)
            best = newest._replace(step=read_json(self.folder / newest.name / COMPLETE).get(BEST))
            if best in points - {newest}:
                self._fetch_checkpoint(best)
            self._left -= {newest, best}

    def _fetch_checkpoint(self, point: Point) -> None:
        names = self._names_of(point)
        last = f"{point.name}/{COMPLETE}"
        self.remote.get(names - {last}, self.folder)
        self.remote.get([last], self.folder)


def _files(folder: Path) -> list[Path]:
    """The files of a working folder, without links and what is still being written."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_temporary(name)]
        found += [Path(root, name) for name in names if not _is_temporary(name) and not Path(root, name).is_symlink()]
    return found


def _is_temporary(name: str) -> bool:
    return name.startswith(".") or (name.startswith("checkpoint-") and not FINAL.fullmatch(name))


def _parts(names: Iterable[str]) -> set[str]:
    """Files that machines pass to each other; after a run, those of a save that failed or was interrupted."""
    return {name for name in names if PARTS in PurePosixPath(name).parts}


def _point_of(name: str) -> Point | None:
    """The checkpoint that a file belongs to, by its name relative to the output_dir; None for other files."""
    parts = PurePosixPath(name).parts
    for i, part in enumerate(parts[:-1]):
        if match := FINAL.fullmatch(part):
            return Point("/".join(parts[:i]), int(match[1]))
    return None


def _complete(names: Iterable[str]) -> set[Point]:
    """The checkpoints that are complete, by the names of all files."""
    return {p for name in names if (p := _point_of(name)) and name == f"{p.name}/{COMPLETE}"}


def _rank(name: str) -> int:
    """One of RANKS. Weights go first, config.json last: who finds it finds a whole model."""
    plain = PurePosixPath(name).name
    return 2 if plain in ("config.json", COMPLETE) else 0 if plain.endswith((".safetensors", ".bin")) else 1


def _link(source: str, target: str) -> None:
    """Links a file to another name; copies it where the file system has no hard links."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
