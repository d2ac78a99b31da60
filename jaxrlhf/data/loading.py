"""From the data flags to the tokenised train and eval rows of a step: `load_data`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from jaxrlhf.config import Ge, Gt, Lasting, Lt, NonNegativeInt, PositiveInt, Settings, alias
from jaxrlhf.data.batches import Data, PairData, PromptData, SFTData
from jaxrlhf.data.sources import SHARES, Source, parse_split, resolve_source, split_indices
from jaxrlhf.data.templates import DEFAULT_TEMPLATE, check_template, check_tokenizer, default_cache, uses_chat_template
from jaxrlhf.data.tokenized import (
    FORMAT,
    Encoding,
    Ragged,
    hash_json,
    open_part,
    read_part,
    tokenizer_fingerprint,
    write_part,
)
from jaxrlhf.distributed import by_turns, check_same
from jaxrlhf.errors import InputError

logger = logging.getLogger(__name__)

DATA_CLASSES: dict[str, type[Data]] = {"sft": SFTData, "reward": PairData, "ppo": PromptData, "dpo": PairData}


@dataclass(frozen=True)
class DataConfig(Settings, may_change=True):
    """Where rows come from, how the steps share them, and how they become tokens."""

    data_path: tuple[str, ...] = ()
    """Training data: a JSON, JSONL, CSV or Parquet file, a folder of such files, a Hugging Face data set (name,
    name:config or save_to_disk folder), or 'demo'. Several are joined."""
    data_split: str = ""
    """Shares of the training rows for sft,reward,ppo, such as 2,4,4; dpo takes those of reward and ppo. Empty: each step
    uses all rows."""
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
    prompt_template: str = DEFAULT_TEMPLATE
    """Text around prompt and response, or 'raw' to join them. The tokenizer's chat template replaces the default."""
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
        check_template(self.prompt_template)


def cache_folder(config: DataConfig) -> Path:
    """The folder for tokenised data: `data_cache_dir`, else $JAXRLHF_CACHE, else ~/.cache/jaxrlhf."""
    return Path(config.data_cache_dir).expanduser() if config.data_cache_dir else default_cache()


