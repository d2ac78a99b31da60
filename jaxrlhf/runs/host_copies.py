"""Copies of a state in host memory for a save in the background, and the priority of the threads that write them."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np

NICENESS = 12
"""Priority of the threads that write a checkpoint. Where the train step keeps all processors busy, a writing thread
gets 6 % of one."""
ALIGNMENT = 64  # bytes; XLA takes an array of numpy's without another copy when it begins at a multiple of it
THREADS = 4
Result = TypeVar("Result")


def owned(arrays: Mapping[str, jax.Array | np.ndarray]) -> dict[str, jax.Array | np.ndarray]:
    """Returns arrays that later steps leave alone, as far as orbax does not copy them itself.

    Orbax copies from accelerators to the host. On a CPU it only looks at the memory of the arrays, and XLA, which may
    not donate what somebody looks at, then copies them within the next step: one after another, into fresh pages. Here,
    threads copy into large pages.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        pending = {name: _copies(array, pool) for name, array in arrays.items()}
        return {name: finish() for name, finish in pending.items()}


def _copies(array: jax.Array | np.ndarray, pool: ThreadPoolExecutor) -> Callable[[], jax.Array | np.ndarray]:
    """Begins to copy an array; returns a function that waits for it and returns the copy."""
    if not isinstance(array, jax.Array) or any(device.platform != "cpu" for device in array.sharding.device_set):
        return lambda: array
    shards = array.addressable_shards
    first = {str(shard.index): shard for shard in reversed(shards)}  # replicas share a copy
    copies = {index: pool.submit(_aligned_copy, np.asarray(shard.data)) for index, shard in first.items()}

    def finish() -> jax.Array:
        parts = []
        for shard in shards:
            place = jax.sharding.SingleDeviceSharding(shard.device, memory_kind=array.sharding.memory_kind)
            parts.append(jax.device_put(copies[str(shard.index)].result(), place, may_alias=True))
        return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)

    return finish


def _aligned_copy(source: np.ndarray) -> np.ndarray:
    space = np.empty(source.nbytes + ALIGNMENT, np.uint8)
    begin = -space.ctypes.data % ALIGNMENT
    copy = space[begin : begin + source.nbytes].view(source.dtype).reshape(source.shape)
    np.copyto(copy, source)
    return copy


def at_low_priority(task: Callable[[], Result]) -> Result:
    """Runs a function in a thread of low priority, which threads inherit that it starts; returns its result."""
    with ThreadPoolExecutor(1, initializer=_lower_priority) as pool:
        return pool.submit(task).result()


def hurry() -> None:
    """Gives the threads of low priority that of this thread, as it waits for them; the system may forbid it."""
    if sys.platform != "linux":
        return
    usual = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(OSError):  # not allowed, or the thread has ended
            if os.getpriority(os.PRIO_PROCESS, thread) == max(usual, NICENESS):
                os.setpriority(os.PRIO_PROCESS, thread, usual)


def _lower_priority() -> None:
    if sys.platform == "linux":  # elsewhere the call means the whole process
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, max(now, NICENESS))
