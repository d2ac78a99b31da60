"""Settings: frozen dataclasses that hold one another, flat flags, and YAML files whose keys are the flags.

A config of a trainer holds the dataclasses that its parts take (`SFTConfig.data` is a `DataConfig`). Flags and YAML keys
are the plain field names, whatever dataclass they stand in: `--max_length 64` sets `config.data.max_length`. The
docstring under a field is its help, its annotation says what is allowed: `Annotated[int, Ge(1), alias("n")] = 8`.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import tyro
from annotated_types import Ge, Gt, Le, Lt

from jaxrlhf.errors import InputError

T = TypeVar("T")


class _Mark(NamedTuple):
    name: str


MAY_CHANGE, LASTING, SECTION, DERIVED = map(_Mark, ("may_change", "lasting", "section", "derived"))

MayChange = Annotated[T, MAY_CHANGE]
"""A setting that a resumed run may have otherwise than the run that it continues."""
Lasting = Annotated[T, LASTING]
"""The opposite, in a class with `may_change=True`."""
Section = Annotated[T, SECTION]
"""Settings under a name of their own: `--sft.max_steps 5`, a mapping in YAML."""
Derived = Annotated[T, DERIVED, tyro.conf.Fixed, tyro.conf.Suppress]
"""A value that a program takes from elsewhere: neither a flag nor a YAML key."""

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), Lt(math.inf)]
NonNegative = Annotated[float, Ge(0), Lt(math.inf)]
Fraction = Annotated[float, Ge(0), Le(1)]


def alias(*names: str) -> object:
    """Other names of a flag or key, as a part of its annotation."""
    return tyro.conf.arg(aliases=[f"--{name}" for name in names])


@dataclasses.dataclass(frozen=True)
class FromYaml:
    """Turns what a YAML file has for a setting into a list of texts, as a part of its annotation."""

    read: Callable[[Any], Any]


class Setting(NamedTuple):
    """One field: where it lies in the config, its type, and what its annotation says of it."""

    path: tuple[str, ...]
    kind: Any
    notes: tuple[Any, ...]
    may_change: bool
    hidden: bool

    @property
    def aliases(self) -> list[str]:
        named = [name for note in self.notes for name in getattr(note, "aliases", None) or ()]
        return [name.removeprefix("--").replace("-", "_") for name in named]


class Settings:
    """Base of all settings: checks annotations, and gives access by flat names.

    A subclass is a frozen dataclass. `check` holds what no annotation says. `HIDDEN` names settings of its parts that
    it has no use for: neither flags nor keys. `may_change=True` marks all fields as `MayChange`.
    """

    HIDDEN: ClassVar[frozenset[str]] = frozenset()
    _may_change: ClassVar[bool] = False

    def __init_subclass__(cls, may_change: bool | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if may_change is not None:
            cls._may_change = may_change

    def __post_init__(self) -> None:
        for name, (kind, notes) in _hints(type(self)).items():
            check_value(name, getattr(self, name), kind, notes)
        self.check()

    def check(self) -> None:
        """Refuses settings that contradict each other. Raises InputError naming them."""

    @classmethod
    def create(cls, **values: Any) -> Self:
        """Builds the config from flat names: `SFTConfig.create(data_path=("demo",), learning_rate=1e-4)`.

        Raises InputError for a name that is not a setting, or a value that is not allowed.
        """
        return _build(cls, _by_name(cls, values), None)

    def replace(self, **values: Any) -> Self:
        """Returns a copy with the named settings changed, in whatever part they stand."""
        return _build(type(self), _by_name(type(self), values), self)

    def value(self, name: str) -> Any:
        """Returns the value of a setting by its flat name."""
        return functools.reduce(getattr, _every(type(self))[name].path, self)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yields (flat name, value) of every flag, sections aside."""
        for name, setting in settings(type(self)).items():
            yield name, functools.reduce(getattr, setting.path, self)


