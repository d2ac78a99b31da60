"""Reads one source for one step: its format, the group of each row, and the tokens of the selected rows."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np

from jaxrlhf.config.files import write_json_atomic
from jaxrlhf.data.cache import hash_json
from jaxrlhf.data.columns import Columns
from jaxrlhf.data.files import Table, table_of_rows
from jaxrlhf.data.formats import SAME, Reader
from jaxrlhf.data.messages import BadRow, Completion, Message, as_messages
from jaxrlhf.data.mixture import SourceConfig
from jaxrlhf.data.parts import Part, make_part, problems_of
from jaxrlhf.data.recognition import check_serves, describe, recognise
from jaxrlhf.data.registry import find
from jaxrlhf.data.settings import DataConfig
from jaxrlhf.data.sources import Source, resolve_source
from jaxrlhf.data.tokenized import (
    FEW,
    FORMAT,
    OWN_COLUMNS,
    TOKENS,
    Encoding,
    encode_batch,
    features_of,
    group_of,
    index_batch,
    open_cached,
    run_pass,
)
from jaxrlhf.data.tokenizer import Tokenizer, with_template
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

PAIRED = ("reward", "dpo")
HEAD = 100  # rows that decide the format


class Opened(NamedTuple):
    """A table of a source, how its rows are read, and what they are, in words."""

    table: Table
    reader: Reader
    words: str


class Note(TypedDict):
    """Formats and sizes of a source's tables, one item per table, kept in the cache."""

    formats: list[str]
    words: list[str]
    sizes: list[int]


