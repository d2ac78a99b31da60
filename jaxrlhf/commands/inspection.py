"""Finds out what a step sees of its data: formats, rows token by token, counts, lengths, duplicates."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.commands.data_report import (
    Inspection,
    Passage,
    Piece,
    Reason,
    Repeats,
    Row,
    RowsReport,
    Segment,
    Share,
    SourceReport,
)
from jaxrlhf.data import Data, DataConfig, Tokenizer, epoch_permutation, length_bucket, load_data
from jaxrlhf.data.encoding import SpecialTokens
from jaxrlhf.data.formats import FORMATS
from jaxrlhf.data.packing import pack
from jaxrlhf.data.parts import COUNTS, Part
from jaxrlhf.data.reading import Reading
from jaxrlhf.data.steps import LENGTH_WINDOW

EXAMPLES = 3  # places that are named as examples
REASONS = 5  # reasons of bad rows that are listed for a source
BARS = 32  # bars of a histogram
CHUNK = 1000  # rows that are read together
FIRST = 1000  # rows of each file of a stream that are read


@dataclass(frozen=True)
class Scan:
    """Results of one pass over the kept rows of a part.

    Attributes:
        rows: int64 [n]: the row's number in its table.
        tables: int [n]: the table's number in the source.
        groups: int64 [n]: the number of its prompt; -1 where it has none, or where an earlier example is of its row.
        hashes: int64 [n]: of its tokens.
        trained: tokens that are trained on.
    """

    part: Part
    rows: np.ndarray
    tables: np.ndarray
    groups: np.ndarray
    hashes: np.ndarray
    trained: int

    def place(self, number: int) -> str:
        """Returns the file and line of a kept row."""
        return self.part.reading.where(int(self.tables[number]), int(self.rows[number]))


def inspect_data(config: DataConfig, tokenizer: Tokenizer, step: str, *, show: int, batch_size: int) -> Inspection:
    """Loads the data of a step and describes it.

    Args:
        config: the data settings.
        tokenizer: from `load_tokenizer`.
        step: "sft", "reward", "ppo", "dpo" or "kto".
        show: rows of each source to show.
        batch_size: rows of a batch, for the share of padding.

    Raises:
        InputError: as in `load_data`.
    """
    first = (config.max_train_samples or FIRST) if config.streaming else 0
    train, evaluation = load_data(config, tokenizer, step, first=first)
    scans = {"train": [scan(part) for part in train.parts], "eval": [scan(part) for part in evaluation.parts]}
    edges = edges_of([*train.parts, *evaluation.parts])
    reports: dict[tuple[str, str], dict[str, RowsReport]] = collections.defaultdict(dict)
    readings: dict[tuple[str, str], Reading] = {}
    for label, data in (("eval", evaluation), ("train", train)):
        shares = shares_of(data) if label == "train" else [None] * len(data.parts)
        for k, found in enumerate(scans[label]):
            rows = tuple(shown_rows(data, found, show))
            reports[key_of(found.part)][label] = report_of(data, k, found, edges, batch_size, shares[k], rows)
        for part in data.unusable:
            reports[key_of(part)][label] = report_of_none(part, edges)
        readings |= {key_of(part): part.reading for part in (*data.parts, *data.unusable)}
    unused = [s for s in config.sources if step not in s.steps]
    order = {(source.short_name, source.path): i for i, source in enumerate(config.sources)}
    sources = [source_report(readings[key], config, reports[key]) for key in readings]
    sources += [SourceReport(source.short_name, source.path, steps=source.steps) for source in unused]
    return Inspection(
        step=step,
        sources=tuple(sorted(sources, key=lambda source: order.get((source.name, source.path), len(order)))),
        edges=edges,
        bound=("max_prompt_seq_len", config.max_prompt_seq_len) if step == "ppo" else ("max_length", config.max_length),
        batch_size=batch_size,
        packed=tuple(first_packed(train, scans["train"])),
        packed_length=train.maximum if train.bins is not None else 0,
        duplicates=duplicates(scans["train"], scans["eval"]),
        first=first,
    )


# ---- sources


def key_of(part: Part) -> tuple[str, str]:
    """The name and the path of a part's source."""
    return part.name, part.reading.source.path


