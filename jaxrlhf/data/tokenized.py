"""Tokenises rows once, into a ragged token stream on disk that later runs map into memory.

A cached part is a folder: `tokens.bin` (int32, all rows one after the other), `offsets.npy` (int64, where each field
of each row begins), `rows.npy` (int32, where each row came from) and `meta.json`. For prompts (ppo), `fields.bin` and
`fields.npy` hold each row's prompt as the data has it and its reward columns. The folder's name is a hash of everything
that the tokens depend on, so a cached part is never out of date.
"""

from __future__ import annotations

import collections
import json
import logging
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxrlhf.data.cache import created, hash_json
from jaxrlhf.data.rendering import encode_rows
from jaxrlhf.data.rows import BadRow, Example, read_columns, read_row
from jaxrlhf.data.sources import Rows
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import Console

logger = logging.getLogger(__name__)

FORMAT = 3  # raise it when the layout or the meaning of the files changes
CHUNK = 1024  # rows tokenised in one call
SHOWN = 3  # places of bad rows that a report names
COUNTS = ("skipped", "truncated_prompts", "truncated_responses", "dropped_too_long")

T = TypeVar("T")


@dataclass(frozen=True)
class Encoding:
    """Everything that decides how a row becomes tokens. Lengths are in tokens."""

    step: str
    names: tuple[tuple[str, str], ...]  # prompt, chosen, rejected -> the field's name in the file
    special_tokens_in_data: bool
    max_length: int  # bound of prompt + response (sft, reward, dpo)
    max_prompt_length: int  # bound of the prompt (ppo)
    long_prompts: str  # "truncate" or "drop"
    columns: tuple[str, ...] = ()  # further fields to keep (ppo)

    @property
    def bound(self) -> tuple[str, int]:
        """The setting that bounds a row's length, and its value."""
        if self.step == "ppo":
            return "max_prompt_seq_len", self.max_prompt_length
        return "max_length", self.max_length


@dataclass(frozen=True)
class RowSet:
    """The rows that a part is made of, before tokenisation.

    Attributes:
        label: the part, for messages.
        sources: name of each source, as the user gave it.
        rows: the rows of each source.
        origin: int32 [n, 2]: source number and row number of each selected row.
    """

    label: str
    sources: tuple[str, ...]
    rows: Sequence[Rows]
    origin: np.ndarray


@dataclass(frozen=True)
class Ragged:
    """Tokenised rows of a step: field `j` (prompt, chosen, rejected) of row `i` is `part(i, j)`.

    Attributes:
        tokens: int32: all fields of all rows.
        offsets: int64: where each field begins in `tokens`.
        rows: int32 [n, 2]: the source's number and the row's number in that source.
        sources: name of each source.
        counts: rows given, kept, skipped, truncated and dropped.
        problems: reasons and places of skipped rows.
        fields: uint8: JSON text of `kept` for each row; empty but for ppo.
        field_offsets: int64: where each row begins in `fields`.
        columns: names of the values in `kept` after the prompt.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    sources: tuple[str, ...]
    counts: dict[str, int]
    problems: tuple[str, ...]
    fields: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    field_offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def kept(self, i: int) -> list[Any]:
        """Row `i`'s prompt as the data has it, and the values of `columns`."""
        return json.loads(self.fields[self.field_offsets[i] : self.field_offsets[i + 1]].tobytes())

    @property
    def parts(self) -> int:
        """Number of fields of a row."""
        return (len(self.offsets) - 1) // len(self.rows)

    def part(self, i: int, j: int) -> np.ndarray:
        """int32: the tokens of field `j` of row `i`."""
        k = i * self.parts + j
        return self.tokens[self.offsets[k] : self.offsets[k + 1]]

    def lengths(self, j: int) -> np.ndarray:
        """int64 [n]: the length of field `j` of each row."""
        return self.lengths_of(np.arange(len(self)), j)

    def lengths_of(self, rows: np.ndarray, j: int) -> np.ndarray:
        """int64, shaped as `rows`: the length of field `j` of these rows."""
        k = rows * self.parts + j
        return self.offsets[k + 1] - self.offsets[k]


