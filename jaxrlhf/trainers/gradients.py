"""Gradients inside a jitted step: accumulated over micro-batches, then applied. Scoring uses the same micro-batches."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxrlhf.models import Decoder, RouterSums, logical_axes, param_shardings, split_trainable, working_copy
from jaxrlhf.sharding import (
    REPLICATED_RULES,
    TRAIN_RULES,
    back_like,
    constrain,
    constrain_tree,
    on_device,
    optimizer_shardings,
    platform,
    split,
    tree_shardings,
)
from jaxrlhf.trainers.narrowing import mask_to_cut_by, narrowed, order_by_length, worth_cutting
from jaxrlhf.trainers.routers import Recorder, RouterOptions, router_loss, router_metrics

PyTree = Any


CPU_TOKENS = 1024
"""Most tokens of a micro-batch on a CPU, unless a single row is longer."""


def micro_batches(batch: PyTree, parts: int) -> int:
    """Chunks that a batch of arrays `[B, T]` is worked through in: `parts`, or on a CPU a multiple of it.

    On a CPU a micro-batch above `CPU_TOKENS` tokens per device is split further, because its activations fill the
    memory. The number follows from shapes alone, so a resumed run has the same.
    """
    shapes = [x.shape for x in jax.tree.leaves(batch) if x.ndim == 2]
    if platform() != "cpu" or not shapes:
        return parts
    rows, length = max(shapes, key=lambda shape: shape[1])
    rows //= parts * split("batch", rows)
    fitting = (more for more in range(1, rows) if rows % more == 0 and rows // more * length <= CPU_TOKENS)
    return parts * next(fitting, max(rows, 1))


def take_rows(batch: PyTree, index: jax.Array) -> PyTree:
    """Takes the rows with these numbers of all arrays `[B, …]`, split over the batch axes."""
    return jax.tree.map(lambda x: constrain(jnp.take(x, index, axis=0), "batch", *[None] * (x.ndim - 1)), batch)


def split_rows(batch: PyTree, parts: int) -> PyTree:
    """`[B, …]` → `[parts, B / parts, …]`, part j taking rows j, j + parts, …

    Striding keeps every part spread over all devices that hold the batch, without moving rows between them.
    """

    def chunks(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(f"{parts} parts do not divide a batch of {x.shape[0]} rows")
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *([None] * (x.ndim - 2)))

    return jax.tree.map(chunks, batch)


def join_rows(batch: PyTree) -> PyTree:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), batch)


def map_rows(function: Callable[[PyTree], PyTree], batch: PyTree, parts: int, mask: jax.Array | None = None) -> PyTree:
    """`function` over `micro_batches` chunks of rows, one after the other; results in the original row order.

    Args:
        function: Takes rows of the batch, and returns arrays `[rows, …]`.
        batch: Arrays `[B, …]`.
        parts: Chunks, at least.
        mask: bool `[B, T]` of right-padded rows. With it, chunks that a CPU makes are cut to their longest row
            (trainers/narrowing.py): what `function` returns for a real column must not depend on later columns, and
            arrays `[rows, T, …]` of the result are 0 in the columns that were cut off.
    """
    asked, parts = parts, micro_batches(batch, parts)
    if parts == 1:
        return function(batch)
    mask = mask_to_cut_by(mask, asked, parts)
    if mask is None:
        return join_rows(jax.lax.map(function, split_rows(batch, parts)))

    def cut(rows: tuple[PyTree, jax.Array]) -> PyTree:
        return narrowed(function, *rows, widen=True)

    order = order_by_length(mask, parts)
    result = join_rows(jax.lax.map(cut, split_rows(take_rows((batch, mask), order), parts)))
    return take_rows(result, jnp.argsort(order))


def sum_parts(
    function: Callable[[PyTree, jax.Array | None], PyTree],
    batch: PyTree,
    parts: int,
    key: jax.Array | None,
    mask: jax.Array | None = None,
) -> PyTree:
    """The sum of `function(rows, key)` over `parts` micro-batches, each with a key of its own.

    With the bool mask `[B, T]` of right-padded rows, micro-batches are cut to their longest row
    (trainers/narrowing.py).
    """
    if parts == 1:
        return function(batch, key)
    function = jax.jit(function, inline=True)  # traced once for the shapes of the sum and for whole rows

    def add(total: PyTree, part: tuple[PyTree, jax.Array | None, jax.Array | None]) -> tuple[PyTree, None]:
        rows, key, mask = part
        added = function(rows, key) if mask is None else narrowed(lambda rows: function(rows, key), rows, mask)
        return jax.tree.map(jnp.add, total, added), None

    if mask is not None:
        batch, mask = split_rows(take_rows((batch, mask), order_by_length(mask, parts)), parts)
    else:
        batch = split_rows(batch, parts)
    keys = None if key is None else jax.random.split(key, parts)
    shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], (batch, keys)))
    total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), (batch, keys, mask))
    return total


def accumulate_gradients(
    loss: Callable[..., tuple[jax.Array, PyTree]],
    params: PyTree,
    batch: PyTree,
    parts: int,
    key: jax.Array | None = None,
    pin: Callable[[PyTree], PyTree] = lambda grads: grads,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, PyTree, PyTree]:
    """(loss, stats, gradients) of `loss(params, rows, key)` summed over `parts` micro-batches.

    The loss and its stats must be sums over global denominators, so that their sum is the value of the whole batch.
    `pin` is applied to the gradients of each micro-batch before they are added. `mask` is that of `sum_parts`.
    """

    def gradient(rows: PyTree, key: jax.Array | None) -> tuple[jax.Array, PyTree, PyTree]:
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, rows, key)
        return value, stats, pin(grads)

    return sum_parts(gradient, batch, parts, key, mask)


class Gradients(NamedTuple):
    """The result of `model_gradients`."""

    loss: jax.Array
    """Without the losses of routers, which its gradients have."""
    stats: PyTree
    grads: PyTree
    routers: dict[str, jax.Array]
    """`router_metrics`; empty for a model without experts."""


def model_gradients(
    loss: Callable[..., tuple[jax.Array, PyTree]],
    module: Decoder,
    trainable: PyTree,
    batch: PyTree,
    parts: int,
    mesh: Mesh | None,
    key: jax.Array | None = None,
    routers: RouterOptions = RouterOptions(),  # noqa: B008 - frozen
    mask: jax.Array | None = None,
) -> Gradients:
    """`accumulate_gradients` for a model's trainable leaves (`split_trainable`) as its ZeRO stage has it.

    The passes read a working copy (stages 1 and 2). Gradients are float32; they lie whole on every device below stage
    2 (all-reduced), else like the parameters (reduce-scattered).

    Args:
        loss: `loss(module, params, rows, key)` returns a scalar and stats, sums over global denominators. It must use
            the module that it gets: that one records the routers.
        module: The model.
        trainable: Its leaves that are trained.
        batch: Arrays `[B, …]`.
        parts: Micro-batches, at least (`micro_batches`).
        mesh: The training mesh.
        key: Of dropout.
        routers: Weights of the losses of routers.
        mask: bool `[B, T]` of right-padded rows, for the micro-batches that a CPU makes (`map_rows`).
    """
    axes = split_trainable(logical_axes(module), module)[0]
    rules = REPLICATED_RULES if module.zero_stage < 2 else TRAIN_RULES

    def pin(grads: PyTree) -> PyTree:
        grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        return grads if mesh is None else constrain_tree(grads, tree_shardings(axes, grads, mesh, rules))

    params = working_copy(trainable, axes, module, mesh, trained=True)
    if not module.config.num_experts:  # losses of routers would need a pass of their own
        asked, parts = parts, micro_batches(batch, parts)
        mask = mask_to_cut_by(worth_cutting(mask, module.config), asked, parts)
        return Gradients(*accumulate_gradients(partial(loss, module), params, batch, parts, key, pin, mask), {})
    coefficients = routers.coefficients(module.config)

    def recorded(params: PyTree, rows: PyTree, key: jax.Array | None) -> tuple[jax.Array, PyTree, RouterSums]:
        recorder = Recorder(module)
        return *loss(recorder, params, rows, key), recorder.sums

    def counted(rows: PyTree, key: jax.Array | None) -> RouterSums:
        return jax.lax.stop_gradient(recorded(params, rows, key)[2])

    whole = sum_parts(counted, batch, parts, key) if parts > 1 and any(coefficients) else None

    def total(params: PyTree, rows: PyTree, key: jax.Array | None) -> tuple[jax.Array, tuple]:
        value, stats, sums = recorded(params, rows, key)
        return value + router_loss(sums, sums if whole is None else whole, coefficients), (value, stats, sums)

    _, (value, stats, sums), grads = accumulate_gradients(total, params, batch, parts, key, pin)
    return Gradients(value, stats, grads, router_metrics(sums))


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


def exceeds(metrics: Mapping[str, jax.Array], limits: Mapping[str, ArrayLike] | None) -> jax.Array:
    """True if one of the metrics is above its limit. Limits are arguments of a program: others compile nothing."""
    known = {} if limits is None else limits
    over = [metrics[name] > limit for name, limit in known.items() if name in metrics]
    return jnp.any(jnp.stack(over)) if over else jnp.zeros((), bool)


def _trainable_shardings(module: Decoder, mesh: Mesh) -> PyTree:
    return split_trainable(param_shardings(module, mesh), module)[0]
