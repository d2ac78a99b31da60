"""Checkpoints: bit-exact on any mesh, never harmed by an interrupted save, clear about what does not fit."""

import json
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.runs import checkpoints
from jaxrlhf.runs.checkpoints import (
    latest_checkpoint,
    list_checkpoints,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
)


class Counters(NamedTuple):
    step: int
    kl: float
    beta: np.float32
    offset: np.ndarray
    name: str
    done: bool
    extra: None


def mesh_of(*shape):
    names = ("data", "fsdp", "tensor")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def make_state(mesh):
    """Parameters sharded over the mesh, an optax state, keys, and every kind of small leaf."""
    keys = jax.random.split(jax.random.key(3), 2)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    names = mesh.axis_names
    bits = jax.random.bits(keys[0], (16, 8), jnp.uint32)
    params = {
        "block": {"kernel": place(jax.lax.bitcast_convert_type(bits, jnp.float32), names[0], names[-1])},
        "bias": place(jax.random.normal(keys[1], (8,)).astype(jnp.bfloat16), names),
        "special": place(jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32)),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "params": params,
        "opt_state": tx.init(params),
        "key": place(jax.random.key(7)),
        "keys": place(jax.random.split(jax.random.key(8), 8), names[0]),
        "raw_key": place(jax.random.PRNGKey(9)),
        "counters": Counters(3, 0.1, np.float32(0.2), np.arange(3), "x", True, None),
        "weak": jnp.asarray(1.5),
    }


def raw(leaf):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return (str(getattr(leaf, "dtype", type(leaf))), np.shape(leaf), np.asarray(leaf).tobytes())


def assert_same(actual, expected):
    flat, tree = jax.tree.flatten(actual)
    expected_flat, expected_tree = jax.tree.flatten(expected)
    assert tree == expected_tree
    assert [raw(leaf) for leaf in flat] == [raw(leaf) for leaf in expected_flat]


def small(value=0.0, size=4):
    return {"w": jnp.full((size,), value, jnp.float32)}


def test_every_kind_of_leaf_returns_bit_for_bit(tmp_path):
    state = make_state(mesh_of(4, 2))
    path = save_checkpoint(tmp_path, 5, state, {"epoch": 1})
    restored, metadata = restore_checkpoint(path, state)
    assert_same(restored, state)
    assert metadata == {"epoch": 1, "step": 5} == read_metadata(path)
    assert restored["counters"]._fields == Counters._fields
    assert restored["weak"].weak_type and not restored["weak"].committed
    placed = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    returned = [leaf for leaf in jax.tree.leaves(restored) if isinstance(leaf, jax.Array)]
    assert [leaf.sharding for leaf in returned] == [leaf.sharding for leaf in placed]
    assert jax.random.uniform(restored["key"]) == jax.random.uniform(state["key"])


def test_restores_onto_another_mesh_from_shapes_alone(tmp_path):
    state = make_state(mesh_of(4, 2))
    path = save_checkpoint(tmp_path, 1, state, {})
    other = make_state(mesh_of(2, 2, 2))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, other
    )
    restored, _ = restore_checkpoint(path, like)
    assert_same(restored, state)
    assert restored["params"]["block"]["kernel"].sharding == other["params"]["block"]["kernel"].sharding
    assert restored["keys"].sharding.is_equivalent_to(other["keys"].sharding, 1)


