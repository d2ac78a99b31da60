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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "No space left" in reason:
            reason = "no space left on the disk"
        raise StorageError(f"cannot {task}: {reason}; {remedy}") from error
