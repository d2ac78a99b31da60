"""Settings from flags and YAML files (tyro and PyYAML), and back to YAML."""

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml

from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.config.settings import (
    SECTION,
    FromYaml,
    Setting,
    Settings,
    _hints,
    canonical,
    is_optional,
    scalar_of,
    sections,
    settings,
    to_dict,
)
from jaxrlhf.errors import InputError

C = TypeVar("C", bound=Settings)

NONE_WORDS = ("none", "null", "~", "")
BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_GUARD = "\x00"  # before a value of a list that begins with a dash, which tyro would take for a flag
_MARKERS = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)


def parse(cls: type[C], argv: Sequence[str], prog: str, description: str) -> C:
    """Builds a config from flags, and from `--config FILE.yaml` below them.

    Booleans are `--flag`, `--no_flag` or `--flag true`; lists take words with spaces or commas between them; `none`
    stands for no value. The last of two equal flags wins. `--help` (`--help SECTION`) prints the flags and exits.

    Raises:
        InputError: naming an unknown or doubled name, a value of another type, a file that cannot be read.
    """
    words = list(argv)
    if wanted := [word for word in words if word in ("-h", "--help")]:
        name = (words[words.index(wanted[0]) + 1 :] or [""])[0]
        if name and name not in sections(cls):
            raise InputError(f"--help {name}: the sections are {', '.join(sections(cls)) or 'none'}")
        kind, prefix = (sections(cls)[name], f"{prog} --{name}.FLAG") if name else (cls, prog)
        tyro.cli(_shown(kind), args=["--help"], prog=prefix, description=_page(cls, name, description), config=_MARKERS)
    tokens: dict[str, list[str]] = {name: [] for name in ("", *sections(cls))}
    flags = list(_flags(words))
    files = [values for name, values in flags if name == "config"]
    if files:
        if len(files[-1]) != 1:
            raise InputError(f"--config takes one YAML file, got {len(files[-1])}: {' '.join(files[-1]) or 'none'}")
        _add_mapping(cls, tokens, read_yaml(files[-1][0]), files[-1][0])
    for name, values in flags:
        if name != "config":
            _add_flag(cls, tokens, name, values)
    config = _call(cls, tokens[""], prog)
    parts = {
        name: _call(kind, tokens[name], f"{prog} --{name}.FLAG", getattr(config, name))
        for name, kind in sections(cls).items()
        if tokens[name]
    }
    return dataclasses.replace(config, **parts) if parts else config


def load_yaml(cls: type[C], path: str | Path) -> C:
    """Builds a config from a YAML file alone; the inverse of `save_yaml`."""
    return parse(cls, ["--config", str(path)], str(path), "")


def save_yaml(config: Settings, path: str | Path) -> None:
    """Writes the config to `path` atomically, such that `load_yaml` and `--config` give an equal one."""
    write_text_atomic(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping with all scalars as text. Raises InputError when it is unreadable, malformed or no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a UTF-8 text file"
        raise InputError(f"cannot read the config file {path}: {reason}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold 'setting: value' lines, found a {type(values).__name__}")
    return values


class _Loader(yaml.BaseLoader):
    """Leaves scalars as text, and refuses doubled keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {doubled!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _flags(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, words that follow) of each flag, in order."""
    name, values = "", []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            if name:
                yield name, values
            flag, equals, value = word[2:].partition("=")
            name, values = flag.replace("-", "_"), [value] if equals else []
        elif name:
            values.append(word)
        else:
            raise InputError(f"unexpected argument {word!r}: settings are given as --flag value")
    if name:
        yield name, values


def _add_flag(cls: type, tokens: dict[str, list[str]], name: str, values: list[str]) -> None:
    section, dot, inner = name.partition(".")
    if dot and section in sections(cls):
        cls, name = sections(cls)[section], inner
    else:
        section = ""
    if name in sections(cls):
        raise InputError(f"--{name} is a section: set its entries, as in --{name}.FLAG VALUE, or a mapping in YAML")
    if name.startswith("no_") and not values and name not in settings(cls):
        name, values = name.removeprefix("no_"), ["false"]
    setting = settings(cls)[name := canonical(cls, name)]
    kind = typing.get_origin(scalar_of(setting.kind))
    if kind in (tuple, dict):
        values = [item.strip() for value in values for item in value.split(",") if item.strip()]
    tokens[section] += _tokens(name, setting, values)


def _add_mapping(
    cls: type, tokens: dict[str, list[str]], values: Mapping[str, Any], file: str, section: str = ""
) -> None:
    given: set[str] = set()
    for key, value in values.items():
        name = canonical(cls, str(key), f" in {file}")
        if name in given:
            raise InputError(f"{file}: {name} is given twice, once as {key}")
        given.add(name)
        if name in sections(cls):
            if value and not isinstance(value, dict):
                raise InputError(f"{file}: {name} is a section and must hold a mapping, found {value!r}")
            _add_mapping(sections(cls)[name], tokens, value or {}, file, name)
            continue
        setting = settings(cls)[name]
        readers = [note.read for note in setting.notes if isinstance(note, FromYaml)]
        value = readers[0](value) if readers else value
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items()]
        is_tuple = typing.get_origin(scalar_of(setting.kind)) is tuple
        if isinstance(value, str) and is_tuple:
            value = [item.strip() for item in value.split(",") if item.strip()]
        tokens[section] += _tokens(name, setting, list(value) if isinstance(value, list | tuple) else [value])


