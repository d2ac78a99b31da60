"""Bytes of the parameters' copies on one device: those that decoding reads, working copies, and gradients."""

import math
from typing import Any, cast

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from jaxrlhf.models import (
    Decoder,
    cast_matrices,
    logical_axes,
    param_shardings,
    reads_stored,
    split_trainable,
    trained_head,
)
from jaxrlhf.plan.roofline import flat_shapes, itemsize
from jaxrlhf.plan.system import System, array_bytes, local_shape
from jaxrlhf.sharding import GENERATE_RULES, REPLICATED_RULES, named_sharding, tree_shardings

PyTree = Any


def _flat_axes(module: Decoder) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """Logical axes of the parameters by path."""
    return cast(Any, flatten_dict(logical_axes(module)))


def generation_view_bytes(system: System, platform: str = "", experts: float = 1.0) -> int:
    """Bytes of the weights as decoding reads them: cast, one array per layer, split for tensor parallelism.

    `experts`: the share of the experts that is counted.
    """
    module = system.modules["actor"].clone(lora=None)
    axes, total = _flat_axes(module), 0
    for path, x in flat_shapes(module).items():
        stacked = int(path[0] == "layers")
        shape = x.shape[stacked:]
        sharding = named_sharding(axes[path][stacked:], shape, system.generate_mesh, GENERATE_RULES)
        size = itemsize(module) if len(shape) > 1 else x.dtype.itemsize
        share = experts if "expert" in axes[path] else 1.0
        total += int(share * array_bytes(sharding.shard_shape(shape), size, platform)) * (x.shape[0] if stacked else 1)
    return total


def half_way_bytes(system: System) -> int:
    """Bytes of the weights that move to generation in two steps: cast, and half-way there.

    These are the kernels that storage splits along another dimension than generation does.
    """
    module = system.modules["actor"].clone(lora=None)
    axes, total = _flat_axes(module), 0
    stored: dict[tuple[str, ...], NamedSharding] = cast(Any, flatten_dict(param_shardings(module, system.mesh)))
    for path, x in flat_shapes(module).items():
        share = stored[path].shard_shape(x.shape)
        read = named_sharding(axes[path], x.shape, system.generate_mesh, GENERATE_RULES).shard_shape(x.shape)
        nested = all(mine <= part for whole, part, mine in zip(x.shape, read, share, strict=True) if part < whole)
        total += 0 if nested or share == x.shape else 2 * math.prod(share) * itemsize(module)
    return total


def merged_adapter_bytes(system: System) -> int:
    """Bytes of the float32 kernel that the merge of adapters holds before generation: the largest one of a layer."""
    shapes = flat_shapes(system.modules["actor"])
    kernels = [shapes[(*path[:-1], "kernel")].shape for path in shapes if path[-1] == "lora_a"]
    return max((4 * math.prod(shape[1:]) for shape in kernels), default=0) // system.generate_tensor


def _sharded_bytes(shapes: PyTree, shardings: PyTree) -> int:
    """Bytes on one device of arrays of these shapes in these places."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def working_copy_bytes(system: System, name: str, params: PyTree, trained: bool = False) -> int:
    """Bytes of `jaxrlhf.models.working_copy`: all parameters where stages 1 and 2 gather them, else what is cast."""
    module = system.modules[name]
    if reads_stored(module, system.mesh):
        return 0
    head = trained_head(module) if trained and module.lora is None else None
    if _casts_in_place(system, module):
        return cast_bytes(params, module, head)
    shapes = jax.eval_shape(lambda tree: cast_matrices(tree, module.dtype, head), params)
    return _sharded_bytes(shapes, tree_shardings(logical_axes(module), shapes, system.mesh, REPLICATED_RULES))


def _casts_in_place(system: System, module: Decoder) -> bool:
    """True where the working copy lies as the parameters do."""
    return not reads_stored(module, system.mesh) and (module.zero_stage in (0, 3) or system.stored_parts == 1)


def fresh_gradient_bytes(system: System, name: str) -> int:
    """Bytes of the gradients of one micro-batch: in the dtypes of a working copy that lies as the parameters do."""
    module = system.modules[name]
    if not _casts_in_place(system, module):
        return gradient_bytes(system, name)
    trainable = system.trainable(name)
    head = trained_head(module) if module.lora is None else None
    cast = jax.eval_shape(lambda tree: cast_matrices(tree, module.dtype, head), trainable)
    return _sharded_bytes(cast, jax.tree.map(lambda x: x.sharding, trainable))


def gradient_bytes(system: System, name: str) -> int:
    """Bytes of the trained leaves' float32 gradients; whole on every device below ZeRO stage 2."""
    module, trainable = system.modules[name], system.trainable(name)
    shardings = jax.tree.map(lambda x: x.sharding, trainable)
    if module.zero_stage < 2:
        axes, _ = split_trainable(logical_axes(module), module)
        shardings = tree_shardings(axes, trainable, system.mesh, REPLICATED_RULES)
    return _sharded_bytes(trainable, shardings)


def layout_copy_bytes(system: System) -> int:
    """Bytes of the actor's gradients that the compiler holds in a second layout before the update.

    Those are stacked kernels whose split dimension is not the last one: query, key and value, and the MLP's down
    projection.
    """
    module = system.modules["actor"]
    if module.lora is not None or not system.gathers("actor"):
        return 0
    stacked: dict[tuple[str, ...], jax.ShapeDtypeStruct] = cast(Any, flatten_dict(system.trees["actor"]["layers"]))
    turned = [
        x for path, x in stacked.items() if path[-1] == "kernel" and path[-2] in ("query", "key", "value", "down")
    ]
    return sum(4 * math.prod(local_shape(x)) for x in turned)


def cast_bytes(tree: PyTree, module: Decoder, but: str | None = None) -> int:
    """Bytes of a tree's matrices in the compute dtype, where they are held in another, except the leaf named `but`."""
    new = jax.eval_shape(lambda t: cast_matrices(t, module.dtype, but), tree)
    changed = jax.tree.map(
        lambda x, y: math.prod(local_shape(x)) * y.dtype.itemsize if x.dtype != y.dtype else 0, tree, new
    )
    return sum(jax.tree.leaves(changed))
