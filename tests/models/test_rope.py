"""Rotary positions: every scaling rule against transformers, both spellings of the options, and refusals by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.models import config_from_dict
from jaxrlhf.models.rotary import inverse_frequencies, ropes, rotate, rotation

BASE = {"model_type": "llama", "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1}
BASE |= {"num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e3, "original_max_position_embeddings": 40}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8}
LONGROPE |= {"short_factor": [1.0 + i / 20 for i in range(16)], "long_factor": [1.5 + i for i in range(16)]}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        LLAMA3 | {"rope_theta": 5e5},
        LLAMA3 | {"factor": 32.0, "rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
        YARN,
        YARN | {"beta_fast": 4, "beta_slow": 0.5, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.2},
        YARN | {"attention_factor": 0.8, "mscale": 1.0},
        LONGROPE | {"factor": 4.0},
        LONGROPE | {"attention_factor": 1.3},
    ],
)
@pytest.mark.parametrize("length", [5, 8, 9, 40])
def test_rotation_equals_transformers(parameters, length):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    options = {k: v for k, v in BASE.items() if k != "model_type"} | {"rope_parameters": dict(parameters)}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**options))
    cos, sin = theirs(torch.zeros(1), torch.arange(length)[None])
    ours = rotation(config_from_dict(BASE | {"rope_parameters": parameters}), jnp.arange(length)[None])
    for a, b in zip(ours, (cos, sin), strict=True):
        assert a.shape == (1, 1, length, 16)
        np.testing.assert_allclose(a[0, 0], b.numpy()[0, :, :16], rtol=0, atol=5e-6)


def test_dynamic_scaling_depends_on_each_rows_own_length():
    config = config_from_dict(BASE | {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}})
    short, long = np.arange(20) % 6, np.arange(20)
    both = rotation(config, jnp.asarray([short, long]))
    for row, positions in enumerate((short, long)):
        alone = rotation(config, jnp.asarray([positions]))
        np.testing.assert_array_equal(both[0][row], alone[0][0])
    plain = rotation(config.replace(rope_scaling=None), jnp.asarray([short, long]))
    np.testing.assert_allclose(both[0][0], plain[0][0], rtol=0, atol=1e-6)
    assert np.abs(both[0][1] - plain[0][1]).max() > 0.1


@pytest.mark.parametrize(
    ("older", "today"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, LLAMA3 | {"rope_theta": 5e5}),
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_both_spellings_mean_the_same(older, today):
    assert config_from_dict(BASE | older) == config_from_dict(BASE | {"rope_parameters": today})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "mrope", "factor": 2.0}, r"rope_type 'mrope' is not supported \(one of \['default'"),
        (
            {"rope_type": "longrope"},
            r"'longrope' takes \[.*\] and optionally \[.*has \['original_max_position_embeddings'",
        ),
        ({"rope_type": "linear"}, r"'linear' takes \['factor'\], but the config has \[\]"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_what_is_not_supported_is_named(parameters, message):
    with pytest.raises(InputError, match=message):
        config_from_dict(BASE | {"rope_parameters": parameters})


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_a_rotation_of_the_leading_pairs(interleaved):
    config = config_from_dict(BASE).replace(rotary_dim=6, rotary_interleaved=interleaved)
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 32)).astype(np.float32)
    cos, sin = rotation(config, jnp.asarray([[0, 1, 7]]))
    y = np.asarray(rotate(jnp.asarray(x), cos, sin, interleaved=interleaved))
    np.testing.assert_array_equal(y[..., 6:], x[..., 6:])
    np.testing.assert_allclose(y[:, :, 0], x[:, :, 0], atol=1e-6)
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    for (i, j), frequency in zip(pairs, inverse_frequencies(ropes(config)[0][0]), strict=True):
        for column, position in enumerate((0, 1, 7)):
            turned = (x[..., column, i] + 1j * x[..., column, j]) * np.exp(1j * position * frequency)
            np.testing.assert_allclose(y[..., column, i] + 1j * y[..., column, j], turned, atol=1e-5)
