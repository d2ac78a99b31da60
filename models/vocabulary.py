"""Checks that tokenizers and models agree on the number of tokens."""

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig

PADDING = 1024
"""Rows by which the embeddings of models with one tokenizer may differ: published models pad their tables."""


def check_tokenizer_fits(
    tokenizer_size: int, config: DecoderConfig, what: str, remedy: str = "", model: str = "the model"
) -> None:
    """Raises InputError when a tokenizer has more tokens than a model has embedding rows.

    A model may have more rows than its tokenizer has tokens: published models pad their tables.

    Args:
        tokenizer_size: One more than the tokenizer's highest id.
        config: The model's configuration.
        what: Name of the tokenizer in the message, such as "the tokenizer of facebook/opt-125m".
        remedy: Alternative to the model's own tokenizer, such as "add rows with --resize_vocabulary".
        model: Name of the model in the message.
    """
    if tokenizer_size > config.vocab_size:
        raise InputError(
            f"{what} has {tokenizer_size} tokens, {model} only {config.vocab_size} (vocab_size): use the model's own "
            f"tokenizer{', or ' if remedy else ''}{remedy}"
        )


def check_same_rows(first: DecoderConfig, second: DecoderConfig, names: tuple[str, str]) -> None:
    """Raises InputError when the sizes of two vocabularies show that the models cannot have one tokenizer.

    For models whose tokenizers are not at hand. Models of one family may differ by the padding of their embeddings.

    Args:
        first: Configuration of one model, such as the actor.
        second: Configuration of the other, such as the reward model.
        names: Names of the two in the message, such as `("actor=opt-1.3b", "reward=gpt2")`.
    """
    allowed = PADDING if first.family == second.family else 0
    if abs(first.vocab_size - second.vocab_size) > allowed:
        raise InputError(
            f"{names[0]} has a vocabulary of {first.vocab_size} tokens and {names[1]} one of {second.vocab_size} "
            "(vocab_size): both must read the same tokens, so choose models with the same tokenizer"
        )
