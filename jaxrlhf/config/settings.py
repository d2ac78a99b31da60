"""Dataclass configs from flags and YAML files: every field is a flag and a YAML key, and the reverse.

A config is a frozen dataclass whose fields are declared with `field(default, help)`. `parse` reads `--config file.yaml`
and flags into an instance (flags win); nested dataclasses are sections (`--sft.learning_rate 1e-4`, a mapping in YAML).
Supported types: int, float, str, bool, Literal, tuple[...], dict[str, ...], unions of scalars, and Optional of each.
"""

import copy
import dataclasses
import difflib
import inspect
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.config.values import FALSE_WORDS, NONE_WORDS, TRUE_WORDS, Plain, Tokens, convert, without_none
from jaxrlhf.errors import InputError

Config = TypeVar("Config")

REQUIRED: Any = dataclasses.MISSING
"""Default of a field the user must give: `model_name_or_path: str = field(REQUIRED, "...")`."""


def field(
    default: Any,
    help: str,
    *,
    choices: tuple | list | None = None,
    aliases: tuple[str, ...] = (),
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """A documented dataclass field.

    `default`: value, or `REQUIRED`. Mutable defaults (dict, list) are copied per instance.
    `choices`: allowed values (of each element, for tuples). `aliases`: other accepted names, in flags and in YAML.
    `read`: makes of a value that stands in YAML one of the field's type, and leaves all others as they are.
    """
    metadata = {"help": help, "choices": tuple(choices) if choices else None, "aliases": tuple(aliases), "read": read}
    if default is REQUIRED:  # keyword only, so that a subclass may add it after fields that have defaults
        return dataclasses.field(metadata=metadata, kw_only=True)
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def like(owner: type, name: str, *default: Any, help: str | None = None) -> Any:
    """The field `name` of another dataclass, with another `default` or `help` where they are given."""
    (known,) = (f for f in dataclasses.fields(owner) if f.name == name)
    (value,) = default or (_field_default(known),)
    return field(value, **(known.metadata | ({} if help is None else {"help": help})))


def fixed(value: Any) -> Any:
    """A field of a base class that a subclass has no choice of: neither a flag nor a key, and always `value`."""
    return dataclasses.field(default=value, init=False)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One settable value: its dotted path, type, default (in its section), help, and the class that declares it."""

    path: str
    type: Any
    default: Any
    help: str
    choices: tuple | None
    aliases: tuple[str, ...]
    owner: type


def parse(config_class: type[Config], argv: list[str] | None, prog: str, description: str) -> Config:
    """Build `config_class` from `argv` (default: `sys.argv[1:]`): `--config file.yaml` first, flags on top.

    Raises InputError for an unknown flag or key, a value of the wrong type, missing required values, an unreadable
    file; errors of the dataclass's own `__post_init__` pass through. `--help` prints the flags and exits.
    """
    given = _split_flags(list(sys.argv[1:] if argv is None else argv))
    if "help" in given:
        section = given["help"][-1] if given["help"] else None
        print(help_text(config_class, prog, description, section))
        raise SystemExit(0)
    values: dict[str, tuple[Any, str]] = {}
    config_file = given.pop("config", None)
    if config_file is not None:
        if len(config_file) != 1:
            raise InputError(f"--config takes one YAML file, got {len(config_file)}: {' '.join(config_file) or 'none'}")
        values = _resolve(config_class, _flatten(config_class, read_yaml(config_file[0])), where=config_file[0])
    values.update(_resolve(config_class, given, where=None))
    return _build(config_class, values)


def from_dict(config_class: type[Config], values: dict) -> Config:
    """Build `config_class` from a (nested) dict, as `to_dict` makes it. Raises InputError as `parse` does."""
    return _build(config_class, _resolve(config_class, _flatten(config_class, values), where=""))


def load_yaml(config_class: type[Config], path: str | Path) -> Config:
    """Build `config_class` from a YAML file alone; the inverse of `save_yaml`."""
    return _build(config_class, _resolve(config_class, _flatten(config_class, read_yaml(path)), where=str(path)))


def to_dict(config: Any) -> dict:
    """The config as nested plain values: sections and dicts as dicts, tuples as lists."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(config)


def save_yaml(config: Any, path: str | Path) -> None:
    """Write the config to `path` (atomically) so that `load_yaml` and `--config` give an equal one."""
    text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    write_text_atomic(path, text)


def help_text(config_class: type, prog: str, description: str, section: str | None = None) -> str:
    """The `--help` page, wrapped to the terminal: flags by declaring dataclass; sections are one entry each.

    `section`: print that section's flags instead (`--help sft`).
    """
    import argparse

    sections = _sections(config_class)
    if section is not None and section not in sections:
        known = f"; sections are {', '.join(sections)}" if sections else ""
        raise InputError(f"--help {section}: there is no section of that name{known}")
    usage = f"{prog} [--config FILE.yaml] [--FLAG VALUE ...]"
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=description.replace("%", "%%"),
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28),
    )
    if section is None:
        general = parser.add_argument_group("General")
        general.add_argument("--help", action="store_true", help="show this page and exit")
        text = "read settings from a YAML file whose keys are the flag names; flags given beside it win"
        general.add_argument("--config", metavar="FILE.yaml", help=text)
    groups: dict[type, Any] = {}
    shown = [leaf for leaf in _leaves(config_class) if _section_of(leaf.path, sections) == (section or "")]
    owners = [owner for owner in type.mro(sections[section] if section else config_class) if owner is not object]
    for leaf in sorted(shown, key=lambda leaf: owners.index(leaf.owner) if leaf.owner in owners else len(owners)):
        if leaf.owner not in groups:
            groups[leaf.owner] = parser.add_argument_group(_title(leaf.owner))
        notes = f" (also {', '.join('--' + alias for alias in leaf.aliases)})" if leaf.aliases else ""
        notes += " (required)" if leaf.default is REQUIRED else f" (default: {_show(leaf.default)})"
        text = (leaf.help + notes).replace("%", "%%")
        groups[leaf.owner].add_argument(f"--{leaf.path}", metavar=_metavar(leaf), help=text)
    if section is None and sections:
        group = parser.add_argument_group("Sections")
        for name, kind in sections.items():
            text = f"{_title(kind)}; all its flags: {prog} --help {name}".replace("%", "%%")
            group.add_argument(f"--{name}.FLAG", metavar="VALUE", help=text)
    return parser.format_help().rstrip()


