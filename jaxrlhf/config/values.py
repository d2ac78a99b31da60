"""Reads one config value as its declared type, from a flag's tokens, YAML text or a Python value."""

import types
import typing
from typing import Any, Literal, Union

from jaxrlhf.errors import InputError

NONE_WORDS = {"none", "null", "~", ""}
TRUE_WORDS = {"true", "yes", "on", "1"}
FALSE_WORDS = {"false", "no", "off", "0"}


class Plain(str):
    """Unquoted text from a flag or YAML scalar, to be read as the field's type says (`none`, `1e-4`, `2,4,4`)."""


class Tokens(list):
    """What stood after a flag: a list of `Plain`, empty for a bare `--flag`."""


def without_none(kind: Any) -> tuple[Any, bool]:
    """(type without None, whether None is allowed)."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    return Union[tuple(members)], len(members) < len(typing.get_args(kind))  # noqa: UP007 - built at run time


class _Mismatch(Exception):
    """A value is not of the wanted type; turned into an InputError that names the flag."""


def convert(value: Any, kind: Any, choices: tuple | None, label: str) -> Any:
    """`value` as `kind`. Flags come as lists of `Plain` tokens, YAML and dicts as values. Raises InputError."""
    inner, optional = without_none(kind)
    origin = typing.get_origin(inner)
    shown = " ".join(value) if isinstance(value, Tokens) else value
    try:
        if isinstance(value, Tokens):
            if not value and inner is bool:
                return True
            if not value:
                raise InputError(f"{label} needs a value: {expected(kind, choices)}")
            if origin in (tuple, dict) and len(value) > 1:
                value = Plain(",".join(value))
            elif len(value) == 1:
                value = value[0]
            else:
                raise InputError(f"{label} takes one value ({expected(kind, choices)}), got {len(value)}: {shown}")
        return _value(value, inner, optional, choices)
    except _Mismatch as error:
        detail = f" ({error})" if str(error) else ""
        shown = "nothing" if shown is None or shown == "" else repr(str(shown) if isinstance(shown, str) else shown)
        raise InputError(f"{label}: expected {expected(kind, choices)}, got {shown}{detail}") from error


def _value(value: Any, kind: Any, optional: bool, choices: tuple | None) -> Any:
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if optional and (value is None or (isinstance(value, Plain) and value.lower() in NONE_WORDS)):
        return None
    if origin is tuple:
        return _tuple(value, members, choices)
    if origin is dict:
        return _dict(value, members)
    if origin is Literal:
        choices, members = members, tuple(dict.fromkeys(type(member) for member in members))
    elif origin in (Union, types.UnionType):
        members = tuple(member for member in (int, float, bool, str) if member in members)
    else:
        members = (kind,)
    result = _first_that_fits(value, members)
    if choices and result not in choices:
        raise _Mismatch
    return result


def _first_that_fits(value: Any, kinds: tuple[type, ...]) -> Any:
    """`value` as the first of `kinds` that takes it; a typed value or quoted text keeps its own type if allowed."""
    if not isinstance(value, Plain) and type(value) in kinds:
        return value
    for kind in kinds:
        if len(kinds) > 1 and _is_loose(value, kind):
            continue
        try:
            return _scalar(value, kind)
        except _Mismatch:
            continue
    raise _Mismatch


def _is_loose(value: Any, kind: type) -> bool:
    """Readings that hold only where no other type is possible: `1e3` as an int, `1` or `no` as a truth value."""
    text = str(value).lower()
    return (kind is int and "e" in text) or (kind is bool and text not in ("true", "false"))


def _scalar(value: Any, kind: type) -> Any:
    if kind is str and isinstance(value, str):
        return str(value)
    if kind is bool:
        if isinstance(value, str) and value.lower() in TRUE_WORDS | FALSE_WORDS:
            return value.lower() in TRUE_WORDS
        if isinstance(value, bool):
            return value
    elif kind in (int, float) and isinstance(value, str):
        text = value.strip().lower().removeprefix("+")
        text = text.replace(".inf", "inf") if text in (".inf", "-.inf") else text
        try:
            number = float(text) if kind is float or "e" in text else int(text)
        except ValueError as error:
            raise _Mismatch from error
        if number == number and (kind is float or number == int(number)):
            return kind(number)
    elif kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return float(value)
    elif kind not in (str, bool, int, float):
        raise TypeError(f"config fields of type {kind} are not supported")
    raise _Mismatch


def _tuple(value: Any, members: tuple, choices: tuple | None) -> tuple:
    if isinstance(value, Plain):
        items = [Plain(item.strip()) for item in value.split(",")] if value.strip() else []
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        items = [value]
    if any(isinstance(item, Plain) and not item for item in items):
        raise _Mismatch("an element is empty")
    kinds = members[:1] * len(items) if members[1:] == (Ellipsis,) else members
    if len(kinds) != len(items):
        raise _Mismatch(f"{len(items)} values")
    return tuple(_value(item, *without_none(kind), choices) for item, kind in zip(items, kinds, strict=True))


def _dict(value: Any, members: tuple) -> dict:
    if isinstance(value, Plain):
        pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
        bad = [key for key, equals, _ in pairs if not equals or not key.strip()]
        if bad and value.lower() not in NONE_WORDS:
            raise _Mismatch(f"{bad[0]!r} is not key=value")
        value = {} if bad else {key.strip(): Plain(item.strip()) for key, _, item in pairs}
    if not isinstance(value, dict):
        raise _Mismatch
    kind, optional = without_none(members[1])
    return {str(key): _value(item, kind, optional, None) for key, item in value.items()}


def expected(kind: Any, choices: tuple | None) -> str:
    """The type in words, for messages."""
    inner, optional = without_none(kind)
    origin, members = typing.get_origin(inner), typing.get_args(inner)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if origin is Literal or choices:
        text = "one of " + ", ".join(str(choice) for choice in choices or members)
        text = f"values, each {text}" if origin is tuple else text
    elif origin is tuple and members[1:] == (Ellipsis,):
        text = f"values separated by spaces or commas, each {expected(members[0], None)}"
    elif origin is tuple:
        text = f"{len(members)} values separated by spaces or commas, each {expected(members[0], None)}"
    elif origin is dict:
        text = "key=value,key=value"
    elif origin in (Union, types.UnionType):
        text = " or ".join(words[member] for member in members)
    else:
        text = words.get(inner, str(inner))
    comma = "," if origin is tuple else ""
    return f"{text}{comma} or none" if optional else text
