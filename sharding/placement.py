"""Placement of whole trees: parameters by their logical axes, optimizer states by the parameters they belong to."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.sharding.rules import TRAIN_RULES, LogicalAxes, Rules, named_sharding

PyTree = Any


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def tree_shardings(axes: PyTree, shapes: PyTree, mesh: Mesh, rules: Rules = TRAIN_RULES) -> PyTree:
    """NamedShardings for a tree of arrays (or ShapeDtypeStructs) from the matching tree of logical-axes tuples."""
    return jax.tree.map(lambda a, x: named_sharding(a, x.shape, mesh, rules), axes, shapes, is_leaf=_is_axes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: PyTree, shardings: PyTree, mesh: Mesh
) -> PyTree:
    """Shardings of `optimizer.init(params)`: moments lie like their parameters, counters are replicated."""
    state = jax.eval_shape(optimizer.init, params)
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def batch_sharding(mesh: Mesh, shape: tuple[int, ...], rules: Rules = TRAIN_RULES) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    axes: LogicalAxes = ("batch", *([None] * (len(shape) - 1))) if shape else ()
    return named_sharding(axes, shape, mesh, rules)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """`jax.device_put` of a tree by a tree of shardings."""
    return jax.tree.map(jax.device_put, tree, shardings)


def place_batch(batch: PyTree, mesh: Mesh, rules: Rules = TRAIN_RULES) -> PyTree:
    """Put a tree of host arrays `[B, …]` on the mesh, rows split over the batch axes.

    Of several processes, each gives the whole batch but needs to have filled in only its `held_rows`.
    """

    def put(x: Any) -> jax.Array:
        sharding = batch_sharding(mesh, x.shape, rules)
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def held_rows(mesh: Mesh, rows: int, rules: Rules = TRAIN_RULES) -> np.ndarray:
    """bool `[rows]`: the rows of a batch that `place_batch` puts on this process's devices."""
    held = np.zeros(rows, bool)
    for index in batch_sharding(mesh, (rows,), rules).addressable_devices_indices_map((rows,)).values():
        held[index] = True
    return held


def constrain_tree(tree: PyTree, shardings: PyTree) -> PyTree:
    """Pin a tree's shardings inside a jitted program."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)
