"""Loads the tokenised training and evaluation rows of a step, as `DataConfig` selects them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal, overload

import numpy as np

from jaxrlhf.data.batches import Data
from jaxrlhf.data.cache import check_writable, hash_json
from jaxrlhf.data.columns import MISSING, look_up
from jaxrlhf.data.mixture import EVALUATIONS, SourceConfig, named_apart
from jaxrlhf.data.parts import Part
from jaxrlhf.data.reading import HEAD, Reading
from jaxrlhf.data.selection import SHARES, limit_rows, split_among, split_groups
from jaxrlhf.data.settings import DataConfig, cache_folder, packed_length, packs
from jaxrlhf.data.sources import named_as
from jaxrlhf.data.steps import PairData, PromptData, RewardData, SFTData, UnpairedData
from jaxrlhf.data.streaming import STREAMS, StreamOrder, StreamSource, stream_shares
from jaxrlhf.data.tokenized import Encoding
from jaxrlhf.data.tokenizer import check_tokenizer, tokenizer_fingerprint, with_template
from jaxrlhf.distributed import by_turns, check_same
from jaxrlhf.errors import InputError

logger = logging.getLogger(__name__)

STREAM_EVALUATION = 512  # rows held out of a stream where max_eval_samples does not say
Names = tuple[str, ...]
Chosen = list[tuple[Reading, np.ndarray]]
"""Sources, and the numbers of the rows that are chosen of each."""
DATA_CLASSES: dict[str, type[Data]] = {
    "sft": SFTData,
    "reward": RewardData,
    "ppo": PromptData,
    "dpo": PairData,
    "kto": UnpairedData,
}


@overload
def load_data(
    config: DataConfig, tokenizer, step: Literal["ppo"], columns: Names = (), wanted: Names = ()
) -> tuple[PromptData, PromptData]: ...
@overload
def load_data(
    config: DataConfig, tokenizer, step: str, columns: Names = (), wanted: Names = (), first: int = 0
) -> tuple[Data, Data]: ...
def load_data(
    config: DataConfig, tokenizer, step: str, columns: Names = (), wanted: Names = (), first: int = 0
) -> tuple[Data, Data]:
    """Loads the training and the evaluation rows of a step, tokenised or from the cache.

    Evaluation rows are the same in every step, and no step trains on them: `eval_data_path`, else each source's own
    evaluation split, else a held-out fraction of its prompts. When several processes load, one per machine writes the
    cache while the others wait.

    Args:
        config: the data settings.
        tokenizer: a Hugging Face tokenizer with a chat template (`load_tokenizer`).
        step: "sft", "reward", "ppo", "dpo" or "kto".
        columns: columns of the rows that ppo data keeps, besides `config.reward_columns`.
        wanted: columns that ppo data keeps where a source has them.
        first: only so many rows of each source, read as a stream; 0: all.

    Raises:
        InputError: the data or the tokenizer is unusable, a row lacks a column, or processes read different data.
    """
    if step not in SHARES:
        raise ValueError(f"step '{step}': must be one of {', '.join(SHARES)}")
    check_tokenizer(tokenizer)
    loader = Loader(config, tokenizer, step, columns, wanted, first)
    data, contents = by_turns(f"tokenising the {step} data", loader.load)
    check_same("data", contents)
    return data


class Loader:
    """One call of `load_data`."""

    def __init__(
        self, config: DataConfig, tokenizer, step: str, columns: Names, wanted: Names = (), first: int = 0
    ) -> None:
        self.config, self.step, self.wanted, self.first = config, step, wanted if step == "ppo" else (), first
        self.tokenizer = with_template(tokenizer, config.template)
        self.folder = cache_folder(config)
        check_writable(self.folder)
        self.sources = [source for source in config.sources if step in source.steps]
        if not self.sources:
            raise InputError(f"data_mixture: no source serves the step {step}; add it to the steps of one")
        self.encoding = Encoding(
            step=step,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_seq_len,
            long_prompts=config.long_prompts,
            train_on=config.template.train_on,
            special_tokens_in_data=config.template.special_tokens_in_data,
            columns=tuple(dict.fromkeys((*columns, *config.reward_columns))) if step == "ppo" else (),
        )
        self.fingerprint = tokenizer_fingerprint(tokenizer)

    def load(self) -> tuple[tuple[Data, Data], dict[str, str]]:
        """The training and the evaluation data, and the hash of each thing that they depend on."""
        if self.config.streaming and not self.first:
            if self.step not in STREAMS:
                raise InputError(f"streaming: {self.step} compares rows with others and cannot stream; leave it out")
            return self.load_stream()
        own = [self.reading(source) for source in self.sources]
        others = [self.reading(source, evaluates=True) for source in self.other_sources()]
        check_apart(own, others)
        self.keep_wanted([*own, *others])
        train, evaluation = self.select(own, others)
        contents, result = {"the tokenizer": self.fingerprint}, []
        for label, chosen in (("train", train), ("eval", evaluation)):
            parts, keys = self.parts(label, chosen)
            key = hash_json([self.fingerprint, self.encoding.identity, keys, self.config.seed])
            result.append(self.data(label, parts, key))
            contents |= {f"{reading.source.path} ({label})": reading.fingerprint for reading, _ in chosen}
            contents[f"rows and order ({label})"] = key
        warn_of_shared_prompts(train, evaluation)
        return (result[0], result[1]), contents

    def load_stream(self) -> tuple[tuple[Data, Data], dict[str, str]]:
        """Streamed training data, and evaluation data that is tokenised at once.

        A source without evaluation data of its own gives those of its first rows whose prompts are held out. A data set
        with an evaluation split gives the first rows of that, so that nothing else of it is downloaded.
        """
        config = self.config
        self.check_streams()
        others = [self.reading(source, evaluates=True) for source in self.other_sources()]
        evaluation: Chosen = [(reading, every_row(reading)) for reading in others]
        streams, first, keys = [], [], []
        readings = [Reading(config, source, self.step, self.folder, streaming=True) for source in self.sources]
        self.keep_wanted([*readings, *others])
        for k, (source, reading) in enumerate(zip(self.sources, readings, strict=True)):
            own = source.evaluation == "own" and not config.eval_data_path and reading.has("eval")
            if own and isinstance(reading.origin.data("eval"), list):
                held_apart = self.reading(source).of("eval")
                evaluation.append((held_apart, every_row(held_apart)))
            elif own:
                split, key = self.stream(k, reading.of("eval"), 0.0)
                first.append(split.first(config.max_eval_samples or None, 1.0, "in the evaluation split"))
                keys.append(f"eval {key}")
            holds_out = not own and not config.eval_data_path and source.evaluation in ("own", "held_out")
            fraction = config.eval_fraction if holds_out else 0.0
            stream, key = self.stream(k, reading, fraction)
            logger.info("%s train data: %s, %s: streamed", self.step, stream.name, reading.opened[0].words)
            streams.append(stream)
            keys.append(key)
            if holds_out:
                first.append(stream.first(config.max_eval_samples or STREAM_EVALUATION, fraction, "held out"))
        parts, part_keys = [], []
        if evaluation:
            parts, part_keys = self.parts("eval", self.limited("eval", evaluation, config.max_eval_samples))
        key = hash_json([keys, part_keys, config.seed])
        weights = [source.weight for source in self.sources]
        train = STREAMS[self.step](streams, self.tokenizer, self.encoding.bound[1], key, weights)
        if isinstance(train, PromptData):
            train.column_names = (*self.encoding.columns, *self.encoding.optional_columns)
        contents = {"the tokenizer": self.fingerprint, "the streams": hash_json(keys)}
        return (train, self.data("eval", [*parts, *first], key)), contents

    def keep_wanted(self, readings: list[Reading]) -> None:
        """Adds those of the wanted columns that the data has to what is kept."""
        names = present(self.wanted, readings)
        self.encoding = replace(
            self.encoding, optional_columns=tuple(name for name in names if name not in self.encoding.columns)
        )

    def check_streams(self) -> None:
        """Raises InputError for settings that a stream, whose size is not known, cannot honour."""
        for source in self.sources:
            for name in ("limit", "epochs"):
                if getattr(source, name):
                    raise InputError(f"streaming knows no size of {source.path}, so it takes no {name}; remove it")
            if len(self.sources) > 1 and source.weight is None:
                raise InputError(
                    f"streaming knows no size of {source.path}, which would be its weight; give each one a weight in "
                    "data_mixture"
                )
        if self.config.max_train_samples:
            raise InputError("streaming takes no max_train_samples; max_steps bounds the run")

    def stream(self, k: int, reading: Reading, fraction: float) -> tuple[StreamSource, str]:
        """The stream of source `k` without the share of prompts that is held out, and a hash of what it depends on."""
        config, source = self.config, reading.source
        tokenizer, packing = reading.own_tokenizer(self.tokenizer), packed_length(config, self.step)
        split = split_among(source.steps, config.data_split)
        settings = [fraction, split, config.shuffle_buffer, packing, config.pair_rule, config.pair_margin]
        key = hash_json(
            [reading.stream_key, self.fingerprint, tokenizer.chat_template, self.encoding.identity, settings]
        )
        stream = StreamSource(
            source.short_name,
            reading.opened,
            self.encoding,
            tokenizer,
            StreamOrder(
                window=config.shuffle_buffer,
                shares=stream_shares(self.step, split, fraction),
                packing=packing,
                seed=(config.seed, k),
            ),
            record=self.folder / "streams" / f"{key}.json",
        )
        return stream, key

    def reading(self, source: SourceConfig, evaluates: bool = False) -> Reading:
        with named_as("eval_" if evaluates and self.config.eval_data_path else ""):
            reading = Reading(self.config, source, self.step, self.folder, first=self.first)
        return reading.of("eval") if evaluates and reading.has("eval") else reading

    def other_sources(self) -> list[SourceConfig]:
        """Sources that serve for evaluation only."""
        if self.config.eval_data_path:
            return list(named_apart([SourceConfig(path=path) for path in self.config.eval_data_path]))
        given = [source for source in self.sources if source.evaluation not in EVALUATIONS]
        return [source.replace(path=source.evaluation, split="", limit=0) for source in given]

    def select(self, own: list[Reading], others: list[Reading]) -> tuple[Chosen, Chosen]:
        """The rows to train and to evaluate on, of each source."""
        config = self.config
        train: Chosen = []
        evaluation: Chosen = [(reading, every_row(reading)) for reading in others]
        for reading in own:
            source, held_out = reading.source, config.eval_fraction
            if config.eval_data_path or source.evaluation not in ("own", "held_out"):
                held_out = 0.0
            elif source.evaluation == "own" and reading.has("eval"):
                held_out = 0.0
                held_apart = reading.of("eval")
                evaluation.append((held_apart, every_row(held_apart)))
            rows, held = split_groups(
                reading.groups,
                self.step,
                data_split=split_among(source.steps, config.data_split),
                held_out=held_out,
                seed=config.seed,
                name=source.path,
            )
            train.append((reading, limit_rows(rows, source.limit, config.seed)))
            if held_out:
                evaluation.append((reading, held))
        return (
            self.limited("train", train, config.max_train_samples),
            self.limited("eval", evaluation, config.max_eval_samples),
        )

    def limited(self, label: str, chosen: Chosen, limit: int) -> Chosen:
        """At most `limit` rows of all sources together, chosen at random; sources without rows are left out."""
        starts = np.cumsum([0, *(len(rows) for _, rows in chosen)])
        kept = limit_rows(np.arange(starts[-1]), limit, self.config.seed)
        if label == "eval" and len(kept) < starts[-1]:
            text = "evaluation: %d of the %d held-out rows, chosen at random; --max_eval_samples 0 takes all"
            logger.info(text, len(kept), starts[-1])
        result: Chosen = []
        for (reading, rows), first in zip(chosen, starts, strict=False):
            own = kept[(kept >= first) & (kept < first + len(rows))] - first
            if len(own):
                result.append((reading, rows[own]))
        if not result:
            raise InputError(
                f"{self.step} {label} data: no row is left for this step; raise its share in data_split "
                f"'{self.config.data_split}', or give more data"
            )
        return result

    def parts(self, label: str, chosen: Chosen) -> tuple[list[Part], list[str]]:
        """The tokenised rows of each source, and the hash of each."""
        made = [reading.part(rows, self.tokenizer, self.fingerprint, self.encoding, label) for reading, rows in chosen]
        if not any(len(part) for part, _ in made):
            raise InputError(self.nothing_left(label, [part for part, _ in made]))
        return [part for part, _ in made], [key for _, key in made]

    def nothing_left(self, label: str, parts: list[Part]) -> str:
        """The message for data without a usable row, with the reasons."""
        given = sum(part.counts["rows"] for part in parts)
        reasons = [problem for part in parts for problem in part.problems]
        if dropped := sum(part.counts["dropped_too_long"] for part in parts):
            name, bound = self.encoding.bound
            reasons.append(f"{dropped} rows are longer than {name} {bound}: raise it, or set long_prompts to truncate")
        formats = "; ".join(dict.fromkeys(part.described for part in parts))
        return (
            f"{self.step} {label} data: no usable row is left of {given} (read as {formats}). {'; '.join(reasons)}. "
            "Check the data, and the names of its columns (--prompt_field, --chosen_field …)"
        )

    def data(self, label: str, given: list[Part], key: str) -> Data:
        """The data of the parts that have usable rows, with the weights of their sources."""
        parts = [part for part in given if len(part)]
        by_name = {source.short_name: source for source in self.sources}
        sources = [by_name.get(part.name) for part in parts]
        data = DATA_CLASSES[self.step](
            parts,
            self.tokenizer,
            self.encoding.bound[1],
            key,
            seed=self.config.seed,
            weights=[source.weight if source else None for source in sources] if label == "train" else None,
            epochs=[source.epochs if source else 0 for source in sources] if label == "train" else None,
            packing=packs(self.config, self.step),
        )
        data.unusable = [part for part in given if not len(part)]
        if isinstance(data, PromptData):
            data.column_names = (*self.encoding.columns, *self.encoding.optional_columns)
            data.group_by_length = self.config.group_by_length
        report(f"{self.step} {label} data", data, self.encoding)
        return data


def present(names: Names, readings: list[Reading]) -> Names:
    """Those of the columns that the first rows of a source have."""
    heads = [opened.table.head(HEAD) for reading in readings for opened in reading.opened] if names else []
    return tuple(name for name in names if any(look_up(row, name) is not MISSING for rows in heads for row in rows))


def every_row(reading: Reading) -> np.ndarray:
    """The numbers of all rows."""
    return np.flatnonzero(reading.groups != -1)


def check_apart(own: list[Reading], others: list[Reading]) -> None:
    """Raises InputError when a file or data set serves both for training and for evaluation."""
    trained = {identity for reading in own for identity in reading.origin.identities("train")}
    for reading in others:
        if trained & reading.origin.identities(reading.split):
            raise InputError(
                f"eval_data_path '{reading.source.path}': is also training data; leave it out of one of them"
            )


def warn_of_shared_prompts(train: Chosen, evaluation: Chosen) -> None:
    """Warns when prompts of evaluation rows stand in training rows too."""
    trained = np.unique(np.concatenate([reading.groups[rows] for reading, rows in train]))
    for reading, rows in evaluation:
        shared = int(np.isin(reading.groups[rows], trained).sum())
        if shared:
            logger.warning(
                "%s: %s of %s evaluation rows have a prompt that training rows have too; metrics on them say little",
                reading.source.path,
                f"{shared:,}",
                f"{len(rows):,}",
            )


def report(label: str, data: Data, encoding: Encoding) -> None:
    """Logs one line about each source of the data; a warning when rows were skipped, cut or dropped."""
    name, bound = encoding.bound
    texts = {
        "skipped": "skipped",
        "dropped_too_long": f"dropped, longer than {bound} ({name}) tokens",
        "truncated_prompts": f"prompts cut to fit {bound} ({name}) tokens",
        "truncated_responses": f"responses cut to fit {bound} ({name}) tokens",
    }
    for k, part in enumerate(data.parts):
        counts = part.counts
        changes = [f"{counts[count]:,} {text}" for count, text in texts.items() if counts[count]]
        summary = f"{counts['kept']:,} of {counts['rows']:,} rows, {int(part.lengths.sum()):,} tokens"
        if data.bins is not None:
            filled = data.unit_lengths(part).sum() / (len(data.bins[k]) * data.maximum)
            summary += f", packed into {len(data.bins[k]):,} rows of {data.maximum} tokens ({filled:.1%} full)"
        if margins := part.margins():
            summary += f", {margins:,} with a margin"
        level = logging.WARNING if changes else logging.INFO
        logger.log(
            level, "%s: %s: %s", label, f"{part.name}, {part.described}", "; ".join([summary, *changes, *part.problems])
        )
    for part in data.unusable:
        logger.warning("%s: %s: no usable row: %s", label, part.name, "; ".join(part.problems) or "all are too long")
