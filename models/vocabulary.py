"""Checks that tokenizers and models agree on the tokens, which a vocabulary's size shows."""

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig


def check_tokenizer_fits(tokenizer_size: int, config: DecoderConfig, what: str, remedy: str = "") -> None:
    """Raises InputError when a tokenizer has more tokens than a model has embedding rows.

    A model may have more rows than its tokenizer has tokens: published models pad their tables.

    Args:
        tokenizer_size: Tokens of the tokenizer, `len(tokenizer)`.
        config: The model's configuration.
        what: Name of the tokenizer in the message, such as "the tokenizer of facebook/opt-125m".
        remedy: Alternative to the model's own tokenizer, such as "add rows with --resize_vocabulary".
    """
    if tokenizer_size > config.vocab_size:
        raise InputError(
            f"{what} has {tokenizer_size} tokens, the model only {config.vocab_size} (vocab_size): use the model's own "
            f"tokenizer{', or ' if remedy else ''}{remedy}"
        )


def check_same_tokens(first: DecoderConfig, second: DecoderConfig, names: tuple[str, str]) -> None:
    """Raises InputError when two models that read the same tokens have vocabularies of different sizes.

    Args:
        first: Configuration of one model, such as the actor.
        second: Configuration of the other, such as the reward model.
        names: Names of the two in the message, such as `("actor=opt-1.3b", "reward=gpt2")`.
    """
    if first.vocab_size != second.vocab_size:
        raise InputError(
            f"{names[0]} has a vocabulary of {first.vocab_size} tokens and {names[1]} one of {second.vocab_size} "
            "(vocab_size): both must read the same tokens, so choose models with the same tokenizer"
        )
