"""Settings from flags and YAML files, and back to YAML."""

import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxrlhf.config.annotations import FromYaml, Hint, check_value
from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.config.help import print_help
from jaxrlhf.config.settings import Settings, canonical, errors_in, sections, settings, to_dict
from jaxrlhf.config.text import dump_yaml, guess, is_none, read_yaml, value_of
from jaxrlhf.errors import InputError

C = TypeVar("C", bound=Settings)


def parse(cls: type[C], argv: Sequence[str], prog: str, description: str) -> C:
    """Builds a config from flags, and from `--config FILE.yaml` below them.

    Booleans are `--flag`, `--no_flag` or `--flag true`; lists take words with spaces or commas between them; `none`
    stands for no value. The last of two equal flags wins. `--help` (`--help SECTION`) prints the flags and exits.

    Raises:
        InputError: naming an unknown or doubled name, a value of another type, a file that cannot be read.
    """
    if wanted := [place for place, word in enumerate(argv) if word in ("-h", "--help")]:
        print_help(cls, "".join(word for word in argv[wanted[0] + 1 :][:1] if word[:2] != "--"), prog, description)
    flags, values, errors = list(_flags(argv)), {}, []
    for words in [words for name, words in flags if name == "config"][-1:]:
        if len(words) != 1:
            raise InputError(f"--config takes one YAML file, got {len(words)}: {' '.join(words) or 'none'}")
        entries = read_yaml(words[0])
        with errors_in(words[0]):
            for key, value in entries.items():
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
    write_text_atomic(path, dump_yaml(to_dict(config)))


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
    """What a flag or YAML key holds, by the type of the setting; text that is of another type as it is."""
    for note in hint.notes:
        if isinstance(note, FromYaml) and not isinstance(given, tuple):
            given = note.read(given)
    origin = typing.get_origin(hint.kind)
    words = list(given) if isinstance(given, tuple | list) else [given]
    if hint.optional and len(words) == 1 and is_none(words[0]):
        return None
    if origin is dict and isinstance(given, dict):
        return {str(key): guess(value) for key, value in given.items()}
    if not all(isinstance(word, str) for word in words):
        raise InputError(f"{name}={given!r} must not be nested")
    if origin in (tuple, dict) and not isinstance(given, list):
        words = [item.strip() for word in words for item in word.split(",") if item.strip()]
    if origin is tuple:
        return tuple(value_of(typing.get_args(hint.kind)[0], word) for word in words)
    if origin is dict:
        pairs = [word.partition("=") for word in words if not is_none(word)]
        if bad := [key for key, equals, _ in pairs if not equals]:
            raise InputError(f"{name}: {bad[0]!r} must be key=value")
        return {key: guess(value) for key, _, value in pairs}
    if hint.kind is bool and given == ():
        return True
    if len(words) != 1 or isinstance(given, list):
        raise InputError(f"{name} takes one value, found {' '.join(words) or 'none'}")
    return value_of(hint.kind, words[0])