@functools.cache
def _hints(cls: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """{field: (type, notes of its annotation)}."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: _split(hints[f.name]) for f in dataclasses.fields(cls)}


def _split(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """An annotation as (type, notes); the notes of an optional type's member count too."""
    notes: tuple[Any, ...] = ()
    if typing.get_origin(kind) is Annotated:
        kind, *extra = typing.get_args(kind)
        notes = tuple(extra)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [_split(member) for member in typing.get_args(kind)]
        kind = typing.Union[tuple(member for member, _ in members)]  # noqa: UP007 - built at run time
        notes += tuple(note for _, more in members for note in more)
    return kind, notes


def is_optional(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def scalar_of(kind: Any) -> Any:
    """The type without None, when one member is left."""
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    return members[0] if is_optional(kind) and len(members) == 1 else kind


def check_value(name: str, value: Any, kind: Any, notes: tuple[Any, ...]) -> None:
    """Raises InputError naming the setting, its value and the range or choices that its annotation allows."""
    if value is None and is_optional(kind):
        return
    inner = scalar_of(kind)
    if typing.get_origin(inner) is Literal and value not in typing.get_args(inner):
        raise InputError(f"{name}={value!r} must be one of {', '.join(map(str, typing.get_args(inner)))}")
    limits = [note for note in notes if isinstance(note, Ge | Gt | Le | Lt)]
    if limits and isinstance(value, int | float) and not all(_holds(value, limit) for limit in limits):
        words = [text for limit in limits if (text := _in_words(limit))]
        raise InputError(f"{name}={value} must be {' and '.join(words)}")


def _holds(value: float, limit: Any) -> bool:
    if isinstance(limit, Ge):
        return value >= limit.ge
    if isinstance(limit, Gt):
        return value > limit.gt
    return value <= limit.le if isinstance(limit, Le) else value < limit.lt


def _in_words(limit: Any) -> str:
    if isinstance(limit, Ge):
        return f"at least {limit.ge}"
    if isinstance(limit, Gt):
        return f"above {limit.gt}"
    if isinstance(limit, Le):
        return f"at most {limit.le}"
    return "finite" if limit.lt == math.inf else f"below {limit.lt}"


@functools.cache
def _every(cls: type, hidden: frozenset[str] = frozenset()) -> dict[str, Setting]:
    """Every setting of a config class by its flat name, hidden ones included, without those of sections."""
    hidden = hidden | getattr(cls, "HIDDEN", frozenset())
    found: dict[str, Setting] = {}
    for name, (kind, notes) in _hints(cls).items():
        if dataclasses.is_dataclass(kind) and SECTION not in notes:
            parts = _every(typing.cast(type, kind), hidden)
            found |= {n: s._replace(path=(name, *s.path)) for n, s in parts.items()}
        elif not {SECTION, DERIVED} & set(notes):
            free = (cls._may_change or MAY_CHANGE in notes) and LASTING not in notes
            found[name] = Setting((name,), kind, notes, free, name in hidden)
    return found


@functools.cache
def settings(cls: type) -> dict[str, Setting]:
    """Every flag of a config class by its flat name, without those of sections."""
    return {name: setting for name, setting in _every(cls).items() if not setting.hidden}


@functools.cache
def sections(cls: type) -> dict[str, type]:
    """The classes of a config's sections, by their names."""
    return {name: kind for name, (kind, notes) in _hints(cls).items() if SECTION in notes}


@functools.cache
def _names(cls: type) -> dict[str, str]:
    """Every accepted name: {name or alias: name}."""
    own = {name: name for name in (*settings(cls), *sections(cls))}
    return own | {other: name for name, s in settings(cls).items() for other in s.aliases if other not in own}


def canonical(cls: type, name: str, where: str = "") -> str:
    """The name of a setting that may be given by an alias, with hyphens or underscores."""
    known = _names(cls)
    plain = name.replace("-", "_")
    if plain not in known:
        if plain in _every(cls):
            raise InputError(f"{name}{where} has no use here; remove it")
        near = difflib.get_close_matches(plain, known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help for all settings"
        raise InputError(f"unknown setting {name}{where}; {hint}")
    return known[plain]


def _by_name(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of fields, derived ones included."""
    derived = {name for part in _parts(cls) for name, (_, notes) in _hints(part).items() if DERIVED in notes}
    return {name if name in derived else canonical(cls, name): value for name, value in values.items()}


def _parts(cls: type) -> Iterator[type]:
    yield cls
    for kind, notes in _hints(cls).values():
        if dataclasses.is_dataclass(kind) and SECTION not in notes:
            yield from _parts(typing.cast(type, kind))


def _build(cls: type[T], values: Mapping[str, Any], base: T | None) -> T:
    """`cls` with `values` by field name, wherever they lie; the rest as `base` or the defaults have it."""
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(typing.cast(Any, cls)):
        kind, notes = _hints(cls)[f.name]
        default = dataclasses.MISSING if base is None else getattr(base, f.name)
        if base is None and f.default is not dataclasses.MISSING:
            default = f.default
        elif base is None and f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        if f.name in values:
            value = values[f.name]
            if SECTION in notes and isinstance(value, Mapping):
                part = default if dataclasses.is_dataclass(default) else None
                value = _build(kind, _by_name(kind, value), part)
            arguments[f.name] = tuple(value) if isinstance(value, list) else value
        elif dataclasses.is_dataclass(kind) and SECTION not in notes:
            part = typing.cast(type, kind)
            own = {name for p in _parts(part) for name in _hints(p)} & set(values)
            known = None if default is dataclasses.MISSING else default
            inside = {name: values[name] for name in own}
            arguments[f.name] = _build(type(known) if known else part, inside, known) if own or known is None else known
        elif default is not dataclasses.MISSING:
            arguments[f.name] = default
    missing = [f.name for f in dataclasses.fields(typing.cast(Any, cls)) if f.name not in arguments]
    if missing:
        raise InputError(f"missing required settings: {', '.join(missing)}")
    return cls(**arguments)


def lasting(config: Settings) -> dict[str, Any]:
    """The settings that a resumed run must have as the run that it continues, as JSON values."""
    known = settings(type(config))
    return {name: _plain(value) for name, value in config.items() if not known[name].may_change}


def to_dict(config: Settings) -> dict[str, Any]:
    """The config as plain values by flat names, as YAML has it; sections are dicts of their own."""
    nested = {name: to_dict(getattr(config, name)) for name in sections(type(config))}
    return {name: _plain(value) for name, value in config.items()} | nested


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def check_needs(config: Settings, needs: Mapping[str, str]) -> None:
    """Refuses an option that was changed while the option that it needs is off.

    Args:
        needs: {option: the option that it needs}, both by flat names.

    Raises:
        InputError: naming both.
    """
    for name, other in needs.items():
        value = config.value(name)
        if value != default_of(type(config), name) and not config.value(other):
            raise InputError(f"{name}={value} requires {other}; set {other}, or remove {name}")


def default_of(cls: type, name: str) -> Any:
    """Returns the default of a setting, as the class and the parts in it have it."""
    first, *rest = _every(cls)[name].path
    (f,) = (f for f in dataclasses.fields(cls) if f.name == first)
    default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return functools.reduce(getattr, rest, default)
