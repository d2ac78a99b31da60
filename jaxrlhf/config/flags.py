"""Settings from flags (tyro) and YAML files, and back to YAML."""

import contextlib
import dataclasses
import io
import logging
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from jaxrlhf.config import trl
from jaxrlhf.config.annotations import FromYaml, Hint, TrueWord, check_value, hint_of
from jaxrlhf.config.files import parse_json, write_text_atomic
from jaxrlhf.config.help import print_help
from jaxrlhf.config.other_flags import Words
from jaxrlhf.config.secrets import redacted, shown_setting
from jaxrlhf.config.settings import (
    Settings,
    UnknownSetting,
    canonical,
    errors_in,
    names_of,
    places_of,
    sections,
    settings,
    to_dict,
)
from jaxrlhf.config.yaml_files import Quoted, dump_yaml, is_none, read_yaml
from jaxrlhf.errors import InputError

C = TypeVar("C", bound=Settings)
logger = logging.getLogger(__name__)

TRUE_WORDS, FALSE_WORDS = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse(
    cls: type[C],
    argv: Sequence[str],
    prog: str,
    description: str,
    owners: Callable[[str], Sequence[str]] = lambda name: (),
) -> C:
    """Builds a config from flags, and from `--config FILE.yaml` below them.

    Booleans are `--flag`, `--no_flag` or `--flag true`; lists take words with spaces or commas between them; `none`
    stands for no value. The last of two equal flags wins. `--help` (`--help SECTION`) prints the flags and exits. Flags
    of DeepSpeed-Chat are translated as `cls.OTHER_FLAGS` says, flags and keys of TRL as `cls.TRL_KEYS` says, with lines
    of advice in the log.

    Args:
        cls: The config's class.
        argv: The command's words, without its name.
        prog: The command, as the help page shows it.
        description: What the command does.
        owners: The other commands that have a setting, for the message about an unknown one.

    Raises:
        InputError: naming an unknown or doubled name, a value of another type, a file that cannot be read.
    """
    if wanted := [place for place, word in enumerate(argv) if word in ("-h", "--help")]:
        print_help(cls, "".join(word for word in argv[wanted[0] + 1 :][:1] if word[:2] != "--"), prog, description)
    values, errors = {}, []
    for file, name, value in _translated(cls, list(_flags(argv))):
        try:
            with errors_in(file) if file else contextlib.nullcontext():
                _put(cls, values, name, value, once=bool(file))
        except UnknownSetting as error:
            others = () if places_of(cls, error.name) else owners(error.name)
            begin = " It is" if str(error).endswith("?") else "; it is"
            errors.append(f"{error}{begin} a setting of {', '.join(others)}" if others else str(error))
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError("\n".join(errors))
    return cls.create(**values)


def _translated(cls: type[Settings], flags: list[tuple[str, Words]]) -> list[tuple[str, str, Any]]:
    """(file, name, value) of each setting, in our names: the YAML file's first, then the flags', whose file is ""."""
    file, in_file = "", {}
    for words in [words for name, words in flags if name == "config"][-1:]:
        if len(words) != 1:
            raise InputError(f"--config takes one YAML file, got {len(words)}: {' '.join(words) or 'none'}")
        file, in_file = words[0], read_yaml(words[0])
    if cls.TRL_KEYS:
        of_flags = {name: words for name, words in flags if name != "config"}
        trl.check_not_mixed(cls.TRL_KEYS, file, in_file, of_flags, names_of(cls))
        given = in_file | of_flags
        with errors_in(file) if file else contextlib.nullcontext():
            keys = trl.translate(cls.TRL_KEYS, given, names_of(cls), logger.warning)
        if keys is not None:
            return [(file if value is in_file.get(name) else "", name, value) for name, value in keys.items()]
    names = {name for name, _ in flags}
    if cls.OTHER_FLAGS and names & set(cls.OTHER_FLAGS.flags):
        own = cls.OTHER_FLAGS.owns(names)
        flags = list(cls.OTHER_FLAGS.translate(flags, names_of(cls), logger.warning, own=own).items())
    keys_of_file = [(file, name, value) for name, value in in_file.items()]
    return keys_of_file + [("", name, words) for name, words in flags if name != "config"]


