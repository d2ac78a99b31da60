"""Placeholders for libraries that the settings of a command do not need, so that help pages print without loading them.

A config class stands in the module that uses it, beside code that imports JAX. `placeholders` lets such a module be
imported for its config class alone: what it takes from the libraries then stands for nothing.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax")
"""Libraries that take long to import and that no setting is made of."""


class _Anything(type):
    """The class of placeholders: every attribute, call and index of one is a placeholder again."""

    def __getattr__(cls, name: str) -> "type[Placeholder]":
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder

    def __call__(cls, *args: object, **kwargs: object) -> object:
        return args[0] if len(args) == 1 and isinstance(args[0], type) else Placeholder

    def __getitem__(cls, item: object) -> "type[Placeholder]":
        return Placeholder

    def __or__(cls, other: object) -> Any:
        return Placeholder

    __ror__ = __or__


class Placeholder(metaclass=_Anything):
    """Anything of a library. As the decorator of a class it returns the class."""


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the libraries' modules as empty ones, whose every name is a placeholder."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in LIBRARIES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = lambda name: getattr(Placeholder, name)


@contextmanager
def placeholders() -> Iterator[None]:
    """Imports within the block get placeholders for `LIBRARIES`; afterwards nothing of it is left in `sys.modules`.

    Does nothing where JAX is loaded already.
    """
    if "jax" in sys.modules:
        yield
        return
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in (*LIBRARIES, "jaxrlhf"):
                del sys.modules[name]
                package, _, module = name.rpartition(".")
                vars(sys.modules.get(package, ModuleType(""))).pop(module, None)
