"""The one device mesh: axes `data` (replicas), `fsdp` (sharded parameters), `tensor` (model parallel)."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from jaxrlhf.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data × fsdp × tensor` devices; at most one size may be -1, meaning all remaining devices.

    Raises InputError when the sizes do not use every device exactly once.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh sizes must be positive, with at most one -1 (all remaining devices); got {sizes}")
    if free:
        fixed = 1
        for size in sizes.values():
            fixed *= size if size != -1 else 1
        if len(devices) % fixed:
            raise InputError(
                f"mesh {sizes}: {fixed} does not divide the {len(devices)} devices; change {free[0]}'s peers"
            )
        sizes[free[0]] = len(devices) // fixed
    total = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    if total != len(devices):
        raise InputError(
            f"mesh data={sizes['data']} × fsdp={sizes['fsdp']} × tensor={sizes['tensor']} needs {total} devices, "
            f"but {len(devices)} are present; set one size to -1 to use all of them"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_divisible(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Refuse a mesh whose `tensor` axis does not divide a model dimension that it must split (heads, mlp)."""
    tensor = mesh.shape["tensor"]
    for name, size in sizes.items():
        if size % tensor:
            raise InputError(
                f"mesh tensor={tensor} does not divide the model's {name}={size}; choose a divisor of {size}"
            )
