"""The C library's allocator on CPUs: memory is kept from step to step.

glibc gets each large array as fresh pages from the system and gives them back when the array is freed. A train step
allocates and frees gigabytes, so it spends a part of its time on page faults. `keep_memory` makes glibc serve all
arrays from one heap that stays. Other C libraries are left alone.
"""

import ctypes
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from jaxrlhf.errors import InputError

VARIABLE = "JAXRLHF_KEEP_MEMORY"
TUNABLES = "glibc.malloc"
"""Beginning of glibc's other names for the same options."""


class Option(NamedTuple):
    name: str
    number: int
    """Its number in malloc.h."""
    value: int
    reason: str


OPTIONS = (
    Option("MALLOC_ARENA_MAX", -8, 1, "all threads share one heap, so that what one frees another uses"),
    Option("MALLOC_MMAP_MAX_", -4, 0, "large arrays lie in the heap too, not in mappings that end with them"),
    Option("MALLOC_TRIM_THRESHOLD_", -1, -1, "the heap does not shrink when arrays at its end are freed"),
)
"""Options of `mallopt`, under the names of glibc's environment variables."""


@lru_cache
def glibc() -> ctypes.CDLL | None:
    """The C library of this process where it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def keep_memory(environment: Mapping[str, str], platform: str, verbose: bool = False) -> bool:
    """Sets `OPTIONS` in this process for a run on a CPU; does nothing on other platforms and C libraries.

    An option whose variable is in the environment stays as it is. `JAXRLHF_KEEP_MEMORY=0` switches all of it off.

    Args:
        environment: Variables of the process.
        platform: As `xla_flags.find_platform` names it.
        verbose: Prints what is set to stderr, with reasons.

    Returns:
        True if something is set.

    Raises:
        InputError: `JAXRLHF_KEEP_MEMORY` is neither 0 nor 1.
    """
    asked = environment.get(VARIABLE, "1")
    if asked not in ("0", "1"):
        raise InputError(
            f"{VARIABLE}={asked}: set it to 1, which keeps memory from step to step (the default), or to 0"
        )
    library = glibc()
    if asked == "0" or platform != "cpu" or library is None or TUNABLES in environment.get("GLIBC_TUNABLES", ""):
        return False
    chosen = [option for option in OPTIONS if option.name not in environment]
    if verbose and chosen:
        print("allocator (glibc):", file=sys.stderr)
    for option in chosen:
        library.mallopt(option.number, option.value)
        if verbose:
            print(f"  {option.name}={option.value}\n      {option.reason}", file=sys.stderr)
    return bool(chosen)


def give_back() -> None:
    """Gives unused pages of the heap back to the system, where the C library is glibc."""
    library = glibc()
    if library is not None:
        library.malloc_trim(0)
