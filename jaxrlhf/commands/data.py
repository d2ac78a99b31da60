"""`jaxrlhf data`: what a step sees of your data and trains on. Loads no model."""

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax

from jaxrlhf.commands.data_page import page_of
from jaxrlhf.commands.data_report import Inspection
from jaxrlhf.commands.data_terminal import print_inspection
from jaxrlhf.commands.inspection import inspect_data
from jaxrlhf.config import Ge, PathName, PositiveInt, Settings
from jaxrlhf.config.files import check_output, write_text_atomic
from jaxrlhf.data import DataConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models.hf.checkpoint_files import CONFIG
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.settings import ModelName
from jaxrlhf.trainers.tokenizers import TokenizerConfig

PATIENCE = 3.0  # seconds without a word


@dataclass(frozen=True)
class DataViewConfig(Settings):
    """Shows the rows that a step reads and the tokens that it trains on."""

    step: Literal["sft", "reward", "ppo", "dpo", "kto"] = "sft"
    """Step that reads the data; ppo stands for every algorithm that samples its own responses."""
    show: Annotated[int, Ge(0)] = 2
    """Rows of each source to show."""
    batch_size: PositiveInt = 8
    """Rows of a batch, for the share of padding."""
    html: PathName[str | None] = None
    """Also write a page to this file."""
    json: PathName[str | None] = None
    """Also write everything as JSON to this file; -: to standard output, and nothing else."""
    data: DataConfig = DataConfig()
    model: ModelName = ModelName()
    tokenizer: TokenizerConfig = TokenizerConfig()


def show_data(config: DataViewConfig) -> Inspection:
    """Reads the data as a step does, prints what it finds, and writes the files that the settings name.

    Raises:
        InputError: as in `load_data`, or no tokenizer is given.
    """
    jax.config.update("jax_platforms", "cpu")  # an accelerator that another program uses stays free
    console, model, name = Console(), config.model.model_name_or_path, config.tokenizer.tokenizer_name_or_path
    if model is None and name is None:
        raise InputError("model_name_or_path: no model or tokenizer given; name the folder of one, or its hub name")
    for path, option in ((config.json, "json"), (config.html, "html")):
        check_output(None if path == "-" else path, option)
    with announced(console, "reading and tokenising the rows (later calls take them from the cache)"), quiet():
        if model is None and (Path(str(name)).expanduser() / CONFIG).is_file():
            model = name  # a model's folder: its end ids count too
        tokenizer = config.tokenizer.load(model, config.data.template)
        found = inspect_data(config.data, tokenizer, config.step, show=config.show, batch_size=config.batch_size)
    text = json.dumps(found.as_dict(), indent=2, ensure_ascii=False)
    if config.json == "-":
        sys.stdout.write(f"{text}\n")
    else:
        print_inspection(found)
    for path, content in ((config.json, f"{text}\n"), (config.html, page_of(found) if config.html else "")):
        if path is not None and path != "-":
            write_text_atomic(path, content)
            console.print(f"wrote {path}")
    return found


@contextlib.contextmanager
def announced(console: Console, message: str) -> Iterator[None]:
    """Prints `message` when the block takes more than a few seconds."""
    timer = threading.Timer(PATIENCE, console.print, [message])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back the lines in which `load_data` reports its rows: the command shows the same."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logger = logging.getLogger("jaxrlhf.data.loading")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
