"""Settings: frozen dataclasses that hold one another, flat flags, and YAML files whose keys are the flags.

A config of a trainer holds the dataclasses that its parts take (`SFTConfig.data` is a `DataConfig`). Flags and YAML
keys are the plain field names, whatever dataclass they stand in: `--max_length 64` sets `config.data.max_length`. The
docstring under a field is its help, its annotation says what is allowed: `Annotated[int, Ge(1), alias("n")] = 8`.
"""

import contextlib
import dataclasses
import difflib
import functools
import os
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from jaxrlhf.config.annotations import LASTING, MAY_CHANGE, PATH, Hint, check_value, hints_of
from jaxrlhf.config.other_flags import Script
from jaxrlhf.errors import InputError

T = TypeVar("T")


class UnknownSetting(InputError):
    """A name that is no setting of the config."""

    def __init__(self, name: str, hint: str) -> None:
        super().__init__(f"unknown setting {name}; {hint}")
        self.name = name


class Setting(NamedTuple):
    """One field: where it lies in the config, and what its annotation says of it."""

    path: tuple[str, ...]
    hint: Hint
    may_change: bool
    hidden: bool


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all settings: checks annotations, and gives access by flat names.

    A subclass is a frozen dataclass. `check` holds what no annotation says. `HIDDEN` names settings of its parts that
    it has no use for: neither flags nor keys. `OTHER_FLAGS` translates the flags of DeepSpeed-Chat's script for the
    same purpose, `TRL_KEYS` the keys and flags of TRL's trainer. `may_change=True` marks all fields as `MayChange`.
    """

    HIDDEN: ClassVar[frozenset[str]] = frozenset()
    OTHER_FLAGS: ClassVar[Script | None] = None
    TRL_KEYS: ClassVar[Script | None] = None
    _may_change: ClassVar[bool] = False

    def __init_subclass__(cls, may_change: bool | None = None, **options: object) -> None:
        super().__init_subclass__(**options)
        if may_change is not None:
            cls._may_change = may_change

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            check_value(name, getattr(self, name), hint)
            if PATH in hint.notes:
                object.__setattr__(self, name, expanded(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Refuses settings that contradict each other. Raises InputError naming them."""

    @classmethod
    def create(cls, **values: object) -> Self:
        """Builds the config from flat names: `SFTConfig.create(data_path=("demo",), learning_rate=1e-4)`.

        Raises InputError for a name that is not a setting, or a value that is not allowed.
        """
        return _build(cls, values, None)

    def replace(self, **values: object) -> Self:
        """Returns a copy with the named settings changed, in whatever part they stand."""
        return _build(type(self), values, self)

    def value(self, name: str) -> Any:
        """Returns the value of a setting by its flat name."""
        return functools.reduce(getattr, _every(type(self))[name].path, self)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yields (flat name, value) of every flag, sections aside."""
        for name in settings(type(self)):
            yield name, self.value(name)


def expanded(value: object) -> object:
    """A path, or several, with the home folder in place of a leading ~."""
    if isinstance(value, str):
        return os.path.expanduser(value)
    return tuple(map(os.path.expanduser, value)) if isinstance(value, tuple | list) else value


@functools.cache
def _every(cls: type[Settings], hidden: frozenset[str] = frozenset()) -> dict[str, Setting]:
    """Every setting of a config class by its flat name, hidden and derived ones included, without those of sections."""
    hidden = hidden | cls.HIDDEN
    found: dict[str, Setting] = {}
    for name, hint in hints_of(cls).items():
        free = (cls._may_change or MAY_CHANGE in hint.notes) and LASTING not in hint.notes
        own = {name: Setting((), hint, free, name in hidden or hint.is_derived)}
        for key, setting in (_every(hint.kind, hidden) if hint.is_part else own).items():
            if not hint.is_section and (key not in found or found[key].hint.is_derived):
                found[key] = setting._replace(path=(name, *setting.path))
    return found


@functools.cache
def settings(cls: type) -> dict[str, Setting]:
    """Every flag of a config class by its flat name, without those of sections."""
    return {name: setting for name, setting in _every(cls).items() if not setting.hidden}


@functools.cache
def sections(cls: type) -> dict[str, type]:
    """The classes of a config's sections, by their names."""
    return {name: hint.kind for name, hint in hints_of(cls).items() if hint.is_section}


@functools.cache
def names_of(cls: type) -> dict[str, str]:
    """Every accepted name: {name or alias: name}."""
    own = {name: name for name in (*settings(cls), *sections(cls))}
    return {other: name for name, s in settings(cls).items() for other in s.hint.aliases} | own


FEW = 12
"""Most settings of a config that a message names one by one."""


def places_of(cls: type, name: str) -> list[str]:
    """The flags that set `name`, a setting or its alias, in the config itself and in its sections."""
    inner = [f"{section}.{name}" for section, kind in sections(cls).items() if name in names_of(kind)]
    other: Script | None = getattr(cls, "OTHER_FLAGS", None)
    return [name, *inner] if name in names_of(cls) or (other and name in other.flags) else inner


