"""Published shapes: their parameter counts, without allocating one of them."""

import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.models import KNOWN, Decoder, config_from_dict, config_to_dict, count_params, known_config, param_shapes


@pytest.mark.parametrize("name", KNOWN)
def test_parameter_counts_are_the_published_ones(name):
    config = known_config(name)
    assert config.family == KNOWN[name].model_type
    unpadded = config.replace(vocab_multiple=1)
    assert count_params(param_shapes(Decoder(unpadded))) == KNOWN[name].parameters
    assert config_from_dict(config_to_dict(config)) == config


def test_every_supported_family_has_a_known_shape():
    from jaxrlhf.models.families import FAMILIES

    assert {known.model_type for known in KNOWN.values()} == set(FAMILIES)


def test_names_are_found_as_on_the_hub():
    assert known_config("facebook/opt-1.3b") == known_config("OPT-1.3B") == known_config("opt-1.3b")
    assert known_config("meta-llama/Llama-2-7b-hf") == known_config("llama-2-7b")
    assert known_config("opt-350m").embedding_size == 512
    with pytest.raises(InputError, match=r"unknown model 'opt-2b'; known shapes are gpt2, gpt2-medium"):
        known_config("opt-2b")
