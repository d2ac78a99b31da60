"""Loads the tokenised training and evaluation rows of a step, as `DataConfig` selects them."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, overload

import numpy as np

from jaxrlhf.config import Ge, Gt, Lasting, Lt, NonNegativeInt, PositiveInt, Settings, alias
from jaxrlhf.data.batches import Data, PairData, PromptData, SFTData
from jaxrlhf.data.cache import default_cache, hash_json, tokenizer_fingerprint
from jaxrlhf.data.sources import SHARES, Source, parse_split, resolve_source, split_indices
from jaxrlhf.data.tokenized import FORMAT, Encoding, Ragged, RowSet, read_part, write_part
from jaxrlhf.data.tokenizer import TemplateConfig, check_tokenizer, with_template
from jaxrlhf.distributed import by_turns, check_same
from jaxrlhf.errors import InputError

logger = logging.getLogger(__name__)

DATA_CLASSES: dict[str, type[Data]] = {"sft": SFTData, "reward": PairData, "ppo": PromptData, "dpo": PairData}


@dataclass(frozen=True)
class DataConfig(Settings, may_change=True):
    """The data sources, their split over the steps, and the tokenization."""

    data_path: tuple[str, ...] = ()
    """Training data: a JSON, JSONL, CSV or Parquet file, a folder of such files, a Hugging Face data set (name,
    name:config or save_to_disk folder), or 'demo'. Several are joined."""
    data_split: str = ""
    """Shares of the training rows for sft,reward,ppo, such as 2,4,4; dpo takes those of reward and ppo. Empty: every
    step uses all rows."""
    eval_data_path: tuple[str, ...] = ()
    """Evaluation data; default: the data's own eval, validation or test split, else rows held out."""
    eval_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Share of the rows held out for evaluation when the data has no such split."""
    prompt_field: str = "prompt"
    """Field with the prompt: text, or a list of role/content messages."""
    chosen_field: str = "chosen"
    """Field with the preferred response, which sft learns."""
    rejected_field: str = "rejected"
    """Field with the other response."""
    reward_columns: tuple[str, ...] = ()
    """Further fields that reward functions receive. Fields that a function requires are read in any case."""
    template: TemplateConfig = TemplateConfig()
    max_length: Annotated[int, Ge(2), alias("max_seq_len")] = 512
    """Longest prompt + response in tokens (sft, reward, dpo)."""
    max_prompt_seq_len: PositiveInt = 256
    """Longest prompt in tokens (ppo and its relatives)."""
    long_prompts: Literal["truncate", "drop"] = "truncate"
    """Cut the beginning of a prompt that is too long, or drop the row."""
    max_train_samples: NonNegativeInt = 0
    """Use at most this many training rows, chosen at random; 0: all."""
    max_eval_samples: NonNegativeInt = 0
    """Use at most this many evaluation rows, chosen at random; 0: all."""
    data_cache_dir: str = ""
    """Folder for tokenised data; default: $JAXRLHF_CACHE, else ~/.cache/jaxrlhf."""
    seed: Lasting[NonNegativeInt] = 42
    """Seed of the data split and order, of initialisation, dropout and sampling."""

    def check(self) -> None:
        for name in ("data_path", "eval_data_path", "reward_columns"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(map(str, value or ())))
        parse_split(self.data_split)


def cache_folder(config: DataConfig) -> Path:
    """The folder for tokenised data: `data_cache_dir`, else $JAXRLHF_CACHE, else ~/.cache/jaxrlhf."""
    return Path(config.data_cache_dir).expanduser() if config.data_cache_dir else default_cache()


@overload
def load_data(
    config: DataConfig, tokenizer, step: Literal["ppo"], columns: tuple[str, ...] = ()
) -> tuple[PromptData, PromptData]: ...
@overload
def load_data(config: DataConfig, tokenizer, step: str, columns: tuple[str, ...] = ()) -> tuple[Data, Data]: ...
def load_data(config: DataConfig, tokenizer, step: str, columns: tuple[str, ...] = ()) -> tuple[Data, Data]:
    """Loads the training and the evaluation rows of a step, tokenised or from the cache.

    Evaluation rows are the same in every step, and no step trains on them: `eval_data_path`, else each source's own
    evaluation split, else a held-out fraction of it. When several processes load, one per machine writes the cache
    while the others wait.

    Args:
        config: the data settings.
        tokenizer: a Hugging Face tokenizer.
        step: "sft", "reward", "ppo" or "dpo".
        columns: fields of the rows that ppo data keeps, besides `config.reward_columns`.

    Raises:
        InputError: the data or the tokenizer is unusable, a row lacks a column, or processes read different data.
    """
    if step not in SHARES:
        raise ValueError(f"step '{step}': must be one of {', '.join(SHARES)}")
    if not config.data_path:
        raise InputError("data_path: no data given; name a file, a folder, a Hugging Face data set, or 'demo'")
    check_tokenizer(tokenizer)
    parts, contents = by_turns(f"tokenising the {step} data", lambda: tokenised_parts(config, tokenizer, step, columns))
    check_same("data", contents)
    return parts


def tokenised_parts(
    config: DataConfig, tokenizer, step: str, columns: tuple[str, ...]
) -> tuple[tuple[Data, Data], dict[str, str]]:
    """The two parts of `load_data`, and the hash of each thing that they depend on."""
    folder = cache_folder(config)
    sources = [resolve_source(name, folder) for name in config.data_path]
    eval_sources = [resolve_source(name, folder) for name in config.eval_data_path]
    check_apart(sources, eval_sources)
    encoding = Encoding(
        step=step,
        names=(("prompt", config.prompt_field), ("chosen", config.chosen_field), ("rejected", config.rejected_field)),
        special_tokens_in_data=config.template.special_tokens_in_data,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_seq_len,
        long_prompts=config.long_prompts,
        columns=tuple(dict.fromkeys((*columns, *config.reward_columns))) if step == "ppo" else (),
    )
    tokenizer = with_template(tokenizer, config.template)
    tokenizer_hash = tokenizer_fingerprint(tokenizer)
    result, contents = [], {"the tokenizer": tokenizer_hash}
    for part in ("train", "eval"):
        selection = Selection(part, step, tuple(sources), tuple(eval_sources), config)
        selected = selection.key()
        key = hash_json([FORMAT, tokenizer_hash, asdict(encoding), selected])
        ragged = cached_part(folder / "tokens" / f"{step}-{part}-{key}", selection, tokenizer, encoding)
        result.append(DATA_CLASSES[step](ragged, tokenizer, encoding.bound[1], key))
        contents |= {f"{name} ({part})": fingerprint for name, _, fingerprint in selected[1]}
        contents[f"rows and order ({part})"] = key
    return (result[0], result[1]), contents


def check_apart(sources: list[Source], eval_sources: list[Source]) -> None:
    """Raises InputError when a file or data set serves both for training and for evaluation."""
    trained = {identity for source in sources for identity in source.identities("train")}
    for source in eval_sources:
        if trained & source.identities(source.evaluation_split):
            raise InputError(f"eval_data_path '{source.name}': is also training data; leave it out of one of them")


@dataclass(frozen=True)
class Selection:
    """The rows of the sources that make up the train or the eval part of a step."""

    part: str
    step: str
    sources: tuple[Source, ...]
    eval_sources: tuple[Source, ...]
    config: DataConfig

    @property
    def limit(self) -> int:
        """The largest number of rows; 0: all."""
        return self.config.max_train_samples if self.part == "train" else self.config.max_eval_samples

    def key(self) -> list:
        """Everything that the selection depends on, for the cache's key. Hashes the files without parsing them."""
        prints = [[s.name, "eval" in s.splits, s.fingerprint(split)] for s, split in self.splits()]
        share = [self.config.data_split, self.step] if self.part == "train" else []
        held_out = 0 if self.eval_sources else self.config.eval_fraction
        return [self.part, prints, share, held_out, self.limit, self.config.seed]

    def splits(self) -> list[tuple[Source, str]]:
        """The sources that the rows come from, and the split of each."""
        if self.part == "train":
            return [(source, "train") for source in self.sources]
        return [(source, source.evaluation_split) for source in self.eval_sources or self.sources]

    def read(self) -> RowSet:
        """Reads the sources and selects the rows. Raises InputError when none is left."""
        rows, origins = [], []
        for k, (source, split) in enumerate(self.splits()):
            rows.append(source.rows(split))
            selected = self.select(source, split, len(rows[k]))
            origins.append(np.stack([np.full(len(selected), k), selected], axis=1))
        origin = np.concatenate(origins).astype(np.int32)
        if 0 < self.limit < len(origin):
            order = np.random.default_rng((self.config.seed, 1)).permutation(len(origin))
            origin = origin[np.sort(order[: self.limit])]
        label = f"{self.step} {self.part} data"
        if not len(origin):
            raise InputError(
                f"{label}: no row is left for this step; raise its share in data_split '{self.config.data_split}', "
                "or give more data"
            )
        return RowSet(label, tuple(source.name for source, _ in self.splits()), rows, origin)

    def select(self, source: Source, split: str, n: int) -> np.ndarray:
        """The selected row numbers of a source with `n` rows."""
        if self.part == "eval" and (self.eval_sources or split == "eval"):
            return np.arange(n)
        config = self.config
        held_out = 0.0 if self.eval_sources or "eval" in source.splits else config.eval_fraction
        train, evaluation = split_indices(
            n, self.step, data_split=config.data_split, held_out=held_out, seed=config.seed, name=source.name
        )
        return train if self.part == "train" else evaluation