class Tally:
    """Counts what happens to the rows of a part, and keeps the first problems."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.bad: collections.Counter[str] = collections.Counter()
        self.places: list[str] = []

    def skip(self, problem: BadRow | str, place: str) -> None:
        """Counts a row that is left out."""
        self.counts["skipped"] += 1
        self.bad[str(problem)] += 1
        if len(self.places) < SHOWN:
            self.places.append(f"{place}: {problem}")

    def check_any_left(self, kept: int, row_set: RowSet, encoding: Encoding) -> None:
        """Raises InputError when no row is kept, with the reasons."""
        if kept:
            return
        reasons = [f"{n} × {what}" for what, n in self.bad.most_common(SHOWN)]
        if dropped := self.counts["dropped_too_long"]:
            name, bound = encoding.bound
            reasons.append(f"{dropped} × longer than {name} {bound}: raise it, or set long_prompts to truncate")
        names = ", ".join(f"{field}_field '{name}'" for field, name in encoding.names)
        first = f"; first: {self.places[0]}" if self.places else ""
        raise InputError(
            f"{row_set.label}: no usable row is left of {len(row_set.origin)} ({'; '.join(reasons)}){first}. "
            f"Check the data and the field names ({names})"
        )


class _Item(NamedTuple):
    """A valid row on its way to the tokenizer."""

    k: int  # position in the row set
    example: Example
    place: tuple[Rows, int]


def chunks(items: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Cuts `items` into lists of `size`; the last one may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def read_rows(row_set: RowSet, encoding: Encoding, tally: Tally) -> Iterator[_Item]:
    """Yields the valid rows; counts the others. Raises InputError for a row that lacks a column."""
    names = dict(encoding.names)
    rows_in_order = row_set.origin.tolist()
    progress = Console().progress(
        len(rows_in_order), description=f"tokenising {row_set.label}", unit="row", transient=True
    )
    with progress as bar:
        for k, (source, i) in enumerate(bar.over(rows_in_order)):
            rows = row_set.rows[source]
            row = rows[i]
            try:
                example = read_row(row, encoding.step, names)
            except BadRow as problem:
                tally.skip(problem, rows.where(i))
                continue
            try:
                columns = read_columns(row, encoding.columns)
            except BadRow as problem:
                raise InputError(
                    f"{rows.where(i)}: {problem}, and a reward function or reward_columns asks for it; correct or "
                    "delete the row, or name another column"
                ) from problem
            yield _Item(k, replace(example, columns=columns), (rows, i))


def encode_examples(examples: list[Example], tokenizer, encoding: Encoding) -> list[list[list[int]] | str]:
    """The ids of each example's prompt and responses, or why it cannot be rendered."""
    rows = encode_rows(
        tokenizer,
        [example.prompt for example in examples],
        [example.responses for example in examples],
        train_on="last",
        special_tokens_in_data=encoding.special_tokens_in_data,
    )
    return [row if isinstance(row, str) else [row.prompt, *(ids for ids, _ in row.responses)] for row in rows]


def fit(
    parts: list[list[int]], encoding: Encoding, bos_id: int | None, counts: dict[str, int]
) -> list[list[int]] | None:
    """Cuts a row to its bound, or returns None to drop it; adds to `counts`.

    The prompt loses its beginning (a BOS stays), because its end is nearest to the response. A response longer than
    `max_length` - 1 loses its end, and with it its EOS: one prompt token stays to predict its first token from.
    """
    prompt, *responses = parts
    room = encoding.max_prompt_length if encoding.step == "ppo" else encoding.max_length - max(map(len, responses))
    if len(prompt) <= room:
        return parts
    if encoding.long_prompts == "drop":
        counts["dropped_too_long"] += 1
        return None
    longest = encoding.max_length - 1
    if any(len(response) > longest for response in responses):
        counts["truncated_responses"] += 1
        responses = [response[:longest] for response in responses]
    room = max(room, 1)
    if len(prompt) > room:
        counts["truncated_prompts"] += 1
        keep_bos = room > 1 and prompt[0] == bos_id
        prompt = prompt[:1] + prompt[len(prompt) - room + 1 :] if keep_bos else prompt[len(prompt) - room :]
    return [prompt, *responses]


