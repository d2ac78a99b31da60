"""The rows that `jaxrlhf eval` reads: each source's own evaluation split where it has one, else all its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.data import Data, DataConfig, Tokenizer
from jaxrlhf.data.cache import check_writable, hash_json
from jaxrlhf.data.columns import MISSING, look_up, read_columns
from jaxrlhf.data.formats import FORMATS
from jaxrlhf.data.loading import Loader, every_row, present
from jaxrlhf.data.messages import BadRow, Prompt
from jaxrlhf.data.mixture import SourceConfig
from jaxrlhf.data.parts import Part
from jaxrlhf.data.reading import Reading
from jaxrlhf.data.registry import find
from jaxrlhf.data.selection import limit_rows
from jaxrlhf.data.settings import cache_folder
from jaxrlhf.errors import InputError


@dataclass(frozen=True)
class Prompts:
    """Prompts as the data has them, before any tokenizer.

    Attributes:
        prompts: texts or conversations.
        tools: the tools of each, for chat templates.
        variables: values that each gives to variables of chat templates.
        values: further columns, which reward functions read.
        places: file and line of each.
        skipped: what was wrong with rows that are left out, and how many.
    """

    prompts: list[Prompt]
    tools: list[list[Any] | None]
    variables: list[dict[str, Any] | None]
    values: dict[str, list[object]]
    places: list[str]
    skipped: dict[str, int]

    def __len__(self) -> int:
        return len(self.prompts)

    def columns(self, indices: Sequence[int]) -> dict[str, list[object]]:
        """The further columns of these rows."""
        return {name: [values[i] for i in indices] for name, values in self.values.items()}

    def where(self, i: int) -> str:
        """The place of a row, for messages."""
        return self.places[i]

    def take(self, indices: Sequence[int]) -> Prompts:
        """Only these rows."""
        return Prompts(
            prompts=[self.prompts[i] for i in indices],
            tools=[self.tools[i] for i in indices],
            variables=[self.variables[i] for i in indices],
            values=self.columns(indices),
            places=[self.places[i] for i in indices],
            skipped=self.skipped,
        )


def reading_of(config: DataConfig, source: SourceConfig, step: str) -> Reading:
    """The source's own evaluation split, or all its rows."""
    reading = Reading(config, source, step, cache_folder(config))
    return reading.of("eval") if reading.has("eval") else reading


def read_prompts(config: DataConfig, columns: Sequence[str], limit: int, wanted: tuple[str, ...] = ()) -> Prompts:
    """Reads the prompts of the data.

    Args:
        config: the data settings.
        columns: further columns to keep, besides `config.reward_columns`.
        limit: at most this many rows, chosen at random; 0: all.
        wanted: further columns to keep where a source has them.

    Raises:
        InputError: the data cannot be read, has no usable row, or a row lacks a column.
    """
    check_writable(cache_folder(config))
    names = tuple(dict.fromkeys((*columns, *config.reward_columns)))
    readings = [reading_of(config, source, "ppo") for source in config.sources if "ppo" in source.steps]
    optional = tuple(name for name in present(wanted, readings) if name not in names)
    entries = [
        (opened, i) for reading in readings for opened in reading.opened for i in range(len(opened.table.dataset))
    ]
    found = Prompts([], [], [], {name: [] for name in (*names, *optional)}, [], {})
    for j in limit_rows(np.arange(len(entries)), limit, config.seed).tolist():
        opened, i = entries[j]
        (row,) = opened.table.rows([i])
        if row is None:  # a blank line
            continue
        try:
            scored = opened.reader.all(row)[0]
        except BadRow as problem:
            found.skipped[str(problem)] = found.skipped.get(str(problem), 0) + 1
            continue
        found.prompts.append(scored.prompt)
        found.tools.append(scored.tools)
        found.variables.append(scored.variables)
        found.places.append(opened.table.where(i))
        values = read_columns(row, names, found.places[-1], optional)
        for name, value in zip((*names, *optional), values, strict=True):
            found.values[name].append(value)
    if not len(found):
        reasons = "; ".join(f"{what} ({count} rows)" for what, count in found.skipped.items())
        raise InputError(f"no usable prompt in {', '.join(config.names)}: {reasons or 'no rows'}; check --prompt_field")
    return found


def load_rows(config: DataConfig, tokenizer: Tokenizer, step: str, limit: int) -> Data:
    """Loads the tokenised rows of a step ("reward" or "sft"), not packed.

    Raises InputError as in `load_data`.
    """
    loader = Loader(config.replace(packing=False), tokenizer, step, ())
    readings = [loader.reading(source, evaluates=True) for source in loader.sources]
    parts, keys = loader.parts("eval", loader.limited("eval", [(r, every_row(r)) for r in readings], limit))
    return loader.data("eval", parts, hash_json(keys))


def holds_pairs(config: DataConfig) -> bool:
    """True when a reward model can be trained on every source: rows have better and worse responses."""
    for source in config.sources:
        named = find(source.path, config.dataset_registry or None)
        if named and "reward" not in named.steps:
            return False
        reading = reading_of(config, source, "sft" if named is None or "sft" in named.steps else "reward")
        if "reward" not in FORMATS[reading.note["formats"][0]].steps:
            return False
    return True


def origins(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """The table of the source and the row in it that each kept row came from, int64 `[n]` each."""
    rows = part.table.with_format("numpy", columns=["row"])[:]["row"][part.rows].astype(np.int64)
    return np.asarray(part.tables)[part.rows], rows


def groups_of(part: Part) -> np.ndarray:
    """The number of each kept row's prompt, int64 `[n]`; rows of one prompt have one number."""
    tables, rows = origins(part)
    starts = np.cumsum([0, *part.reading.note["sizes"]])
    return part.reading.groups[starts[tables] + rows]


def subsets_of(part: Part, field: str) -> list[str]:
    """The value of a column in each kept row, as text. Raises InputError where a row has none."""
    tables, rows = origins(part)
    values = [""] * len(rows)
    for k in np.unique(tables).tolist():
        table, places = part.reading.opened[k].table, np.flatnonzero(tables == k)
        for place, row in zip(places.tolist(), table.rows(rows[places].tolist()), strict=True):
            value = look_up(row, field)
            if value is MISSING or value is None or isinstance(value, list | dict):
                columns = ", ".join(row) if isinstance(row, dict) else "none"
                where = table.where(int(rows[place]))
                raise InputError(f"subset_field '{field}': {where} has no such value (its columns: {columns})")
            values[place] = str(value)
    return values
