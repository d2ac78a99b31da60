"""What an exported reward model needs to score in transformers as it does here: a pad token of its own, and no offset.

`AutoModelForSequenceClassification` reads a score at the last token that is not the pad token. Where padding is an end
token, it reads a text that ends one token early. So an export pads with a token that no text ends with.
"""

import copy
import json
import re
from typing import Any

import numpy as np

from jaxrlhf.distributed import to_host
from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.model import Model, resize_vocabulary

PAD = "<|pad|>"
_SPARE = re.compile(r"(?i)[<\[|]+.*(pad|reserved|unused|extra_id).*[>\]|]+")


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


def for_transformers(model: Model, tokenizer: Any = None) -> tuple[Model, Any]:
    """A reward model and its tokenizer as transformers scores with them; another model stays as it is.

    The pad token is that of the tokenizer, unless it ends texts. Then it is a spare token of the tokenizer, or a new
    one in a free row of the embedding, or in one row more. A model whose scores were always read before its pad token
    (`DecoderConfig.score_skips`) keeps that one.

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
    pad = _pad_id(model.config, tokenizer)
    if tokenizer is not None and (pad is None or tokenizer.pad_token_id != pad):
        tokenizer = copy.deepcopy(tokenizer)
        if pad is None:
            tokenizer.add_special_tokens({"pad_token": PAD})
            pad = tokenizer.pad_token_id
        else:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    pad = model.config.vocab_size if pad is None else pad
    if pad >= model.config.vocab_size:
        model = resize_vocabulary(model, pad + 1)
    config = model.config.replace(pad_token_id=pad)
    if config.generation_config:
        values = json.loads(config.generation_config) | {"pad_token_id": pad}
        config = config.replace(generation_config=json.dumps(values))
    return model.replace(module=model.module.clone(config=config), config=config), tokenizer


def _pad_id(config: DecoderConfig, tokenizer: Any) -> int | None:
    """The id of a pad token that ends no text; None if there is no such token yet."""
    vocabulary = None if tokenizer is None else set(tokenizer.get_vocab().values())
    skipped = config.score_skips
    if skipped is not None and (vocabulary is None or skipped in vocabulary):
        return skipped
    own = config.eos_token_id
    ends = set(own) if isinstance(own, tuple) else {own}
    if tokenizer is None:
        pad = config.pad_token_id
        return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size and pad not in ends else None
    ends.add(tokenizer.eos_token_id)
    candidates = [tokenizer.pad_token_id]
    special = sorted(tokenizer.added_tokens_decoder.items())
    candidates += [i for i, token in special if token.special and _SPARE.fullmatch(token.content)]
    return next((i for i in candidates if i is not None and i not in ends and i < config.vocab_size), None)
