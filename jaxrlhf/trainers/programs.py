"""Compiled programs of a run: each first run is announced, and programs may be compiled ahead, in threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, ParamSpec, TypeVar

import jax

from jaxrlhf.config.allocator import give_back
from jaxrlhf.distributed.activity import activity
from jaxrlhf.runs import Run
from jaxrlhf.runs.console import Console

PyTree = Any
P = ParamSpec("P")
Result = TypeVar("Result")


class Announce(Generic[P, Result]):
    """Calls a jitted function, and says that it compiles when its positional arguments have new shapes.

    Memory that the allocator keeps goes back to the system first: what other programs left rarely fits the new one.
    """

    def __init__(self, run: Run | Console | None, name: str, function: Callable[P, Result]) -> None:
        self.run, self.name, self.function = run, name, function
        self.seen: set[tuple] = set()
        self._ahead: tuple[tuple | None, Future[object]] | None = None

    def compile_ahead(self, compiled: Callable[[], object], args: Sequence[PyTree] | None = None) -> Future[object]:
        """Calls `compiled` in a thread; a call of the function that needs the program waits until it is done.

        Args:
            compiled: Compiles the program, so that JAX finds it. Its errors are left to the call.
            args: Positional arguments of calls that need the program, or objects with their shapes; default: of all.

        Returns:
            What the thread will return.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix=f"compiles the {self.name}")
        begun = pool.submit(compiled)
        pool.shutdown(wait=False)
        self._ahead = None if args is None else _shapes(args), begun
        return begun

    def _wait_for_compiler(self, args: Sequence[PyTree]) -> None:
        if self._ahead is not None and self._ahead[0] in (None, _shapes(args)):
            wait([self._ahead[1]])
            self._ahead = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        shapes = tuple((x.shape, str(x.dtype)) if hasattr(x, "dtype") else x for x in jax.tree.leaves(args))
        activity.program = self.name
        if self.run is None or shapes in self.seen:
            self._wait_for_compiler(args)
            return self.function(*args, **kwargs)
        self.seen.add(shapes)
        before = activity.compile_seconds
        with self.run.status(f"{self.name}: compiling, then the first run…") as notes:
            self._wait_for_compiler(args)
            give_back()
            result = jax.block_until_ready(self.function(*args, **kwargs))
            notes.append(f"{activity.compile_seconds - before:.1f}s of it compiling")
        return result


def _shapes(args: Sequence[PyTree]) -> tuple:
    return tuple(x.shape if hasattr(x, "shape") else x for x in jax.tree.leaves(tuple(args)))
