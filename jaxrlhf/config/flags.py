"""Settings from flags and YAML files, and back to YAML."""

import contextlib
import math
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from jaxrlhf.config.annotations import FromYaml, check_value, is_optional, scalar_of
from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.config.help import print_help
from jaxrlhf.config.settings import Setting, Settings, canonical, errors_in, sections, settings, to_dict
from jaxrlhf.errors import InputError

C = TypeVar("C", bound=Settings)

NONE_WORDS = ("none", "null", "~", "")
TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse(cls: type[C], argv: Sequence[str], prog: str, description: str) -> C:
    """Builds a config from flags, and from `--config FILE.yaml` below them.

    Booleans are `--flag`, `--no_flag` or `--flag true`; lists take words with spaces or commas between them; `none`
    stands for no value. The last of two equal flags wins. `--help` (`--help SECTION`) prints the flags and exits.

    Raises:
        InputError: naming an unknown or doubled name, a value of another type, a file that cannot be read.
    """
    if wanted := [place for place, word in enumerate(argv) if word in ("-h", "--help")]:
        print_help(cls, "".join(argv[wanted[0] + 1 : wanted[0] + 2]), prog, description)
    flags, values, errors = list(_flags(argv)), {}, []
    for words in [words for name, words in flags if name == "config"][-1:]:
        if len(words) != 1:
            raise InputError(f"--config takes one YAML file, got {len(words)}: {' '.join(words) or 'none'}")
        with errors_in(words[0]):
            for key, value in read_yaml(words[0]).items():
                _put(cls, values, key, value, once=True)
    for name, words in flags:
        try:
            if name != "config":
                _put(cls, values, name, words)
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError("\n".join(errors))
    return cls.create(**values)


def load_yaml(cls: type[C], path: str | Path) -> C:
    """Builds a config from a YAML file alone; the inverse of `save_yaml`."""
    return parse(cls, ["--config", str(path)], str(path), "")


def save_yaml(config: Settings, path: str | Path) -> None:
    """Writes the config to `path` atomically, such that `load_yaml` and `--config` give an equal one."""
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    write_text_atomic(path, text)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping, with scalars as text. Raises InputError for a file that holds something else."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the file: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"not valid YAML: {error}") from error
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise InputError(f"must hold 'setting: value' lines, found a {type(values).__name__}")
    return values


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


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, "'" if _is_none(text) or not isinstance(_guess(text), str) else None
    ),
)


def _flags(words: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, words that follow) of each flag, in order."""
    name, values = "", ()
    for word in words:
        if word.startswith("--") and len(word) > 2:
            if name:
                yield name, values
            name, equals, value = word[2:].partition("=")
            name, values = name.replace("-", "_"), (value,) if equals else ()
        elif name:
            values += (word,)
        else:
            raise InputError(f"unexpected argument {word!r}: settings are given as --flag value")
    if name:
        yield name, values


def _put(cls: type, values: dict[str, Any], name: str, given: Any, once: bool = False) -> None:
    """Reads a setting into `values`. `given`: the words of a flag as a tuple; text, list or dict from YAML."""
    section, dot, inner = name.partition(".")
    if dot and section in sections(cls):
        with errors_in(f"in section {section}"):
            return _put(sections(cls)[section], values.setdefault(section, {}), inner, given, once)
    if name.startswith("no_") and given == () and name not in settings(cls):
        name, given = name.removeprefix("no_"), ("false",)
    known = canonical(cls, name)
    if known in sections(cls):
        if given and not isinstance(given, dict):
            raise InputError(f"{name} is a section: set its entries, as in --{name}.FLAG VALUE, or a mapping in YAML")
        for key, value in (given or {}).items():
            _put(cls, values, f"{known}.{key}", value, once)
    elif once and known in values:
        raise InputError(f"{known} is given twice, once as {name}")
    else:
        setting = settings(cls)[known]
        values[known] = _read(known, setting, given)
        check_value(known, values[known], setting.kind, setting.notes)


def _read(name: str, setting: Setting, given: Any) -> Any:
    """What a flag or YAML key holds, by the type of the setting; text that is of another type as it is."""
    for note in setting.notes:
        if isinstance(note, FromYaml) and not isinstance(given, tuple):
            given = note.read(given)
    kind, origin = scalar_of(setting.kind), typing.get_origin(scalar_of(setting.kind))
    words = list(given) if isinstance(given, tuple | list) else [given]
    if is_optional(setting.kind) and len(words) == 1 and _is_none(words[0]):
        return None
    if origin is dict and isinstance(given, dict):
        return {str(key): _guess(value) for key, value in given.items()}
    if not all(isinstance(word, str) for word in words):
        raise InputError(f"{name}={given!r} must not be nested")
    if origin in (tuple, dict) and not isinstance(given, list):
        words = [item.strip() for word in words for item in word.split(",") if item.strip()]
    if origin is tuple:
        return tuple(_scalar(typing.get_args(kind)[0], word) for word in words)
    if origin is dict:
        pairs = [word.partition("=") for word in words if not _is_none(word)]
        if bad := [key for key, equals, _ in pairs if not equals]:
            raise InputError(f"{name}: {bad[0]!r} must be key=value")
        return {key: _guess(value) for key, _, value in pairs}
    if kind is bool and given == ():
        return True
    if len(words) != 1 or isinstance(given, list):
        raise InputError(f"{name} takes one value, found {' '.join(words) or 'none'}")
    return _scalar(kind, words[0])


def _is_none(word: Any) -> bool:
    return isinstance(word, str) and not isinstance(word, _Quoted) and word.lower() in NONE_WORDS


def _number(text: str) -> int | float | None:
    for read in (int, float):
        with contextlib.suppress(ValueError):
            number = read(text.replace(".inf", "inf"))
            return None if "_" in text or math.isnan(number) else number
    return None


def _scalar(kind: Any, text: str) -> Any:
    """The text as a value of `kind`; unchanged where it is none."""
    if typing.get_origin(kind) is Literal:
        return {str(choice): choice for choice in typing.get_args(kind)}.get(text, text)
    if kind is bool:
        known = text.lower() in TRUE_WORDS + FALSE_WORDS
        return text.lower() in TRUE_WORDS if known else text
    number = _number(text) if kind in (int, float) else None
    if number is None or (kind is int and not float(number).is_integer()):
        return str(text)
    return kind(number)


def _guess(text: str) -> int | float | bool | str:
    """The value of an entry of a dict, whose type no annotation says."""
    if isinstance(text, _Quoted) or not isinstance(text, str):
        return str(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = _number(text)
    return text if number is None else number