def canonical(cls: type, name: str) -> str:
    """The name of a setting that may be given by an alias, with hyphens or underscores. InputError for others."""
    known, plain = names_of(cls), name.replace("-", "_")
    if plain in known:
        return known[plain]
    if plain in _every(cls):
        raise InputError(f"the setting {name} has no use here; remove it")
    near = places_of(cls, plain) or near_names(plain, known)
    names = list(dict.fromkeys(known.values()))
    whole = f"there are {', '.join(names)}" if len(names) <= FEW else "see --help for all settings"
    raise UnknownSetting(plain, f"did you mean {' or '.join(near)}?" if near else whole)


def near_names(given: str, known: Iterable[str]) -> list[str]:
    """At most three known names for a mistaken one: that it abbreviates, begins, is part of, or is spelled like."""
    known = list(known)
    initials = [name for name in known if "_" in name and "".join(word[0] for word in name.split("_") if word) == given]
    begun = [name for name in known if name.startswith(f"{given}_")]
    longer = begun or [name for name in known if f"_{given}_" in f"_{name}_"]
    return list(dict.fromkeys([*initials, *longer, *difflib.get_close_matches(given, known, n=3, cutoff=0.6)]))[:3]


@contextlib.contextmanager
def errors_in(place: str) -> Iterator[None]:
    """Puts `place` before the messages of InputErrors."""
    try:
        yield
    except InputError as error:
        error.args = (f"{place}: {error}",)
        raise


def default_in(field: dataclasses.Field) -> Any:
    """The default of a field; MISSING when it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _build(cls: type[T], values: Mapping[str, object], base: T | None) -> T:
    """`cls` with `values` by flat name; the rest as `base` or the defaults have it."""
    known, tree = _every(cls), {}
    for name, value in values.items():
        # A flag or alias goes before a derived value of the same name.
        derived = name not in names_of(cls) and name in known and known[name].hint.is_derived
        setting = known.get(name := name if derived else canonical(cls, name))
        *path, last = setting.path if setting else (name,)
        inner = functools.reduce(lambda node, part: node.setdefault(part, {}), path, tree)
        inner[last] = tuple(value) if isinstance(value, list) else value
    return _grow(cls, tree, base)


def _grow(cls: type[T], tree: Mapping[str, object], base: T | None) -> T:
    """As `_build`, of values by field name, those of parts in mappings of their own."""
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(typing.cast(Any, cls)):
        hint = hints_of(cls)[f.name]
        start = default_in(f) if base is None else getattr(base, f.name)
        value = tree.get(f.name, {} if hint.is_part and start is dataclasses.MISSING else start)
        if dataclasses.is_dataclass(hint.kind) and isinstance(value, Mapping):
            inner, own = (None, hint.kind) if start is dataclasses.MISSING else (start, type(start))
            with errors_in(f"in section {f.name}") if hint.is_section else contextlib.nullcontext():
                value = (_build if hint.is_section else _grow)(typing.cast(type, own), value, inner)
        arguments[f.name] = value
    missing = [name for name, value in arguments.items() if value is dataclasses.MISSING]
    if missing:
        raise InputError(f"missing required settings: {', '.join(missing)}; --help describes them")
    return cls(**arguments)


def lasting(config: Settings) -> dict[str, object]:
    """The settings that a resumed run must have as the run that it continues, as JSON values."""
    known = settings(type(config))
    return {name: _plain(value) for name, value in config.items() if not known[name].may_change}


def lasting_defaults(cls: type[Settings]) -> dict[str, object]:
    """The defaults of those settings. A run behaved like this before the setting existed."""
    return {name: _plain(default_of(cls, name)) for name, setting in settings(cls).items() if not setting.may_change}


def to_dict(config: Settings) -> dict[str, object]:
    """The config as plain values by flat names, as YAML has it; sections are dicts of their own."""
    nested = {name: to_dict(getattr(config, name)) for name in sections(type(config))}
    return {name: _plain(value) for name, value in config.items()} | nested


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def check_needs(config: Settings, needs: Mapping[str, str]) -> None:
    """Refuses an option that was changed while the option that it needs is off.

    Args:
        config: The config that has both.
        needs: {option: the option that it needs}, both by flat names.

    Raises:
        InputError: naming both.
    """
    for name, other in needs.items():
        value = config.value(name)
        if value != default_of(type(config), name) and not config.value(other):
            raise InputError(f"{name}={value} requires {other}; set {other}, or remove {name}")


def default_of(cls: type, name: str) -> Any:
    """Returns the default of a setting or section, as the class and the parts in it have it."""
    first, *rest = _every(cls)[name].path if name in _every(cls) else (name,)
    (field,) = (f for f in dataclasses.fields(cls) if f.name == first)
    return functools.reduce(getattr, rest, default_in(field))
