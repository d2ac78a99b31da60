"""Checks of vocabulary sizes: what fits passes, and a refusal names both sides and the remedy."""

import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.models import check_same_rows, check_tokenizer_fits, known_config

GPT2, OPT = known_config("gpt2"), known_config("opt-125m")


@pytest.mark.parametrize("size", [1, GPT2.vocab_size])
def test_a_tokenizer_with_no_more_tokens_than_the_model_fits(size):
    check_tokenizer_fits(size, GPT2, "the tokenizer")


def test_a_larger_tokenizer_is_refused_with_both_sizes_and_the_remedies():
    match = r"the tokenizer of gpt5 has 50258 .* 50257 .*model's own tokenizer, or add rows with --resize_vocabulary"
    with pytest.raises(InputError, match=match):
        check_tokenizer_fits(50258, GPT2, "the tokenizer of gpt5", remedy="add rows with --resize_vocabulary")
    with pytest.raises(InputError, match=r"own tokenizer$"):
        check_tokenizer_fits(50258, GPT2, "the tokenizer")


def test_models_of_one_vocabulary_pass_however_they_pad_their_embeddings():
    check_same_rows(GPT2, known_config("gpt2-medium"), ("actor", "critic"))
    check_same_rows(GPT2, GPT2.replace(vocab_size=50304), ("actor", "critic"))


def test_models_of_two_vocabularies_are_refused_with_names_and_sizes():
    with pytest.raises(InputError, match=r"actor=gpt2 has .* 50257 .*reward=opt one of 50272 .*same tokenizer"):
        check_same_rows(GPT2, OPT, ("actor=gpt2", "reward=opt"))