def source_report(reading: Reading, config: DataConfig, reports: dict[str, RowsReport]) -> SourceReport:
    """Describes a source. `reading`: its training rows, where it has some."""
    source, named, format = reading.source, reading.named, reading.note["formats"][0]
    steps = [step for step in FORMATS[format].steps if step in source.steps and (not named or step in named.steps)]
    evaluates_on = ""
    if "train" in reports:
        own = source.evaluation == "own" and reading.has("eval")
        held_out = f"{config.eval_fraction:.0%} of its prompts, held out"
        evaluates_on = ", ".join(files_of(reading, "eval")) if own else held_out
        if config.eval_data_path or "eval" not in reports:
            evaluates_on = "other data" if source.evaluation != "none" else "nothing"
    return SourceReport(
        name=source.short_name,
        path=source.path,
        recognised=", ".join(dict.fromkeys(reading.note["words"])),
        format=format,
        files=files_of(reading, reading.split),
        data_set=named.name if named else "",
        licence=named.licence if named else "",
        steps=tuple(steps),
        template=reading.template,
        evaluates_on=evaluates_on,
        train=reports.get("train"),
        evaluation=reports.get("eval"),
    )


def files_of(reading: Reading, split: str) -> tuple[str, ...]:
    """The names of the files of a split, or the split's name in its data set."""
    data = reading.origin.splits[split]
    return tuple(path.name for path in data) if isinstance(data, list) else (f"split {data.split or split}",)


# ---- rows


def scan(part: Part) -> Scan:
    """Goes once over the kept rows of a part."""
    names = [name for name in part.table.column_names if name.startswith(("ids_", "mask_"))]
    own = part.table.with_format("numpy", columns=["row", "prompt_length"])[:]
    rows, tables = own["row"][part.rows].astype(np.int64), np.asarray(part.tables)[part.rows]
    starts = np.cumsum([0, *part.reading.note["sizes"]])
    groups = part.reading.groups[starts[tables] + rows]
    repeated = (np.diff(rows, prepend=-1) == 0) & (np.diff(tables, prepend=-1) == 0)
    groups = np.where(repeated | (own["prompt_length"][part.rows] == 0), -1, groups)
    hashes, trained = [], 0
    for start in range(0, len(part), CHUNK):
        columns = part.fetch(np.arange(start, min(start + CHUNK, len(part))), names)
        ids = zip(*(columns[name] for name in names if name.startswith("ids_")), strict=True)
        hashes += [hash(tuple(np.asarray(sequence, np.int32).tobytes() for sequence in row)) for row in ids]
        trained += sum(int(np.sum(row)) for name in names if name.startswith("mask_") for row in columns[name])
    return Scan(part, rows, tables, groups, np.array(hashes, np.int64), trained)


GIVEN = {
    "label": lambda label: "good" if label else "bad",
    "margin": lambda margin: "" if np.isnan(margin) else f"margin {margin:g}",
}
"""Words for the columns that a loss reads besides tokens."""


def shown_rows(data: Data, found: Scan, show: int) -> Iterator[Row]:
    """The first kept rows of a part, token by token."""
    special = set(SpecialTokens(data.tokenizer).names)
    names = data.sequence_names
    columns = ["prompt_length", *(f"{kind}_{j}" for j in range(len(names)) for kind in ("ids", "mask"))]
    beside = [name for name in GIVEN if name in found.part.table.column_names]
    numbers = np.arange(min(show, len(found.part)))
    fetched = found.part.fetch(numbers, [*columns, *beside]) if len(numbers) else {}
    for i in numbers:
        n = int(fetched["prompt_length"][i])
        values = {name: [int(token) for token in fetched[name][i]] for name in columns[1:]}
        passages = [passage(data.tokenizer, "prompt", values["ids_0"][:n], values["mask_0"][:n], special)] if n else []
        if names != ("prompt",):
            for j, name in enumerate(names):
                label = name if len(names) > 1 else "response" if n else "text"
                sides = values[f"ids_{j}"], values[f"mask_{j}"]
                passages.append(passage(data.tokenizer, label, *sides, special, n))
        given = [GIVEN[name](fetched[name][i]) for name in beside]
        yield Row(found.place(int(i)), tuple(passages), ", ".join(filter(None, given)))


