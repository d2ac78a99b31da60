"""The sparse block: both implementations against a loop over tokens, meshes against one device, files, refusals."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import fused_experts, relative_error, routed_outputs, tensors_of
from jax.sharding import PartitionSpec as P
from lab import few
from safetensors.numpy import save_file

from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    LoRAConfig,
    add_lora,
    config_from_dict,
    config_to_dict,
    create_model,
    load_pretrained,
    merged,
    param_shardings,
    save_pretrained,
)
from jaxrlhf.models.moe import Experts, Routing, dense_experts, ragged_experts, route
from jaxrlhf.sharding import make_mesh

CASES = ("mixtral", "mixtral-options", "qwen3_moe", "qwen3_moe-options", "qwen3_moe-mixed")
SIZES = ((1, 1, 1, 2), (1, 2, 1, 2), (2, 1, 2, 2), (1, 2, 2, 2), (1, 1, 1, 1))
"""Mesh shapes: data, fsdp, tensor, expert."""


def random_experts(tokens=13, k=2, experts=5, width=6, inner=4, first=0):
    rng = np.random.default_rng(0)
    shapes = {"up": (experts, width, inner), "gate": (experts, width, inner), "down": (experts, inner, width)}
    kernels = Experts(**{name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()})
    chosen = np.stack([rng.permutation(experts + first)[:k] - first for _ in range(tokens)])
    routing = Routing(jnp.asarray(rng.random((tokens, k)), jnp.float32), jnp.asarray(chosen, jnp.int32))
    return jnp.asarray(rng.normal(size=(tokens, width)), jnp.float32), routing, kernels


def loop(x, routing, kernels):
    """Token by token and choice by choice, in float64."""
    x, kernels = np.float64(x), [np.float64(kernel) for kernel in kernels]
    up, gate, down = kernels
    out = np.zeros_like(x)
    for t, (weights, experts) in enumerate(zip(*map(np.asarray, routing), strict=True)):
        for weight, e in zip(weights, experts, strict=True):
            if 0 <= e < len(up):
                inner = x[t] @ gate[e]
                out[t] += weight * ((inner / (1 + np.exp(-inner)) * (x[t] @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("compute", [dense_experts, ragged_experts])
def test_experts_are_a_weighted_sum_over_each_tokens_choices(compute, first):
    """With `first` some choices are experts of other devices, which add nothing."""
    x, routing, kernels = random_experts(first=first)
    got = jax.jit(lambda *args: compute(*args, jax.nn.silu))(x, routing, kernels)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, loop(x, routing, kernels), rtol=1e-5, atol=1e-5)


def test_both_implementations_have_the_same_gradients():
    x, routing, kernels = random_experts(first=3)
    seed = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def gradients(compute):
        def total(x, weights, kernels):
            return (seed * compute(x, Routing(weights, routing.experts), kernels, jax.nn.silu)).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, routing.weights, kernels)

    for a, b in zip(*map(jax.tree.leaves, (gradients(dense_experts), gradients(ragged_experts))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_all_tokens_may_choose_one_expert():
    x, routing, kernels = random_experts(k=1)
    routing = routing._replace(experts=jnp.full_like(routing.experts, 2))
    for compute in (dense_experts, ragged_experts):
        got = jax.jit(lambda *args, compute=compute: compute(*args, jax.nn.silu))(x, routing, kernels)
        np.testing.assert_allclose(got, loop(x, routing, kernels), rtol=1e-5, atol=1e-5)


def test_weights_are_probabilities_and_normalised_on_demand():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.float32)
    probabilities = np.asarray(jax.nn.softmax(logits))
    plain, normal = route(logits, 2, False), route(logits, 2, True)
    np.testing.assert_array_equal(plain.experts, np.argsort(-probabilities, axis=1)[:, :2])
    np.testing.assert_allclose(plain.weights, np.sort(probabilities, axis=1)[:, :-3:-1], rtol=1e-6)
    np.testing.assert_allclose(normal.weights.sum(1), 1, rtol=1e-6)


@pytest.fixture(scope="module")
def on_one_device(make_model):
    """`on_one_device(rows)`: a model, ids and mask, and the model's outputs and gradients."""

    @functools.cache
    def run(rows):
        model = make_model("qwen3_moe", "lm")
        rng = np.random.default_rng(0)
        ids, mask = rng.integers(3, model.config.vocab_size, (rows, 6)), np.ones((rows, 6), int)
        mask[0, 4:] = 0
        return model, ids, mask, routed_outputs(model, None, ids, mask)

    return run


@pytest.mark.parametrize("implementation", ["dense", "ragged"])
@pytest.mark.parametrize("sizes", few(SIZES, SIZES[1:3]))
@pytest.mark.parametrize("rows", [8, 3])
def test_meshes_change_nothing(on_one_device, sizes, implementation, rows):
    """Rows that the batch axes do not divide are on every device, whose experts then sum up."""
    model, ids, mask, expected = on_one_device(rows)
    data, fsdp, tensor, expert = sizes
    mesh = make_mesh(data, fsdp, tensor, expert, devices=jax.devices()[: int(np.prod(sizes))])
    got = routed_outputs(model, mesh, ids, mask, implementation)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=2e-5)
    for a, b in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[2]))
    for a, b in zip(*map(jax.tree.leaves, (got[2], expected[2])), strict=True):
        assert np.abs(a - b).max() < 1e-5 * largest