def read_yaml(path: str | Path) -> dict:
    """A YAML mapping, unquoted scalars left as `Plain` text. InputError when unreadable, malformed or no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise InputError(f"cannot read the config file {path}: {reason}") from error
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if values is None or values == "":
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold 'flag_name: value' lines, found a {_kind_of(values)}")
    return values


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _split_flags(argv: list[str]) -> dict[str, Tokens]:
    """`--a 1 --b=2 x` -> {"a": ["1"], "b": ["2", "x"]}; a flag given twice: the last one counts."""
    given: dict[str, Tokens] = {}
    name = None
    for token in argv:
        if token == "-h":
            given[name := "help"] = Tokens()
        elif token.startswith("--") and len(token) > 2:
            flag, equals, value = token[2:].partition("=")
            given.pop(name := _normal(flag), None)
            given[name] = Tokens([Plain(value)] if equals else [])
        elif name is None:
            raise InputError(f"unexpected argument {token!r}: settings are given as --flag value")
        else:
            given[name].append(Plain(token))
    return given


def _flatten(config_class: type, values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {dotted path: value}, going into sections only (dict fields stay whole)."""
    sections = _sections(config_class)
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = prefix + _normal(str(key))
        section = sections.get(path[len(prefix) :])
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        empty = value is None or (isinstance(value, Plain) and value.lower() in NONE_WORDS)
        if section is not None and (empty or isinstance(value, dict)):
            entries = _flatten(section, {} if empty else value, prefix=f"{path}.")
        else:
            entries = {path: value}
        for name, item in entries.items():
            if name in flat:
                raise InputError(f"{name} is given twice")
            flat[name] = item
    return flat