def load_yaml(cls: type[C], path: str | Path) -> C:
    """Builds a config from a YAML file alone; the inverse of `save_yaml`."""
    return parse(cls, ["--config", str(path)], str(path), "")


def save_yaml(config: Settings, path: str | Path) -> None:
    """Writes the config to `path` atomically, such that `load_yaml` and `--config` give an equal one.

    Secrets are replaced (`redacted`), so a config with some must get them again.
    """
    write_text_atomic(path, dump_yaml(redacted(to_dict(config))))


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
        hint = settings(cls)[known].hint
        values[known] = _read(known, hint, given)
        check_value(known, values[known], hint)


def _read(name: str, hint: Hint, given: Any) -> Any:
    """The value of a flag or YAML key; text of another type stays as it is, for `check_value` to refuse."""
    for note in hint.notes:
        if isinstance(note, FromYaml) and not isinstance(given, tuple):
            read = note.read(given)
            given = list(read) if isinstance(read, tuple) else read  # a list is complete: no commas divide its texts
    origin = typing.get_origin(hint.kind)
    if origin is dict and isinstance(given, dict):
        given = [(str(key), value) for key, value in given.items()]
    words = list(given) if isinstance(given, tuple | list) else [given]
    if hint.optional and len(words) == 1 and is_none(words[0]):
        return None
    if origin is dict:
        pairs = words if isinstance(given, list) else _pairs(name, words)
        kind = int | float | bool | str
        return {key: _typed(kind, value) if isinstance(value, str) else value for key, value in pairs}
    if not all(isinstance(word, str) for word in words):
        raise InputError(f"{name}={shown_setting(name, given)} must not be nested")
    if origin is tuple:
        items = words if isinstance(given, list) else _items(words)
        kind = hint_of(typing.get_args(hint.kind)[0]).kind
        return tuple(_typed(kind, item) for item in items)
    if hint.kind is bool and given == ():
        return True
    if len(words) != 1 or isinstance(given, list):
        raise InputError(f"{name} takes one value, found {shown_setting(name, ' '.join(words)) if words else 'none'}")
    if TrueWord(words[0].lower()) in hint.notes:
        return True
    return _typed(hint.kind, words[0])


def _items(words: Sequence[str]) -> list[str]:
    """Words with commas between them, one by one."""
    return [item.strip() for word in words for item in word.split(",") if item.strip()]


def _pairs(name: str, words: Sequence[str]) -> list[tuple[str, Any]]:
    """The entries of a mapping from the words of a flag: KEY=VALUE each, or one JSON object."""
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        try:
            mapping = parse_json(words[0])
        except ValueError as error:
            raise InputError(f"{name}={words[0]} is not a valid JSON object ({error}); correct it") from error
        return [(key, Quoted(value) if isinstance(value, str) else value) for key, value in mapping.items()]
    return [_pair(name, word) for word in _items(words) if not is_none(word)]


def _pair(name: str, word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise InputError(f"{name}: {word!r} must be key=value")
    return key, value


def _typed(kind: object, word: str) -> Any:
    """The word as tyro reads it for a type; unchanged where it is of another type."""
    lowered, anything = word.lower(), kind == int | float | bool | str
    if kind is str or (anything and isinstance(word, Quoted)):
        return str(word)
    if kind is bool or (anything and lowered in ("true", "false")):
        return lowered in TRUE_WORDS if lowered in TRUE_WORDS + FALSE_WORDS else word
    text = word.replace(".inf", "inf")  # as YAML writes it
    if kind is int and "e" in lowered:
        with contextlib.suppress(ValueError):
            text = f"{float(word):.0f}" if float(word).is_integer() else word
    one = dataclasses.make_dataclass("Setting", [("value", kind)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            value = tyro.cli(one, args=["--value", text]).value
    except SystemExit:
        return word
    # Python reads 1_000, nan and numbers beyond the largest; settings do not.
    odd = isinstance(value, int | float) and (
        "_" in word or not word.isascii() or value != value or (math.isinf(value) and "inf" not in lowered)
    )
    return word if odd else value
