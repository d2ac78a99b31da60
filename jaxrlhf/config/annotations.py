"""Annotations of settings: type, range, aliases, and whether a resumed run may change the value."""

import dataclasses
import functools
import math
import numbers
import operator
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro
from annotated_types import Ge, Gt, Le, Lt

from jaxrlhf.config.secrets import shown_setting
from jaxrlhf.errors import InputError

T = TypeVar("T")


class _Mark(NamedTuple):
    name: str


MAY_CHANGE, LASTING, SECTION, DERIVED, PATH = map(_Mark, ("may_change", "lasting", "section", "derived", "path"))

MayChange = Annotated[T, MAY_CHANGE]
"""A setting that a resumed run may have otherwise than the run that it continues."""
Lasting = Annotated[T, LASTING]
"""The opposite, in a class with `may_change=True`."""
Section = Annotated[T, SECTION]
"""Settings under a name of their own: `--sft.max_steps 5`, a mapping in YAML."""
Derived = Annotated[T, DERIVED, tyro.conf.Fixed, tyro.conf.Suppress]
"""A value that a program takes from elsewhere: neither a flag nor a YAML key."""

PathName = Annotated[T, PATH]
"""Text that may be a path: a leading ~ becomes the home folder."""

LARGEST = 10**9
"""Largest absolute value of a number whose annotation states no bound of its own."""
MAX_NAME = 255
"""Bytes that file systems allow in the name of a file or folder."""

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
CountOrAuto = Annotated[int, Ge(-1)]
"""A count, or -1 for one that the program finds."""
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]


def alias(*names: str) -> object:
    """Other names of a flag or key, as a part of its annotation."""
    return tyro.conf.arg(aliases=[f"--{name}" for name in names])


@dataclasses.dataclass(frozen=True)
class FromYaml:
    """Turns what a YAML file has for a setting into a list of texts, as a part of its annotation."""

    read: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class TrueWord:
    """A further word for true, as a part of the annotation of a truth value."""

    word: str


class Hint(NamedTuple):
    """The annotation of a field: its type without None, its notes, and whether None is allowed."""

    kind: Any
    notes: tuple[Any, ...] = ()
    optional: bool = False

    @property
    def is_part(self) -> bool:
        """True for settings whose names are the config's own."""
        return dataclasses.is_dataclass(self.kind) and SECTION not in self.notes

    @property
    def is_section(self) -> bool:
        """True for settings under the field's name."""
        return SECTION in self.notes

    @property
    def is_derived(self) -> bool:
        """True for a value that a program takes from elsewhere."""
        return DERIVED in self.notes

    @property
    def aliases(self) -> list[str]:
        """Other names."""
        named = [name for note in self.notes for name in getattr(note, "aliases", None) or ()]
        return [name.removeprefix("--").replace("-", "_") for name in named]


@functools.cache
def hints_of(cls: type) -> dict[str, Hint]:
    """{field: what its annotation says}."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hint_of(hints[f.name]) for f in dataclasses.fields(cls)}


def hint_of(annotation: object) -> Hint:
    """Reads the annotation of a field or of the items of a tuple."""
    notes: tuple[Any, ...] = ()
    if typing.get_origin(annotation) is Annotated:
        annotation, *more = typing.get_args(annotation)
        notes = tuple(more)
    members = typing.get_args(annotation)
    if type(None) not in members:
        return Hint(annotation, notes)
    inner = hint_of(typing.Union[tuple(member for member in members if member is not type(None))])  # noqa: UP007
    return Hint(inner.kind, notes + inner.notes, True)


_LIMITS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
_SCALARS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "text"),
}


def check_value(name: str, value: Any, hint: Hint) -> None:
    """Raises InputError naming the setting, its value and the type, range or choices that its annotation allows."""
    if value is None and hint.optional:
        return
    members: tuple[Any, ...] = typing.get_args(hint.kind)
    said: list[str] = []
    allowed, words = _SCALARS.get(hint.kind, (object, ""))
    if not isinstance(value, allowed) or (hint.kind in (int, float) and isinstance(value, bool)):
        said = [words]
    elif typing.get_origin(hint.kind) is Literal and value not in members:
        said = [f"one of {', '.join(map(str, members))}"]
    elif typing.get_origin(hint.kind) is tuple and not isinstance(value, str):
        paths = (PATH,) * (PATH in hint.notes)
        for item in tuple(value or ()):
            inner = hint_of(members[0])
            if inner.kind is str and not isinstance(item, str):
                continue  # turned into text by the config's own check, such as an object of reward_functions
            check_value(name, item, inner._replace(notes=inner.notes + paths))
    elif typing.get_origin(hint.kind) is dict and isinstance(value, dict):
        for key, item in value.items():
            check_value(name, key, Hint(str))
            if not isinstance(item, bool | int | float | str):
                raise InputError(f"{name}: {key}={item} must be a number, true, false or a text")
            check_value(f"{name}: {key}", item, Hint(str) if isinstance(item, str) else Hint(object))
    elif isinstance(value, str):
        said = _text_problems(value, PATH in hint.notes)
    else:
        limits = limits_of(hint)
        if not all(getattr(operator, compare)(value, limit) for compare, _, limit in limits):
            endless = isinstance(value, float) and not math.isfinite(value)
            said = ["finite"] if endless else [f"{words} {limit}" for _, words, limit in limits]
    if said:
        raise InputError(f"{name}={shown_setting(name, value)} must be {' and '.join(dict.fromkeys(said))}")


def limits_of(hint: Hint) -> list[tuple[str, str, float]]:
    """The range of a number: (comparison of `operator`, its words, limit). LARGEST bounds the sides without one."""
    if hint.kind not in (int, float):
        return []
    own = [(*_LIMITS[type(note)], note) for note in hint.notes if type(note) in _LIMITS]
    limits = [(compare, words, getattr(note, compare)) for compare, words, note in own]
    compared = {compare for compare, _, _ in limits}
    if not compared & {"ge", "gt"}:
        limits.append(("ge", "at least", -LARGEST))
    if not compared & {"le", "lt"}:
        limits.append(("le", "at most", LARGEST))
    return limits


def _text_problems(value: str, path: bool) -> list[str]:
    """The rule for text that no file, no program and no YAML file can hold."""
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return ["text of Unicode characters other than NUL"]
    if path and any(len(part.encode()) > MAX_NAME for part in value.split("/")):
        return [f"a path whose parts have at most {MAX_NAME} bytes"]
    return []
