"""YAML files: read without tags that make objects, and within bounds.

In files of settings scalars are read as text, so that flags and keys are parsed alike.
"""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.config.files import MAX_DEPTH, read_text
from jaxrlhf.errors import InputError

MAX_YAML = 2**20
"""Bytes of the largest YAML file."""
MAX_NODES = 10**5
"""Values of the largest YAML file, those behind references counted each time."""
NONE_WORDS = ("none", "null", "~", "")


class Quoted(str):
    """Text in quotes, which is no number and not none."""


class _Bounded:
    """Refuses documents that refer to themselves, or are too large once their references are followed."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()  # type: ignore[misc]
        if node is not None:
            _expanded(node, {}, 1)
        return node


def _expanded(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """The number of values in a node, with what its references stand for. Raises YAMLError beyond the bounds."""
    if id(node) not in counts:
        counts[id(node)] = MAX_NODES + 1  # as long as it is being counted: a reference to itself is endless
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        items = [item for entry in inner for item in (entry if isinstance(entry, tuple) else (entry,))]
        if depth > MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_DEPTH} deep")
        counts[id(node)] = 1 + sum(_expanded(item, counts, depth + 1) for item in items)
    if counts[id(node)] > MAX_NODES:
        raise yaml.YAMLError(f"it holds more than {MAX_NODES:,} values once its references (*name) are followed")
    return counts[id(node)]


class _SafeLoader(_Bounded, yaml.SafeLoader):
    """Makes plain values only."""


class _Loader(_Bounded, yaml.BaseLoader):
    """Leaves scalars as text, and refuses doubled keys."""

    def construct_scalar(self, node: yaml.ScalarNode) -> object:
        text = super().construct_scalar(node)
        return Quoted(text) if node.style else text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
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


def is_none(word: object) -> bool:
    """Returns True for a word that stands for no value."""
    return isinstance(word, str) and not isinstance(word, Quoted) and word.lower() in NONE_WORDS


def _looks_typed(text: str) -> bool:
    try:
        return text.lower() in ("true", "false") or float(text.replace(".inf", "inf")) is not None
    except ValueError:
        return False


def load_yaml_file(path: str | Path, loader: type = _SafeLoader) -> Any:
    """The plain value in a YAML file. Raises OSError, or ValueError with a reason for a message."""
    return parse_yaml(read_text(path, MAX_YAML), loader)


def parse_yaml(text: str, loader: type = _SafeLoader) -> Any:
    """The plain value of a YAML text. Raises ValueError with a reason for a message."""
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    except (RecursionError, OverflowError) as error:
        raise ValueError(f"not valid YAML: {error or 'nested too deep'}") from error


def read_yaml(path: str | Path) -> dict[str, object]:
    """Reads a YAML mapping, with scalars as text. Raises InputError for a file that holds something else."""
    try:
        values = load_yaml_file(path, _Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold 'setting: value' lines, found a {type(values).__name__}")
    return values


def dump_yaml(values: Mapping[str, object]) -> str:
    """YAML of plain values, such that `read_yaml` gives text that means the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
