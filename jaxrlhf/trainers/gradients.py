"""Gradients inside a jitted step: accumulated over micro-batches, then applied. Scoring uses the same micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrlhf.models import Decoder, logical_axes, param_shardings, split_trainable, working_copy
from jaxrlhf.sharding import (
    REPLICATED_RULES,
    TRAIN_RULES,
    back_like,
    constrain,
    constrain_tree,
    on_device,
    optimizer_shardings,
    tree_shardings,
)

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
    pin: Callable[[PyTree], PyTree] = lambda grads: grads,
) -> tuple[jax.Array, PyTree, PyTree]:
    """(loss, stats, gradients) of `loss(params, rows, key)` summed over `parts` micro-batches.

    The loss and its stats must be sums over global denominators, so that their sum is the value of the whole batch.
    `pin` is applied to the gradients of each micro-batch before they are added.
    """

    def gradient(params: PyTree, rows: PyTree, key: jax.Array | None) -> tuple[tuple[jax.Array, PyTree], PyTree]:
        result, grads = jax.value_and_grad(loss, has_aux=True)(params, rows, key)
        return result, pin(grads)

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


def model_gradients(
    loss: Callable[..., tuple[jax.Array, PyTree]],
    module: Decoder,
    trainable: PyTree,
    batch: PyTree,
    parts: int,
    mesh: Mesh | None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, PyTree, PyTree]:
    """`accumulate_gradients` for a model's trainable leaves (`split_trainable`) as its ZeRO stage has it.

    The passes read a working copy (stages 1 and 2). Gradients are float32; they lie whole on every device below stage
    2 (all-reduced), else like the parameters (reduce-scattered).
    """
    axes = split_trainable(logical_axes(module), module)[0]
    rules = REPLICATED_RULES if module.zero_stage < 2 else TRAIN_RULES

    def pin(grads: PyTree) -> PyTree:
        grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        return grads if mesh is None else constrain_tree(grads, tree_shardings(axes, grads, mesh, rules))

    return accumulate_gradients(loss, working_copy(trainable, axes, module, mesh, trained=True), batch, parts, key, pin)


def frozen_working_copy(frozen: PyTree, module: Decoder, mesh: Mesh | None) -> PyTree:
    """`working_copy` of the leaves that are not trained (`split_trainable`)."""
    return working_copy(frozen, split_trainable(logical_axes(module), module)[1], module, mesh)


def init_optimizer(
    optimizer: optax.GradientTransformation, module: Decoder, trainable: PyTree, mesh: Mesh, *, offload: bool = False
) -> PyTree:
    """`optimizer.init` of the trainable leaves (`split_trainable`), made in its place beside them.

    `offload` keeps the moments in host memory; `apply_gradients` brings them to the devices and back.
    """
    shardings = _trainable_shardings(module, mesh)
    shardings = optimizer_shardings(optimizer, trainable, shardings, mesh, offload=offload)
    return jax.jit(optimizer.init, out_shardings=shardings)(trainable)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    module: Decoder,
    trainable: PyTree,
    opt_state: PyTree,
    grads: PyTree,
    mesh: Mesh | None,
    made: jax.Array,
) -> tuple[PyTree, PyTree]:
    """One optimizer step: the new trainable leaves, pinned to where they lie, and the new optimizer state.

    Where the bool `made` is false everything stays as it was, whatever the gradients hold.
    """
    state = on_device(opt_state)
    updates, new_state = optimizer.update(grads, state, trainable)
    new = optax.apply_updates(trainable, updates), new_state
    trainable, new_state = jax.tree.map(lambda new, old: jnp.where(made, new, old), new, (trainable, state))
    if mesh is not None:
        trainable = constrain_tree(trainable, _trainable_shardings(module, mesh))
    return trainable, back_like(new_state, opt_state)


def _trainable_shardings(module: Decoder, mesh: Mesh) -> PyTree:
    return split_trainable(param_shardings(module, mesh), module)[0]