def cached_part(folder: Path, selection: Selection, tokenizer, encoding: Encoding) -> Ragged:
    """The part in `folder`; tokenises the selected rows when it is not there. Logs what was read."""
    ragged, origin = read_part(folder), "from the cache"
    if ragged is None:
        row_set, origin = selection.read(), "tokenised into"
        try:
            write_part(folder, row_set, tokenizer, encoding)
        except OSError as error:
            raise InputError(
                f"data_cache_dir '{folder.parent}': cannot be written ({error.strerror or error}); "
                "free space there, or choose another folder"
            ) from error
        ragged = read_part(folder)
        if ragged is None:
            raise InputError(
                f"data_cache_dir '{folder.parent}': {folder.name} cannot be read back; choose another folder"
            )
    report(f"{selection.step} {selection.part} data", ragged, encoding, f"{origin} {folder}")
    return ragged


def report(label: str, ragged: Ragged, encoding: Encoding, how: str) -> None:
    """Logs one line about a part; a warning when rows were skipped, cut or dropped."""
    name, bound = encoding.bound
    texts = {
        "skipped": "skipped",
        "dropped_too_long": f"dropped, longer than {bound} ({name}) tokens",
        "truncated_prompts": f"prompts cut to fit {bound} ({name}) tokens",
        "truncated_responses": f"responses cut to fit {bound} ({name}) tokens",
    }
    counts = ragged.counts
    changes = [f"{counts[name]:,} {text}" for name, text in texts.items() if counts[name]]
    summary = f"{counts['kept']:,} of {counts['rows']:,} rows, {len(ragged.tokens):,} tokens, {how}"
    level = logging.WARNING if changes else logging.INFO
    logger.log(level, "%s: %s", label, "; ".join([summary, *changes, *ragged.problems]))
