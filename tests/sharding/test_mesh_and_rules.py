"""The mesh, how logical axes become partition specs, and the pinning of activations."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.errors import InputError
from jaxrlhf.sharding import (
    AXES,
    GENERATE_RULES,
    REPLICATED_RULES,
    TRAIN_RULES,
    batch_sharding,
    check_divisible,
    constrain,
    default_tensor_parallel,
    generate_mesh,
    make_mesh,
    named_sharding,
    place_batch,
    resolve_spec,
    use,
)
from jaxrlhf.sharding.mesh import arrange_hosts


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({}, (1, 8, 1, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"fsdp": 4, "tensor": -1}, (1, 4, 1, 1, 2)),
        ({"fsdp": 2, "expert": -1}, (1, 2, 4, 1, 1)),
        ({"fsdp": 2, "context": -1}, (1, 2, 1, 4, 1)),
    ],
)
def test_minus_one_takes_all_remaining_devices(asked, sizes):
    mesh = make_mesh(**asked)
    assert mesh.axis_names == AXES and mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_of_some_devices():
    assert list(make_mesh(fsdp=2, devices=jax.devices()[2:4]).devices.flat) == jax.devices()[2:4]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fsdp": 3}, "needs 3 devices, but 8 are present"),
        ({"data": 3, "fsdp": -1}, "3 does not divide the 8 devices"),
        ({"fsdp": -1, "tensor": -1}, "at most one -1"),
        ({"fsdp": 0}, "must be positive"),
        ({"data": -2, "fsdp": 1}, "must be positive"),
        ({"data": 2, "fsdp": 2, "tensor": 4}, "needs 16 devices"),
    ],
)
def test_impossible_meshes_are_refused(asked, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**asked)


def test_tensor_axis_must_divide():
    mesh = make_mesh(fsdp=2, tensor=4)
    check_divisible(mesh, {"num_heads": 8}, "tensor")
    with pytest.raises(InputError, match="tensor=4 does not divide the model's num_heads=6"):
        check_divisible(mesh, {"num_heads": 6}, "tensor")


@pytest.mark.parametrize(
    ("sizes", "axes", "shape", "expected"),
    [
        # the dimension that decode splits takes tensor first, then fsdp
        ((1, 8, 1), ("embed", "heads", "head_dim"), (32, 8, 4), P(None, "fsdp")),
        ((1, 2, 4), ("embed", "heads", "head_dim"), (32, 8, 4), P(None, ("tensor", "fsdp"))),
        ((8, 1, 1), ("embed", "heads", "head_dim"), (32, 8, 4), P()),
        # heads divide by tensor only: fsdp falls back to embed
        ((1, 4, 2), ("embed", "heads", "head_dim"), (32, 6, 4), P("fsdp", "tensor")),
        ((1, 8, 1), ("embed", "heads", "head_dim"), (32, 6, 4), P("fsdp")),
        # nothing divides
        ((1, 8, 1), ("embed", "heads", "head_dim"), (33, 6, 4), P()),
        # few key/value heads: not split over tensor, embed takes fsdp
        ((1, 2, 4), ("embed", "kv_heads", "head_dim"), (32, 2, 4), P("fsdp")),
        ((1, 2, 2), ("vocab", "embed"), (104, 32), P(("tensor", "fsdp"))),
        ((1, 8, 1), ("layers", "embed", "mlp"), (2, 32, 48), P(None, None, "fsdp")),
        ((1, 8, 1), ("norm",), (32,), P()),
        ((2, 4, 1), ("batch", None, None), (16, 3, 5), P(("data", "fsdp"))),
        ((2, 4, 1), ("batch", None), (6, 3), P("data")),
        ((2, 4, 1), ("batch", None), (1, 3), P()),
    ],
)
def test_train_rules(sizes, axes, shape, expected):
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    assert resolve_spec(axes, shape, mesh, TRAIN_RULES) == expected


def test_generation_splits_the_dimension_that_storage_splits_and_never_embed():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    axes, shape = ("embed", "heads", "head_dim"), (32, 8, 4)
    stored = resolve_spec(axes, shape, mesh, TRAIN_RULES)
    whole, halves, gathered = (generate_mesh(mesh, 8, group) for group in (8, 4, 2))
    assert resolve_spec(axes, shape, whole, GENERATE_RULES) == stored == P(None, ("tensor", "fsdp"))
    assert resolve_spec(axes, shape, halves, GENERATE_RULES) == P(None, ("tensor", "fsdp"))
    assert resolve_spec(axes, shape, gathered, GENERATE_RULES) == P(None, "tensor")
    assert resolve_spec(("batch", "kv_heads"), (8, 8), whole, GENERATE_RULES) == P(None, ("tensor", "fsdp"))
    assert resolve_spec(("batch", "kv_heads"), (8, 8), halves, GENERATE_RULES) == P("replica", ("tensor", "fsdp"))
    assert resolve_spec(("batch", "kv_heads"), (8, 8), gathered, GENERATE_RULES) == P("replica", "tensor")
    assert resolve_spec(axes, shape, mesh, REPLICATED_RULES) == P(None, "tensor")
    assert list(halves.devices.flat) == list(mesh.devices.flat)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_the_flip_is_nothing_or_one_gather_of_each_device_s_share(group):
    """Storage blocks of a group are neighbours, so there is nothing to permute."""
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    view = generate_mesh(mesh, 8, group)
    spec = ("embed", "mlp")
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=named_sharding(spec, (4, 16), mesh, TRAIN_RULES))

    def flip(x):
        with use(view, GENERATE_RULES):
            return constrain(x, *spec)

    text = jax.jit(flip).lower(x).compile().as_text()
    found = [name for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if f" {name}(" in text]
    assert found == ([] if group == 8 else ["all-gather"])


def test_tensor_parallel_groups_that_do_not_fit_are_refused():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    for group in (1, 3, 6, 16):
        with pytest.raises(InputError, match=rf"generate_tensor_parallel={group} .*one of 2, 4, 8"):
            generate_mesh(mesh, 48, group)
    with pytest.raises(InputError, match="generate_tensor_parallel=8 does not divide the model's num_heads=12"):
        generate_mesh(mesh, 12, 8)


class Chip:
    """A device of some host, as far as arranging a mesh looks at it."""

    platform = "gpu"

    def __init__(self, number: int, per_host: int) -> None:
        self.id, self.process_index = number, number // per_host


@pytest.mark.parametrize(
    ("sizes", "per_host", "group"),
    [
        ((1, 16, 1, 1, 1), 4, 4),
        ((1, 8, 1, 1, 2), 4, 4),
        ((2, 8, 1, 1, 1), 4, 4),
        ((4, 2, 1, 1, 2), 4, 4),
        ((1, 16, 1, 1, 1), 8, 8),
        ((1, 8, 2, 1, 1), 4, 2),
        ((1, 4, 2, 1, 2), 4, 2),
        ((1, 8, 1, 2, 1), 4, 2),
    ],
)
def test_the_default_group_is_the_devices_of_one_host_and_storage_neighbours_are_not(sizes, per_host, group):
    devices = [Chip(number, per_host) for number in range(16)]
    mesh = SimpleNamespace(devices=arrange_hosts(np.array(devices), sizes), shape=dict(zip(AXES, sizes, strict=True)))
    assert {d.id for d in mesh.devices.flat} == set(range(16))
    assert default_tensor_parallel(mesh, num_heads=16) == group
    data, fsdp, expert, context, tensor = sizes
    part = group // tensor
    view = mesh.devices.reshape(data, part, fsdp // part, expert, context, tensor)
    for a, b in np.ndindex(data, fsdp // part):
        assert len({d.process_index for d in view[a, :, b].flat}) == 1
    assert default_tensor_parallel(mesh, num_heads=12) == min(group, 4)


@pytest.mark.parametrize(
    ("rules", "axes", "shape", "expected"),
    [
        (TRAIN_RULES, ("expert", "embed", "mlp"), (4, 32, 48), P("expert", None, "fsdp")),
        (TRAIN_RULES, ("expert", "embed", "mlp"), (4, 32, 49), P("expert", "fsdp")),
        (TRAIN_RULES, ("embed", "heads", "head_dim"), (32, 8, 4), P(None, ("fsdp", "expert"))),
        (TRAIN_RULES, ("batch", None), (8, 3), P(("fsdp", "expert"))),
        (REPLICATED_RULES, ("expert", "embed", "mlp"), (4, 32, 48), P("expert")),
        (REPLICATED_RULES, ("embed", "heads", "head_dim"), (32, 8, 4), P()),
    ],
)
def test_the_expert_axis_splits_experts_and_otherwise_as_fsdp_does(rules, axes, shape, expected):
    assert resolve_spec(axes, shape, make_mesh(fsdp=4, expert=2), rules) == expected


def test_generation_leaves_experts_in_place_and_gathers_the_rest_over_their_axis():
    mesh = make_mesh(fsdp=4, expert=2)
    view = generate_mesh(mesh, 8, 2)
    assert dict(view.shape) == {"data": 1, "fsdp": 2, "replica": 2, "expert": 2, "context": 1, "tensor": 1}
    assert list(view.devices.flat) == list(mesh.devices.flat)
    assert resolve_spec(("expert", "embed", "mlp"), (4, 32, 48), view, GENERATE_RULES) == P("expert", None, "fsdp")
    assert resolve_spec(("embed", "heads", "head_dim"), (32, 8, 4), view, GENERATE_RULES) == P(None, "fsdp")
    assert resolve_spec(("batch", None), (8, 3), view, GENERATE_RULES) == P(("replica", "expert"))


def test_the_context_axis_splits_columns_of_tokens_heads_in_attention_and_parameters():
    mesh = make_mesh(fsdp=2, context=2, tensor=2)
    view = generate_mesh(mesh, 8, 2)
    assert resolve_spec(("batch", "sequence", None), (4, 6, 32), mesh, TRAIN_RULES) == P("fsdp", "context")
    assert resolve_spec(("batch", "heads", None, None), (4, 8, 6, 4), mesh, TRAIN_RULES) == P(
        "fsdp", ("tensor", "context")
    )
    assert resolve_spec(("embed", "mlp"), (32, 48), mesh, TRAIN_RULES) == P(None, ("tensor", "fsdp", "context"))
    assert resolve_spec(("batch", "sequence", None), (4, 6, 32), view, GENERATE_RULES) == P(("replica", "context"))


def test_axes_must_fit_the_rank():
    with pytest.raises(ValueError, match="do not fit"):
        resolve_spec(("embed",), (3, 4), make_mesh(), TRAIN_RULES)


def test_constrain_is_a_no_op_outside_use_and_pins_inside():
    mesh = make_mesh(data=2, fsdp=4)
    x = jnp.ones((8, 3))
    assert constrain(x, "batch", None) is x
    with use(None, TRAIN_RULES):
        assert constrain(x, "batch", None) is x
    with use(mesh, TRAIN_RULES):
        assert constrain(x, "batch", None).sharding == NamedSharding(mesh, P(("data", "fsdp")))
        with use(None, TRAIN_RULES):
            assert constrain(x, "batch", None) is x
        assert constrain(x, "batch", None) is not x
    assert constrain(x, "batch", None) is x


def test_use_is_left_on_an_error():
    x = jnp.ones((8, 3))
    with pytest.raises(KeyError), use(make_mesh(), TRAIN_RULES):
        raise KeyError
    assert constrain(x, "batch", None) is x


def test_batches_are_split_by_rows():
    mesh = make_mesh(data=2, fsdp=4)
    batch = {"ids": np.arange(48).reshape(16, 3), "row_mask": np.ones(16), "scale": np.float32(2)}
    placed = place_batch(batch, mesh)
    assert placed["ids"].addressable_shards[0].data.shape == (2, 3)
    assert placed["row_mask"].addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(placed["ids"], batch["ids"])
    assert placed["scale"].sharding == batch_sharding(mesh, ())
