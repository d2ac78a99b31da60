"""The one device mesh, with the axes `data` (replicas), `fsdp` (sharded parameters), `expert`, `context` and `tensor`.

`expert` splits the experts of sparse models; `context` splits long sequences; `tensor` splits each layer.
Generation sees the same devices in the same order through a second mesh, which splits the `fsdp` axis in two.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh

from jaxrlhf.errors import InputError

AXES = ("data", "fsdp", "expert", "context", "tensor")
GENERATE_AXES = ("data", "fsdp", "replica", "expert", "context", "tensor")
Device = Any  # jax.Device, which is not a type to type checkers


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    expert: int = 1,
    context: int = 1,
    *,
    devices: Sequence[Device] | None = None,
) -> Mesh:
    """Creates a mesh of `data × fsdp × expert × context × tensor` devices.

    Args:
        data: Replicas; like the other sizes, -1 for all remaining devices.
        fsdp: Devices that share the parameters of a replica.
        tensor: Devices that compute a layer together.
        expert: Devices that the experts of a replica are split over; the batch is split over them too.
        context: Devices that the columns of each sequence are split over; parameters are split over them too.
        devices: None: all devices of the run.

    Raises:
        InputError: The sizes do not use every device exactly once, or several are -1.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh sizes must be positive, with at most one -1 (all remaining devices); got {sizes}")
    if free:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if len(devices) % fixed:
            raise InputError(
                f"mesh {sizes}: {fixed} does not divide the {len(devices)} devices; change {free[0]}'s peers"
            )
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes[name] for name in AXES)
    total = math.prod(shape)
    if total != len(devices):
        raise InputError(
            f"mesh {' × '.join(f'{name}={size}' for name, size in sizes.items())} needs {total} devices, but "
            f"{len(devices)} are present; set one size to -1 to use all of them"
        )
    auto = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "tpu":
        # a mesh axis may use part of a torus axis (tensor=8 on a slice of 4x4x4)
        return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES, axis_types=auto)
    if len({d.process_index for d in devices}) == 1:
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    return Mesh(arrange_hosts(np.asarray(devices), shape), AXES, axis_types=auto)


def arrange_hosts(devices: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Arranges devices of several hosts as a mesh whose neighbours along `fsdp` are on different hosts.

    Generation splits `fsdp` into a slow part for tensor parallelism and a fast part for the batch (`generate_mesh`).
    This order keeps the slow part within a host, where links are fast. (On TPUs JAX arranges the mesh by the topology
    instead.) `expert`, `context` and `tensor`, which exchange activations in every layer, stay within a host where they
    fit.

    Args:
        devices: `[N]`.
        sizes: Of AXES; their product is N.

    Returns:
        The devices, as an array of shape `sizes`.
    """
    data, fsdp, *inner = sizes
    tensor = math.prod(inner)
    ordered = np.array(sorted(devices, key=lambda d: (d.process_index, d.id)), dtype=object)
    local = len(devices) // len({d.process_index for d in devices})
    if local % tensor or (fsdp * tensor) % local:
        return ordered.reshape(sizes)
    spread = ordered.reshape(data, fsdp * tensor // local, local // tensor, tensor)
    return spread.swapaxes(1, 2).reshape(sizes)


def generate_mesh(mesh: Mesh, num_heads: int, tensor_parallel: int | None = None) -> Mesh:
    """Returns the view of `mesh` that generation uses: groups of devices that generate together, axes GENERATE_AXES.

    A group spans the `tensor` axis and the slow part of `fsdp`. The fast part becomes the axis `replica`, which splits
    the batch as `data`, `expert` and `context` do. Storage splits a dimension over (tensor, fsdp, expert, context), so
    a group's share of it is one contiguous piece. Resharding is then a plain all-gather over `replica`, `expert` and
    `context`, or nothing where these are 1. Experts stay where `expert` has put them.

    Args:
        mesh: The training mesh.
        num_heads: Attention heads of the model.
        tensor_parallel: Devices of a group; None or 0: `default_tensor_parallel`.

    Raises:
        InputError: A group is not `tensor` times a divisor of `fsdp`, or does not divide the heads.
    """
    tensor_parallel = tensor_parallel or default_tensor_parallel(mesh, num_heads)
    if num_heads % tensor_parallel:
        raise InputError(
            f"generate_tensor_parallel={tensor_parallel} does not divide the model's num_heads={num_heads}; choose a "
            f"divisor of {num_heads}"
        )
    data, fsdp, expert, context, tensor = (mesh.shape[name] for name in AXES)
    allowed = [tensor * part for part in range(1, fsdp + 1) if fsdp % part == 0]
    if tensor_parallel not in allowed:
        raise InputError(
            f"generate_tensor_parallel={tensor_parallel} does not fit the mesh data={data} × fsdp={fsdp} × "
            f"tensor={tensor}: it must be tensor times a divisor of fsdp, one of {', '.join(map(str, allowed))}"
        )
    part = tensor_parallel // tensor
    devices = mesh.devices.reshape(data, part, fsdp // part, expert, context, tensor)
    return Mesh(devices, GENERATE_AXES, axis_types=(AxisType.Auto,) * len(GENERATE_AXES))


def default_tensor_parallel(mesh: Mesh, num_heads: int) -> int:
    """Size of generation's tensor-parallel group unless one is given: the `fsdp × tensor` devices of one host.

    Where these do not divide the heads, the largest legal group that does (`tensor` always does).
    """
    replica = mesh.devices[0]
    first = replica.flat[0]
    local = sum(d.process_index == first.process_index for d in replica.flat)
    _, fsdp, expert, context, tensor = (mesh.shape[name] for name in AXES)
    parts = [p for p in range(1, fsdp + 1) if fsdp % p == 0 and num_heads % (p * tensor) == 0]
    return tensor * max([p for p in parts if p * expert * context * tensor <= local], default=1)


def check_divisible(mesh: Mesh, sizes: Mapping[str, int], *axes: str) -> None:
    """Raises InputError when the product of mesh axes does not divide the model dimensions `sizes`, by name."""
    parts = math.prod(mesh.shape[axis] for axis in axes)
    named = " × ".join(f"{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
    for name, size in sizes.items():
        if size % parts:
            raise InputError(f"mesh {named} does not divide the model's {name}={size}; choose a divisor of {size}")