def passage(
    tokenizer: Tokenizer, name: str, ids: list[int], mask: list[int], special: set[int], first: int = 0
) -> Passage:
    """The tokens from number `first` on, in runs of one kind."""
    kinds = [(bool(marked), token in special) for token, marked in zip(ids, mask, strict=True)]
    starts = [i for i in range(first, len(ids)) if i == first or kinds[i] != kinds[i - 1]]
    pieces = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        pieces.append(Piece(decoded(tokenizer, ids, start, end), *kinds[start]))
    return Passage(name, tuple(ids[first:]), tuple(mask[first:]), tuple(pieces))


def decoded(tokenizer: Tokenizer, ids: list[int], start: int, end: int) -> str:
    """The text of tokens `start` to `end`. Some tokenizers drop a space where a text begins, so more is decoded."""
    decode: Any = tokenizer.decode  # one text, though its type says perhaps several
    before, whole = (
        decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False) for part in (ids[:start], ids[:end])
    )
    if whole.startswith(before):
        return whole[len(before) :]
    return decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def first_packed(data: Data, scans: Sequence[Scan]) -> Iterator[Segment]:
    """The segments of the packed row that training takes first; none without packing."""
    if data.bins is None:
        return
    for k, row in data.members(int(data.indices(0, 1)[0])):
        for name, tokens in zip(data.sequence_names, data.parts[k].lengths[:, row], strict=True):
            label = name if len(data.sequence_names) > 1 else ""
            yield Segment(scans[k].place(row), label, int(tokens))


# ---- counts


def report_of(
    data: Data,
    k: int,
    found: Scan,
    edges: tuple[int, ...],
    batch_size: int,
    share: Share | None,
    rows: tuple[Row, ...],
) -> RowsReport:
    """The report of part `k` of the data."""
    lengths = found.part.lengths
    return RowsReport(
        counts=found.part.counts,
        reasons=reasons_of(found.part),
        tokens=int(lengths.sum()),
        trained_tokens=found.trained,
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        histogram=tuple(np.histogram(lengths, edges)[0].tolist()),
        padding=padding_of(data, k, batch_size),
        mixture=share,
        rows=rows,
    )


def report_of_none(part: Part, edges: tuple[int, ...]) -> RowsReport:
    """The report of a part without a usable row."""
    nothing = (0,) * (len(edges) - 1)
    return RowsReport(part.counts, reasons_of(part), 0, 0, 0.0, 0.0, 0, nothing, {}, None, ())


def reasons_of(part: Part) -> tuple[Reason, ...]:
    """Why rows of a part were skipped, dropped or cut, the most frequent reasons first."""
    columns = part.table.with_format("arrow", columns=["row", "problem", "cut"])[:]
    rows, cuts = columns.column("row").to_numpy(), columns.column("cut").to_numpy()
    entries: dict[str, list[int]] = collections.defaultdict(list)
    for i in np.flatnonzero(columns.column("problem").is_valid().to_numpy()):
        entries[f"skipped: {columns.column('problem')[int(i)].as_py()}"].append(int(i))
    ordered = sorted(entries.items(), key=lambda item: -len(item[1]))
    if len(ordered) > REASONS + 1:
        others = sorted(i for _, found in ordered[REASONS:] for i in found)
        ordered = [*ordered[:REASONS], (f"skipped: {len(ordered) - REASONS} other reasons", others)]
    titles = {"dropped_too_long": "dropped: too long", "truncated_prompts": "cut: the beginning of the prompt"}
    titles |= {"truncated_responses": "cut: the end of the response"}
    for name, title in titles.items():
        ordered.append((title, np.flatnonzero((cuts & COUNTS[name]) != 0).tolist()))
    where, tables = part.reading.where, np.asarray(part.tables)
    return tuple(
        Reason(what, len(found), tuple(where(int(tables[i]), int(rows[i])) for i in found[:EXAMPLES]))
        for what, found in ordered
        if found
    )


