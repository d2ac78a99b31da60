"""What the annotation of a setting says: its type, its range, its other names, and what a resumed run may change."""

import dataclasses
import functools
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro
from annotated_types import Ge, Gt, Le, Lt

from jaxrlhf.errors import InputError

T = TypeVar("T")


class _Mark(NamedTuple):
    name: str


MAY_CHANGE, LASTING, SECTION, DERIVED = map(_Mark, ("may_change", "lasting", "section", "derived"))

MayChange = Annotated[T, MAY_CHANGE]
"""A setting that a resumed run may have otherwise than the run that it continues."""
Lasting = Annotated[T, LASTING]
"""The opposite, in a class with `may_change=True`."""
Section = Annotated[T, SECTION]
"""Settings under a name of their own: `--sft.max_steps 5`, a mapping in YAML."""
Derived = Annotated[T, DERIVED, tyro.conf.Fixed, tyro.conf.Suppress]
"""A value that a program takes from elsewhere: neither a flag nor a YAML key."""

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), Lt(math.inf)]
NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
Fraction = Annotated[float, Ge(0), Le(1)]


def alias(*names: str) -> object:
    """Other names of a flag or key, as a part of its annotation."""
    return tyro.conf.arg(aliases=[f"--{name}" for name in names])


@dataclasses.dataclass(frozen=True)
class FromYaml:
    """Turns what a YAML file has for a setting into a list of texts, as a part of its annotation."""

    read: Callable[[Any], Any]


@functools.cache
def hints_of(cls: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """{field: (type, notes of its annotation)}."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: _split(hints[f.name]) for f in dataclasses.fields(cls)}


def _split(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation as (type, notes); the notes of an optional type's member count too."""
    notes: tuple[Any, ...] = ()
    if typing.get_origin(kind) is Annotated:
        kind, *extra = typing.get_args(kind)
        notes = tuple(extra)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [_split(member) for member in typing.get_args(kind)]
        kind = typing.Union[tuple(member for member, _ in members)]  # noqa: UP007 - built at run time
        notes += tuple(note for _, more in members for note in more)
    return kind, notes


def is_optional(kind: Any) -> bool:
    """Returns True for a type that None belongs to."""
    return type(None) in typing.get_args(kind)


def scalar_of(kind: Any) -> Any:
    """The type without None, when one member is left."""
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    return members[0] if is_optional(kind) and len(members) == 1 else kind


_LIMITS: dict[type, tuple[str, str]] = {
    Ge: ("ge", "at least"),
    Gt: ("gt", "above"),
    Le: ("le", "at most"),
    Lt: ("lt", "below"),
}
_SCALARS: dict[Any, tuple[Any, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "text"),
}


def check_value(name: str, value: Any, kind: Any, notes: tuple[Any, ...]) -> None:
    """Raises InputError naming the setting, its value and the type, range or choices that its annotation allows."""
    if value is None and is_optional(kind):
        return
    inner = scalar_of(kind)
    allowed, words = _SCALARS.get(inner, (object, ""))
    if not isinstance(value, allowed) or (inner in (int, float) and isinstance(value, bool)):
        raise InputError(f"{name}={value!r} must be {words}")
    if typing.get_origin(inner) is Literal and value not in typing.get_args(inner):
        raise InputError(f"{name}={value!r} must be one of {', '.join(map(str, typing.get_args(inner)))}")
    if typing.get_origin(inner) is tuple and typing.get_args(inner)[0] in (int, float):
        for item in value:
            check_value(name, item, typing.get_args(inner)[0], ())
    limits = [(*_LIMITS[type(note)], note) for note in notes if type(note) in _LIMITS]
    limits = [(compare, words, getattr(note, compare)) for compare, words, note in limits]
    if not all(getattr(operator, compare)(value, limit) for compare, _, limit in limits):
        said = dict.fromkeys("finite" if math.isinf(limit) else f"{words} {limit}" for _, words, limit in limits)
        raise InputError(f"{name}={value} must be {' and '.join(said)}")


def is_part(kind: Any, notes: tuple[Any, ...]) -> bool:
    """Returns True for a field that holds settings whose names are the config's own."""
    return dataclasses.is_dataclass(kind) and SECTION not in notes