def _tokens(name: str, setting: Setting, values: list[str]) -> list[str]:
    """The words that tyro reads for a setting."""
    kind, lowered = scalar_of(setting.kind), [str(value).lower() for value in values]
    flag = f"--{name}"
    if is_optional(setting.kind) and len(values) == 1 and lowered[0] in NONE_WORDS:
        return [flag, "None"]
    if kind is bool:
        value = BOOLEANS.get(lowered[0]) if len(values) == 1 else None if values else True
        if value is None:
            raise InputError(f"{flag} must be true or false, found {' '.join(values)}")
        return [flag if value else f"--no_{name}"]
    if typing.get_origin(kind) is dict:
        pairs = [value.partition("=") for value in values if value.lower() not in NONE_WORDS]
        if bad := [key for key, equals, _ in pairs if not equals]:
            raise InputError(f"{flag} takes key=value,key=value; {bad[0]!r} is not key=value")
        booleans = {"true": "True", "false": "False"}
        return [flag, *(word for key, _, item in pairs for word in (key, booleans.get(item.lower(), item)))]
    if typing.get_origin(kind) is tuple:
        return [flag, *(f"{_GUARD}{v}" if v.startswith("-") and not _is_number(v) else v for v in values)]
    if len(values) != 1:
        raise InputError(f"{flag} takes one value, found {' '.join(values) or 'none'}")
    return [f"{flag}={values[0]}"]


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return float(text) is not None
    return False


def _call(cls: type[C], tokens: list[str], prog: str, default: C | None = None) -> C:
    """tyro's result as an instance of `cls`; its message as an InputError."""
    said = io.StringIO()
    shown = _shown(cls)
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.cli(
                shown,
                args=tokens,
                prog=prog,
                default=None if default is None else _as(shown, default),
                config=_MARKERS,
                use_underscores=True,
            )
    except SystemExit as stop:
        if isinstance(stop.__context__, InputError):  # ours, of values that the type allows
            raise stop.__context__ from None
        lines = (re.sub(r"[│╭╮╰╯─]", "", line).strip() for line in said.getvalue().splitlines())
        raise InputError("\n  ".join(line for line in lines if line)) from stop
    return _as(cls, parsed)


def _as(cls: type, config: Any) -> Any:
    """The same values in another class of the same fields, guards taken off."""
    values = {}
    for f in dataclasses.fields(cls):
        value = getattr(config, f.name)
        kind, notes = _hints(cls)[f.name]
        if dataclasses.is_dataclass(kind) and SECTION not in notes:
            value = _as(typing.cast(type, kind), value)
        elif isinstance(value, tuple):
            value = tuple(item.removeprefix(_GUARD) if isinstance(item, str) else item for item in value)
        values[f.name] = value
    return cls(**values)


def _shown(cls: type, hidden: frozenset[str] = frozenset()) -> type:
    """`cls` as tyro sees it: sections and hidden settings are fixed at their defaults."""
    hidden = hidden | getattr(cls, "HIDDEN", frozenset())
    changed = []
    for f in dataclasses.fields(cls):
        kind, notes = _hints(cls)[f.name]
        annotation: Any = typing.get_type_hints(cls, include_extras=True)[f.name]
        if f.name in hidden or SECTION in notes:
            annotation = Annotated[annotation, tyro.conf.Fixed, tyro.conf.Suppress]
        elif dataclasses.is_dataclass(kind):
            annotation = _shown(typing.cast(type, kind), hidden)
            if annotation is kind:
                continue
        else:
            continue
        default = f.default
        if dataclasses.is_dataclass(annotation):
            base = (
                default
                if default is not dataclasses.MISSING
                else f.default_factory()
                if f.default_factory is not dataclasses.MISSING
                else kind()
            )
            default = _as(annotation, base)
        changed.append((f.name, annotation, dataclasses.field(default=default)))
    if not changed:
        return cls
    shown = dataclasses.make_dataclass(cls.__name__, changed, bases=(cls,), frozen=True)
    shown.__doc__ = cls.__doc__
    return shown


def _page(cls: type, section: str, description: str) -> str:
    text = f"{description}\n\n--config FILE.yaml reads settings from a file; flags beside it win."
    if section:
        return f"{description}, section {section}: write each flag as --{section}.FLAG."
    if sections(cls):
        text += "\n" + "\n".join(
            f"--{name}.FLAG sets one of section {name}; `--help {name}` lists them." for name in sections(cls)
        )
    return text
