"""YAML files of settings: scalars are read as text, so that flags and keys are parsed alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.errors import InputError

NONE_WORDS = ("none", "null", "~", "")


class Quoted(str):
    """Text in quotes, which is no number and not none."""


class _Loader(yaml.BaseLoader):
    """Leaves scalars as text, and refuses doubled keys."""

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        return Quoted(text) if node.style else text

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} occurs twice", key_node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that would be read as no value."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, "'" if is_none(text) or _looks_typed(text) else None
    ),
)


def is_none(word: Any) -> bool:
    """Returns True for a word that stands for no value."""
    return isinstance(word, str) and not isinstance(word, Quoted) and word.lower() in NONE_WORDS


def _looks_typed(text: str) -> bool:
    try:
        return text.lower() in ("true", "false") or float(text.replace(".inf", "inf")) is not None
    except ValueError:
        return False


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