def load_data(config: DataConfig, tokenizer, step: str, columns: tuple[str, ...] = ()) -> tuple[Data, Data]:
    """The training and the evaluation rows of `step` ("sft", "reward", "ppo" or "dpo"), tokenised or from the cache.

    Evaluation rows are the same in every step and are trained on in none: `eval_data_path`, else each source's own
    evaluation split, else a held-out fraction of it. `columns`: fields of the rows that ppo data keeps, besides
    `config.reward_columns`; a row that lacks one is bad input. Raises InputError for unusable data or tokenizer, and
    when the processes of a run read different data. Of these, one of each machine writes the cache, while the others
    wait.
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
    """The two parts of `load_data`, and hashes of all they come from by what they are hashes of."""
    folder = cache_folder(config)
    sources = [resolve_source(name, folder) for name in config.data_path]
    eval_sources = [resolve_source(name, folder) for name in config.eval_data_path]
    check_apart(sources, eval_sources)
    columns = tuple(dict.fromkeys((*columns, *config.reward_columns))) if step == "ppo" else ()
    encoding = Encoding(
        step=step,
        names=(("prompt", config.prompt_field), ("chosen", config.chosen_field), ("rejected", config.rejected_field)),
        template=config.prompt_template,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_seq_len,
        long_prompts=config.long_prompts,
        columns=columns,
    )
    read = functools.cache(
        lambda source_index, split, own: (eval_sources if own else sources)[source_index].rows(split)
    )
    tokenizer_hash = tokenizer_fingerprint(tokenizer)
    maximum = config.max_prompt_seq_len if step == "ppo" else config.max_length
    result, contents = [], {"the tokenizer": tokenizer_hash}
    for part in ("train", "eval"):
        selection = Selection(part, step, tuple(sources), tuple(eval_sources), config, read)
        chosen = selection.key()
        key = hash_json([FORMAT, tokenizer_hash, asdict(encoding), chosen])
        ragged = cached_part(folder / "tokens" / f"{step}-{part}-{key}", selection, tokenizer, encoding)
        result.append(DATA_CLASSES[step](ragged, tokenizer, maximum, key))
        contents |= {f"{name} ({part})": fingerprint for name, _, fingerprint in chosen[1]}
        contents[f"rows and order ({part})"] = key
    return (result[0], result[1]), contents


def check_apart(sources: list[Source], eval_sources: list[Source]) -> None:
    """Raise InputError when a file or data set that is trained on is also given for evaluation."""
    files = {path.resolve() for source in sources for path in source.files.get("train", ())}
    saved = {source.fingerprint("train") for source in sources if "train" in source.datasets}
    for source in eval_sources:
        split = evaluation_split(source)
        shared = any(path.resolve() in files for path in source.files.get(split, ()))
        if shared or (split in source.datasets and source.fingerprint(split) in saved):
            raise InputError(f"eval_data_path '{source.name}': is also training data; leave it out of one of them")


def evaluation_split(source: Source) -> str:
    return "eval" if source.has("eval") else "train"


@dataclass(frozen=True)
class Selection:
    """Which rows of which sources make up the train or the eval part of a step."""

    part: str
    step: str
    sources: tuple[Source, ...]
    eval_sources: tuple[Source, ...]
    config: DataConfig
    read: functools._lru_cache_wrapper

    @property
    def label(self) -> str:
        return f"{self.step} {self.part} data"

    @property
    def names(self) -> tuple[str, ...]:
        given = self.eval_sources if self.part == "eval" and self.eval_sources else self.sources
        return tuple(source.name for source in given)

    def key(self) -> list:
        """All that the selection depends on, for the cache's name; reads the files' bytes but does not parse them."""
        config = self.config
        samples = config.max_train_samples if self.part == "train" else config.max_eval_samples
        prints = [[s.name, s.has("eval"), s.fingerprint(split)] for s, split, _ in self.splits()]
        share = [config.data_split, self.step] if self.part == "train" else []
        held_out = 0 if self.eval_sources else config.eval_fraction
        return [self.part, prints, share, held_out, samples, config.seed]

    def splits(self) -> list[tuple[Source, str, bool]]:
        """The (source, split, whether it is one of eval_data_path) that the rows are taken from."""
        if self.part == "train":
            return [(source, "train", False) for source in self.sources]
        if self.eval_sources:
            return [(source, evaluation_split(source), True) for source in self.eval_sources]
        return [(source, evaluation_split(source), False) for source in self.sources]

    def origin(self) -> np.ndarray:
        """int32 [n, 2]: (source number, row number) of every selected row, in order."""
        config, chosen = self.config, []
        for k, (source, split, own) in enumerate(self.splits()):
            n = len(self.read(k, split, own))
            if self.part == "eval" and (own or split == "eval"):
                rows = np.arange(n)
            else:
                held_out = 0.0 if self.eval_sources or source.has("eval") else config.eval_fraction
                train, evaluation = split_indices(
                    n, self.step, data_split=config.data_split, held_out=held_out, seed=config.seed, name=source.name
                )
                rows = train if self.part == "train" else evaluation
            chosen.append(np.stack([np.full(len(rows), k), rows], axis=1))
        result = np.concatenate(chosen).astype(np.int32)
        limit = config.max_train_samples if self.part == "train" else config.max_eval_samples
        if limit and limit < len(result):
            result = result[np.sort(np.random.default_rng((config.seed, 1)).permutation(len(result))[:limit])]
        if not len(result):
            raise InputError(
                f"{self.label}: no row is left for this step; raise its share in data_split '{config.data_split}', "
                "or give more data"
            )
        return result

    def rows(self, origin: np.ndarray) -> Iterator[tuple[object, functools.partial]]:
        splits = self.splits()
        for k, row in origin.tolist():
            _, split, own = splits[k]
            rows = self.read(k, split, own)
            yield rows[row], functools.partial(rows.where, row)


def cached_part(folder: Path, selection: Selection, tokenizer, encoding: Encoding) -> Ragged:
    ragged = open_part(folder)
    known = ragged is not None
    if ragged is None:
        origin = selection.origin()
        try:
            write_part(folder, selection.rows(origin), origin, selection.names, tokenizer, encoding, selection.label)
        except OSError as error:
            raise InputError(
                f"data_cache_dir '{folder.parent}': cannot be written ({error.strerror or error}); "
                "free space there, or choose another folder"
            ) from error
        ragged = read_part(folder)
    report(selection.label, ragged, folder, known, tokenizer, encoding)
    return ragged


def report(label: str, ragged: Ragged, folder: Path, known: bool, tokenizer, encoding: Encoding) -> None:
    """Log one line on what was read; a warning when rows were skipped, cut or dropped."""
    counts = ragged.counts
    bound = (
        f"{encoding.max_prompt_length} (max_prompt_seq_len)"
        if encoding.step == "ppo"
        else f"{encoding.max_length} (max_length)"
    )
    changes = [
        f"{counts[name]:,} {text}"
        for name, text in (
            ("skipped", "skipped"),
            ("dropped_too_long", f"dropped, longer than {bound} tokens"),
            ("truncated_prompts", f"prompts cut to fit {bound} tokens"),
            ("truncated_responses", f"responses cut to fit {bound} tokens"),
        )
        if counts[name]
    ]
    rendering = "chat template" if uses_chat_template(tokenizer, encoding.template) else repr(encoding.template)
    logger.log(
        logging.WARNING if changes else logging.INFO,
        "%s: %s of %s rows, %s tokens, rendered by %s, %s %s%s",
        label,
        f"{counts['kept']:,}",
        f"{counts['rows']:,}",
        f"{len(ragged.tokens):,}",
        rendering,
        "from the cache" if known else "tokenised into",
        folder,
        "".join(f"; {change}" for change in changes) + "".join(f"; {problem}" for problem in ragged.problems),
    )
