"""Makes an exported reward model score in transformers as it does here: a pad token of its own, and no offset.

`AutoModelForSequenceClassification` reads a score at the last token that is not the pad token. Where padding is an end
token, it reads a text that ends one token early. So an export pads with a token that no text ends with.
"""

import copy
from typing import TYPE_CHECKING

import numpy as np

from jaxrlhf.distributed import to_host
from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.generation_config import id_tuple
from jaxrlhf.models.hf.tokenizer_export import with_pad_id, with_pad_token
from jaxrlhf.models.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score_offset(model: Model) -> float:
    """The constant part of a reward model's score; 0 for one without."""
    if model.module.head != "scalar" or not model.config.score_bias:
        return 0.0
    return float(np.asarray(to_host(model.params["score"]["bias"])).reshape(()))


def without_score_offset(model: Model) -> Model:
    """The model without the constant part of its score, which changes no comparison of two responses."""
    if not model.config.score_bias:
        return model
    config = model.config.replace(score_bias=False)
    params = dict(model.params)
    if model.module.head == "scalar":
        params["score"] = {"kernel": params["score"]["kernel"]}
    return model.replace(module=model.module.clone(config=config), params=params, config=config)


def for_transformers(
    model: Model, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> tuple[Model, "PreTrainedTokenizerBase | None"]:
    """A reward model and its tokenizer as transformers scores with them; another model stays as it is.

    The pad token is one that ends no response (`with_pad_token`); without a tokenizer it may be a new row. A model
    whose scores were always read before its pad token (`DecoderConfig.score_skips`) keeps that one.

    Raises:
        InputError: The score has a constant part, which transformers' classes cannot express.
    """
    if model.module.head != "scalar":
        return model, tokenizer
    offset = score_offset(model)
    if offset:
        raise InputError(
            f"this reward model adds {offset:g} to every score, which AutoModelForSequenceClassification cannot do; "
            "set normalize_reward to false in the source's config.json to export the raw scores, which rank alike"
        )
    model = without_score_offset(model)
    skipped = model.config.score_skips
    if tokenizer is None:
        return with_pad_id(model, _unused_id(model.config) if skipped is None else skipped), None
    if skipped is None or skipped not in tokenizer.get_vocab().values():
        return with_pad_token(model, tokenizer)
    if tokenizer.pad_token_id != skipped:
        tokenizer = copy.deepcopy(tokenizer)  # the run's stays as it is
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(skipped)
    return with_pad_id(model, skipped), tokenizer


def _unused_id(config: DecoderConfig) -> int:
    """The config's pad id if it ends no text, else that of a new row."""
    pad = config.pad_token_id
    if isinstance(pad, int) and 0 <= pad < config.vocab_size and pad not in id_tuple(config.eos_token_id):
        return pad
    return config.vocab_size
