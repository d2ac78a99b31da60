"""Values as text, in flags and in YAML, where quotes tell text from numbers."""

import contextlib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxrlhf.errors import InputError

NONE_WORDS = ("none", "null", "~", "")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class _Quoted(str):
    """Text in quotes, which is no number and not none."""


class _Loader(yaml.BaseLoader):
    """Leaves scalars as text, and refuses doubled keys."""

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        return _Quoted(text) if node.style else text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that would be read as something else."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping, with scalars as text. Raises InputError for a file that holds something else."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold 'setting: value' lines, found a {type(values).__name__}")
    return values


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML of plain values, such that `read_yaml` gives text that means the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def is_none(word: Any) -> bool:
    """Returns True for a word that stands for no value."""
    return isinstance(word, str) and not isinstance(word, _Quoted) and word.lower() in NONE_WORDS


def _number(text: str) -> int | float | None:
    for read in (int, float):
        with contextlib.suppress(ValueError):
            number = read(text.replace(".inf", "inf"))
            return None if "_" in text or number != number else number
    return None


def value_of(kind: Any, text: str) -> Any:
    """The text as a value of `kind`; unchanged where it is none."""
    if typing.get_origin(kind) is Literal:
        return {str(choice): choice for choice in typing.get_args(kind)}.get(text, text)
    if kind is bool:
        known = text.lower() in TRUE_WORDS + FALSE_WORDS
        return text.lower() in TRUE_WORDS if known else text
    number = _number(text) if kind in (int, float) else None
    with contextlib.suppress(OverflowError):
        if number is not None and (kind is float or number == int(number)):
            return kind(number)
    return str(text)


def guess(text: str) -> int | float | bool | str:
    """The value of an entry of a dict, whose type no annotation says."""
    if isinstance(text, _Quoted) or not isinstance(text, str):
        return str(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = _number(text)
    return text if number is None else number


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, "'" if is_none(text) or not isinstance(guess(text), str) else None
    ),
)