class Reading:
    """One split of one source, read for one step.

    Args:
        config: the data settings.
        source: which source, and how.
        step: the step that reads it.
        folder: the cache folder.
        split: "train" or "eval".
        streaming: read the training rows as they are needed.
        origin: the source, where it is found already.
        first: only so many rows of each table, read as a stream; 0: all.
    """

    def __init__(
        self,
        config: DataConfig,
        source: SourceConfig,
        step: str,
        folder: Path,
        split: str = "train",
        streaming: bool = False,
        origin: Source | None = None,
        first: int = 0,
    ) -> None:
        self.config, self.source, self.step, self.folder, self.split = config, source, step, folder, split
        self.streaming, self.first = streaming, first
        self.named = named = find(source.path, config.dataset_registry or None)
        if named and step not in named.steps:
            raise InputError(
                f"data_path '{source.path}': this data set serves {', '.join(named.steps)}, not {step}; leave it out "
                "of this step (`steps` in data_mixture), or declare your own in dataset_registry"
            )
        self.origin = origin or resolve_source(
            source.path, folder, split=source.split, named=named, streaming=streaming or bool(first)
        )
        own = dict(named.fields) if named and not named.convert else {}
        self.columns = Columns(config.fields.names | own | {k: str(v) for k, v in source.fields.items()})
        self.format = source.format or config.data_format or (named.format if named else "")
        self.template = source.template or (named.prompt_template if named else "")

    def of(self, split: str) -> Reading:
        """The same source's other split."""
        given = self.config, self.source, self.step, self.folder, split, self.streaming, self.origin, self.first
        return Reading(*given)

    def has(self, split: str) -> bool:
        return split in self.origin.splits

    @cached_property
    def fingerprint(self) -> str:
        """Hashes the contents of the split. Raises InputError when the source has no such split."""
        if self.first:
            return hash_json([self.stream_key, self.first])
        return self.origin.fingerprint(self.split)

    @cached_property
    def opened(self) -> list[Opened]:
        """The tables of the split. Raises InputError for rows of no format, of two, or of one useless to the step."""
        tables = self.origin.tables(self.split)
        if self.first:
            tables = [first_rows(table, self.first) for table in tables]
        if self.streaming and self.named and self.named.convert_all:
            raise InputError(f"data_path '{self.source.path}': its examples span rows, so it cannot be streamed")
        if self.named and self.named.convert_all:
            raw = [row for table in tables for row in table.rows(range(len(table.dataset))) if row is not None]
            tables = [table_of_rows(list(self.named.rows(raw, self.step)), self.source.path, "example")]
        result = [self.open_table(table) for table in tables]
        if len({opened.reader.format for opened in result}) > 1:
            listed = "; ".join(f"{opened.table.name}: {opened.words}" for opened in result)
            raise InputError(
                f"data_path '{self.source.path}': its files hold rows of several formats ({listed}); give them as "
                "sources of their own"
            )
        if self.step in PAIRED and result[0].reader.format == "unpaired":
            if self.streaming:
                raise InputError(
                    f"data_path '{self.source.path}': holds unpaired preferences, whose pairs span rows; {self.step} "
                    "cannot stream them"
                )
            return [pair_up(self.source.path, result)]
        return result

    def open_table(self, table: Table) -> Opened:
        convert = self.named.convert_row if self.named and self.named.convert else None
        head = table.head(HEAD)
        rows = [made for row in head for made in convert(row)] if convert else head
        format = recognise(rows, self.columns, table.name, self.format)
        first = next(row for row in rows if isinstance(row, dict))
        check_serves(format, self.step, table.name, first)
        words = describe(format, first, self.columns)
        reader = Reader(format, self.columns, self.config.pair_rule, self.config.pair_margin, convert)
        return Opened(table, reader, words)

    @cached_property
    def key(self) -> str:
        """Hash of everything that the groups of the rows depend on."""
        convert = repr(self.named) if self.named else ""
        return hash_json([FORMAT, self.fingerprint, self.columns.identity, self.format, self.step in PAIRED, convert])

    @property
    def stream_key(self) -> str:
        """Hash of what a stream depends on. Files count by name, size and time: nothing is read before its time."""
        files = self.origin.splits[self.split]
        names = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files] if isinstance(files, list) else []
        return hash_json([FORMAT, self.source.path, names, self.columns.identity, self.format, repr(self.named)])

    @cached_property
    def note(self) -> Note:
        """The formats and sizes of the tables, from the cache where possible."""
        path = self.folder / "rows" / f"{self.key}.json"
        if path.exists():
            note: Note = json.loads(path.read_text(encoding="utf-8"))
            for format in note["formats"]:
                check_serves(format, self.step, self.source.path)
            return note
        note = {
            "formats": [opened.reader.format for opened in self.opened],
            "words": [opened.words for opened in self.opened],
            "sizes": [len(opened.table.dataset) for opened in self.opened],
        }
        write_json_atomic(path, note)
        return note

    @cached_property
    def groups(self) -> np.ndarray:
        """int64 [n]: the group of each row; -1: a blank line. Rows of one prompt have one group."""
        from datasets import Features, Value

        found = []
        for k in range(len(self.note["sizes"])):
            path = self.folder / "rows" / f"{self.key}-{k}.arrow"
            result = open_cached(path)
            if result is None:
                opened = self.opened[k]
                result = run_pass(
                    opened.table.dataset,
                    index_batch,
                    path,
                    label=f"reading {opened.table.name}",
                    features=Features({"group": Value("int64")}),
                    num_proc=self.config.dataset_num_proc if len(opened.table.dataset) > FEW else 1,
                    table=dataclasses.replace(opened.table, dataset=None),
                    reader=opened.reader,
                )
            found.append(result.with_format("numpy")["group"][:])
        return np.concatenate(found)

    def own_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the source's own template, where it has one."""
        if not self.template:
            return tokenizer
        name = "prompt_template" if self.template == "raw" or "{prompt}" in self.template else "chat_template"
        return with_template(tokenizer, self.config.template.replace(**{name: self.template}))

    def part(
        self, rows: np.ndarray, tokenizer: Tokenizer, fingerprint: str, encoding: Encoding, label: str
    ) -> tuple[Part, str]:
        """The tokens of these rows, and the hash of everything that they depend on, such as the run's tokenizer."""
        tokenizer = self.own_tokenizer(tokenizer)
        settings = [encoding.identity, self.config.pair_rule, self.config.pair_margin]
        chosen_rows = hashlib.blake2b(rows.astype(np.int64).tobytes(), digest_size=16).hexdigest()
        key = hash_json([self.key, fingerprint, tokenizer.chat_template, settings, chosen_rows])
        folder = self.folder / "tokens"
        bounds = np.cumsum([0, *self.note["sizes"]])
        stem = "-".join((encoding.step, str(TOKENS), *OWN_COLUMNS.get(encoding.step, ()), key))
        tables, numbers, note_path = [], [], folder / f"{stem}.json"
        for k, (first, last) in enumerate(itertools.pairwise(bounds)):
            chosen = rows[(rows >= first) & (rows < last)] - first
            if len(chosen):
                path = folder / f"{stem}-{k}.arrow"
                table = open_cached(path)
                if table is None:
                    note_path.unlink(missing_ok=True)
                    table = self.tokenise(k, chosen, tokenizer, encoding, path, label)
                tables.append(table)
                numbers.append(k)
        if note_path.exists():
            problems = tuple(json.loads(note_path.read_text(encoding="utf-8"))["problems"])
        else:
            problems = problems_of(tables, [self.opened[k].table for k in numbers])
            write_json_atomic(note_path, {"problems": problems})
        words = ", ".join(dict.fromkeys(self.note["words"]))
        part = make_part(self.source.short_name, tables, len(rows), problems, words)
        of_entries = np.repeat(numbers, [len(table) for table in tables])
        if part.margins():  # unknown to version 0.1.0
            key = hash_json([key, "margin"])
        if any(SAME in problem for problem in problems):  # version 0.1.0 kept these rows
            key = hash_json([key, "distinct"])
        return dataclasses.replace(part, tables=of_entries, reading=self), key

    def where(self, k: int, row: int) -> str:
        """The place of a row of table `k`, for messages."""
        return self.opened[k].table.where(row)

    def tokenise(
        self, k: int, rows: np.ndarray, tokenizer: Tokenizer, encoding: Encoding, path: Path, label: str
    ) -> Dataset:
        """Tokenises rows of table `k` into the file `path`."""
        opened = self.opened[k]
        return run_pass(
            opened.table.dataset.select(rows),
            encode_batch,
            path,
            label=f"tokenising {opened.table.name} ({label})",
            features=features_of(encoding.step),
            num_proc=self.config.dataset_num_proc,
            table=dataclasses.replace(opened.table, dataset=None),
            numbers=rows,
            reader=opened.reader,
            tokenizer=tokenizer,
            encoding=encoding,
        )


