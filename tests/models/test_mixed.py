"""Decoders with sparse and dense layers: their stacks, options, routers, adapters, remat and meshes."""

import jax
import numpy as np
import pytest
from comparisons import routed_outputs

from jaxrlhf.errors import InputError
from jaxrlhf.models import LoRAConfig, add_lora, config_from_dict, config_to_dict, save_pretrained
from jaxrlhf.models.mixed import Segment, layer_params, segments
from jaxrlhf.models.moe import ROUTER_SUMS
from jaxrlhf.sharding import make_mesh

CASE = "qwen3_moe-mixed"


def config(make_model, layers, **options):
    plain = config_to_dict(make_model("qwen3_moe").config)
    return config_from_dict(plain | {"num_hidden_layers": layers} | options)


@pytest.mark.parametrize(
    ("layers", "options", "dense", "found"),
    [
        (4, {"decoder_sparse_step": 2}, (0, 2), [(0, (True, False), 2)]),
        (7, {"decoder_sparse_step": 3}, (0, 1, 3, 4, 6), [(0, (True, True, False), 2), (6, (True,), 1)]),
        (6, {"mlp_only_layers": [2, 0, 1]}, (0, 1, 2), [(0, (True,), 3), (3, (False,), 3)]),
        (5, {"mlp_only_layers": [0, 2]}, (0, 2), [(0, (True, False), 2), (4, (False,), 1)]),
        (4, {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (0, 1, 2), [(0, (True,), 3), (3, (False,), 1)]),
        (3, {"mlp_only_layers": [1]}, (1,), [(0, (False,), 1), (1, (True,), 1), (2, (False,), 1)]),
    ],
)
def test_options_say_which_layers_are_dense_and_come_back(make_model, layers, options, dense, found):
    c = config(make_model, layers, **options)
    assert c.dense_layers == dense and c.sparse_layers == layers - len(dense)
    assert segments(c) == [Segment(*segment) for segment in found]
    values = config_to_dict(c)
    assert {name: values[name] for name in options} == options
    written = config_to_dict(c.replace(source=""))  # without the words of the source
    assert config_from_dict(written) == c


def test_options_without_a_sparse_layer_or_beyond_the_layers_are_refused(make_model):
    for options, message in (
        ({"mlp_only_layers": [0, 1]}, r"mlp_only_layers=\[0, 1\] is not supported: no layer has experts"),
        ({"decoder_sparse_step": 3}, "decoder_sparse_step=3 is not supported: no layer has experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be a positive integer"),
        ({"mlp_only_layers": [2]}, r"mlp_only_layers=\[2\] is not supported: it must be a list of layers from 0 to 1"),
        ({"mlp_only_layers": ["0"]}, "it must be a list of layers"),
    ):
        with pytest.raises(InputError, match=message):
            config(make_model, 2, **options)


def test_every_layer_has_its_own_parameters_and_nothing_else_is_stored(make_model):
    model = make_model(CASE)
    layers = model.params["layers"]
    assert {name: jax.tree.leaves(x)[0].shape[0] for name, x in layers.items()} == {
        "attn": 5, "attn_norm": 5, "mlp_norm": 5, "mlp": 3, "dense_mlp": 2,
    }  # fmt: skip
    third = layer_params(layers, model.config, 3)["mlp"]
    np.testing.assert_array_equal(third["up"]["kernel"], layers["mlp"]["up"]["kernel"][1])
    up = layers["dense_mlp"]["up"]["kernel"]
    assert set(layer_params(layers, model.config, 2)["mlp"]) == {"up", "gate", "down"}
    np.testing.assert_array_equal(layer_params(layers, model.config, 2)["mlp"]["up"]["kernel"], up[1])


def test_routers_count_the_choices_of_their_own_layers(make_model, make_batch, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = make_model(CASE)
    save_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = make_batch("right", model.config.vocab_size)
    with torch.no_grad():
        given = {"input_ids": torch.tensor(np.asarray(ids)), "attention_mask": torch.tensor(np.asarray(mask))}
        logits = theirs(**given, output_router_logits=True).router_logits
    _, state = model.module.apply({"params": model.params}, ids, mask, mutable=[ROUTER_SUMS])
    counts = state[ROUTER_SUMS]["layers"]["mlp"]["sums"].counts
    assert len(logits) == len(counts) == 3
    real = np.asarray(mask).astype(bool)
    for layer, ours in zip(logits, counts, strict=True):
        chosen = layer.reshape(*real.shape, -1).topk(3).indices.numpy()[real]
        np.testing.assert_array_equal(ours, np.bincount(chosen.ravel(), minlength=6))


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 1, 1, 2)])
def test_meshes_and_remat_change_nothing(make_model, sizes):
    model = make_model(CASE, "lm")
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, model.config.vocab_size, (8, 6)), np.ones((8, 6), int)
    mask[0, 4:] = 0
    data, fsdp, tensor, expert = sizes
    mesh = make_mesh(data, fsdp, tensor, expert, devices=jax.devices()[: int(np.prod(sizes))])
    expected = routed_outputs(model, None, ids, mask)
    got = routed_outputs(model.replace(module=model.module.clone(remat="full")), mesh, ids, mask, "ragged")
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=2e-5)
    for a, b in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[2]))
    for a, b in zip(*map(jax.tree.leaves, (got[2], expected[2])), strict=True):
        assert np.abs(a - b).max() < 1e-5 * largest


def test_dense_layers_take_no_adapters_on_their_mlps(make_model):
    model = make_model(CASE)
    with pytest.raises(InputError, match="cannot have adapters"):
        add_lora(model, LoRAConfig(rank=2, targets=("dense_mlp/up",)))