def edges_of(parts: Sequence[Part]) -> tuple[int, ...]:
    """Bounds of intervals that hold all lengths; the last one holds its upper bound too."""
    longest = max(int(part.lengths.max()) for part in parts)
    return tuple(np.unique(np.linspace(0, longest, BARS + 1).astype(int)).tolist())


def shares_of(data: Data) -> list[Share]:
    """The share of the training stream that each source gives."""
    sizes, weights = np.array(data.sizes), np.array(data.schedule.weights) / np.sum(data.schedule.weights)
    tokens = weights * [part.lengths.sum() for part in data.parts] / sizes
    columns = weights, tokens / tokens.sum(), weights * sizes.sum() / sizes
    return [Share(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def padding_of(data: Data, k: int, batch_size: int) -> dict[str, float]:
    """The share of positions without a token: in batches of rows, and packed or, for ppo, sorted by length."""
    part, sequences = data.parts[k], len(data.sequence_names)
    plain = data.maximum // sequences if data.bins is not None else data.maximum
    longest = part.lengths.max(axis=0)[epoch_permutation(len(part), data.seed, 0)]
    tokens, result = int(part.lengths.sum()), {}
    orders = {"batches": longest}
    if data.sequence_names == ("prompt",):
        window = LENGTH_WINDOW * batch_size
        pieces = [np.sort(longest[start : start + window]) for start in range(0, len(longest), window)]
        orders["sorted"] = np.concatenate(pieces)
    for name, order in orders.items():
        groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        positions = sum(length_bucket(int(group.max()), plain) * len(group) for group in groups)
        result[name] = 1 - tokens / (positions * sequences)
    if data.sequence_names != ("prompt",):
        capacity = plain * sequences
        bins = data.bins[k] if data.bins is not None else pack(part.lengths.sum(axis=0), capacity, data.seed)
        result["packed"] = 1 - tokens / (len(bins) * capacity)
    return result


# ---- duplicates


def duplicates(train: Sequence[Scan], evaluation: Sequence[Scan]) -> dict[str, Repeats]:
    """Rows that repeat an earlier row or prompt of training, and evaluation rows whose prompt training has too."""
    own, other = entries_of(train, "groups"), entries_of(evaluation, "groups")
    first: dict[int, tuple[Scan, int]] = {}
    for value, found, i in own:
        first.setdefault(value, (found, i))
    shared = [(first[value], (found, i)) for value, found, i in other if value in first]
    return {
        "equal_rows": repeats(repeated(entries_of(train, "hashes"))),
        "equal_prompts": repeats(repeated(own)),
        "shared_prompts": repeats(shared),
    }


Entry = tuple[int, Scan, int]
Pair = tuple[tuple[Scan, int], tuple[Scan, int]]


def entries_of(scans: Sequence[Scan], name: str) -> list[Entry]:
    """The value of each row, its scan and its number; rows without a value are left out."""
    return [
        (value, found, i)
        for found in scans
        for i, value in enumerate(getattr(found, name).tolist())
        if name == "hashes" or value != -1
    ]


def repeated(entries: Sequence[Entry]) -> list[Pair]:
    """The rows whose value an earlier row has, each with that row."""
    first: dict[int, tuple[Scan, int]] = {}
    pairs = []
    for value, found, i in entries:
        if value in first:
            pairs.append((first[value], (found, i)))
        else:
            first[value] = (found, i)
    return pairs


def repeats(pairs: Sequence[Pair]) -> Repeats:
    """Counts pairs of an earlier row and the row that repeats it."""
    sources = collections.Counter(found.part.name for _, (found, _) in pairs)
    examples = [(first.place(i), later.place(j)) for (first, i), (later, j) in pairs[:EXAMPLES]]
    return Repeats(len(pairs), dict(sources), tuple(examples))
