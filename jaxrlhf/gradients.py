"""Gradients inside a jitted step: accumulated over chunks of rows (scoring shares the chunks), then applied."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrlhf.models import Decoder, param_shardings, split_trainable
from jaxrlhf.sharding import constrain, constrain_tree, optimizer_shardings

PyTree = Any


def split_rows(batch: PyTree, parts: int) -> PyTree:
    """`[B, …]` → `[parts, B / parts, …]`, part j taking rows j, j + parts, …

    Striding keeps every part spread over all devices that hold the batch, without moving rows between them.
    """

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(f"{parts} parts do not divide a batch of {x.shape[0]} rows")
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *([None] * (x.ndim - 2)))

    return jax.tree.map(split, batch)


def join_rows(batch: PyTree) -> PyTree:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)


def map_rows(function: Callable[[PyTree], PyTree], batch: PyTree, parts: int) -> PyTree:
    """`function` over `parts` chunks of rows, one after the other; results in the original row order."""
    if parts == 1:
        return function(batch)
    return join_rows(jax.lax.map(function, split_rows(batch, parts)))


def accumulate_gradients(
    loss: Callable[..., tuple[jax.Array, PyTree]],
    params: PyTree,
    batch: PyTree,
    parts: int,
    key: jax.Array | None = None,
) -> tuple[jax.Array, PyTree, PyTree]:
    """(loss, stats, gradients) of `loss(params, rows, key)` summed over `parts` micro-batches.

    The loss and its stats must be sums over global denominators, so that their sum is the value of the whole batch.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, stats), grads = gradient(params, batch, key)
        return value, stats, grads
    keys = None if key is None else jax.random.split(key, parts)

    def add(total: PyTree, rows: tuple[PyTree, Any]) -> tuple[PyTree, None]:
        (value, stats), grads = gradient(params, *rows)
        return jax.tree.map(jnp.add, total, (value, stats, grads)), None

    rows = (split_rows(batch, parts), keys)
    first = jax.tree.map(lambda x: x[0], rows)
    shapes = jax.eval_shape(lambda p, r: gradient(p, *r), params, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][0], shapes[0][1], shapes[1]))
    total, _ = jax.lax.scan(add, zeros, rows)
    return total


def init_optimizer(optimizer: optax.GradientTransformation, module: Decoder, trainable: PyTree, mesh: Mesh) -> PyTree:
    """`optimizer.init` of the trainable leaves (`split_trainable`), made in its place beside them."""
    shardings = optimizer_shardings(optimizer, trainable, _trainable_shardings(module, mesh), mesh)
    return jax.jit(optimizer.init, out_shardings=shardings)(trainable)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    module: Decoder,
    trainable: PyTree,
    opt_state: PyTree,
    grads: PyTree,
    mesh: Mesh | None,
) -> tuple[PyTree, PyTree]:
    """One optimizer step: the new trainable leaves, pinned to where they lie, and the new optimizer state."""
    updates, opt_state = optimizer.update(grads, opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    return trainable if mesh is None else constrain_tree(trainable, _trainable_shardings(module, mesh)), opt_state


def _trainable_shardings(module: Decoder, mesh: Mesh) -> PyTree:
    return split_trainable(param_shardings(module, mesh), module)[0]
