"""Finds the format of rows by their columns, and says what is missing where none fits."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Mapping

from jaxrlhf.data.columns import FIELDS, Columns, look_up
from jaxrlhf.data.formats import FORMATS
from jaxrlhf.data.messages import kind_of
from jaxrlhf.errors import InputError

SAMPLE = 1000  # rows that the recognition looks at


def recognise(rows: Iterable[object], columns: Columns, name: str, wanted: str = "") -> str:
    """The format of a source, by the columns of its first rows.

    Args:
        rows: the first rows.
        columns: names of the columns.
        name: the source, for messages.
        wanted: the format that the user names; it must fit the rows.

    Raises:
        InputError: no format fits, or rows of two formats stand in one source.
    """
    found: dict[str, list[int]] = collections.defaultdict(list)
    first: Mapping = {}
    for number, row in enumerate(itertools.islice(rows, SAMPLE), start=1):
        if isinstance(row, Mapping) and row:
            first = first or row
            fit = [key for key in ([wanted] if wanted else FORMATS) if not FORMATS[key].missing(row, columns)]
            if fit:
                found[fit[0]].append(number)
    if not found:
        raise InputError(_no_format(first, columns, name, wanted))
    best = max(found, key=lambda key: len(found[key]))
    for key, numbers in found.items():
        if not FORMATS[key].names <= FORMATS[best].names:
            raise InputError(
                f"{name}: holds rows of two formats: row {found[best][0]} is {FORMATS[best].title} "
                f"({FORMATS[best].listed}), row {numbers[0]} is {FORMATS[key].title} "
                f"({FORMATS[key].listed}); put them into two files, or choose one with --data_format"
            )
    return best


def listed(row: Mapping) -> str:
    """The columns of a row, with the kind of each value; those of an object too, for dotted paths."""
    kinds = {key: kind_of(value) for key, value in row.items()}
    kinds |= {key: f"an object of {', '.join(map(str, value))}" for key, value in row.items() if is_object(value)}
    return ", ".join(f"{key} ({kind})" for key, kind in kinds.items())[:1000] or "none"


def is_object(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value)


def is_row(value: object) -> bool:
    """True for an object that is not a message."""
    return isinstance(value, Mapping) and bool(value) and not value.keys() & {"role", "from"}


def _no_format(row: Mapping, columns: Columns, name: str, wanted: str) -> str:
    """The message for rows that fit no format: their columns, and the nearest format."""
    lacks = {key: FORMATS[key].missing(row, columns) for key in ([wanted] if wanted else FORMATS)}
    near = {key: missing for key, missing in lacks.items() if wanted or len(missing) < len(FORMATS[key].columns)}
    found = f"{name}: its columns fit no format. Found: {listed(row)}."
    around = [key for key, value in row.items() if isinstance(value, list) and value and all(map(is_row, value))]
    if len(row) == 1 and around and not near:
        return f"{found} The rows stand inside '{around[0]}': write them as a list, or one per line, and nothing else"
    if not near:
        known = "; ".join(", ".join(c.partition("|")[0] for c in form.columns) for form in FORMATS.values())
        return (
            f"{found} Formats have the columns: {known}. Name yours, such as --prompt_field question "
            "--completion_field answer; dotted paths such as answers.0.text work too"
        )
    best = min(near, key=lambda key: len(near[key]))
    missing = [c.partition("|")[0] for c in near[best]]
    flags = " ".join(f"--{column}_field" for column in missing if column in FIELDS)
    if not flags and not wanted:
        flags = "--prompt_field, --completion_field …"
    name = f"name your columns with {flags}, or " if flags else ""
    return (
        f"{found} The nearest is {FORMATS[best].title} (data_format {best}), which lacks "
        f"{', '.join(columns.path(column) for column in missing)}; {name}add it to the rows"
    )


def check_serves(format: str, step: str, name: str, row: Mapping | None = None) -> None:
    """Raises InputError when a step cannot use rows of a format, with the columns of one where it is given."""
    if step in FORMATS[format].steps:
        return
    need = {
        "sft": "a response (--completion_field, --chosen_field), messages (--messages_field) or text (--text_field)",
        "ppo": "prompts (--prompt_field)",
        "kto": "a completion and its label (--completion_field, --label_field), or chosen and rejected",
    }.get(step, "a preference: chosen and rejected (--chosen_field, --rejected_field)")
    found = f". Found: {listed(row)}" if row else ""
    raise InputError(
        f"{name}: holds {FORMATS[format].title} rows ({FORMATS[format].listed}), which {step} cannot use; it needs "
        f"rows with {need}{found}"
    )


def describe(format: str, row: Mapping, columns: Columns) -> str:
    """The format of a source in words: `preference, implicit prompt, conversational`."""
    values = [look_up(row, columns.path(c)) for part in FORMATS[format].columns for c in part.split("|")]
    conversational = any(isinstance(value, list | Mapping) and format != "ranked" for value in values)
    return f"{FORMATS[format].title}, {'conversational' if conversational else 'text'}"
