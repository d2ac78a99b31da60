"""Checkpoint folders in: file kinds, dtypes, placement on a mesh, and every kind of damage reported by name."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained, param_shardings, read_config, save_pretrained
from jaxrlhf.sharding import make_mesh

# Sizes that eight devices divide, but for the vocabulary (101 is padded to 104).
WIDE = {"hidden_size": 32, "num_heads": 8, "num_kv_heads": 8, "head_dim": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("gpt2", **WIDE)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A good folder: never change it, copy it."""
    folder = tmp_path_factory.mktemp("gpt2")
    save_pretrained(model, folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def edit(folder, change):
    """Rewrite model.safetensors through `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same(got, expected, vocab=101):
    got, expected = (flatten_dict(x, sep="/") for x in (got, expected))
    assert set(got) == set(expected)
    for name, ours in got.items():
        ours, theirs = np.asarray(ours), np.asarray(expected[name])
        if name in ("embed/embedding", "lm_head/kernel"):
            assert not ours[vocab:].any()
            ours, theirs = ours[:vocab], theirs[:vocab]
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_single_file(model, folder):
    loaded = load_pretrained(folder)
    assert loaded.config == model.config
    assert_same(loaded.params, model.params)


def test_sharded_index(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=10_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(load_pretrained(tmp_path).params, model.params)


@pytest.mark.parametrize("sharded", [False, True])
def test_old_pytorch_files(model, folder, sharded):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, members in parts.items():
            torch.save({name: tensors[name] for name in members}, folder / file)
        weight_map = {name: file for file, members in parts.items() for name in members}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    assert_same(load_pretrained(folder).params, model.params)


def test_old_pytorch_files_in_half_precision(model, folder):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.tensor(v).bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), model.params)
    assert_same(load_pretrained(folder).params, rounded)


def test_base_model_files_without_the_prefix(model, folder):
    edit(folder, lambda tensors: {name.removeprefix("transformer."): x for name, x in tensors.items()})
    assert_same(load_pretrained(folder).params, model.params)


def test_buffers_of_old_checkpoints_and_a_stored_tied_head_are_passed_over(model, folder):
    def add(tensors):
        tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.uint8)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    edit(folder, add)
    assert_same(load_pretrained(folder).params, model.params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_half_precision_files(model, tmp_path, dtype, param_dtype):
    save_pretrained(model, tmp_path, dtype=dtype)
    loaded = load_pretrained(tmp_path, param_dtype=param_dtype)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(param_dtype), model.params)
    assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {np.dtype(param_dtype)}
    assert_same(loaded.params, rounded)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 1, 8)])
def test_placement_on_a_mesh(model, exported, sizes):
    mesh = make_mesh(*sizes)
    loaded = load_pretrained(exported, mesh=mesh)
    assert_same(loaded.params, model.params)
    wanted = flatten_dict(param_shardings(loaded.module, mesh), sep="/")
    for name, x in flatten_dict(loaded.params, sep="/").items():
        assert x.sharding == wanted[name], name
    split = 8 if sizes[0] == 1 else sizes[1] * sizes[2]
    table = loaded.params["embed"]["embedding"]
    assert table.shape == (104, 32) and table.addressable_shards[0].data.size == table.size // split


def test_a_language_model_gets_a_fresh_scalar_head_from_its_key(model, exported):
    first, again, other = (load_pretrained(exported, head="scalar", key=jax.random.key(k)) for k in (1, 1, 2))
    score = first.params["score"]["kernel"]
    assert score.shape == (32,) and "lm_head" not in first.params
    np.testing.assert_array_equal(score, again.params["score"]["kernel"])
    assert (np.asarray(score) != np.asarray(other.params["score"]["kernel"])).all()


def test_a_reward_loader_refuses_a_language_model(exported):
    with pytest.raises(InputError, match=r"has no scalar head.*language model.*jaxrlhf reward"):
        load_pretrained(exported, head="scalar", new_head=False)


def test_a_language_model_loader_refuses_a_reward_model(exported, tmp_path):
    save_pretrained(load_pretrained(exported, head="scalar"), tmp_path / "reward")
    with pytest.raises(InputError, match=r"reward is a reward model.*not a language model"):
        load_pretrained(tmp_path / "reward", head="lm")


def test_a_malicious_pickle_does_not_execute(folder, tmp_path):
    pytest.importorskip("torch")
    witness = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": Attack()}))
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read safely"):
        load_pretrained(folder)
    assert not witness.exists()


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        load_pretrained(tmp_path / "nowhere")


def test_unfetchable_hub_name():
    with pytest.raises(InputError, match=r"'nobody/nothing' is neither a local folder nor could it be fetched"):
        load_pretrained("nobody/nothing")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_pretrained(folder)


def test_checkpoints_in_place_of_a_model_are_named_with_the_way_to_a_model(folder):
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "metadata.json").write_text("{}")
    with pytest.raises(InputError, match=rf"the model of its run is {folder}\. .*convert --input {checkpoint} "):
        load_pretrained(checkpoint)
    (folder / "config.json").unlink()
    for path in (folder, checkpoint):
        with pytest.raises(InputError, match=rf"convert --input {path} .*--tokenizer_name_or_path"):
            load_pretrained(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "must hold a JSON object, found list")])
def test_unreadable_config(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"config\.json.*{message}"):
        load_pretrained(folder)


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_pretrained(folder)


@pytest.mark.parametrize("keep", [4, 200, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors is not a readable safetensors file.*truncated"):
        load_pretrained(folder)


def test_absent_shard(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=rf"names files that are not in .*{gone.name}"):
        load_pretrained(tmp_path)


def test_index_naming_a_tensor_its_shard_lacks(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, shard)
    with pytest.raises(InputError, match=f"missing {name}"):
        load_pretrained(tmp_path)


def test_every_misfit_is_listed_at_once(folder):
    def damage(tensors):
        del tensors["transformer.h.1.ln_1.bias"]
        tensors["transformer.h.7.ln_1.bias"] = np.zeros(32, np.float32)
        tensors["transformer.ln_f.weight"] = np.zeros(33, np.float32)

    edit(folder, damage)
    with pytest.raises(InputError) as error:
        load_pretrained(folder)
    lines = str(error.value).splitlines()
    assert str(folder) in lines[0] and "does not fit its config.json" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        "missing transformer.h.1.ln_1.bias (32,)",
        "unexpected transformer.h.7.ln_1.bias (32,)",
        "transformer.ln_f.weight has shape (33,), the config asks for (32,)",
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(folder, value):
    def damage(tensors):
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = value

    edit(folder, damage)
    with pytest.raises(InputError, match=r"tensor transformer\.h\.1\.mlp\.c_fc\.weight holds NaN or infinite"):
        load_pretrained(folder)


def test_integer_weights_are_refused(folder):
    edit(folder, lambda tensors: tensors.update({"transformer.ln_f.bias": np.zeros(32, np.int8)}))
    with pytest.raises(InputError, match=r"transformer\.ln_f\.bias.*int8"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert"}, r"config\.json: model type 'bert' is not supported; supported are \['"),
        ({"model_type": None}, r"'model_type' is missing"),
        ({"activation_function": "tanh"}, r"activation_function='tanh' is not supported \(one of"),
        ({"add_cross_attention": True}, r"add_cross_attention=True is not supported \(only False is\)"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        ({"n_head": None}, r"option 'n_head' is missing"),
        ({"n_head": 5}, r"n_embd=32.*n_head=5"),
        ({"n_head": "8"}, r"n_head='8' must be a positive integer"),
        ({"n_layer": 0}, r"n_layer=0 must be a positive integer"),
        ({"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon='1e-5' must be of type float"),
        ({"scale_attn_weights": 1}, r"scale_attn_weights=1 must be of type bool"),
    ],
)
def test_unsupported_configs_name_the_option(folder, values, message):
    edit_config(folder, **values)
    with pytest.raises(InputError, match=message):
        read_config(folder)


def test_unknown_head(folder):
    with pytest.raises(InputError, match="head='critic' is not one of 'lm', 'scalar'"):
        load_pretrained(folder, head="critic")


def test_a_mesh_that_does_not_divide_the_heads(make_model, tmp_path):
    save_pretrained(make_model("gpt2"), tmp_path)
    with pytest.raises(InputError, match=r"tensor=8 does not divide the model's num_heads=3"):
        load_pretrained(tmp_path, mesh=make_mesh(fsdp=1, tensor=8))
