"""Errors of the file system under a run, as `StorageError`."""

import contextlib
from collections.abc import Iterator

from jaxrlhf.errors import StorageError


@contextlib.contextmanager
def storage_errors(task: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an OSError of the block into a StorageError.

    Args:
        task: What the block does, such as "write metrics.jsonl".
        remedy: What the user can do, or what is left.
        *kinds: Further exceptions by which a library reports a failure of the storage.

    Raises:
        StorageError: `cannot {task}: {reason}; {remedy}`.
    """
    try:
        yield
    except (OSError, *kinds) as error:
        raise StorageError(f"cannot {task}: {reason_of(error)}; {remedy}") from error


def reason_of(error: Exception) -> str:
    """One line that says why the storage failed."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return "no space left on the disk" if "No space left" in reason else reason
