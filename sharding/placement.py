"""Placement of whole trees: parameters, optimizer states and batches on the mesh, and offload to the host."""

from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.errors import InputError
from jaxrlhf.sharding.rules import TRAIN_RULES, LogicalAxes, Rules, named_sharding

PyTree = Any


def _is_axes(x: PyTree) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def tree_shardings(axes: PyTree, shapes: PyTree, mesh: Mesh, rules: Rules = TRAIN_RULES) -> PyTree:
    """Returns the NamedShardings of a tree of arrays.

    Args:
        axes: A tuple of logical axes for each array.
        shapes: The arrays, or ShapeDtypeStructs.
        mesh: The mesh.
        rules: Map logical axes to mesh axes.
    """
    return jax.tree.map(lambda a, x: named_sharding(a, x.shape, mesh, rules), axes, shapes, is_leaf=_is_axes)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


HOST = "pinned_host"  # the memory kind of offloaded arrays


def offloaded(shardings: PyTree) -> PyTree:
    """Returns the same NamedShardings in host memory; jitted programs move such arrays with `on_device`.

    Raises:
        InputError: The backend has no such memory.
    """

    def move(sharding: NamedSharding) -> NamedSharding:
        device = cast(Mesh, sharding.mesh).devices.flat[0]
        kinds = sorted(memory.kind for memory in device.addressable_memories())
        if HOST not in kinds:
            raise InputError(
                f"offload: {device.device_kind} devices of the {device.platform} backend have no {HOST} memory, only "
                f"{', '.join(kinds)}; leave the offload flags out"
            )
        return sharding.with_memory_kind(HOST)

    return jax.tree.map(move, shardings)


def on_device(tree: PyTree) -> PyTree:
    """Copies arrays in host memory to the devices, inside a jitted program."""
    return jax.tree.map(
        lambda x: (
            jax.device_put(x, jax.memory.Space.Device) if jax.typeof(x).memory_space == jax.memory.Space.Host else x
        ),
        tree,
    )


def back_like(tree: PyTree, before: PyTree) -> PyTree:
    """Moves each leaf of `tree` to the memory of its counterpart in `before`, inside a jitted program."""
    return jax.tree.map(
        lambda x, b: (
            jax.device_put(x, jax.memory.Space.Host) if jax.typeof(b).memory_space == jax.memory.Space.Host else x
        ),
        tree,
        before,
    )


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: PyTree, shardings: PyTree, mesh: Mesh, *, offload: bool = False
) -> PyTree:
    """Returns the shardings of `optimizer.init(params)`: moments lie like their parameters, counters are replicated.

    Args:
        optimizer: The optimizer.
        params: Trainable parameters, or ShapeDtypeStructs.
        shardings: Of the parameters.
        mesh: The training mesh.
        offload: Puts the moments in host memory.
    """
    state = jax.eval_shape(optimizer.init, params)
    shardings = offloaded(shardings) if offload else shardings
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def batch_sharding(mesh: Mesh, shape: tuple[int, ...], rules: Rules = TRAIN_RULES) -> NamedSharding:
    """Returns the sharding of a batch `[B, …]`: rows are split over the batch axes."""
    axes: LogicalAxes = ("batch", *([None] * (len(shape) - 1))) if shape else ()
    return named_sharding(axes, shape, mesh, rules)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """`jax.device_put` of a tree by a tree of shardings."""
    return jax.tree.map(jax.device_put, tree, shardings)


def place_batch(batch: PyTree, mesh: Mesh, rules: Rules = TRAIN_RULES) -> PyTree:
    """Puts a tree of host arrays `[B, …]` on the mesh, with rows split over the batch axes.

    Every process passes the whole batch, but only its `held_rows` need to be filled in.
    """

    def put(x: np.ndarray) -> jax.Array:
        sharding = batch_sharding(mesh, x.shape, rules)
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def held_rows(mesh: Mesh, rows: int, rules: Rules = TRAIN_RULES) -> np.ndarray:
    """Returns bool `[rows]`: the rows of a batch that `place_batch` puts on this process's devices."""
    held = np.zeros(rows, bool)
    for index in batch_sharding(mesh, (rows,), rules).addressable_devices_indices_map((rows,)).values():
        held[index] = True
    return held


def constrain_tree(tree: PyTree, shardings: PyTree) -> PyTree:
    """Pins the shardings of a tree inside a jitted program."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def abstract(tree: PyTree) -> PyTree:
    """The tree with each device array replaced by its shape, dtype and sharding, for `lower` of a jitted function."""

    def shape_of(x: object) -> object:
        if not isinstance(x, jax.Array):
            return x
        sharding = x.sharding if x.committed else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=jax.typeof(x).weak_type)

    return jax.tree.map(shape_of, tree)
