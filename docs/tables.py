"""Pages of the reference made from the code: flags of each command, metrics, data formats and named data sets."""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxrlhf.cli import commands
from jaxrlhf.config.annotations import Hint, hint_of, hints_of
from jaxrlhf.config.settings import Setting, default_of, sections, settings
from jaxrlhf.data.formats import FORMATS, STEPS
from jaxrlhf.data.known_datasets import KNOWN
from jaxrlhf.data.mixture import SourceConfig
from jaxrlhf.runs.metrics import METRICS

LIMITS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}
KINDS = {int: "int", float: "float", bool: "true or false", str: "text"}


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; `|` in cells is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (titles, ["---"] * len(titles), *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


@functools.cache
def docs_of(cls: type) -> dict[str, str]:
    """The docstring under each field of a class, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if base.__module__.startswith("jaxrlhf")]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = node.body if isinstance(node, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split()).replace("<", "&lt;")
    return found


def allowed(hint: Hint) -> str:
    """The values that a setting takes: its type, choices and range."""
    kind = hint.kind
    if typing.get_origin(kind) is typing.Literal:
        said = ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        said = f"several: {allowed(hint_of(typing.get_args(kind)[0]))}"
    elif typing.get_origin(kind) is dict:
        said = "several: name=value"
    else:
        said = KINDS.get(kind) or " or ".join(KINDS.get(member, str(member)) for member in typing.get_args(kind))
    limits = [
        words.format(f"{limit:g}")
        for note in hint.notes
        for name, words in LIMITS.items()
        if (limit := getattr(note, name, None)) is not None and abs(limit) != float("inf")
    ]
    return ", ".join([said, *limits])


def shown(value: Any) -> str:
    """A default as one writes it after its flag."""
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == () or value == "" or value == {}:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict):
        value = [f"{key}={item}" for key, item in value.items()]
    return f"`{' '.join(map(str, value))}`" if isinstance(value, tuple | list) else f"`{value}`"


def owner(cls: type, setting: Setting) -> type:
    """The dataclass that declares a setting."""
    for part in setting.path[:-1]:
        cls = hints_of(cls)[part].kind
    return cls


def flags(cls: type, prefix: str = "", default: Callable[[str], Any] | None = None) -> str:
    """Tables of the flags of a config class, one for each part of it.

    Args:
        cls: The config class.
        prefix: Prefix of the flags of a section, such as `ppo.`.
        default: Gives the default of a setting by its name. Default: that of the class.
    """
    default = default or functools.partial(default_of, cls)
    parts: dict[type, list[list[str]]] = {}
    for name, setting in settings(cls).items():
        place = owner(cls, setting)
        names = "<br>".join(f"`--{prefix}{n}`" for n in (name, *dict.fromkeys(setting.hint.aliases)))
        text = docs_of(place).get(setting.path[-1], "")
        parts.setdefault(place, []).append([names, text, allowed(setting.hint), shown(default(name))])
    found = []
    for place, rows in parts.items():
        text = (inspect.getdoc(place) or place.__name__).partition("\n\n")[0].replace("\n", " ")
        title = text.partition(". ")[0].rstrip(".")
        found.append(f"{'###' if prefix else '##'} {title}\n\n{table(['flag', 'meaning', 'takes', 'default'], rows)}")
    return "\n".join(found)


def command_uris() -> dict[str, str]:
    """The page of each command's flags, by the command's name."""
    return {name: f"reference/flags/{name.replace('+', 'p')}.md" for name in commands()}


def command_page(name: str) -> str:
    """The page of one command's flags."""
    command = commands()[name]
    cls = command.config_class()
    text = [f"---\nsearch:\n  boost: 0.5\n---\n# jaxrlhf {name}\n\n{command.help[0].upper()}{command.help[1:]}.\n"]
    text.append(flags(cls))
    for section, kind in sections(cls).items():
        start = default_of(cls, section)
        text.append(f"## Section `{section}`\n\nSettings of this step alone.\n")
        text.append(flags(kind, f"{section}.", start.value))
    return "\n".join(text)


def commands_table() -> str:
    """All commands with links to their pages, from the page reference/flags.md."""
    links = {name: f"[`jaxrlhf {name}`]({uri.removeprefix('reference/')})" for name, uri in command_uris().items()}
    return table(["command", ""], [[links[name], command.help] for name, command in commands().items()])


def metrics_tables() -> str:
    """All metrics by group."""
    text = []
    for title, metrics in METRICS.items():
        rows = [["<br>".join(f"`{n}`" for n in m.names.split()), m.meaning, m.healthy] for m in metrics]
        text.append(f"## {title}\n\n{table(['metric', 'meaning', 'healthy'], rows)}")
    return "\n".join(text)


def steps_of(steps: Sequence[str]) -> str:
    return "all" if tuple(steps) == STEPS else ", ".join(f"`{step}`" for step in steps)


def columns_of(columns: Sequence[str]) -> str:
    return ", ".join(" or ".join(f"`{one}`" for one in column.split("|")) for column in columns)


def formats_table() -> str:
    """The data formats, in the order in which they are recognised."""
    rows = [[f"`{name}`", f.title, columns_of(f.columns), steps_of(f.steps)] for name, f in FORMATS.items()]
    return table(["`data_format`", "", "columns", "steps"], rows)


def datasets_table() -> str:
    """The data sets that are known by name."""
    formats = {name: f"`{d.format}`" if d.format else "see below" for name, d in KNOWN.items()}
    rows = [[f"`{name}`", formats[name], steps_of(d.steps), d.licence] for name, d in KNOWN.items()]
    return table(["name", "format", "steps", "licence that its card states"], rows)


def sources_table() -> str:
    """The keys of a source of `data_mixture`."""
    docs = docs_of(SourceConfig)
    rows = [[f"`{name}`", docs[name], shown(default_of(SourceConfig, name))] for name in settings(SourceConfig)]
    return table(["key", "meaning", "default"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "commands": commands_table,
    "metrics": metrics_tables,
    "formats": formats_table,
    "datasets": datasets_table,
    "sources": sources_table,
}
"""Makers of the tables that stand in place of a page's lines `<!-- table: NAME -->`, by NAME."""
