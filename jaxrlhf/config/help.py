"""The pages of `--help`, by tyro."""

import dataclasses
import typing
from typing import Annotated, Any

import tyro

from jaxrlhf.config.annotations import hints_of
from jaxrlhf.config.settings import Settings, default_in, default_of, sections
from jaxrlhf.errors import InputError

COMMON = ("model", "models", "data", "folder", "run", "tracking")
RARE = ("rollout", "generation", "frozen", "ptx", "mesh", "compute", "process")
"""Parts that stand first and last on a page."""


def _place(part: str) -> int:
    return COMMON.index(part) if part in COMMON else len(COMMON)


def print_help(cls: type[Settings], section: str, prog: str, description: str) -> None:
    """Prints the flags, or those of a section, and exits."""
    names = sections(cls)
    if section and section not in names:
        raise InputError(f"--help {section}: the sections are {', '.join(names) or 'none'}")
    if section:
        start = default_of(cls, section)
        shown = _shown(names[section], start, frozenset())
        description = f"section {section}: write each flag as --{section}.FLAG"
    else:
        shown = _shown(cls, None, frozenset())
        lines = [f"--{name}.FLAG sets one of section {name}; `--help {name}` lists them." for name in names]
        description += "\n\n" + "\n".join(["--config FILE.yaml reads settings from a file; flags win.", *lines])
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    tyro.cli(shown, args=["--help"], prog=prog, description=description, use_underscores=True, config=markers)


def _shown(cls: type, start: object, hidden: frozenset[str]) -> type:
    """`cls` as tyro shows it: with the defaults of `start`, parts without a prefix, hidden settings left out."""
    hidden, fields = hidden | getattr(cls, "HIDDEN", frozenset()), []
    for f in dataclasses.fields(cls):
        hint = hints_of(cls)[f.name]
        default = default_in(f) if start is None else getattr(start, f.name)
        annotation: Any = typing.get_type_hints(cls, include_extras=True)[f.name]
        if hint.is_part:
            part = _shown(hint.kind, None if default is dataclasses.MISSING else default, hidden)
            annotation, default = part, part()
        elif f.name in hidden or hint.is_section:
            annotation = Annotated[annotation, tyro.conf.Fixed, tyro.conf.Suppress]
        given = () if default is dataclasses.MISSING else (dataclasses.field(default_factory=lambda v=default: v),)
        fields.append((f.name, annotation, *given))
    names = {"__doc__": cls.__doc__, "__module__": cls.__module__}
    shown = dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), namespace=names, frozen=True, kw_only=True)
    parts = sorted(shown.__dataclass_fields__.items(), key=lambda item: (item[0] in RARE, _place(item[0])))
    shown.__dataclass_fields__ = dict(parts)
    return shown