def first_rows(table: Table, count: int) -> Table:
    """A table of the first rows of a streamed one. Raises InputError when it has none."""
    from datasets import Dataset

    rows = [dict(row) for row in table.each(count)]
    if not rows:
        raise InputError(f"{table.name}: holds no rows")
    return dataclasses.replace(table, dataset=Dataset.from_list(rows))


def pair_up(name: str, tables: list[Opened]) -> Opened:
    """Pairs the good and the bad completions of each prompt of unpaired rows, in memory.

    Raises InputError when no prompt has both.
    """
    found: dict[int, dict[bool, list[tuple[int, Completion]]]] = collections.defaultdict(lambda: {True: [], False: []})
    prompts, number = {}, 0
    for opened in tables:
        for row in opened.table.rows(range(len(opened.table.dataset))):
            number += 1
            try:
                scored = opened.reader(row) if row is not None else None
            except BadRow:
                continue  # a pair needs two good rows
            if scored is not None:
                completion, label = scored.completions[0]
                group = group_of(scored)
                prompts[group] = scored
                found[group][label > 0].append((number, completion))
    rows, numbers = [], []
    for group, sides in found.items():
        for (place, chosen), (_, rejected) in zip(sides[True], sides[False], strict=False):
            sided = {"chosen": messages_of(chosen), "rejected": messages_of(rejected)}
            rows.append(
                {"prompt": as_messages(prompts[group].prompt), **sided, "tools": prompts[group].tools}
                | {"chat_template_kwargs": prompts[group].variables}
            )
            numbers.append(place)
    if not rows:
        raise InputError(
            f"data_path '{name}': holds unpaired preferences, but no prompt has a good and a bad completion, so there "
            "are no pairs to learn from"
        )
    table = table_of_rows(rows, name, "row", numbers)
    return Opened(table, Reader("preference", Columns({})), f"{tables[0].words}, paired by prompt")


def messages_of(completion: Completion) -> list[Message]:
    """A completion as messages: text is the assistant's."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