def test_latest_goes_by_number_and_ignores_what_is_not_complete(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, step, small(step), {})
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12.unfinished").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("stage", ["_write_arrays", "write_json_atomic", "os.rename"])
@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_save_harms_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch, stage, step):
    save_checkpoint(tmp_path, 1, small(1.0), {}, keep_last=1)

    def interrupt(*args):
        raise KeyboardInterrupt

    def half_written(target, arrays):
        target.mkdir()
        (target / "manifest.ocdbt").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "os.rename":  # a kill right before the new checkpoint takes its name
            rename = checkpoints.os.rename
            stop = lambda a, b: interrupt() if str(a).endswith(".unfinished") else rename(a, b)  # noqa: E731
            patch.setattr(checkpoints.os, "rename", stop)
        else:
            patch.setattr(checkpoints, stage, half_written if stage == "_write_arrays" else interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, step, small(2.0), {}, keep_last=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert_same(restore_checkpoint(tmp_path / "checkpoint-1", small())[0], small(1.0))
    save_checkpoint(tmp_path, step, small(2.0), {}, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{step}"]
    assert_same(restore_checkpoint(tmp_path / f"checkpoint-{step}", small())[0], small(2.0))


def test_keep_last_removes_the_oldest_after_success(tmp_path):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, small(), {}, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    save_checkpoint(tmp_path, 12, small(), {}, keep_last=None)
    save_checkpoint(tmp_path, 13, small(), {}, keep_last=0)
    assert len(list_checkpoints(tmp_path)) == 4


def test_metadata_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, small(), {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_mismatch_lists_every_differing_path(tmp_path):
    state = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "c": {"d": jnp.zeros(5)}, "n": None, "same": jnp.zeros(1)}
    path = save_checkpoint(tmp_path, 1, state, {})
    like = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4, jnp.bfloat16), "e": jnp.zeros(5), "n": 1, "same": jnp.zeros(1)}
    with pytest.raises(InputError) as caught:
        restore_checkpoint(path, like)
    assert str(caught.value).splitlines()[1:] == [
        "  a: checkpoint has float32[2,3], expected float32[3,2]",
        "  b: checkpoint has float32[4], expected bfloat16[4]",
        "  c/d: checkpoint has float32[5], expected nothing",
        "  e: checkpoint has nothing, expected float32[5]",
        "  n: checkpoint has NoneType, expected int",
    ]
    assert str(path) in str(caught.value)


def data_files(path):
    return [file for file in sorted((path / "state").rglob("*")) if file.is_file() and file.stat().st_size > 50]


@pytest.mark.parametrize("harm", ["delete", "truncate", "overwrite", "metadata", "index"])
def test_a_damaged_checkpoint_is_named(tmp_path, harm):
    path = save_checkpoint(tmp_path, 3, {"w": jnp.arange(4096.0)}, {})
    for file in data_files(path) if harm in ("delete", "truncate", "overwrite") else []:
        content = file.read_bytes()
        if harm == "delete":
            file.unlink()
        else:
            file.write_bytes(content[: len(content) // 2] if harm == "truncate" else bytes(len(content)))
    if harm == "metadata":
        (path / "metadata.json").write_text("{")
    if harm == "index":
        (path / "index.json").write_text(json.dumps({}))
    with pytest.raises(StorageError, match=r"checkpoint-3 is damaged"):
        restore_checkpoint(path, {"w": jnp.arange(4096.0)})


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no checkpoint .*checkpoint-4"):
        restore_checkpoint(tmp_path / "checkpoint-4", small())
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(InputError, match=r"checkpoint-4 .*index\.json"):
        restore_checkpoint(tmp_path / "checkpoint-4", small())


@pytest.mark.parametrize("stage", ["_write_arrays", "write_json_atomic"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("No space left on device [x]")])
def test_a_full_disk_is_a_storage_error_and_older_checkpoints_stay(tmp_path, monkeypatch, stage, error):
    save_checkpoint(tmp_path, 1, small(1.0), {}, keep_last=1)

    def fail(*args):
        raise error

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"checkpoint-2: no space left"):
        patch.setattr(checkpoints, stage, fail)
        save_checkpoint(tmp_path, 2, small(2.0), {}, keep_last=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_moved_run_folder_still_restores(tmp_path):
    save_checkpoint(tmp_path / "old", 1, small(3.0), {})
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert_same(restore_checkpoint(tmp_path / "new" / "checkpoint-1", small())[0], small(3.0))
