"""A disk that is full, by a limit of the kernel."""

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(size):
    """The kernel writes no file beyond `size` bytes: a write that reaches over it is cut, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