def test_experts_lie_apart_and_the_mesh_must_divide_them(make_model):
    model = make_model("mixtral")
    mesh = make_mesh(fsdp=2, expert=4)
    shardings = param_shardings(model.module, mesh)
    assert shardings["layers"]["mlp"]["up"]["kernel"].spec == P(None, "expert", None, "fsdp")
    for stage in (0, 1, 2, 3):
        up = param_shardings(model.module.clone(zero_stage=stage), mesh)["layers"]["mlp"]["up"]["kernel"]
        assert up.spec[1] == "expert"
    with pytest.raises(InputError, match="mesh expert=8 does not divide the model's num_experts=4"):
        param_shardings(model.module, make_mesh(fsdp=1, expert=8))


@pytest.mark.parametrize("case_name", CASES)
def test_fused_files_load_as_the_same_model(make_model, case_name, tmp_path):
    model = make_model(case_name)
    save_pretrained(model, tmp_path)
    fused = fused_experts(tensors_of(tmp_path))
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in fused)
    save_file({name: np.ascontiguousarray(x) for name, x in fused.items()}, tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    for a, b in zip(*map(jax.tree.leaves, (loaded.params, load_and_save(model, tmp_path / "own"))), strict=True):
        np.testing.assert_array_equal(a, b)


def load_and_save(model, folder):
    save_pretrained(model, folder)
    return load_pretrained(folder).params


def test_fused_files_of_transformers_load(make_model, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    save_pretrained(make_model("mixtral"), tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any("gate_up_proj" in name for name in tensors_of(tmp_path / "fused"))
    pairs = (load_pretrained(tmp_path / name).params for name in ("ours", "fused"))
    for a, b in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_missing_experts_are_named(make_model, tmp_path):
    save_pretrained(make_model("mixtral"), tmp_path)
    tensors = tensors_of(tmp_path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"missing model.layers.1.block_sparse_moe.experts.2.w3.weight \(40, 24\)"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("sizes", [(1, 2, 1, 4), (2, 1, 2, 2)])
def test_files_load_onto_meshes_and_come_back(make_model, sizes, tmp_path):
    model = make_model("mixtral")
    save_pretrained(model, tmp_path / "one")
    data, fsdp, tensor, expert = sizes
    loaded = load_pretrained(tmp_path / "one", mesh=make_mesh(data, fsdp, tensor, expert))
    save_pretrained(loaded, tmp_path / "other")
    one, other = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other")
    assert one.keys() == other.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(other[name], x)


@pytest.mark.parametrize(
    ("case_name", "changes", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise=0.1 is not supported"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 must be from 1 to the number of experts, 4"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts=0 must be a positive integer"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "max_window_layers=1"),
    ],
)
def test_unsupported_options_are_refused_by_name(make_model, case_name, changes, message):
    with pytest.raises(InputError, match=message):
        config_from_dict(config_to_dict(make_model(case_name).config) | changes)


def test_the_published_spellings_of_the_number_of_experts(make_model):
    config = make_model("qwen3_moe").config
    values = json.loads(json.dumps(config_to_dict(config)))
    assert values["num_experts"] == 6
    values["num_local_experts"] = values.pop("num_experts")  # as transformers 5 writes it
    assert config_from_dict(values) == config


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe-mixed"])
def test_adapters_on_attention_train_and_merge_and_experts_are_refused(make_model, make_batch, name):
    model = make_model(name)
    adapted = add_lora(model, LoRAConfig(rank=2))
    assert set(adapted.params["layers"]["mlp"]["up"]) == {"kernel"}
    assert "lora_a" in adapted.params["layers"]["attn"]["query"]
    rng = np.random.default_rng(0)
    params = jax.tree.map_with_path(
        lambda path, x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if path[-1].key == "lora_b" else x,
        adapted.params,
    )
    ids, mask = make_batch("right", model.config.vocab_size)
    adapted = adapted.replace(params=params)
    logits = [jax.jit(m.module.apply)({"params": m.params}, ids, mask) for m in (adapted, merged(adapted), model)]
    assert relative_error(np.asarray(logits[1]), np.asarray(logits[0])) < 1e-5
    assert np.abs(logits[2] - logits[0]).max() > 1e-2
    for target in ("up_proj", "mlp/router", "experts"):
        with pytest.raises(InputError, match=f"LoRA target '{target}' names experts, routers or an MLP beside them"):
            add_lora(model, LoRAConfig(rank=2, targets=(target,)))


def test_fresh_models_have_experts_that_differ(make_model):
    model = create_model(make_model("mixtral").config)
    up = model.params["layers"]["mlp"]["up"]["kernel"]
    assert up.shape == (2, 4, 24, 40)
    assert not np.allclose(up[:, 0], up[:, 1]) and not np.allclose(up[0], up[1])
