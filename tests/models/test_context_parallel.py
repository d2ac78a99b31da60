"""Sequences split over the mesh axis `context`: the same values and gradients as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.models import param_shardings
from jaxrlhf.sharding import TRAIN_RULES, make_mesh, place, use

ROWS, COLUMNS = 4, 16


def batch(model, packed):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, model.config.vocab_size, (ROWS, COLUMNS)).astype(np.int32)
    mask = np.arange(COLUMNS)[None] < np.array([[COLUMNS], [11], [7], [13]])
    segments = np.where(np.arange(COLUMNS) < 5, 1, 2) * mask if packed else None
    return ids, mask, segments


def results(model, mesh, arrays, implementation, stage=3):
    """Log-probs or values of real columns, and gradients of their weighted sum."""
    ids, mask, segments = arrays
    module = model.module.clone(attention_implementation=implementation, zero_stage=stage)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=ids.shape)) * mask

    def loss(params):
        with use(mesh, TRAIN_RULES):
            if module.head == "scalar":
                values = module.apply({"params": params}, ids, mask, segments)
            else:
                start = jnp.full(len(ids), 3)
                window = {} if segments is not None else {"start": start, "count": 8}
                values, entropy = module.apply(
                    {"params": params}, ids, mask, 0.7, segment_ids=segments, method="logprobs", **window
                )
                values = values + entropy
            return jnp.sum(values * weights), values * mask

    params = model.params if mesh is None else place(model.params, param_shardings(module, mesh))
    (_, values), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return jax.device_get((values, grads))


CASES = {
    "codegen": ("lm", (1, 2, 2, 1, 2), False, "auto"),
    "llama": ("lm", (1, 2, 1, 1, 4), True, "auto"),
    "bloom-options": ("lm", (2, 1, 1, 1, 2), False, "xla"),
    "gemma2": ("lm", (1, 1, 1, 1, 4), False, "auto"),
    "qwen3_moe": ("lm", (1, 2, 1, 2, 2), False, "auto"),
    "mistral": ("scalar", (1, 1, 2, 1, 2), False, "auto"),
}


@pytest.mark.parametrize("family", CASES)
def test_split_sequences_have_the_same_values_and_gradients(make_model, family):
    head, (data, fsdp, tensor, expert, context), packed, implementation = CASES[family]
    model = make_model(family, head)
    devices = jax.devices()[: data * fsdp * tensor * expert * context]
    mesh = make_mesh(data, fsdp, tensor, expert, context, devices=devices)
    arrays = batch(model, packed)
    expected, got = (results(model, m, arrays, implementation) for m in (None, mesh))
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]))
    for a, b in zip(*map(jax.tree.leaves, (got[1], expected[1])), strict=True):
        assert np.abs(a - b).max() < 1e-5 * largest


def test_lengths_and_heads_must_be_divisible(make_model):
    model = make_model("gptj")
    mesh = make_mesh(fsdp=2, context=4)
    with (
        pytest.raises(InputError, match="mesh context=4 does not divide sequences of 18 tokens"),
        use(mesh, TRAIN_RULES),
    ):
        model.module.apply({"params": model.params}, np.ones((2, 18), np.int32))
    with pytest.raises(InputError, match="context=8 does not divide the model's num_heads=3"):
        param_shardings(model.module, make_mesh(fsdp=1, context=8))
