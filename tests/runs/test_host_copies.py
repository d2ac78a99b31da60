"""Copies of a state for a save in the background, and the priority of what writes it."""

import os
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf.runs.host_copies import NICENESS, at_low_priority, hurry, owned
from jaxrlhf.sharding import make_mesh


def pointers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.uint32])
@pytest.mark.parametrize("spec", [("data", "fsdp"), ("fsdp",), (None, "data"), ()], ids=str)
def test_a_copy_has_the_values_and_the_placement_and_none_of_the_memory(spec, dtype):
    placed = NamedSharding(make_mesh(2, 4), PartitionSpec(*spec))
    array = jax.device_put(jnp.arange(24 * 8).reshape(24, 8).astype(dtype), placed)
    copy = owned({"x": array})["x"]
    assert (copy.sharding, copy.dtype, copy.shape) == (array.sharding, array.dtype, array.shape)
    np.testing.assert_array_equal(np.asarray(copy), np.asarray(array))
    assert not set(pointers(copy)) & set(pointers(array))


@pytest.mark.parametrize("kind", [memory.kind for memory in jax.devices()[0].addressable_memories()])
def test_a_copy_of_an_offloaded_array_is_in_the_same_memory(kind):
    placed = NamedSharding(make_mesh(1, 8), PartitionSpec("fsdp"), memory_kind=kind)
    array = jax.device_put(jnp.arange(24.0), placed)
    copy = owned({"x": array})["x"]
    assert copy.sharding == placed and not set(pointers(copy)) & set(pointers(array))
    np.testing.assert_array_equal(np.asarray(copy), np.arange(24.0))


def test_replicas_share_one_copy():
    array = jax.device_put(jnp.arange(24.0), NamedSharding(make_mesh(2, 4), PartitionSpec("fsdp")))
    assert len(set(pointers(owned({"x": array})["x"]))) == 4


@pytest.mark.parametrize("array", [jnp.float32(3), jnp.ones((0, 4)), np.arange(5)], ids=["scalar", "empty", "numpy"])
def test_small_arrays_and_those_of_numpy_are_kept(array):
    copy = owned({"x": array})["x"]
    assert type(copy) is type(array)
    np.testing.assert_array_equal(np.asarray(copy), np.asarray(array))


def test_a_step_may_donate_an_array_that_was_copied():
    """XLA reuses the memory of a donated array only while nobody looks at it."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = step(jax.device_put(jnp.arange(1 << 16), NamedSharding(make_mesh(1, 8), PartitionSpec("fsdp"))))
    before = pointers(array)
    copy = owned({"x": array})["x"]
    assert pointers(step(array)) == before
    np.testing.assert_array_equal(np.asarray(copy), np.arange(1 << 16) + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux")
def test_threads_of_a_save_and_those_that_they_start_yield_to_the_step():
    def priority():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def with_child():
        found = [priority()]
        child = threading.Thread(target=lambda: found.append(priority()))
        child.start()
        child.join()
        return found

    before = priority()
    assert at_low_priority(with_child) == [max(before, NICENESS)] * 2
    assert priority() == before


def may_hurry():
    """True where a thread may raise its priority again."""

    def lower_and_raise():
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) - 1)

    try:
        at_low_priority(lower_and_raise)
    except PermissionError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux" or not may_hurry(), reason="only Linux, and not every user, can")
def test_threads_that_somebody_waits_for_have_his_priority():
    ready, go, found = threading.Event(), threading.Event(), []

    def work():
        ready.set()
        go.wait(60)
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    child = at_low_priority(lambda: started(work))
    ready.wait(60)
    hurry()
    go.set()
    child.join()
    assert found == [os.getpriority(os.PRIO_PROCESS, threading.get_native_id())]


def started(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_an_error_in_a_thread_of_low_priority_is_raised():
    with pytest.raises(ZeroDivisionError):
        at_low_priority(lambda: 1 // 0)
