"""The token ids that end a response: one set for training targets, rollouts, evaluation, chat and exports.

The set of a tokenizer holds its EOS, the special token that its chat template puts after an assistant turn, and the
EOS ids of the model's config.json and generation_config.json. Ids that the user gives replace all of them.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxrlhf.data.encoding import SpecialTokens
from jaxrlhf.data.renderer import MARK, PROBE, common_part, renderer_of_transformers
from jaxrlhf.data.vocabulary import vocabulary_size
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from jaxrlhf.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
_REMEDY = "correct the file, or name the ids with --eos_token_ids"


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a response. The template's closes a response that has none, else the first.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`, perhaps with the ids of `with_end_ids`.
    """
    given = getattr(tokenizer, "end_ids_given", ())
    if given:
        return given
    found: tuple[Any, ...] = (tokenizer.eos_token_id, turn_end(tokenizer), *getattr(tokenizer, "end_ids_of_model", ()))
    return tuple(dict.fromkeys(i for i in found if i is not None))


def without_end(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
    """The ids of a sampled response without the one that ended it; not every tokenizer skips it as a special token."""
    return ids[:-1] if len(ids) and int(ids[-1]) in end_ids(tokenizer) else ids


def knows_model(tokenizer: Tokenizer) -> bool:
    """True when the tokenizer is one of `with_end_ids`."""
    return hasattr(tokenizer, "end_ids_of_model")


def closing_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The end ids that cut a training target: those of special tokens, which the text of a message never has."""
    return frozenset(i for i in end_ids(tokenizer) if is_special(tokenizer, i))


def with_end_ids(
    tokenizer: Tokenizer, files: Mapping[str, object], given: Iterable[int | str] = (), *, other_tokenizer: bool = False
) -> Tokenizer:
    """Returns a copy of the tokenizer with the end ids of a model.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        files: the values of `eos_token_id` by file: those of `config.json` and `generation_config.json`.
        given: ids, or the texts of tokens, that replace all others.
        other_tokenizer: the model's files may mean another tokenizer: only ids of this one's special tokens count.

    Raises:
        InputError: an id is none of the vocabulary, or generation_config.json belongs to another model.
    """
    tokenizer, size = copy.copy(tokenizer), vocabulary_size(tokenizer)
    tokenizer.end_ids_given = tuple(dict.fromkeys(_id_of(tokenizer, item, size) for item in given))
    tokenizer.end_ids_of_model = ()
    if tokenizer.end_ids_given:
        return tokenizer
    for name, value in files.items():
        ids = _ids(name, value)
        if other_tokenizer:
            ids = [i for i in ids if 0 <= i < size and is_special(tokenizer, i)]
        _check_ids(tokenizer, name, ids, size)
        tokenizer.end_ids_of_model += tuple(ids)
    return tokenizer


def _ids(name: str, value: object) -> list[int]:
    """The ids in a file, checked for their type."""
    ids: list[Any] = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{name}: eos_token_id={value!r} must be an id or a list of ids; {_REMEDY}")
    return ids


def _check_ids(tokenizer: Tokenizer, name: str, ids: list[int], size: int) -> None:
    """Raises InputError for ids outside the vocabulary and for a generation config of another model."""
    outside = [i for i in ids if not 0 <= i < size]
    if outside:
        raise InputError(
            f"{name}: eos_token_id={outside[0]} is outside the tokenizer's vocabulary of {size} tokens, so the file "
            f"belongs to another model; {_REMEDY}"
        )
    strange = [i for i in ids if i not in end_ids(tokenizer) and not is_special(tokenizer, i)]
    if not strange:
        return
    token = tokenizer.convert_ids_to_tokens(strange[0])
    if GENERATION_CONFIG in name and len(strange) == len(ids):
        raise InputError(
            f"{name}: eos_token_id={ids} are plain tokens of this tokenizer ({strange[0]} is {token!r}) and in no "
            f"other file of the model, so the file belongs to another model; {_REMEDY}"
        )
    logger.warning("%s: eos_token_id=%d, which ends responses, is the plain token %r", name, strange[0], token)


def _id_of(tokenizer: Tokenizer, item: int | str, size: int) -> int:
    """The id that a user gives as a number or as the text of a token."""
    if isinstance(item, str) and not item.isdecimal():
        if item not in tokenizer.get_vocab():
            known = ", ".join(SpecialTokens(tokenizer).names.values())
            raise InputError(f"eos_token_ids: the tokenizer has no token {item!r}; its special tokens are {known}")
        found: Any = tokenizer.convert_tokens_to_ids(item)
        return found
    if not 0 <= int(item) < size:
        raise InputError(
            f"eos_token_ids: {item} is outside the tokenizer's vocabulary of {size} tokens (0 to {size - 1})"
        )
    return int(item)


def is_special(tokenizer: Tokenizer, i: int) -> bool:
    """True for a token that no plain text is encoded with: a special one, or one that looks like a mark."""
    added = tokenizer.added_tokens_decoder.get(i)
    if (added is not None and added.special) or i in tokenizer.all_special_ids:
        return True
    token: Any = tokenizer.convert_ids_to_tokens(i)
    return token is not None and MARK.fullmatch(token) is not None


class Turn(NamedTuple):
    """The text that a chat template puts around an assistant message."""

    before: str = ""
    """Between the prompt and the last message."""
    after: str = ""
    """After the last message."""
    between: str = ""
    """After an earlier message, up to the words of the user."""


@functools.lru_cache(maxsize=16)
def turn_of(template: str, names: tuple[tuple[str, str], ...]) -> Turn:
    """Finds the text around an assistant message with a probe.

    Args:
        template: the chat template.
        names: the special tokens that the template may name.
    """
    render = renderer_of_transformers()
    options: dict[str, Any] = {"chat_template": template, **dict(names)}
    question = {"role": "user", "content": "a"}
    messages = [question, {"role": "assistant", "content": PROBE}]
    try:
        (prompt,), _ = render([[question]], add_generation_prompt=True, **options)
        (whole,), _ = render([messages], **options)
    except Exception:  # a template that refuses even this leaves nothing to find
        return Turn()
    if PROBE not in whole:
        return Turn()
    before, _, after = whole.partition(PROBE)
    before = before.removeprefix(prompt) if before.startswith(prompt) else ""
    try:
        (longer,), _ = render([[*messages, {"role": "user", "content": PROBE}]], **options)
    except Exception:  # some templates refuse a turn after the assistant's
        return Turn(before, after)
    return Turn(before, after, longer.split(PROBE)[1] if longer.count(PROBE) == 2 else "")


def names_of(tokenizer: Tokenizer) -> tuple[tuple[str, str], ...]:
    """The special tokens by the names that chat templates use."""
    return tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The id of the special token that the chat template puts right after an assistant turn; None for none.

    White space may stand before it. A token that only the last turn has before it is no end but the header of the next
    turn: some templates write that header whether or not they are asked for it. One that also stands before the words
    is no end either. EOS is the end where both turns have it after other marks, as those of Cohere.
    """
    template = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    if not isinstance(template, str):
        return None
    turn = turn_of(template, names_of(tokenizer))
    eos: Any = tokenizer.eos_token
    eos_id: Any = tokenizer.eos_token_id  # transformers leaves open what its ids are
    if eos and eos in turn.after[: common_part(turn.after, turn.between)]:
        return eos_id
    last, earlier = (_first_special(tokenizer, text) for text in (turn.after, turn.between))
    if earlier is not None and earlier != last:
        return None
    token: Any = None if last is None else tokenizer.convert_ids_to_tokens(last)
    return None if token is not None and token in turn.before else last


def _first_special(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of the special token that a text begins with, after white space."""
    text = text.lstrip()
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    begun = {name: i for name, i in added.items() if name and text.startswith(name)}
    # Only these few are asked: `is_special` reads all added tokens, and this runs for every response that is decoded.
    special = [name for name, i in begun.items() if is_special(tokenizer, i)]
    if special:
        return begun[max(special, key=len)]
    mark = MARK.match(text)  # SentencePiece has symbols of its own that are no added tokens
    ids = tokenizer(mark[0], add_special_tokens=False, verbose=False)["input_ids"] if mark else []
    found = [i for i in ids if mark and tokenizer.convert_ids_to_tokens(i) == mark[0]]
    return found[0] if found else None
