"""The columns of rows: their names, dotted paths into them, and their values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.data.files import Row
from jaxrlhf.data.messages import BadRow, kind_of
from jaxrlhf.errors import InputError

FIELDS = ("prompt", "completion", "chosen", "rejected", "messages", "text", "label", "responses", "scores")
"""Columns whose names a flag sets."""
LATER = ("margin", "chat_template_kwargs")
"""Columns that version 0.1.0 did not know."""


@dataclass(frozen=True)
class Columns:
    """The name or dotted path of each canonical column in a row (`question.full_text`)."""

    names: Mapping[str, str]

    @property
    def identity(self) -> dict[str, str]:
        """The names, for hashes. Without the defaults of columns that version 0.1.0 did not know: hashes of runs that
        began with that version stay."""
        return {column: name for column, name in self.names.items() if column != name or column not in LATER}

    def path(self, column: str) -> str:
        return self.names.get(column, column)

    def has(self, row: Row, column: str) -> bool:
        return look_up(row, self.path(column)) is not MISSING

    def get(self, row: Row, column: str) -> Any:
        """The value, or None. Raises BadRow when the row lacks the column."""
        value = look_up(row, self.path(column))
        if value is MISSING:
            raise BadRow(self.path(column), "is missing")
        return value


MISSING = object()


def look_up(row: object, path: str, default: object = MISSING) -> Any:
    """The value at a dotted path (`answers.0.text`), or `default`. A column whose name has dots goes first."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for part in path.split("."):
        if isinstance(row, Mapping) and part in row:
            row = row[part]
        elif isinstance(row, Sequence) and not isinstance(row, str) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return default
    return row


def read_columns(row: object, names: Sequence[str], where: str, optional: Sequence[str] = ()) -> list[object]:
    """The values of further columns, None for one of `optional` that is missing.

    Raises InputError for another one that is missing or null, and for a value that is no JSON value.
    """
    values = [look_up(row, name) for name in names] + [look_up(row, name, None) for name in optional]
    for name, value in zip((*names, *optional), values, strict=True):
        problem = ""
        if value is None and name in optional:
            continue
        if value is None or (kind_of(value) == "an object" and not isinstance(value, Mapping | bytes)):
            problem = "is null" if value is None else "is missing"
        else:
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                problem = f"is not a JSON value but a {type(value).__name__}"
        if problem:
            has = ", ".join(map(str, row)) if isinstance(row, Mapping) else ""
            raise InputError(
                f"{where}: '{name}' {problem}, and a reward function, the environment or reward_columns asks for it; "
                f"correct or delete the row, or name another column (it has {has or 'none'})"[:1000]
            )
    return values