def _resolve(config_class: type, given: dict[str, Any], where: str | None) -> dict[str, tuple[Any, str]]:
    """Replace aliases and `no_` forms by field paths. Values become (value, how to name it in a message).

    `where`: YAML file, "" for a dict, None for flags. Raises InputError for unknown names, all of them together.
    """
    leaves = {leaf.path: leaf for leaf in _leaves(config_class)}
    names = {path: path for path in leaves}
    for leaf in leaves.values():
        head = leaf.path.rpartition(".")[0]
        names.update({f"{head}.{alias}" if head else alias: leaf.path for alias in map(_normal, leaf.aliases)})
    flag = "--" if where is None else ""
    resolved: dict[str, tuple[Any, str]] = {}
    unknown: list[str] = []
    for name, value in given.items():
        label = f"{flag}{name}" + (f" in {where}" if where else "")
        head, dot, last = name.rpartition(".")
        positive = head + dot + last.removeprefix("no_")
        if name in names:
            path = names[name]
            if where is not None and path in resolved:
                raise InputError(f"{label}: given twice, it is another name of {path}")
            resolved[path] = (value, label)
        elif where is None and last.startswith("no_") and positive in names and _is_bool(leaves[names[positive]].type):
            if value:
                raise InputError(f"{label} takes no value; use --{positive} {' '.join(value)}")
            resolved[names[positive]] = (Tokens([Plain("false")]), label)
        elif any(path.startswith(f"{name}.") for path in leaves):
            unknown.append(f"{label} is a section; set its entries, as in --{name}.FLAG VALUE, or a mapping in YAML")
        else:
            unknown.append(f"unknown {'flag' if where is None else 'setting'} {label}{_suggest(name, names, flag)}")
    if unknown:
        raise InputError("\n".join(unknown))
    return resolved


def _suggest(name: str, names: dict[str, str], flag: str) -> str:
    last = name.rpartition(".")[2]
    near = [known for known in names if known.rpartition(".")[2] == last][:4]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not near:
        tails = {known.rpartition(".")[2]: known for known in names}
        near = [tails[tail] for tail in difflib.get_close_matches(last, tails, n=1, cutoff=0.75)]
    return f"; did you mean {' or '.join(flag + known for known in near)}?" if near else "; see --help for all of them"


def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def _is_bool(kind: Any) -> bool:
    return without_none(kind)[0] is bool


def _sections(config_class: type) -> dict[str, type]:
    kinds = {f.name: without_none(_hints(config_class)[f.name])[0] for f in dataclasses.fields(config_class) if f.init}
    return {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}


def _section_of(path: str, sections: dict[str, type]) -> str:
    head = path.partition(".")[0]
    return head if head in sections else ""