def write_part(folder: Path, row_set: RowSet, tokenizer, encoding: Encoding) -> None:
    """Tokenises rows into the cache folder `folder`. Raises InputError when no row is usable."""
    tally, kept, lengths, sizes = Tally(), [], [], []
    with created(folder) as temporary:
        temporary.mkdir()
        with open(temporary / "tokens.bin", "wb") as file, open(temporary / "fields.bin", "wb") as fields:
            for chunk in chunks(read_rows(row_set, encoding, tally)):
                examples = [item.example for item in chunk]
                for item, parts in zip(chunk, encode_examples(examples, tokenizer, encoding), strict=True):
                    if isinstance(parts, str):
                        rows, i = item.place
                        tally.skip(parts, rows.where(i))
                        continue
                    fitted = fit(parts, encoding, tokenizer.bos_token_id, tally.counts)
                    if fitted is None:
                        continue
                    kept.append(item.k)
                    lengths.extend(map(len, fitted))
                    file.write(np.concatenate([np.asarray(ids, np.int32) for ids in fitted]).tobytes())
                    if encoding.step == "ppo":
                        sizes.append(fields.write(json.dumps([item.example.prompt, *item.example.columns]).encode()))
        tally.check_any_left(len(kept), row_set, encoding)
        np.save(temporary / "offsets.npy", starts(lengths))
        np.save(temporary / "rows.npy", row_set.origin[kept].astype(np.int32))
        np.save(temporary / "fields.npy", starts(sizes))
        meta = {
            "format": FORMAT,
            "crc32": {name: zlib.crc32(array.data) for name, array in read_arrays(temporary).items()},
            "sources": row_set.sources,
            "columns": encoding.columns,
            "counts": {"rows": len(row_set.origin), "kept": len(kept), **tally.counts},
            "problems": [f"{what} ({n} rows)" for what, n in tally.bad.most_common(SHOWN)] + tally.places,
        }
        sealed = {"meta": meta, "hash": hash_json(meta)}
        (temporary / "meta.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def starts(lengths: list[int]) -> np.ndarray:
    """int64 [n + 1]: where each of n consecutive pieces begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a cached part, mapped into memory."""
    names = {"offsets": "offsets", "rows": "rows", "field_offsets": "fields"}
    arrays = {name: np.load(folder / f"{file}.npy", mmap_mode="r") for name, file in names.items()}
    arrays["tokens"] = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
    path = folder / "fields.bin"  # empty but for ppo, and an empty file cannot be mapped
    arrays["fields"] = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    return arrays


def read_part(folder: Path) -> Ragged | None:
    """The cached part in `folder`, or None when there is none. Deletes a damaged one, with a warning."""
    if not folder.exists():
        return None
    try:
        sealed = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta, arrays = sealed["meta"], read_arrays(folder)
        checksums = {name: zlib.crc32(array.data) for name, array in arrays.items()}
        if hash_json(meta) != sealed["hash"] or checksums != meta["crc32"]:
            raise ValueError("the checksums differ from those recorded")
        names: dict[str, Any] = {name: tuple(meta[name]) for name in ("sources", "problems", "columns")}
        return Ragged(**arrays, **names, counts=meta["counts"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.warning("the cached tokens in %s are damaged (%s); tokenising again", folder, error)
        shutil.rmtree(folder)
        return None
