"""Tokenises rows, in batches and by `datasets.map`, into an Arrow file that later runs map into memory.

Two passes go over a source. The first gives each row the group that it is split by: rows with one prompt share a group,
so that no prompt is trained on and evaluated on. The second tokenises the rows that a step selects. The name of each
file is a hash of everything that it depends on, so it is never out of date.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrlhf.config.children import children_end
from jaxrlhf.data.columns import read_columns
from jaxrlhf.data.files import Table, first_line
from jaxrlhf.data.formats import Reader, Scored
from jaxrlhf.data.messages import BadRow, as_messages
from jaxrlhf.data.rendering import EncodedRow, encode_rows, encode_texts_as_documents
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

FORMAT = 4  # raise it when the meaning of the cached files changes; runs that began before then do not resume
TOKENS = 4  # raise it when rows of some data give other tokens
CHUNK = 5000  # rows of a batch: texts that it repeats are encoded once
MANY = 2000  # rows that several processes tokenise sooner than one
FEW = 50_000  # rows that one process reads sooner than several start
SEQUENCES = {"sft": 1, "reward": 2, "ppo": 1, "dpo": 2, "kto": 1}
"""Sequences that a row has in each step."""
OWN_COLUMNS = {"ppo": {"kept": "string"}, "kto": {"label": "bool"}, "reward": {"margin": "float32"}}
"""A column of a step's own: the prompt and what rewards read with it, as JSON; whether a completion is good; the margin
of a pair, or null."""
TokenRow = dict[str, Any]
"""A tokenised row: its values by the columns of `features_of`, with arrays of int32 for lists."""
Fitted = tuple[int, list[tuple[list[int], list[int]]]]
"""The length of a row's prompt, and its sequences as (ids, mask)."""
CUT_PROMPT, CUT_RESPONSE, DROPPED = 1, 2, 4


@dataclass(frozen=True)
class Encoding:
    """Everything that decides how a row becomes tokens, besides the tokenizer. Lengths are in tokens."""

    step: str
    max_length: int  # bound of prompt + response (sft, reward, dpo, kto)
    max_prompt_length: int  # bound of the prompt (ppo)
    long_prompts: str  # "truncate" or "drop"
    train_on: str = "all"
    special_tokens_in_data: bool = False
    columns: tuple[str, ...] = ()  # further columns to keep, which every row must have (ppo)
    optional_columns: tuple[str, ...] = ()  # further columns to keep, null where a row has none (ppo)

    @property
    def identity(self) -> dict[str, object]:
        """The fields, for hashes. One that version 0.1.0 did not have is left out where it has no effect, so that the
        hashes of runs that began with that version stay."""
        return {name: value for name, value in asdict(self).items() if name != "optional_columns" or value}

    @property
    def bound(self) -> tuple[str, int]:
        """The setting that bounds a row's length, and its value."""
        if self.step == "ppo":
            return "max_prompt_seq_len", self.max_prompt_length
        return "max_length", self.max_length


# ---- the passes over a table


_CANONICAL = json.JSONEncoder(sort_keys=True, default=str)