def _field_default(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def _leaves(config_class: type, prefix: str = "", instance: Any = None) -> list[Leaf]:
    """Every settable value, sections included; defaults are those of `instance` where there is one."""
    sections, hints, leaves = _sections(config_class), _hints(config_class), []
    for f in dataclasses.fields(config_class):
        if not f.init:
            continue
        default = _field_default(f) if instance is None else getattr(instance, f.name)
        if f.name in sections:
            section_default = default if dataclasses.is_dataclass(default) else None
            leaves += _leaves(sections[f.name], f"{prefix}{f.name}.", section_default)
            continue
        owner = [c for c in config_class.__mro__ if f.name in inspect.get_annotations(c)][-1]
        notes = f.metadata
        choices, aliases = notes.get("choices"), notes.get("aliases", ())
        path = prefix + f.name
        leaves.append(Leaf(path, hints[f.name], default, notes.get("help", ""), choices, aliases, owner))
    return leaves


def _build(config_class: type[Config], values: dict[str, tuple[Any, str]]) -> Config:
    missing = [leaf.path for leaf in _leaves(config_class) if leaf.default is REQUIRED and leaf.path not in values]
    if missing:
        flags = ", ".join(f"--{path}" for path in missing)
        raise InputError(f"missing required settings: {flags} (flags, or keys of the --config file)")
    return _build_section(config_class, values, "", None)


def _build_section(config_class: type, values: dict[str, tuple[Any, str]], prefix: str, instance: Any) -> Any:
    sections, arguments = _sections(config_class), {}
    hints = _hints(config_class)
    for f in dataclasses.fields(config_class):
        if not f.init:
            continue
        path = prefix + f.name
        default = _field_default(f) if instance is None else getattr(instance, f.name)
        if f.name in sections:
            touched = any(key.startswith(f"{path}.") for key in values)
            if touched or default is REQUIRED:
                base = default if dataclasses.is_dataclass(default) else None
                default = _build_section(sections[f.name], values, f"{path}.", base)
            arguments[f.name] = default
        elif path in values:
            value, label = values[path]
            read = f.metadata.get("read")
            value = value if read is None else read(value)
            arguments[f.name] = convert(value, hints[f.name], f.metadata.get("choices"), label)
        else:
            arguments[f.name] = default
    try:
        return config_class(**arguments)
    except InputError as error:
        if not prefix:
            raise
        raise InputError(f"in section {prefix.rstrip('.')}: {error}") from error


def _metavar(leaf: Leaf) -> str:
    inner, _ = without_none(leaf.type)
    origin, members = typing.get_origin(inner), typing.get_args(inner)
    words = {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT"}
    if origin is Literal or leaf.choices:
        text = "{" + ",".join(str(choice) for choice in leaf.choices or members) + "}"
        return f"{text} ..." if origin is tuple else text
    if origin is tuple:
        kinds = [words.get(member, "VALUE") for member in members if member is not Ellipsis]
        return ",".join(kinds) if len(kinds) > 1 or Ellipsis not in members else f"{kinds[0]} ..."
    return "KEY=VALUE,..." if origin is dict else words.get(inner, "VALUE")


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(_show, value)) or "empty"
    if isinstance(value, dict):
        return ",".join(f"{key}={_show(item)}" for key, item in value.items()) or "empty"
    if isinstance(value, str):
        return value if value and value.isprintable() and " " not in value else repr(value)
    return (
        {None: "none", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else (repr(value))
    )


def _title(owner: type) -> str:
    text = owner.__doc__ or ""
    generated = text.startswith(f"{owner.__name__}(")
    return owner.__name__ if generated or not text.strip() else text.strip().splitlines()[0].rstrip(".")


def _kind_of(value: Any) -> str:
    return "list" if isinstance(value, list) else "single value"


class _Loader(yaml.SafeLoader):
    """Reads unquoted scalars as `Plain` text, so YAML and flags share one way to read values; refuses doubled keys."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


def _construct_text(loader: yaml.Loader, node: yaml.ScalarNode) -> str:
    return Plain(node.value) if node.style is None else node.value


def _construct_mapping(loader: yaml.Loader, node: yaml.MappingNode) -> dict:
    keys = [str(loader.construct_object(key)) for key, _ in node.value]
    doubled = next((key for key in keys if keys.count(key) > 1), None)
    if doubled is not None:
        raise yaml.constructor.ConstructorError(None, None, f"the key {doubled!r} occurs twice", node.start_mark)
    return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that our reader would take for something else."""


def _represent_text(dumper: yaml.Dumper, text: str) -> yaml.Node:
    ambiguous = text.lower() in NONE_WORDS | TRUE_WORDS | FALSE_WORDS or "," in text or _is_number(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if ambiguous else None)


def _is_number(text: str) -> bool:
    try:
        return float(text.replace(".inf", "inf")) is not None
    except ValueError:
        return False


_Dumper.add_representer(str, _represent_text)
