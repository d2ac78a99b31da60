"""Tokenises rows once, into a ragged token stream on disk that later runs map into memory.

A cached part is a folder: `tokens.bin` (int32, all rows one after the other), `offsets.npy` (int64, where each field
of each row begins), `rows.npy` (int32, where each row came from) and `meta.json`; for prompts (ppo) also `fields.bin`
and `fields.npy`, each row's prompt as it stood and its reward columns. Its name is a hash of all that the tokens depend
on, so it is never out of date; it is moved into place whole, so it is never half written.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.data.rows import FIELDS, Example, Problem, read_columns, read_row
from jaxrlhf.data.templates import encode_prompts, encode_responses
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import Console

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when the layout or the meaning of the files changes
CHUNK = 1024  # rows tokenised in one call
SHOWN = 3  # places of bad rows that a report names


@dataclass(frozen=True)
class Encoding:
    """All that decides how a row becomes tokens. Lengths are in tokens."""

    step: str
    names: tuple[tuple[str, str], ...]  # prompt, chosen, rejected -> the field's name in the file
    template: str
    max_length: int  # bound of prompt + response (sft, reward, dpo)
    max_prompt_length: int  # bound of the prompt (ppo)
    long_prompts: str  # "truncate" or "drop"
    columns: tuple[str, ...] = ()  # further fields to keep (ppo)


@dataclass(frozen=True)
class Ragged:
    """Tokenised rows of a step: field `j` (prompt, chosen, rejected) of row `i` is `part(i, j)`.

    `rows` int32 [n, 2]: the source's number and the row's number in that source. `counts`: what was done to the rows.
    `fields` uint8: the JSON text of what `kept` gives for each row, beginning at `field_offsets`; empty but for ppo.
    `columns`: the names of what it gives after the prompt.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    sources: tuple[str, ...]
    counts: dict[str, int]
    problems: tuple[str, ...]
    fields: np.ndarray | None = None
    field_offsets: np.ndarray | None = None
    columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def kept(self, i: int) -> list[Any]:
        """Row `i`'s prompt as it stood in the data, and the values of `columns`."""
        return json.loads(self.fields[self.field_offsets[i] : self.field_offsets[i + 1]].tobytes())

    @property
    def parts(self) -> int:
        return (len(self.offsets) - 1) // len(self.rows)

    def part(self, i: int, j: int) -> np.ndarray:
        k = i * self.parts + j
        return self.tokens[self.offsets[k] : self.offsets[k + 1]]

    def lengths(self, j: int) -> np.ndarray:
        """int64 [n]: the length of field `j` of each row."""
        return np.diff(self.offsets).reshape(-1, self.parts)[:, j]

    def lengths_of(self, rows: np.ndarray, j: int) -> np.ndarray:
        """int64, as `rows`: the length of field `j` of these rows."""
        k = rows * self.parts + j
        return self.offsets[k + 1] - self.offsets[k]


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what a tokenizer does to text."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("truncation", None)  # set and unset by calls; what we ask for does not depend on them
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
        state["init"] = {k: str(v) for k, v in sorted(tokenizer.init_kwargs.items()) if k != "name_or_path"}
    special = {"eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id, "chat": tokenizer.chat_template}
    return hash_json([state, special, tokenizer.all_special_tokens])


def hash_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def encode_rows(
    rows: Iterable[tuple[Any, Callable[[], str]]], tokenizer, encoding: Encoding, counts: dict[str, int]
) -> Iterator[tuple[int, list[list[int]], Example] | tuple[int, Problem, str]]:
    """Yield `(k, [prompt ids, response ids...], example)` or `(k, problem, where)` for the k-th of `rows`.

    `rows` are (row, function telling where it stood). A row dropped for its length yields nothing but is counted.
    Raises InputError for a row that lacks a column.
    """
    names = dict(encoding.names)
    chunk: list[tuple[int, Example, Callable[[], str]]] = []
    for k, (row, where) in enumerate(rows):
        example = read_row(row, encoding.step, names)
        if isinstance(example, Problem):
            yield k, example, where()
        else:
            chunk.append((k, with_columns(example, row, encoding.columns, where), where))
        if len(chunk) == CHUNK:
            yield from encode_chunk(chunk, tokenizer, encoding, counts)
            chunk = []
    yield from encode_chunk(chunk, tokenizer, encoding, counts)


def with_columns(example: Example, row: Any, names: tuple[str, ...], where: Callable[[], str]) -> Example:
    values = read_columns(row, names)
    if isinstance(values, Problem):
        raise InputError(
            f"{where()}: '{values.field}' {values.what}, and a reward function or reward_columns asks for it; mend or "
            "delete the row, or name another column"
        )
    return replace(example, columns=values)


def encode_chunk(chunk, tokenizer, encoding: Encoding, counts) -> Iterator[tuple[int, list[list[int]], Example]]:
    try:
        encoded = encode_examples([example for _, example, _ in chunk], tokenizer, encoding)
    except InputError:
        for _, example, where in chunk:  # find the row that is at fault
            try:
                encode_examples([example], tokenizer, encoding)
            except InputError as error:
                raise InputError(f"{where()}: {error}") from error
        raise
    for (k, example, _), parts in zip(chunk, encoded, strict=True):
        fitted = fit(parts, encoding, tokenizer.bos_token_id, counts)
        if fitted is not None:
            yield k, fitted, example


def encode_examples(examples: list[Example], tokenizer, encoding: Encoding) -> list[list[list[int]]]:
    prompts = [example.prompt for example in examples]
    prompt_ids = encode_prompts(tokenizer, prompts, encoding.template)
    columns = [prompt_ids]
    for j in range(len(FIELDS[encoding.step]) - 1):
        responses = [example.responses[j] for example in examples]
        columns.append(encode_responses(tokenizer, prompts, prompt_ids, responses, encoding.template))
    return [list(parts) for parts in zip(*columns, strict=True)]


def fit(
    parts: list[list[int]], encoding: Encoding, bos_id: int | None, counts: dict[str, int]
) -> list[list[int]] | None:
    """Cut a row to its bound, or return None to drop it; `counts` says which.

    The prompt loses its beginning (a BOS stays), so that what is nearest to the response is kept. A response that alone
    exceeds `max_length`, less one prompt token to predict its first token from, loses its end, and with it its EOS.
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


def write_part(
    folder: Path,
    rows: Iterable[tuple[Any, Callable[[], str]]],
    origin: np.ndarray,
    sources: tuple[str, ...],
    tokenizer,
    encoding: Encoding,
    label: str,
) -> None:
    """Tokenise `rows` (their origins int32 [n, 2]) into the cache folder `folder`, which appears only when complete.

    Raises InputError when no row is left, saying what was wrong with them.
    """
    counts = dict.fromkeys(("skipped", "truncated_prompts", "truncated_responses", "dropped_too_long"), 0)
    bad: collections.Counter[str] = collections.Counter()
    places: list[str] = []
    kept, lengths, sizes, total = [], [], [], len(origin)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        progress = Console().progress(total, description=f"tokenising {label}", unit="row", transient=True)
        tokens, columns = temporary / "tokens.bin", temporary / "fields.bin"
        with progress as bar, open(tokens, "wb") as file, open(columns, "wb") as fields:
            for k, result, rest in encode_rows(bar.over(rows), tokenizer, encoding, counts):
                if isinstance(result, Problem):
                    counts["skipped"] += 1
                    bad[f"'{result.field}' {result.what}"] += 1
                    if len(places) < SHOWN:
                        places.append(f"{rest}: '{result.field}' {result.what}")
                    continue
                kept.append(k)
                lengths.extend(map(len, result))
                file.write(np.concatenate([np.asarray(part, np.int32) for part in result]).tobytes())
                if encoding.step == "ppo":
                    sizes.append(fields.write(json.dumps([rest.prompt, *rest.columns]).encode()))
        if not kept:
            raise InputError(no_rows_message(label, total, counts, bad, places, encoding))
        for name, value in (
            ("offsets", starts(lengths)),
            ("rows", origin[kept].astype(np.int32)),
            ("fields", starts(sizes)),
        ):
            np.save(temporary / f"{name}.npy", value)
        arrays = read_arrays(temporary)
        meta = {
            "format": FORMAT,
            "rows": len(kept),
            "tokens": len(arrays["tokens"]),
            "crc32": {name: crc32_blocks(array) for name, array in arrays.items()},
            "sources": sources,
            "columns": encoding.columns,
            "counts": {"rows": total, "kept": len(kept), **counts},
            "problems": [f"{what} ({n} rows)" for what, n in bad.most_common(SHOWN)] + places,
        }
        sealed = {"meta": meta, "hash": hash_json(meta)}
        (temporary / "meta.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")
        move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def no_rows_message(label, total, counts, bad, places, encoding: Encoding) -> str:
    reasons = [f"{n} × {what}" for what, n in bad.most_common(SHOWN)]
    if counts["dropped_too_long"]:
        bound = "max_prompt_seq_len" if encoding.step == "ppo" else "max_length"
        reasons.append(f"{counts['dropped_too_long']} × longer than {bound} (raise it, or long_prompts truncate)")
    names = ", ".join(f"{field}_field '{name}'" for field, name in encoding.names)
    first = f"; first: {places[0]}" if places else ""
    return (
        f"{label}: no usable row is left of {total} ({'; '.join(reasons) or 'none given'}){first}. "
        f"Check the data and the field names ({names})"
    )


def move_into_place(temporary: Path, folder: Path) -> None:
    try:
        os.replace(temporary, folder)
    except OSError:
        if not (folder / "meta.json").exists():
            raise
        logger.info("%s was written by another process meanwhile; that one is used", folder)


def open_part(folder: Path) -> Ragged | None:
    """The cached part in `folder`, or None when there is none. A damaged one is deleted, with a message."""
    if not folder.exists():
        return None
    try:
        return read_part(folder)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.warning("the cached tokens in %s are damaged (%s); tokenising again", folder, error)
        shutil.rmtree(folder)
        return None


def starts(lengths: list[int]) -> np.ndarray:
    """int64 [n + 1]: where each of n pieces begins that lie one after the other, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a cached part, mapped into memory."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("offsets", "rows")}
    arrays["tokens"] = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
    arrays["field_offsets"] = np.load(folder / "fields.npy", mmap_mode="r")
    path = folder / "fields.bin"  # empty for sft and reward, and an empty file cannot be mapped
    arrays["fields"] = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    return arrays


def read_part(folder: Path) -> Ragged:
    sealed = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    meta, arrays = sealed["meta"], read_arrays(folder)
    sizes = (len(arrays["tokens"]), len(arrays["rows"]), len(arrays["fields"]))
    if hash_json(meta) != sealed["hash"] or sizes != (meta["tokens"], meta["rows"], int(arrays["field_offsets"][-1])):
        raise ValueError("sizes differ from those recorded")
    if {name: crc32_blocks(array) for name, array in arrays.items()} != meta["crc32"]:
        raise ValueError("checksums differ from those recorded")
    names = {name: tuple(meta[name]) for name in ("sources", "problems", "columns")}
    return Ragged(**arrays, **names, counts=meta["counts"])


def crc32_blocks(array: np.ndarray, block: int = 1 << 22) -> int:
    checksum = 0
    for start in range(0, len(array), block):
        checksum = zlib.crc32(array[start : start + block].tobytes(), checksum)
    return checksum
