"""Checkpoints of machines that share no folder: parts and copies travel through the store at the run's URL.

The processes that see one local folder have a leader, the lowest of them, which makes and removes files there. Process
0's folder holds the checkpoints. While one is written, the processes of other machines put their parts under `.parts/`
at the URL, and process 0 fetches them before it completes the checkpoint, as if all had written into its folder. Before
one is read, the leaders of the other machines fetch it.
"""

import contextlib
import itertools
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax

from jaxrlhf.config.remote import RemoteFolder
from jaxrlhf.distributed import barrier, from_primary, gather, is_primary
from jaxrlhf.distributed.processes import seen
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs.checkpoint_index import Files, file_facts, is_own, sizes
from jaxrlhf.runs.storage import reason_of

PARTS = ".parts"


def leaders_of(folder: Path) -> tuple[int, ...]:
    """Returns, for each process, the lowest number of those that see its files in `folder`. All processes call it.

    Raises:
        InputError: The folder cannot be written.
    """
    if jax.process_count() == 1:
        return (0,)
    token, own = from_primary("naming a file", lambda: uuid.uuid4().hex), jax.process_index()
    probes = [folder / f".{token}-{process}.tmp" for process in range(jax.process_count())]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probes[own].touch()
    except OSError as error:
        raise InputError(f"working_dir {folder} cannot be written ({error.strerror}); choose another") from error
    barrier(f"writing {folder}")
    leaders = gather(f"looking at {folder}", seen(probes).index(True))
    probes[own].unlink(missing_ok=True)
    barrier(f"having looked at {folder}")
    return tuple(leaders)


def first(errors: Iterable[str | None]) -> str | None:
    """Returns the first error, if there is one."""
    return next((error for error in errors if error), None)


class Exchange:
    """Passes files between machines through the store. All processes make it, and call `bring` and `at_hand`, together.

    Args:
        url: URL of the run's folder.
        folder: The local folder of the run, under the same path on each machine.
        leaders: As `leaders_of` returns them.
    """

    def __init__(self, url: str, folder: Path, leaders: tuple[int, ...]) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        own = jax.process_index()
        same = [process for process, leader in enumerate(leaders) if leader == leaders[own]]
        self.leader = same[0]
        """The leader of this machine."""
        self.leads = same[0] == own
        """This process makes and removes the files of its machine."""
        self.is_apart = same[0] != 0
        """This process does not see process 0's folder."""
        self.share = same.index(own), len(same)
        """Number of this process among those of its machine, and their number."""
        self._count = itertools.count()
        self._place = f"{PARTS}/{from_primary('naming the exchange', lambda: uuid.uuid4().hex)}"

    def new_name(self) -> str:
        """Returns a name for an attempt to save, the same on all processes. A failed one may leave parts behind."""
        return f"save-{next(self._count)}"

    def send(self, folder: Path, name: str) -> Files:
        """Puts what this process has written into `folder` at the URL, for process 0 to `collect` by the same name.

        Returns:
            Size and checksum of each file.

        Raises:
            StorageError: The store does not take them.
        """
        files = file_facts(folder, filter(is_own, sizes(folder)))
        self._at(name).put(folder, files)
        return files

    def collect(self, folder: Path, name: str) -> None:
        """Fetches what all processes have sent into `folder`, on process 0, and removes it from the URL."""
        remote = self._at(name)
        remote.get(remote.files(), folder)
        self._clear()

    def bring(self, path: Path) -> None:
        """Copies the files of a folder or a checkpoint from process 0's machine to the same path on the others.

        Raises:
            StorageError: On every process, when one of them cannot.
        """
        name = path.relative_to(self.folder).as_posix()
        error, names, place = from_primary(f"sharing {path}", lambda: self._offer(path, name))
        if error is None and self.leads and self.is_apart:
            error = self._fetch(path, names, place)
        errors = gather(f"fetching {path}", error)
        if is_primary():
            with contextlib.suppress(StorageError):  # the end of the run removes it
                self._clear()
        if problem := first(errors):
            raise StorageError(f"cannot copy {path} to the other machines: {problem}")

    @contextlib.contextmanager
    def at_hand(self, checkpoint: Path) -> Iterator[None]:
        """The same for a block. Later the other machines remove their copy."""
        self.bring(checkpoint)
        yield
        barrier(f"reading {checkpoint}")
        self.discard(checkpoint)

    def discard(self, path: Path) -> None:
        """Removes a folder where it is not process 0's."""
        if self.leads and self.is_apart:
            shutil.rmtree(path, ignore_errors=True)

    def _offer(self, path: Path, name: str) -> tuple[str | None, list[str], str]:
        """Puts a folder at the URL, unless it is a checkpoint that is there. Returns why it failed, or names, place."""
        is_checkpoint = (path / "metadata.json").is_file()
        try:
            names = list(sizes(path)) if is_checkpoint else [file.name for file in path.iterdir() if file.is_file()]
            names = [name for name in names if not name.startswith(".")]
            metadata = (path / "metadata.json").read_bytes() if is_checkpoint else None
            if metadata and RemoteFolder(f"{self.url}/{name}").read("metadata.json") == metadata:
                return None, names, name
            place = f"{self._place}/{name}"
            RemoteFolder(f"{self.url}/{place}").put(path, names)
        except OSError as error:
            return reason_of(error), [], ""
        return None, names, place

    def _fetch(self, path: Path, names: list[str], place: str) -> str | None:
        """Fetches a folder; returns why it failed."""
        try:
            shutil.rmtree(path, ignore_errors=True)
            RemoteFolder(f"{self.url}/{place}").get(names, path)
        except OSError as error:
            return reason_of(error)
        return None

    def _at(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self.url}/{self._place}/{name}")

    def _clear(self) -> None:
        remote = RemoteFolder(f"{self.url}/{self._place}")
        remote.delete(remote.files())
