"""Checkpoints: bit-exact on any mesh, never harmed by an interrupted save, clear about what does not fit."""

import asyncio
import gc
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
from jaxrlhf.runs import pending_save, saving
from jaxrlhf.runs.checkpoints import latest_checkpoint, list_checkpoints, read_metadata, restore_checkpoint
from jaxrlhf.runs.saving import Retention, Saver, save_checkpoint


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


@pytest.mark.parametrize("stage", ["arrays", "write_json_atomic", "os.rename"])
@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_save_harms_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch, stage, step):
    save_checkpoint(tmp_path, 1, small(1.0), {}, keep_last=1)

    def interrupt(*args):
        raise KeyboardInterrupt

    def half_written(save, arrays, background):
        (save.work / "state").mkdir()
        (save.work / "state" / "manifest.ocdbt").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "os.rename":  # a kill right before the new checkpoint takes its name
            rename = pending_save.os.rename
            stop = lambda a, b: interrupt() if str(a).endswith(".unfinished") else rename(a, b)  # noqa: E731
            patch.setattr(pending_save.os, "rename", stop)
        elif stage == "arrays":
            patch.setattr(pending_save.PendingSave, "write", half_written)
        else:
            patch.setattr(pending_save, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, step, small(2.0), {}, keep_last=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert_same(restore_checkpoint(tmp_path / "checkpoint-1", small())[0], small(1.0))
    (tmp_path / ".summary.json.abc.tmp").touch()
    save_checkpoint(tmp_path, step, small(2.0), {}, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{step}"]
    assert_same(restore_checkpoint(tmp_path / f"checkpoint-{step}", small())[0], small(2.0))


def test_keep_last_removes_the_oldest_after_success(tmp_path):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, small(), {}, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
    save_checkpoint(tmp_path, 12, small(), {})
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (2, 3):
        save_checkpoint(folder, step, {"w": jnp.arange(4096.0), "key": jax.random.key(1), "n": 1, "x": 0.5}, {})
    return folder


LIKE = {"w": np.zeros(4096, np.float32), "key": jax.eval_shape(lambda: jax.random.key(1)), "n": 1, "x": 0.5}


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
def test_a_damaged_file_is_named_with_the_checkpoint_to_use_instead(whole, tmp_path, harm):
    folder = shutil.copytree(whole, tmp_path / "run")
    for file in data_files(folder / "checkpoint-3"):
        content = bytearray(file.read_bytes())
        if harm == "delete":
            file.unlink()
        elif harm == "truncate":
            file.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 4
            file.write_bytes(content)
        name = str(file.relative_to(folder / "checkpoint-3"))
        remedy = "--resume_from_checkpoint checkpoint-2 continues from an older one"
        with pytest.raises(StorageError, match=rf"checkpoint-3 is damaged: .*{name}.*; {remedy}"):
            restore_checkpoint(folder / "checkpoint-3", LIKE)
        shutil.copytree(whole, folder, dirs_exist_ok=True)
    assert float(restore_checkpoint(folder / "checkpoint-3", LIKE)[0]["w"][7]) == 7


DEEP = "[" * 5000 + "]" * 5000
DAMAGED = [("index.json", text) for text in ("{", "[]", "null", DEEP, "9" * 5000, '{"format": 2}', '{"format": "2"}')]
DAMAGED += [("metadata.json", text) for text in ("{", "[]", "{}", '{"step": "3"}', '{"step": true}', DEEP)]
DAMAGED += [("metadata.json", '{"step": 3, "identity": 3}')]


@pytest.mark.parametrize(("name", "text"), DAMAGED)
def test_a_record_of_another_form_is_named(whole, tmp_path, name, text):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "checkpoint-3" / name).write_text(text)
    with pytest.raises(StorageError, match=rf"checkpoint-3 is damaged: {name}.*--resume_from_checkpoint checkpoint-2"):
        restore_checkpoint(folder / "checkpoint-3", LIKE)


@pytest.fixture(scope="module")
def first_format(whole):
    """The index of a checkpoint as version 0.1.0 wrote it."""
    index = json.loads((whole / "checkpoint-3" / "index.json").read_text())
    assert index.pop("xxh3") and index["format"] == 2
    assert all(len(facts["xxh3"]) == 32 for facts in index["files"].values())
    return index | {"format": 1, "files": {name: facts["bytes"] for name, facts in index["files"].items()}}


WRONG = [(field, value) for field in ("path", "kind", "dtype", "shape", "impl") for value in (None, 3, [], {}, "no")]
WRONG += [("value", []), ("shape", ["a"]), ("shape", [-1])]
WRONG += [("files", {"x": "3"}), ("files", []), ("leaves", {}), ("leaves", [3]), ("leaves", [])]


@pytest.mark.parametrize(("place", "value"), WRONG)
def test_an_entry_of_another_form_is_named(whole, first_format, tmp_path, place, value):
    folder = shutil.copytree(whole, tmp_path / "run")
    leaves = [entry | {place: value} if place in entry else entry for entry in first_format["leaves"]]
    index = first_format | {"leaves": leaves} | ({place: value} if place in first_format else {})
    (folder / "checkpoint-3" / "index.json").write_text(json.dumps(index))
    with pytest.raises((StorageError, InputError), match=r"checkpoint-3 (is damaged|does not fit)"):
        restore_checkpoint(folder / "checkpoint-3", LIKE)


@pytest.mark.parametrize(
    ("name", "old", "new"), [("index.json", '"value": 1', '"value": 5'), ("metadata.json", "3", "7")]
)
def test_a_changed_value_in_a_record_is_noticed(whole, tmp_path, name, old, new):
    folder = shutil.copytree(whole, tmp_path / "run")
    path = folder / "checkpoint-3" / name
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(StorageError, match=rf"checkpoint-3 is damaged: {name}: its content is not as it was written"):
        restore_checkpoint(folder / "checkpoint-3", LIKE)


def test_checkpoints_of_the_first_format_restore_and_those_of_a_later_one_are_refused(whole, first_format, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "checkpoint-3" / "index.json").write_text(json.dumps(first_format))
    (folder / "checkpoint-3" / "metadata.json").write_text(json.dumps({"step": 3}))
    restored, metadata = restore_checkpoint(folder / "checkpoint-3", LIKE)
    assert float(restored["w"][7]) == 7 and metadata == {"step": 3}
    (folder / "checkpoint-3" / "index.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(InputError, match=r"checkpoint-3 has format 3, .* formats up to 2: update jaxrlhf"):
        restore_checkpoint(folder / "checkpoint-3", LIKE)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no checkpoint .*checkpoint-4"):
        restore_checkpoint(tmp_path / "checkpoint-4", small())
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(InputError, match=r"checkpoint-4 .*index\.json"):
        restore_checkpoint(tmp_path / "checkpoint-4", small())


def failing(error):
    def fail(*args, **options):
        raise error

    return fail


FULL = [OSError(28, "No space left on device"), ValueError("No space left on device [x]")]
STAGES = ["orbax.checkpoint.AsyncCheckpointer.save", "orbax.checkpoint.AsyncCheckpointer.close"]
STAGES += ["jaxrlhf.runs.pending_save.file_facts", "jaxrlhf.runs.pending_save.write_json_atomic"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", FULL, ids=["os", "tensorstore"])
def test_a_full_disk_is_a_storage_error_and_older_checkpoints_stay(tmp_path, monkeypatch, stage, error):
    save_checkpoint(tmp_path, 1, small(1.0), {}, keep_last=1)
    if stage.endswith("atomic") and isinstance(error, ValueError):
        error = OSError(30, "Read-only file system: no space left")
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"(?i)checkpoint-2: .*no space left"):
        patch.setattr(stage, failing(error))
        save_checkpoint(tmp_path, 2, small(2.0), {}, keep_last=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def boundary(saver):
    saver.advance([saver.report()])


def test_a_save_in_the_background_has_the_bits_of_the_moment_while_steps_that_donate_the_state_run_on(tmp_path):
    state = make_state(mesh_of(4, 2)) | {"large": jnp.arange(1 << 20, dtype=jnp.float32)}
    arrays, rest = {k: v for k, v in state.items() if k not in ("keys", "key", "counters")}, state["counters"]
    save_checkpoint(tmp_path / "now", 1, arrays | {"counters": rest}, {})
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    saver = Saver(tmp_path / "later")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
    saver.start(1, arrays | {"counters": rest}, {})
    for _ in range(20):
        arrays = step(arrays)
        assert not list_checkpoints(tmp_path / "later"), "it has its name only after a look at the end of a step"
    saver.wait()
    like |= {"counters": rest}
    both = [restore_checkpoint(tmp_path / name / "checkpoint-1", like)[0] for name in ("now", "later")]
    assert_same(both[1], both[0])
    files = [json.loads((tmp_path / n / "checkpoint-1" / "index.json").read_text())["leaves"] for n in ("now", "later")]
    assert files[0] == files[1]


def test_a_second_save_waits_for_the_first_and_each_is_announced_when_it_is_complete(tmp_path):
    said, complete = [], []
    saver = Saver(tmp_path, Retention(1), say=said.append, on_complete=lambda path: complete.append(list_of(path)))
    list_of = lambda path: (path.name, len(list_checkpoints(path.parent)))  # noqa: E731
    saver.start(1, small(1.0), {})
    assert complete == []
    saver.start(2, small(2.0), {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    saver.wait()
    assert complete == [("checkpoint-1", 1), ("checkpoint-2", 2)], "before older ones are removed"
    assert [line.split(":")[0] for line in said] == ["checkpoint-1", "checkpoint-2"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_failed_save_is_told_at_the_next_boundary_and_retried_until_too_many_fail_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "RETRY", 0.0)
    said = []
    saver = Saver(tmp_path, max_failures=2, say=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(STAGES[0], failing(FULL[0]))
        saver.start(1, small(1.0), {})
        assert not saver.retry_is_due and said == []
        boundary(saver)
        assert "WARNING: cannot write the checkpoint" in said[0] and "no space left on the disk" in said[0]
        assert saver.holds_off and list(tmp_path.iterdir()) == [], "what was written does not fill the disk"
        boundary(saver)
        assert saver.retry_is_due and not saver.holds_off and saver.failed == {1}
    saver.start(2, small(2.0), {})
    saver.wait()
    boundary(saver)
    assert not saver.retry_is_due and latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    monkeypatch.setattr(STAGES[0], failing(FULL[0]))
    saver.start(3, small(3.0), {})
    boundary(saver)
    saver.start(4, small(4.0), {})
    with pytest.raises(StorageError, match=r"checkpoint-4: no space left .*\(2 times in a row\); older .* are kept"):
        boundary(saver)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize(("file", "shown"), [("/packages/orbax/checkpoint/writes.py", False), ("/mine.py", True)])
def test_a_write_that_fails_after_its_save_was_reported_prints_no_traceback(tmp_path, caplog, file, shown):
    save_checkpoint(tmp_path, 1, small(1.0), {})
    program = compile("async def write(): raise ValueError('no such folder')", file, "exec")

    async def forget():
        names = {}
        exec(program, names)
        tasks = [asyncio.ensure_future(names["write"]())]
        await asyncio.sleep(0)
        tasks.clear()

    asyncio.run(forget())
    gc.collect()
    assert ("no such folder" in caplog.text) == shown


def test_a_folder_that_is_away_is_not_made_again_and_saves_go_on_when_it_is_back(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "RETRY", 0.0)
    said = []
    saver = Saver(tmp_path / "run", max_failures=2, say=said.append)
    saver.start(1, small(1.0), {}, background=False)
    (tmp_path / "run").rename(tmp_path / "away")
    saver.start(2, small(2.0), {})
    assert not (tmp_path / "run").exists() and "run is gone; training goes on" in said[-1]
    (tmp_path / "away").rename(tmp_path / "run")
    saver.start(3, small(3.0), {}, background=False)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-3"]


def test_nobody_waits_for_a_save_that_could_not_begin(tmp_path, monkeypatch):
    saver = Saver(tmp_path, max_failures=2)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(STAGES[0], failing(MemoryError()))
        saver.start(1, small(1.0), {})
    saver.wait()
    saver.start(2, small(2.0), {}, background=False)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_retention_keeps_the_newest_the_best_and_every_nth(tmp_path):
    saver = Saver(tmp_path, Retention(last=2, period=4))
    for step in range(1, 10):
        saver.start(step, small(), {}, keep={5}, background=False)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (4, 5, 8, 9)]


def test_a_moved_run_folder_still_restores(tmp_path):
    save_checkpoint(tmp_path / "old", 1, small(3.0), {})
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert_same(restore_checkpoint(tmp_path / "new" / "checkpoint-1", small())[0], small(3.0))
