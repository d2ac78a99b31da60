"""Devices that compute wrongly without an error: a step is run twice, and copies of the state are compared.

Checksums are computed where the arrays lie. One that differs names the array and the device.
"""

import time
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrlhf.distributed import gather
from jaxrlhf.errors import SilentCorruption
from jaxrlhf.sharding import on_device

PyTree = Any
Checksums: TypeAlias = dict[str, dict[int, int]]
"""By path of the array and id of the device, of the part that lies there."""

MULTIPLIER = 0x9E3779B1  # odd, so that no single wrong element leaves a sum as it was
SHOWN = 4


def run_twice(
    update: Callable[..., tuple[PyTree, dict[str, jax.Array]]], state: PyTree, *args: object, **options: object
) -> tuple:
    """`update(state, …)`, a jitted step, run twice from the same state.

    It takes the time of one more step and, while it runs, the memory of one more state. Every process calls it.

    Args:
        update: Returns the new state and metrics; the state is donated.
        state: The state.
        *args: Further arguments.
        **options: Keyword arguments.

    Returns:
        The new state, and the metrics with `timing/deterministic_check`, the seconds that the check took.

    Raises:
        SilentCorruption: The two results differ, or the copies of an array of the state do, on any process.
    """
    begin = time.monotonic()
    first = checksums(update(_copied(state), *args, **options))
    middle = time.monotonic()
    state, metrics = jax.block_until_ready(update(state, *args, **options))
    again = time.monotonic()
    check_equal(first, checksums((state, metrics)))
    check_copies(state)
    seconds = middle - begin + time.monotonic() - again
    return state, {**metrics, "timing/deterministic_check": seconds}


def checksums(tree: PyTree) -> Checksums:
    """Checksums of the parts of all arrays that lie on this process's devices."""
    sums: Checksums = {}
    meshes: dict[Mesh, dict[str, tuple[jax.Array, PartitionSpec]]] = {}
    for name, x in _leaves(tree):
        if not isinstance(x, jax.Array):
            continue
        sums[name] = {}
        if isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, Mesh):
            meshes.setdefault(x.sharding.mesh, {})[name] = x, x.sharding.spec
        else:
            for shard in x.addressable_shards:
                sums[name][shard.device.id] = zlib.crc32(np.asarray(shard.data).tobytes())
    for mesh, named in meshes.items():
        arrays, specs = zip(*named.values(), strict=True)
        for shard in _on_mesh(list(arrays), mesh=mesh, specs=specs).addressable_shards:
            for name, value in zip(named, np.asarray(shard.data)[:, 0], strict=True):
                sums[name][shard.device.id] = int(value)
    return sums


def check_equal(first: Checksums, second: Checksums) -> None:
    """Raises SilentCorruption, on every process, when two runs of a step gave different bits."""
    own = [
        f"{name} on {_device(device)}"
        for name, sums in first.items()
        for device, value in sums.items()
        if second[name][device] != value
    ]
    found = gather("comparing two runs of a step", own)
    _refuse("a step that was run twice from the same state gave different bits", [x for own in found for x in own])


def check_copies(tree: PyTree) -> None:
    """Raises SilentCorruption, on every process, when devices that hold the same part of an array differ in it."""
    own = checksums(tree)
    sums: Checksums = {name: {} for name in own}
    pairs = {name: [[device, value] for device, value in of_devices.items()] for name, of_devices in own.items()}
    for process in gather("comparing copies of the parameters", pairs):
        for name, of_devices in process.items():
            sums[name] |= {device: value for device, value in of_devices}
    found = []
    for name, x in _leaves(tree):
        holders: dict[str, list[int]] = {}
        if name in sums:
            for device, index in x.sharding.devices_indices_map(x.shape).items():
                holders.setdefault(str(index), []).append(device.id)
        found += [f"{name} on {odd}" for devices in holders.values() if (odd := _odd(devices, sums[name]))]
    _refuse("devices that hold the same values have different bits", found)


def _odd(devices: list[int], sums: dict[int, int]) -> str | None:
    """The devices whose checksum is not that of most of them; all, where there is no majority; None without any."""
    (usual, count), *others = Counter(sums[device] for device in devices).most_common()
    if not others:
        return None
    if count <= len(devices) / 2:
        return "one of " + ", ".join(map(_device, devices))
    return ", ".join(_device(device) for device in devices if sums[device] != usual)


def _refuse(what: str, found: list[str]) -> None:
    if not found:
        return
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise SilentCorruption(
        f"{what}: {'; '.join(found[:SHOWN])}{more}. A device or its memory is faulty, or on GPUs a kernel is not "
        "deterministic (XLA_FLAGS=--xla_gpu_deterministic_ops=true rules that out). No checkpoint was written of this "
        "step; take the device out, and continue from the newest checkpoint with --resume"
    )


@jax.jit
def _copied(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, tree)


def _leaves(tree: PyTree) -> list[tuple[str, jax.Array]]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in pairs]


@partial(jax.jit, static_argnames=("mesh", "specs"))
def _on_mesh(arrays: list[jax.Array], *, mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> jax.Array:
    """uint32 `[arrays, devices]`: checksums of the parts, each computed on its device."""

    def of_device(*parts: jax.Array) -> jax.Array:
        return jnp.stack([checksum(part) for part in parts])[:, None]

    every = PartitionSpec(None, mesh.axis_names)
    return jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=every, check_vma=False)(*on_device(arrays))


def checksum(x: jax.Array) -> jax.Array:
    """Sum modulo 2³² of the elements' bits, each times an odd number of its own."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32).reshape(-1)
    numbers = jax.lax.iota(jnp.uint32, bits.size)
    return jnp.sum(bits * ((2 * numbers + 1) * jnp.uint32(MULTIPLIER)), dtype=jnp.uint32)


def _device(number: int) -> str:
    device = next(device for device in jax.devices() if device.id == number)
    return f"device {number} of process {device.process_index}" if jax.process_count() > 1 else f"device {number}"