def group_of(scored: Scored) -> int:
    """A number for the prompt of a row, at least 0; rows with one prompt have one number."""
    key = scored.completions[0][0] if scored.document else as_messages(scored.prompt)
    digest = hashlib.blake2b(_CANONICAL.encode(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def index_batch(batch: Mapping[str, Any], indices: Sequence[int], table: Table, reader: Reader) -> dict[str, list[int]]:
    """The group of each row: -1 for a blank line, and a number below that, of its own, for a row that is unusable."""
    groups = []
    for i, row in zip(indices, table.parse(batch, indices[0]), strict=True):
        try:
            groups.append(-1 if row is None else group_of(reader.all(row)[0]))
        except BadRow:
            groups.append(-2 - i)
    return {"group": groups}


@dataclass
class _Output:
    """Columns of tokenised rows as lists, in the making."""

    step: str

    def __post_init__(self) -> None:
        self.sequences = SEQUENCES[self.step]
        names = ["row", "problem", "cut", "prompt_length", *OWN_COLUMNS.get(self.step, ())]
        parts = [f"{kind}_{j}" for j in range(self.sequences) for kind in ("ids", "mask", "length")]
        self.columns: dict[str, list[Any]] = {name: [] for name in (*names, *parts)}

    def add(
        self, row: int, *, problem: str | None = None, cut: int = 0, own: object = None, encoded: Fitted | None = None
    ) -> None:
        prompt_length, sequences = encoded or (0, [([], [])] * self.sequences)
        values = {"row": row, "problem": problem, "cut": cut, "prompt_length": prompt_length}
        values |= dict.fromkeys(OWN_COLUMNS.get(self.step, ()), own)
        for j, (ids, mask) in enumerate(sequences):
            values |= {f"ids_{j}": ids, f"mask_{j}": mask, f"length_{j}": len(ids)}
        for name, column in self.columns.items():
            column.append(values[name])


def features_of(step: str) -> Features:
    """The types of the columns of a step's tokenised rows."""
    from datasets import Features, List, Value

    plain = {"row": Value("int32"), "problem": Value("string"), "cut": Value("int8"), "prompt_length": Value("int32")}
    own = {name: Value(kind) for name, kind in OWN_COLUMNS.get(step, {}).items()}
    kinds = {"ids": List(Value("int32")), "mask": List(Value("int8")), "length": Value("int32")}
    parts = {f"{name}_{j}": kind for j in range(SEQUENCES[step]) for name, kind in kinds.items()}
    return Features(plain | own | parts)


def encode_batch(
    batch: Mapping[str, Any],
    indices: Sequence[int],
    table: Table,
    numbers: np.ndarray,
    reader: Reader,
    tokenizer: Tokenizer,
    encoding: Encoding,
) -> pyarrow.Table:
    """Tokenises rows into a `pyarrow.Table`. `numbers`: the row numbers in the table by position; `indices`: the
    batch's positions."""
    import pyarrow

    rows = [int(numbers[i]) for i in indices]
    parsed = dataclasses.replace(table, numbers=[table_number(table, i) for i in rows]).parse(batch)
    collects = gc.isenabled()
    gc.disable()  # it would go through all objects of the process again and again: a fifth of the time
    try:
        columns = tokenise(list(zip(rows, parsed, strict=True)), table, reader, tokenizer, encoding)
    finally:
        if collects:
            gc.enable()
    schema = features_of(encoding.step).arrow_schema
    arrays = {
        name: list_array(values, schema.field(name).type) if name[:4] in ("ids_", "mask") else values
        for name, values in columns.items()
    }
    return pyarrow.table(arrays, schema=schema)


def list_array(lists: Sequence[Sequence[int]], kind: pyarrow.ListType) -> pyarrow.Array:
    """Lists of numbers as Arrow data: by way of numpy, which is faster than pyarrow alone."""
    import pyarrow

    ends = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    values = np.fromiter(itertools.chain.from_iterable(lists), kind.value_type.to_pandas_dtype(), count=int(ends[-1]))
    return pyarrow.ListArray.from_arrays(ends, values, type=kind)


def table_number(table: Table, i: int) -> int:
    """The number of row `i` from 1, as messages name it."""
    return i + 1 if table.numbers is None else table.numbers[i]


def tokenise(
    rows: Sequence[tuple[int, object]], table: Table, reader: Reader, tokenizer: Tokenizer, encoding: Encoding
) -> dict[str, list[Any]]:
    """Tokenises numbered rows into columns; a row that cannot be used has its `problem`."""
    output = _Output(encoding.step)
    good: list[tuple[int, Scored, tuple, Any]] = []
    documents: list[tuple[int, str]] = []
    for i, row in rows:
        try:
            examples = [
                (scored, number, example)
                for scored in reader.all(row)
                for number, example in enumerate(reader.examples(scored, encoding.step))
            ]
        except BadRow as problem:
            output.add(i, problem=str(problem))
            continue
        columns = []
        if encoding.step == "ppo":
            columns = read_columns(row, encoding.columns, table.where(i), encoding.optional_columns)
        for scored, number, example in examples:
            if scored.document:
                documents.append((i, str(example[0])))
            else:
                good.append((i, scored, example, own_value(scored, number, columns, encoding.step)))
    encoded = encode_rows(
        tokenizer,
        [scored.prompt for _, scored, _, _ in good],
        [example for _, _, example, _ in good],
        [scored.tools for _, scored, _, _ in good],
        [scored.variables for _, scored, _, _ in good],
        train_on=encoding.train_on if encoding.step == "sft" else "last",
        special_tokens_in_data=encoding.special_tokens_in_data,
    )
    for (i, _, _, own), result in zip(good, encoded, strict=True):
        if isinstance(result, str):
            output.add(i, problem=result)
            continue
        bos: Any = tokenizer.bos_token_id
        fitted, cut = fit(result, encoding, bos)
        output.add(i, cut=cut, own=own, encoded=fitted)
    for (i, _), ids in zip(
        documents, encode_texts_as_documents(tokenizer, [text for _, text in documents]), strict=True
    ):
        for start in range(0, len(ids), encoding.max_length):  # nothing of a long text is lost
            piece = ids[start : start + encoding.max_length]
            output.add(i, encoded=(0, [(piece, [0] + [1] * (len(piece) - 1))]))
    return output.columns


def own_value(scored: Scored, number: int, columns: list[object], step: str) -> str | bool | float | None:
    """The value of a row's example in `OWN_COLUMNS`."""
    if step == "ppo":
        return json.dumps([scored.prompt, *columns])
    return scored.completions[number][1] > 0 if step == "kto" else scored.margin


def fit(row: EncodedRow, encoding: Encoding, bos_id: int | None) -> tuple[Fitted | None, int]:
    """Cuts a row to its bound.

    The prompt loses its beginning (a BOS stays), because its end is nearest to the response. A response longer than
    `max_length` - 1 loses its end, and with it its EOS: one prompt token stays to predict its first token from.

    Returns:
        The length of the prompt and the sequences as (ids, mask), or None for a row to drop; and what was cut.
    """
    responses = row.responses
    longest = max((len(ids) for ids, _ in responses), default=0)
    room, cut = (encoding.max_prompt_length if encoding.step == "ppo" else encoding.max_length - longest), 0
    prompt, mask = row.prompt, row.prompt_mask
    if len(prompt) > room:
        if encoding.long_prompts == "drop":
            return None, DROPPED
        most = encoding.max_length - 1
        if longest > most and responses:
            cut |= CUT_RESPONSE
            responses = [(ids[:most], marks[:most]) for ids, marks in responses]
        room = max(room, 1)
        if len(prompt) > room:
            cut |= CUT_PROMPT
            keep = 1 if room > 1 and prompt[0] == bos_id else 0
            prompt = prompt[:keep] + prompt[len(prompt) - room + keep :]
            mask = mask[:keep] + mask[len(mask) - room + keep :]
    sequences = [(prompt + ids, _targets(mask + marks)) for ids, marks in responses or [([], [])]]
    return (len(prompt), sequences), cut


def _targets(mask: list[int]) -> list[int]:
    """A mask without its first entry: nothing predicts the first token."""
    return [0, *mask[1:]] if mask else mask


# ---- cached passes


def run_pass(
    dataset: Dataset,
    function: Callable,
    path: Path,
    *,
    label: str,
    features: Features,
    num_proc: int,
    **options: object,
) -> Dataset:
    """Runs a pass over a data set by `datasets.map`, or opens its result in the file `path`; returns the result.

    Raises InputError when the file cannot be written.
    """
    import datasets

    # JAX warns of every fork; the processes that `map` forks use no JAX.
    warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
    several = num_proc > 1 and len(dataset) > MANY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        with children_end():
            return dataset.map(
                function,
                batched=True,
                batch_size=CHUNK,
                with_indices=True,
                remove_columns=dataset.column_names,
                cache_file_name=str(path),
                load_from_cache_file=True,
                features=features,
                fn_kwargs=options,
                num_proc=num_proc if several else None,
                new_fingerprint=path.stem.split("-")[-1],
                desc=label,
            )
    except OSError as error:
        raise InputError(
            f"data_cache_dir '{path.parent}': cannot be written ({error.strerror or error}); free space there, or "
            "choose another folder"
        ) from error


def open_cached(path: Path) -> Dataset | None:
    """The data set in a cached file, or None when there is none. Deletes a damaged one, with a warning."""
    import datasets
    from pyarrow import ArrowException

    if not path.exists():
        return None
    try:
        return datasets.Dataset.from_file(str(path))
    except (OSError, ValueError, KeyError, TypeError, ArrowException) as error:
        logger.warning("the cached file %s is damaged (%s); it is made again", path, first_line(error))
        path.unlink()
        return None
