"""Settings of the data: sources, columns, lengths, packing, evaluation and cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from jaxrlhf.config import (
    FromYaml,
    Ge,
    Gt,
    Lasting,
    Lt,
    NonNegative,
    NonNegativeInt,
    PathName,
    PositiveInt,
    Seed,
    Settings,
    alias,
)
from jaxrlhf.config.files import default_cache
from jaxrlhf.data.formats import FORMATS, PairRule
from jaxrlhf.data.mixture import SourceConfig, named_apart, parse_mixture, read_inline
from jaxrlhf.data.selection import parse_split
from jaxrlhf.data.tokenized import SEQUENCES
from jaxrlhf.data.tokenizer import TemplateConfig
from jaxrlhf.errors import InputError


@dataclass(frozen=True)
class FieldsConfig(Settings, may_change=True):
    """Names of the columns; dotted paths reach into them (question.full_text, answers.0.text)."""

    prompt_field: str = "prompt"
    """Column with the prompt: text, or a list of messages."""
    completion_field: str = "completion"
    """Column with the response of prompt-completion rows."""
    chosen_field: str = "chosen"
    """Column with the preferred response, which sft learns."""
    rejected_field: str = "rejected"
    """Column with the other response."""
    messages_field: str = "messages"
    """Column with a conversation."""
    text_field: str = "text"
    """Column with plain text for language modelling."""
    label_field: str = "label"
    """Column of unpaired preferences: true for a good completion."""
    responses_field: str = "responses"
    """Column with several responses to one prompt."""
    scores_field: str = "scores"
    """Column with a score of each response; a column `ranks` counts from the best, 1."""
    margin_field: str = "margin"
    """Column with the margin of a pair, a number that the reward model's loss wants between the scores."""
    system_field: str = ""
    """Column with the system message; default: none."""
    tools_field: str = "tools"
    """Column with the tools of a conversation, for the chat template."""
    chat_template_kwargs_field: str = "chat_template_kwargs"
    """Column with variables of the chat template, such as enable_thinking; they override chat_template_kwargs."""

    @property
    def names(self) -> dict[str, str]:
        """The column of each canonical name."""
        return {name.removesuffix("_field"): value for name, value in self.items()}


@dataclass(frozen=True)
class DataConfig(Settings, may_change=True):
    """The data sources, their mixture and split over the steps, and the tokenization."""

    data_path: PathName[tuple[str, ...]] = ()
    """Training data: a JSON, CSV, TSV, Parquet, Arrow or text file, also compressed; a folder or glob of such files; a
    data set of the hub (name, name:config, name@split) or of save_to_disk; or 'demo'. Several are joined."""
    data_mixture: Annotated[tuple[str, ...], FromYaml(read_inline)] = ()
    """YAML file with a list of sources, in place of data_path: path, weight, fields, template, split, steps, limit …"""
    data_format: str = ""
    """Format of the rows: preference, preference_implicit, ranked, unpaired, prompt_completion, sharegpt, alpaca,
    messages, prompt or text; default: recognised by the columns."""
    dataset_registry: PathName[str] = ""
    """YAML or Python file with declarations of your own data sets."""
    data_split: str = ""
    """Shares of the training rows for sft,reward,ppo, such as 2,4,4; dpo and kto take those of reward and ppo. Empty:
    every step uses all rows."""
    eval_data_path: PathName[tuple[str, ...]] = ()
    """Evaluation data; default: the data's own eval, validation or test split, else rows held out."""
    eval_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Share of the prompts held out for evaluation when the data has no such split."""
    fields: FieldsConfig = FieldsConfig()
    template: TemplateConfig = TemplateConfig()
    pair_rule: PairRule = "best_worst"
    """Pairs of a row with several scored responses: the best against the worst, neighbours in rank, or all pairs."""
    pair_margin: NonNegative = 0.0
    """Smallest difference of the scores in a pair of pair_rule."""
    reward_columns: tuple[str, ...] = ()
    """Further columns that reward functions receive. Columns that a function requires are read in any case."""
    max_length: Annotated[int, Ge(2), alias("max_seq_len")] = 512
    """Longest prompt + response in tokens (sft, reward, dpo, kto)."""
    max_prompt_seq_len: PositiveInt = 256
    """Longest prompt in tokens (ppo and its relatives)."""
    long_prompts: Literal["truncate", "drop"] = "truncate"
    """Cut the beginning of a prompt that is too long, or drop the row."""
    packing: bool | None = None
    """Pack several rows into one, each seeing only itself. Default: on for sft."""
    group_by_length: bool = True
    """Batches of ppo and its relatives hold prompts of like lengths."""
    max_train_samples: NonNegativeInt = 0
    """Use at most this many training rows, chosen at random; 0: all."""
    max_eval_samples: NonNegativeInt = 256
    """Use at most this many evaluation rows, chosen at random; 0: all."""
    streaming: bool = False
    """Read training rows as they are needed, for data that does not fit on the disk; requires max_steps."""
    shuffle_buffer: PositiveInt = 10000
    """Rows that are shuffled together when streaming."""
    dataset_num_proc: PositiveInt = 1
    """Processes that tokenise."""
    data_cache_dir: PathName[str] = ""
    """Folder for tokenised data; default: $JAXRLHF_CACHE, else ~/.cache/jaxrlhf."""
    seed: Lasting[Seed] = 42
    """Seed of the data split and order, of initialisation, dropout and sampling."""

    def check(self) -> None:
        for name in ("data_path", "eval_data_path", "reward_columns", "data_mixture"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(map(str, value or ())))
        if self.data_path and self.data_mixture:
            raise InputError("data_path and data_mixture exclude each other: put all sources into the mixture")
        if self.streaming and self.pair_rule != "best_worst" and not self.packing:
            raise InputError(
                f"pair_rule={self.pair_rule} makes several pairs of a row, which streaming takes only when packed: set "
                "packing to true, or pair_rule to best_worst"
            )
        if self.data_format and self.data_format not in FORMATS:
            raise InputError(f"data_format '{self.data_format}': must be one of {', '.join(FORMATS)}")
        parse_split(self.data_split)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the run. Raises InputError when there are none, or the mixture is unusable."""
        if self.data_mixture:
            return parse_mixture(self.data_mixture)
        if not self.data_path:
            raise InputError("data_path: no data given; name a file, a folder, a Hugging Face data set, or 'demo'")
        return named_apart([SourceConfig(path=path) for path in self.data_path])

    @property
    def names(self) -> tuple[str, ...]:
        """The sources as the user named them, for records."""
        return self.data_path or tuple(source.path for source in self.sources)


def cache_folder(config: DataConfig) -> Path:
    """The folder for tokenised data: `data_cache_dir`, else $JAXRLHF_CACHE, else ~/.cache/jaxrlhf."""
    return Path(config.data_cache_dir) if config.data_cache_dir else default_cache()


def packs(config: DataConfig, step: str) -> bool:
    """True when the step packs its rows."""
    return step == "sft" if config.packing is None else config.packing and step != "ppo"


def packed_length(config: DataConfig, step: str) -> int:
    """Tokens of a packed row of a step; 0 when it does not pack."""
    return config.max_length * SEQUENCES[step] if packs(config, step) else 0
