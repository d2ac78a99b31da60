"""A model folder (or GGUF file), opened: its tensors under the family's names, and what only they tell of the model."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jaxrlhf.config.files import read_json
from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families import get_family
from jaxrlhf.models.hf.checkpoint_files import CONFIG, open_checkpoint, second_format
from jaxrlhf.models.hf.experts import unfused
from jaxrlhf.models.hf.gguf import gguf_source, is_gguf
from jaxrlhf.models.hf.mapping import Family
from jaxrlhf.models.hf.score_heads import ScoreHead, find_score_head, with_score_names
from jaxrlhf.models.hf.tensor_names import differences, resolve_tied, unwrapped, with_declared_names
from jaxrlhf.models.hf.tensor_source import TensorSource, refuse

logger = logging.getLogger(__name__)


class Opened(NamedTuple):
    """An opened checkpoint."""

    source: TensorSource
    """Its tensors under the names that the family declares."""
    config: DecoderConfig
    """The configuration, corrected by what the tensors say: a head that is not tied, the form of a scalar head."""
    score: ScoreHead | None
    """Its scalar head."""
    wrapper: str
    """What the names in the file began with, such as `module.`."""


def open_model(folder: Path, config: DecoderConfig, head: str) -> Opened:
    """Opens the weights of a model folder or GGUF file.

    Args:
        folder: The folder or file.
        config: What its config.json says.
        head: The head to load, "lm" or "scalar".

    Raises:
        InputError: Files are damaged, differ from one another, or hold a head that is not supported or not `head`.
    """
    family = get_family(config.family, str(folder))
    if is_gguf(folder):
        names = [name for tensor in family.all_tensors for name in tensor.names(config)]
        return Opened(with_declared_names(gguf_source(folder, names), family, config), config, None, "")
    options = read_json(folder / CONFIG)
    opened = _named(open_checkpoint(folder), family, config, options)
    _check_second_format(folder, opened, family, options)
    source, score = opened.source, opened.score
    if head == "lm" and score is not None and not score.beside_lm:
        raise InputError(
            f"{folder} is a reward model (it has a scalar head), not a language model; name a language model here"
        )
    source, untied = resolve_tied(source, family, config, head)
    if untied.tie_embeddings != config.tie_embeddings:
        logger.warning(
            "%s: the config ties the output head to the embedding, but the file has a head that differs: it is used, "
            "as in transformers 5",
            folder,
        )
    if head == "lm" and score is not None:
        logger.info("%s: the value head of TRL (%s) is left out", folder, score.name)
    if opened.wrapper:
        logger.info("%s: tensor names begin with %r, which is stripped", folder, opened.wrapper)
    if head == "scalar" and score is not None:
        pad = config.pad_token_id if isinstance(config.pad_token_id, int) and score.skips_pad else None
        untied = untied.replace(score_bias=score.bias, score_skips=pad)
    return opened._replace(source=_without_score(source) if head == "lm" else source, config=untied)


def folder_head(folder: Path, config: DecoderConfig) -> str:
    """The head that a model folder holds, "lm" or "scalar"."""
    family = get_family(config.family, str(folder))
    score = _named(open_checkpoint(folder), family, config, read_json(folder / CONFIG)).score
    return "lm" if score is None or score.beside_lm else "scalar"


def _without_score(source: TensorSource) -> TensorSource:
    return replace(source, shapes={name: x for name, x in source.shapes.items() if not name.startswith("score.")})


def _named(source: TensorSource, family: Family, config: DecoderConfig, options: dict[str, object]) -> Opened:
    source, wrapper = unwrapped(source, family, config)
    source = unfused(source, family, config)
    score = find_score_head(source, options)
    source = with_declared_names(with_score_names(source, score, options), family, config)
    return Opened(source, config, score, wrapper)


def _check_second_format(folder: Path, opened: Opened, family: Family, options: dict[str, object]) -> None:
    """Raises InputError when a folder holds two weight formats that differ, as after a run that wrote only one."""
    try:
        second = second_format(folder)
    except InputError as error:
        logger.warning("%s holds a second weight format, which was not compared: %s", folder, error)
        return
    if second is None:
        return
    other = _named(second, family, opened.config, options)
    found = list(differences(opened.source, other.source))
    refuse(f"{folder} holds weights in two formats that differ, safetensors and .bin; delete the outdated files", found)
