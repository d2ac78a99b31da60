"""Hugging Face's config.json in and out: which options are honoured, refused, or without effect.

What the family's config class in transformers declares is honoured or refused. Transformers ignores any other option,
and so do we: it is logged once, and written back on export. Exceptions are options that other code reads and that
change results; they are refused by name (`_REFUSED`).
"""

import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.config.files import read_json
from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families import get_family
from jaxrlhf.models.families.rope import ROPE_OPTIONS
from jaxrlhf.models.hf.checkpoint_files import CONFIG, base_folder, find_model_folder
from jaxrlhf.models.hf.generation_config import with_generation_config
from jaxrlhf.models.hf.gguf import gguf_options, is_gguf
from jaxrlhf.models.hf.mapping import Family, HFConfig
from jaxrlhf.models.hf.score_heads import OPENRLHF_OPTIONS

logger = logging.getLogger(__name__)


class _Refused(NamedTuple):
    """Options that change results."""

    names: str
    """Regular expression."""
    why: str


_QUANTISED = "quantised checkpoints are not supported; use the original weights"
_SCORES = "reward models with several scores, a gate or a normaliser of their own are not supported"
_REFUSED = (
    _Refused(r"quantization_config|compression_config", _QUANTISED),
    _Refused(r"score_\w+|normalizer_type|gating_\w+|num_objectives", _SCORES),
    _Refused(
        r"normalize_reward",
        "the mean and standard deviation belong to the head; load the whole folder, which applies them",
    ),
    _Refused(r"rope_interleaved", "the rows of query and key are in another order than transformers expects"),
    _Refused(r"pruned_heads|per_layer_config", "all layers must have the same shape"),
)
# Names that trainers save instead of the class of the model within.
_WRAPPERS = ("RewardModel", "CriticModel", "LLMForSequenceRegression")
_WRAPPERS += ("PeftModelForCausalLM", "PeftModelForSequenceClassification")
# Options that transformers writes into every config; they are kept without a word.
_USUAL = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "model_type"}
_USUAL |= {"id2label", "label2id", "problem_type", "is_encoder_decoder", "is_decoder", "tokenizer_class"}
_USUAL |= {"output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward"}
# Options that do not travel: an export has its own, or they point to code and files that it does not have.
# `value_head_prefix`: an export names the head `score`.
_NOT_EXPORTED = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map"}
_NOT_EXPORTED |= {"custom_pipelines", "quantization_config", "value_head_prefix"}
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
_LABELS = ("id2label", "label2id", "num_labels", "_num_labels", "problem_type")


def config_from_dict(values: Mapping[str, object], where: str = CONFIG, *, strict: bool = False) -> DecoderConfig:
    """Reads our configuration from the options of an HF config.

    Args:
        values: Options by name, with `model_type`.
        where: Name of their source in messages.
        strict: Refuses options that the family does not know. For options that a user typed.

    Raises:
        InputError: An option is missing, wrong or not supported, or the config is of another model.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: must hold options by name, found {type(values).__name__}")
    model_type: Any = values.get("model_type")
    if model_type is None:
        raise InputError(f"{where}: option 'model_type' is missing; is this a Hugging Face model config?")
    family = get_family(model_type, where)
    hf = HFConfig(values, where, family.aliases)
    _check_architectures(hf, family)
    _check_dtype(hf)
    try:
        config = family.config_from_hf(hf)
    except InputError as error:  # DecoderConfig's own checks do not know the file
        raise (error if where in str(error) else InputError(f"{where}: {error}")) from error.__cause__
    unread = hf.unread()
    for name, value in unread.items():
        _refuse_if_it_changes_results(hf, name, value)
    unknown = sorted(unread.keys() - _USUAL)
    if (unknown or hf.ignored) and strict:
        listed = ", ".join([*(f"{name}={values[name]!r}" for name in unknown), *hf.ignored])
        raise InputError(f"{where}: options this family does not know: {listed}; correct or remove them")
    unknown += hf.ignored
    if unknown:
        _log_once(f"{where}: options without effect: {', '.join(unknown)}")
    source = {name: value for name, value in hf.items().items() if name not in _NOT_EXPORTED}
    return config.replace(source=json.dumps(source))


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def _refuse_if_it_changes_results(hf: HFConfig, name: str, value: object) -> None:
    if not value:  # null, false, 0 and empty ask for nothing
        return
    for refused in _REFUSED:
        if re.fullmatch(refused.names, name):
            text = repr(value)
            raise InputError(
                f"{hf.where}: option {name}={text if len(text) < 60 else text[:57] + '…'} is not supported: "
                f"{refused.why}"
            )


def _check_architectures(hf: HFConfig, family: Family) -> None:
    """Raises InputError if the weights belong to a class that computes something else than the family's models."""
    named = hf.take("architectures") or []
    named = named if isinstance(named, list) else [named]
    ours = (family.lm_class, family.architecture("scalar"), f"{family.classes}Model")
    allowed = {name.lower() for name in (*ours, *_WRAPPERS)}
    others = [name for name in named if not isinstance(name, str) or name.lower() not in allowed]
    if others:
        why = f"the weights belong to another class; {family.name} models are {ours[0]} or {ours[1]}"
        raise hf.refuse("architectures", named, why)


def _check_dtype(hf: HFConfig) -> None:
    """Raises InputError for a dtype that is none: transformers reads it, also where it loads only the tokenizer."""
    for name in ("dtype", "torch_dtype"):
        value = hf.take(name)
        if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES):
            raise hf.refuse(name, value, f"it must be one of {', '.join(_DTYPES)}")


def read_config(name_or_path: str | os.PathLike) -> DecoderConfig:
    """Reads the configuration of a model folder (or hub name); for an adapter folder that of its base model."""
    if is_gguf(name_or_path):
        return config_from_dict(gguf_options(Path(name_or_path)), str(name_or_path))
    path = base_folder(find_model_folder(name_or_path)) / CONFIG
    # The loader applies these (models/hf/score_heads.py).
    values = {name: value for name, value in read_json(path).items() if name not in OPENRLHF_OPTIONS}
    return with_generation_config(config_from_dict(values, str(path)), path.parent)


def config_to_dict(config: DecoderConfig, head: str = "lm", dtype: str | None = None) -> dict[str, object]:
    """Returns the options of the HF config that `transformers`, 4 and 5, loads as the same model with this head.

    Options of the source stay as they were, also those that have no effect here, unless their value has changed since.

    Args:
        config: Our configuration.
        head: "lm" or "scalar".
        dtype: Of the weights; written under its names in both versions.
    """
    family = get_family(config.family, "config")
    values = _with_source(config, family) | {"architectures": [family.architecture(head)]}
    if dtype is not None:
        values |= {"dtype": dtype, "torch_dtype": dtype}
    if head == "scalar":
        values = {name: value for name, value in values.items() if name not in _LABELS}
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return dict(sorted(values.items()))


def _with_source(config: DecoderConfig, family: Family) -> dict[str, object]:
    """The options of a configuration, as the source has them where they have not changed.

    Rope options are always ours, because they hold the spellings of several versions.
    """
    written = family.config_to_hf(config)
    if not config.source:
        return written
    source = json.loads(config.source)
    before = family.config_to_hf(family.config_from_hf(HFConfig(source, "config")))
    kept = {name: value for name, value in source.items() if name not in ROPE_OPTIONS | family.rewritten}
    return written | {name: value for name, value in kept.items() if before.get(name) == written.get(name)}
