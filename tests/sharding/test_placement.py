"""Whole trees on eight devices: every parameter of every family split, optimizer states beside their parameters."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.errors import InputError
from jaxrlhf.models import Decoder, DecoderConfig, logical_axes, param_shapes, param_shardings
from jaxrlhf.sharding import (
    GENERATE_RULES,
    back_like,
    constrain_tree,
    make_mesh,
    offloaded,
    on_device,
    optimizer_shardings,
    place,
    replicated,
    tree_shardings,
)

SIZES = {"vocab_size": 100, "hidden_size": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 8, "head_dim": 8}
SIZES |= {"intermediate_size": 96, "max_positions": 16}
# What the families are made of, in the decoder's own terms.
KINDS = {
    "fused": {},
    "narrow-embeddings": {"embed_size": 32, "norm_placement": "post", "final_norm": False, "position_offset": 2},
    "rotary": {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "tie_embeddings": False, "qk_norm": True},
    "parallel": {"position": "rotary", "residual": "parallel_shared_norm", "tie_embeddings": False}
    | {"lm_head_bias": True},
    "alibi": {"position": "alibi", "embed_norm": True},
}
MESHES = [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 2, 2)]


def module_of(kind, head="lm", **changes):
    return Decoder(DecoderConfig(family="gpt2", **SIZES | KINDS[kind] | changes), head=head)


def local_size(shape, sharding):
    return int(np.prod(sharding.shard_shape(shape.shape)))


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_matrix_is_split_over_all_parameter_devices(kind, head, sizes):
    mesh = make_mesh(*sizes)
    module = module_of(kind, head)
    shapes, shardings = param_shapes(module), param_shardings(module, mesh)
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    ways = sizes[1] * sizes[2]
    for (path, shape), sharding in zip(paths, jax.tree.leaves(shardings), strict=True):
        name = jax.tree_util.keystr(path)
        vector = shape.ndim - ("layers" in name) <= 1
        if "embed_positions" in name:
            assert local_size(shape, sharding) == shape.size // sizes[1], name
        elif not vector:
            assert local_size(shape, sharding) == shape.size // ways, name
        elif "norm" in name or "score" in name or "out" in name or "down" in name:
            assert local_size(shape, sharding) == shape.size, name


def test_heads_that_do_not_divide_fall_back_to_embed_over_fsdp():
    module = module_of("rotary", num_heads=6, num_kv_heads=2)
    shardings = param_shardings(module, make_mesh(fsdp=8))
    assert shardings["layers"]["attn"]["query"]["kernel"].spec == P(None, "fsdp")
    assert shardings["layers"]["attn"]["key"]["kernel"].spec == P(None, "fsdp")
    assert shardings["layers"]["attn"]["out"]["kernel"].spec == P(None, None, None, "fsdp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_heads": 6, "num_kv_heads": 6}, "num_heads=6"), ({"intermediate_size": 90}, "intermediate_size=90")],
)
def test_a_tensor_axis_that_does_not_divide_is_refused(changes, message):
    with pytest.raises(InputError, match=rf"tensor=4 does not divide the model's {message}"):
        param_shardings(module_of("rotary", **changes), make_mesh(fsdp=2, tensor=4))


def test_the_flip_to_generation_moves_nothing_when_heads_divide():
    mesh, module = make_mesh(fsdp=4, tensor=2), module_of("rotary")
    train = param_shardings(module, mesh)
    generate = tree_shardings(logical_axes(module), param_shapes(module), mesh, GENERATE_RULES)
    for a, b in zip(jax.tree.leaves(train), jax.tree.leaves(generate), strict=True):
        assert a == b


def test_logical_axes_name_every_dimension():
    for kind in KINDS:
        module = module_of(kind)
        axes = jax.tree.leaves(logical_axes(module), is_leaf=lambda x: isinstance(x, tuple))
        for names, shape in zip(axes, jax.tree.leaves(param_shapes(module)), strict=True):
            assert len(names) == shape.ndim and all(isinstance(n, str) for n in names)


def test_optimizer_states_lie_like_their_parameters():
    mesh, module = make_mesh(fsdp=4, tensor=2), module_of("fused")
    shardings = param_shardings(module, mesh)
    params = jax.tree.map(lambda x, s: jax.device_put(np.ones(x.shape, x.dtype), s), param_shapes(module), shardings)
    decay = jax.tree.map(lambda x: x.ndim > 2, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(1e-3, 0.0, 10), mask=decay),
    )
    wanted = optimizer_shardings(optimizer, params, shardings, mesh)
    state = jax.jit(optimizer.init, out_shardings=wanted)(params)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    adam = wanted[1][0]
    assert adam.mu == shardings and adam.nu == shardings
    assert adam.count == replicated(mesh)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert x.sharding == sharding
    assert adam.mu["layers"]["mlp"]["up"]["kernel"].spec == P(None, None, ("tensor", "fsdp"))


@pytest.mark.parametrize(("stage", "split"), [(0, {"tensor"}), (1, {"tensor", "fsdp"}), (2, {"tensor", "fsdp"})])
def test_stage_zero_keeps_parameters_whole_over_fsdp_and_the_others_split_them(stage, split):
    mesh, module = make_mesh(fsdp=4, tensor=2), module_of("fused").clone(zero_stage=stage)
    spec = param_shardings(module, mesh)["layers"]["mlp"]["up"]["kernel"].spec
    assert {axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())} == split


def test_offload_moves_to_host_memory_and_programs_bring_it_back():
    sharding = NamedSharding(make_mesh(), P("fsdp"))
    x = jax.device_put(np.arange(16.0), offloaded({"x": sharding})["x"])
    assert x.sharding.memory_kind == "pinned_host"

    @jax.jit
    def double(tree):
        return back_like(jax.tree.map(lambda x: 2 * x, on_device(tree)), tree)

    result = double({"host": x, "device": jax.device_put(np.ones(8), sharding)})
    assert [x.sharding.memory_kind for x in result.values()] == ["device", "pinned_host"]
    np.testing.assert_array_equal(result["host"], np.arange(16.0) * 2)


def test_offload_is_refused_where_the_backend_has_no_host_memory():
    class Memory:
        kind = "device"

    class Device:
        platform, device_kind = "metal", "M9"

        def addressable_memories(self):
            return [Memory()]

    sharding = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([Device()])))
    with pytest.raises(InputError, match=r"offload: M9 devices of the metal backend have no pinned_host memory"):
        offloaded({"x": sharding})


def test_place_and_constrain_tree():
    mesh = make_mesh(fsdp=8)
    tree = {"a": np.arange(16.0).reshape(8, 2), "b": np.ones(3)}
    shardings = {"a": NamedSharding(mesh, P("fsdp")), "b": replicated(mesh)}
    placed = place(tree, shardings)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    pinned = jax.jit(lambda t: constrain_tree(jax.tree.map(lambda x: x * 2, t), shardings))(tree)
    assert jax.tree.map(lambda x: x.sharding, pinned) == shardings
    np.testing.assert_array_equal(pinned["a"], tree["a"] * 2)
