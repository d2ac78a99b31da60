"""Options of the decoder block that today's families need: rotation by layer, scaled embeddings, refilled slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import few

from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models.layer_options import attends_alike, layer_options
from jaxrlhf.models.rotary import ropes, rotation

LONGROPE = (("long_factor", (3.0, 5.0)), ("original_max_position_embeddings", 6), ("rope_type", "longrope"))
LONGROPE += (("short_factor", (1.0, 1.5)),)


def test_layers_share_kinds_of_rotation(make_model):
    config = make_model("gemma3").config
    kinds, layers = ropes(config)
    assert [kind and kind.base for kind in kinds] == [20.0, 1000.0] and layers == (0, 1, 0)
    assert [options.rope for options in layer_options(config)] == [0, 1, 0]
    same = config.replace(rope_scaling=None, local_rotary_base=config.rotary_base)
    assert len(ropes(same)[0]) == 1 and layer_options(same)[0].rope is None
    smollm3 = make_model("smollm3").config
    assert ropes(smollm3)[0][1] is None
    assert attends_alike(smollm3) and not attends_alike(config)
    cos, sin = rotation(smollm3, jnp.arange(5)[None])
    assert cos.shape == (2, 1, 1, 5, 3)
    np.testing.assert_array_equal(cos[1], 1)
    np.testing.assert_array_equal(sin[1], 0)


def test_generation_decides_by_its_longest_sequence_which_factors_of_longrope_apply(make_model):
    config = make_model("phi3", rope_scaling=LONGROPE, rotary_dim=4).config
    positions = jnp.arange(6)[None]
    whole = rotation(config, positions)
    within, beyond = (rotation(config, positions, longest=longest) for longest in (6, 7))
    np.testing.assert_array_equal(whole, within)
    assert np.abs(np.asarray(whole[1]) - np.asarray(beyond[1])).max() > 0.1
    longer = rotation(config, jnp.arange(7)[None])
    np.testing.assert_array_equal(np.asarray(longer)[..., :6, :], beyond)
    # Rows of one batch, and segments of one row, each by their own length.
    both = rotation(config, jnp.stack([jnp.arange(7), jnp.arange(7) % 6]))
    np.testing.assert_array_equal(np.asarray(both)[:, 0], np.asarray(longer)[:, 0])
    np.testing.assert_array_equal(np.asarray(both)[:, 1, :, :6], np.asarray(whole)[:, 0])


@pytest.mark.parametrize("case", ["gemma", "granite"])
def test_embeddings_are_scaled_with_the_rounding_of_torch(case, reference_of):
    import torch

    reference = reference_of(case)
    ids, mask = reference.batch("right")
    model = reference.ours
    ours = model.module.clone(dtype=jnp.bfloat16).apply(
        {"params": model.params}, jnp.asarray(ids), jnp.asarray(mask), method="embed_tokens"
    )
    half = reference.model.bfloat16().model
    with torch.no_grad():
        theirs = half.embed_tokens(torch.tensor(ids))
        theirs = theirs * half.embedding_multiplier if case == "granite" else theirs
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.float().numpy())


REFILLED = ("gemma2", "gemma3", "smollm3", "olmo2", "phi3-options", "granite", "cohere2")


@pytest.mark.parametrize("case", few(REFILLED, ("gemma3", "smollm3")))
def test_refilled_slots_answer_as_a_fixed_batch_does(case, make_model, make_batch, lab):
    model = make_model(case)
    ids, mask = (x[:, :6] for x in make_batch("left", model.config.vocab_size))
    engine = HybridEngine(model, lab.mesh_of())
    sampling = SamplingConfig(max_new_tokens=5, temperature=0.0)
    fixed, refilled = (engine.generate(ids, mask, jax.random.key(0), sampling, slots=n) for n in (0, 2))
    np.testing.assert_array_equal(fixed.tokens, refilled.tokens)
    np.testing.assert_allclose(fixed.logprobs, refilled.logprobs, rtol=0, atol=1e-5)
    logprobs, _ = model.module.apply({"params": model.params}, fixed.tokens, fixed.mask, method="logprobs")
    response = np.asarray(fixed.response_mask).astype(bool)
    np.testing.assert_allclose(np.asarray(logprobs)[response], np.asarray(fixed.logprobs)[response], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_layers": (True,)}, "1 rotary_layers for 2 layers"),
        ({"attention_softcap": 0.0}, "attention_softcap=0.0 must be positive"),
        ({"logit_scale": -1.0}, "logit_scale=-1.0 must be positive"),
        ({"norm_placement": "both"}, "norm_placement='both' is not one of"),
    ],
)
def test_impossible_layers_are_refused(changes, message, make_model):
    with pytest.raises(InputError, match=message):
        make_model("llama").config.replace(**changes)
