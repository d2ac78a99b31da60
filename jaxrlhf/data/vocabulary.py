"""The ids of a tokenizer's tokens: their range, and whether two tokenizers give the same ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from jaxrlhf.data.tokenizer import Tokenizer

MAX_ID = 2**24
"""Ids are below this: a larger one would ask for an embedding of billions of parameters."""


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id: the rows that a model needs. More than the number of tokens where ids are left
    out."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def check_ids(tokenizer: Tokenizer, where: str) -> None:
    """Raises InputError for an id that no model has a row for, and for a tokenizer that turns one letter into many
    tokens."""
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if highest >= MAX_ID:
        raise InputError(f"{where}: the token {token[:80]!r} has the id {highest}, above {MAX_ID}; correct the file")
    count = len(tokenizer("a", verbose=False)["input_ids"])
    if count > 1000:
        raise InputError(f"{where}: the tokenizer makes {count} tokens of the letter a; correct its normalizer")


def check_same_tokens(tokenizer: Tokenizer, other: Tokenizer, names: tuple[str, str]) -> None:
    """Raises InputError unless another tokenizer gives every token of the first the same id.

    The other one may have more tokens, such as a pad token of its own, and both models may pad their embeddings as they
    like.

    Args:
        tokenizer: the one that makes the ids of a run.
        other: the one of a model that reads them.
        names: names of the two models in the message.
    """
    ids, others = tokenizer.get_vocab(), other.get_vocab()
    differing = [token for token, i in ids.items() if others.get(token) != i]
    if not differing:
        return
    token = min(differing, key=ids.__getitem__)
    theirs = f"has the id {others[token]}" if token in others else "does not exist"
    raise InputError(
        f"{names[0]} and {names[1]} have different tokenizers: {len(differing)} of {len(ids)} tokens differ. {token!r} "
        f"has the id {ids[token]} for {names[0]} and {theirs} for {names[1]}. Both must read the same tokens: choose "
        "models with the same tokenizer"
    )
