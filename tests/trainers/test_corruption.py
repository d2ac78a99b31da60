"""Wrong bits on one device: found, named, and the end of the run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf.errors import SilentCorruption
from jaxrlhf.trainers.corruption import check_copies, checksums, run_twice
from jaxrlhf.trainers.sft import sft_loss, token_count
from jaxrlhf.trainers.supervised import Objective, init_state, train_step


def flipped(x, device, bit=0):
    """The array with one bit of the last element of its part on one device flipped."""
    parts = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            data.reshape(-1).view(f"u{data.dtype.itemsize}")[-1] ^= 1 << bit
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


@pytest.fixture
def tree(lab):
    """Arrays that four groups of two devices hold parts of, that all hold, and that one holds; of several dtypes."""
    mesh = lab.mesh_of(data=2, fsdp=4)
    rng = np.random.default_rng(0)

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return {
        "kernel": put(rng.normal(size=(8, 3)).astype("f4"), "fsdp"),
        "bias": put(jnp.asarray(rng.normal(size=5), jnp.bfloat16)),
        "count": put(np.int32(3)),
        "flags": put(np.array([True, False])),
        "alone": jnp.float32(2.0),
    }


@pytest.mark.parametrize("bit", [0, 13, 30])
def test_one_wrong_bit_of_a_copy_names_the_array_and_its_devices(tree, bit):
    check_copies(tree)
    with pytest.raises(SilentCorruption, match=r"different bits: kernel on one of device 2, device 6\. A device"):
        check_copies(tree | {"kernel": flipped(tree["kernel"], 6, bit)})
    with pytest.raises(SilentCorruption, match=r"different bits: bias on device 3\. A device"):
        check_copies(tree | {"bias": flipped(tree["bias"], 3, bit % 16)})


def test_checksums_depend_on_places_and_not_on_other_arrays(tree):
    sums = checksums(tree)
    swapped = jax.device_put(np.asarray(tree["kernel"])[:, ::-1], tree["kernel"].sharding)
    other = checksums({"kernel": swapped, "bias": tree["bias"]})
    assert other["bias"] == sums["bias"]
    assert all(other["kernel"][device] != value for device, value in sums["kernel"].items())


@pytest.fixture(scope="module")
def sft(lab):
    """`sft(**changes)`: one step of SFT on two replicas of a model that two devices share each, run twice."""
    mesh = lab.mesh_of(data=2, fsdp=2)
    model = lab.tiny_model(mesh=mesh)
    ids = np.random.default_rng(0).integers(3, 101, (8, 12)).astype(np.int32)
    batch = {"input_ids": ids, **dict.fromkeys(("attention_mask", "loss_mask"), np.ones_like(ids))}
    batch["row_mask"] = np.ones(8, np.int32)

    def start():
        copy = model.replace(params=jax.tree.map(jnp.copy, model.params))
        return init_state(copy, lab.sgd, mesh)

    def step(state, update=train_step):
        options = {"objective": Objective(token_count, sft_loss), "micro_batches": 1}
        return run_twice(update, state, batch, jax.random.key(0), **options)

    return start, step


def test_a_step_that_is_checked_is_the_step_and_compiles_once(sft):
    start, step = sft
    calls = []

    def update(*args, **options):
        calls.append(train_step(*args, **options))
        return calls[-1]

    state, metrics = step(start(), update)
    assert len(calls) == 2 and metrics["timing/deterministic_check"] > 0
    compiled = train_step._cache_size()
    step(state)
    assert train_step._cache_size() == compiled


def test_a_step_whose_second_run_differs_in_a_bit_names_what_differs(sft):
    start, step = sft
    results = []

    def update(*args, **options):
        state, metrics = train_step(*args, **options)
        if results:
            scale = flipped(state.params["final_norm"]["scale"], 1)
            state = state.replace(params=state.params | {"final_norm": {"scale": scale}})
        results.append(metrics)
        return state, metrics

    said = r"run twice from the same state gave different bits: 0/params/final_norm/scale on device 1\. .*--resume"
    with pytest.raises(SilentCorruption, match=said):
        step(start(), update)


def test_a_replica_with_a_wrong_bit_is_found_after_the_step(sft):
    start, step = sft
    state = start()
    table = flipped(state.params["embed"]["embedding"], 2, bit=20)
    state = state.replace(params=state.params | {"embed": {"embedding": table}})
    with pytest.raises(
        SilentCorruption, match=r"hold the same values have different bits: .*embed.*one of device 0, device 2"
    ):
        step(state)
