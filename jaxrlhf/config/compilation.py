"""JAX's persistent compilation cache: a program that any run has compiled is read from a folder instead."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from jaxrlhf.config.annotations import PathName
from jaxrlhf.config.settings import Settings
from jaxrlhf.errors import InputError

logger = logging.getLogger(__name__)

MAX_BYTES = 10 * 2**30
"""Size of the cache from which JAX removes the programs that were not used for longest."""


@dataclass(frozen=True)
class CompilationConfig(Settings, may_change=True):
    """The cache of compiled programs."""

    compilation_cache: PathName[str | None] = ""
    """Folder of compiled programs, which later runs read instead of compiling; none: no cache. Default:
    $JAX_COMPILATION_CACHE_DIR, else $XDG_CACHE_HOME/jaxrlhf/xla, else ~/.cache/jaxrlhf/xla."""


def use_compilation_cache(config: CompilationConfig) -> None:
    """Switches the cache on or off, for programs that JAX compiles from now on.

    JAX keys a program by its code, the compiler's flags and version, and the devices, and locks the folder, so that
    several processes and versions may share it.

    Raises:
        InputError: A folder was named that cannot be made.
    """
    import jax

    named = config.compilation_cache
    if named == "" and "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # JAX has read it, and what else its variables say
    folder = None if named is None else Path(named or default_folder())
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if named:
                raise InputError(
                    f"compilation_cache {folder} cannot be made ({error.strerror}); name another"
                ) from error
            logger.warning("%s cannot be made (%s), so programs are compiled anew in each run", folder, error.strerror)
            folder = None
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    if folder is None:
        return
    # Small programs too: a run has hundreds, and together they take longer than the large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def default_folder() -> Path:
    """The folder where nothing says another."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxrlhf" / "xla"
