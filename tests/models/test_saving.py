"""Export folders: complete or absent, sharded by size, in the asked dtype, with everything a reload needs."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from disks import files_of_at_most
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.errors import InputError, StorageError
from jaxrlhf.models import LoRAConfig, ModelCard, add_lora, load_pretrained, save_adapter, save_pretrained
from jaxrlhf.models.hf import checkpoint_files
from jaxrlhf.sharding import make_mesh


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(model):
    return model.replace(params=jax.tree.map(lambda x: x + 1, model.params))


class DiskFull(OSError):
    pass


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fail_at", ["first tensor", "last tensor", "rename", "tokenizer"])
def test_an_interrupted_save_leaves_the_older_export_whole(model, tmp_path, monkeypatch, fail_at):
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    before, calls = contents(tmp_path), 0
    write = checkpoint_files._write_safetensors
    shards = len(list(tmp_path.glob("model-*.safetensors")))
    tokenizer = None

    def failing(path, tensors, dtype):
        nonlocal calls
        calls += 1
        if calls == (1 if fail_at == "first tensor" else shards):
            path.write_bytes(b"half a file")
            raise DiskFull("no space left")
        write(path, tensors, dtype)

    def no_rename(source, target):
        raise DiskFull("no space left")

    class Tokenizer:
        def save_pretrained(self, folder):
            raise DiskFull("no space left")

    if fail_at == "tokenizer":
        tokenizer = Tokenizer()
    elif fail_at == "rename":
        monkeypatch.setattr(checkpoint_files.os, "replace", no_rename)
    else:
        monkeypatch.setattr(checkpoint_files, "_write_safetensors", failing)
    with pytest.raises(StorageError, match=r"cannot write the model to .*: no space left"):
        save_pretrained(changed(model), tmp_path, tokenizer, max_shard_bytes=20_000)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    np.testing.assert_array_equal(
        load_pretrained(tmp_path).params["final_norm"]["scale"], model.params["final_norm"]["scale"]
    )


@pytest.mark.parametrize(
    "largest", ["model-*", "tokenizer.json", "adapter_model.safetensors", "adapter: tokenizer.json"]
)
def test_a_full_disk_leaves_the_older_export_whole_wherever_it_strikes(model, tmp_path, largest):
    tokenizer = train_tokenizer(["Hello, world!"] * 3, vocab_size=300)
    tokenizer.add_tokens([f"<word {i}>" for i in range(100)])
    adapted = add_lora(model, LoRAConfig(1, 6.0, 0.0, ("q_proj",)), jax.random.key(1))
    of_tokenizer = "tokenizer" in largest

    def save(model, adapted):
        if "adapter" in largest:
            save_adapter(adapted, tmp_path, "base", tokenizer if of_tokenizer else None)
        else:
            save_pretrained(model, tmp_path, tokenizer if of_tokenizer else None, max_shard_bytes=9_000)

    save(model, adapted)
    before = contents(tmp_path)
    found = tmp_path.glob(largest.removeprefix("adapter: "))
    limit = max(path.stat().st_size for path in found) - 1
    assert limit + 1 == max(map(len, before.values())), "this file alone is too large"
    with (
        files_of_at_most(limit),
        pytest.raises(StorageError, match=r"cannot write the model to .*; the files there are"),
    ):
        save(changed(model), changed(adapted))
    assert contents(tmp_path) == before
    save(changed(model), changed(adapted))
    assert contents(tmp_path) != before


def test_a_storage_that_fails_between_two_files_is_reported_with_what_is_new(model, tmp_path, monkeypatch):
    save_pretrained(model, tmp_path)
    replace = checkpoint_files.os.replace

    def failing(source, target):
        if target.name == "config.json":
            raise OSError(30, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(checkpoint_files.os, "replace", failing)
    said = r"Read-only file system; model.safetensors, .* are new, config.json are not: write it again"
    with pytest.raises(StorageError, match=said):
        save_pretrained(changed(model), tmp_path)


@pytest.mark.parametrize("old_bytes", [20_000, 2**30])
@pytest.mark.parametrize("new_bytes", [20_000, 2**30])
def test_a_save_killed_at_any_moment_leaves_old_or_new_weights_but_no_mixture(
    model, tmp_path, monkeypatch, old_bytes, new_bytes
):
    """As `kill -9` would: nothing is cleaned up after the failing operation."""
    from pathlib import Path

    new = changed(model)
    norms = [np.asarray(m.params["final_norm"]["scale"]) for m in (model, new)]
    tables = [np.asarray(m.params["layers"]["mlp"]["up"]["kernel"]) for m in (model, new)]
    seen, moment = set(), 0
    while True:
        folder = tmp_path / str(moment)
        save_pretrained(model, folder, max_shard_bytes=old_bytes)
        left = moment

        def count_down(function):
            def counted(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return function(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files.os, "replace", count_down(checkpoint_files.os.replace))
            patch.setattr(Path, "unlink", count_down(Path.unlink))
            patch.setattr(checkpoint_files.shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                save_pretrained(new, folder, max_shard_bytes=new_bytes)
                finished = True
            except Killed:
                finished = False
        loaded = load_pretrained(folder).params
        which = 0 if (np.asarray(loaded["final_norm"]["scale"]) == norms[0]).all() else 1
        np.testing.assert_array_equal(loaded["final_norm"]["scale"], norms[which])
        np.testing.assert_array_equal(loaded["layers"]["mlp"]["up"]["kernel"], tables[which])
        seen.add(which)
        if finished:
            break
        moment += 1
    assert which == 1 and seen == {0, 1} and moment >= 2
    save_pretrained(model, folder, max_shard_bytes=old_bytes)
    assert (np.asarray(load_pretrained(folder).params["final_norm"]["scale"]) == norms[0]).all()


def test_leftovers_of_a_killed_save_are_cleared(model, tmp_path):
    (tmp_path / ".export-99999").mkdir()
    (tmp_path / ".export-99999" / "model.safetensors").write_bytes(b"half")
    save_pretrained(model, tmp_path)
    assert not list(tmp_path.glob(".export-*"))


def test_shards_respect_the_size_and_the_index_names_every_tensor(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes, seen = [], {}
    for path in sorted(tmp_path.glob("model-*.safetensors")):
        tensors = load_file(path)
        sizes.append(sum(x.nbytes for x in tensors.values()))
        seen |= dict.fromkeys(tensors, path.name)
    assert seen == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert len(sizes) > 1 and max(sizes) <= 20_000
    assert {p.name for p in tmp_path.glob("model-*")} == {
        f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors" for i in range(len(sizes))
    }


def test_a_tensor_larger_than_a_shard_gets_its_own(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=1)
    assert all(len(load_file(p)) == 1 for p in tmp_path.glob("model-*.safetensors"))
    assert load_pretrained(tmp_path).config == model.config


def test_stale_weights_are_removed_and_other_files_kept(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    (tmp_path / "pytorch_model.bin").write_bytes(b"older still")
    (tmp_path / "metrics.jsonl").write_text("kept")
    save_pretrained(changed(model), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]
    np.testing.assert_array_equal(
        load_pretrained(tmp_path).params["final_norm"]["scale"], model.params["final_norm"]["scale"] + 1
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, jnp.bfloat16])
def test_dtype_of_the_files(model, tmp_path, dtype):
    save_pretrained(model, tmp_path, dtype=dtype)
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[np.dtype(dtype).name]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {name}  # noqa: SIM118
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == np.dtype(dtype).name
    norm = load_pretrained(tmp_path).params["final_norm"]["scale"]
    np.testing.assert_array_equal(norm, np.asarray(model.params["final_norm"]["scale"]).astype(dtype))


def test_a_dtype_that_cannot_be_exported_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="dtype int8 cannot be exported"):
        save_pretrained(model, tmp_path, dtype=np.int8)
    assert not list(tmp_path.iterdir())


def test_values_beyond_the_range_of_the_dtype_are_refused_by_name(model, tmp_path):
    save_pretrained(model, tmp_path)
    before = contents(tmp_path)
    huge = jax.tree.map(lambda x: x, model.params)
    huge["final_norm"] = {"scale": model.params["final_norm"]["scale"].at[3].set(1e6)}
    with pytest.raises(InputError, match=r"model\.norm\.weight.*float16"):
        save_pretrained(model.replace(params=huge), tmp_path, dtype=np.float16)
    assert contents(tmp_path) == before


def test_a_diverged_model_does_not_replace_a_good_export(model, tmp_path):
    save_pretrained(model, tmp_path)
    before = contents(tmp_path)
    diverged = jax.tree.map(lambda x: x * jnp.nan, model.params)
    with pytest.raises(InputError, match=r"NaN or infinite"):
        save_pretrained(model.replace(params=diverged), tmp_path)
    assert contents(tmp_path) == before


def test_config_generation_config_and_tokenizer_travel_along(model, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save_pretrained(model, tmp_path, Tokenizer())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    ids = json.loads((tmp_path / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == 99


def test_the_vocabulary_is_unpadded(model, tmp_path):
    assert model.params["embed"]["embedding"].shape[0] == 104
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (99, 24)


def test_saving_from_a_mesh_writes_the_same_bytes(model, tmp_path):
    save_pretrained(model, tmp_path / "alone")
    meshed = load_pretrained(tmp_path / "alone", mesh=make_mesh(data=2, fsdp=2, tensor=2))
    save_pretrained(meshed, tmp_path / "meshed")
    assert contents(tmp_path / "meshed") == contents(tmp_path / "alone")


def test_reward_models_say_so_and_get_a_pad_token(make_model, tmp_path):
    model = make_model("llama", head="scalar", pad_token_id=None)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 1 and config["eos_token_id"] == 2
    assert config["pad_token_id"] == 99 and config["vocab_size"] == 100  # no tokenizer says which id is free
    assert not (tmp_path / "generation_config.json").exists()
    again = load_pretrained(tmp_path, head="scalar", new_head=False)
    np.testing.assert_array_equal(again.params["score"]["kernel"], model.params["score"]["kernel"])


def test_a_card_tells_where_the_model_came_from(model, tmp_path):
    card = ModelCard(
        "sft",
        "Supervised fine-tuning",
        "facebook/opt-125m",
        ("rows.jsonl",),
        120,
        {"eval_loss": 1.25, "eval_perplexity": 3.4903},
    )
    save_pretrained(model, tmp_path, card=card)
    _, meta, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(meta) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxrlhf", "sft"],
        "base_model": "facebook/opt-125m",
    }
    for line in (
        "- Data: `rows.jsonl`",
        "- Optimizer steps: 120",
        "| eval_loss | 1.25 |",
        "- Trained by: Supervised fine-tuning",
    ):
        assert line in text
    save_pretrained(model, tmp_path, card=ModelCard(base_model="/models/local"))
    text = (tmp_path / "README.md").read_text()
    assert "base_model:" not in text and "`/models/local`" in text and "metric" not in text


@pytest.fixture(scope="module")
def larger(make_model):
    sizes = {"hidden_size": 128, "num_heads": 8, "num_kv_heads": 8, "head_dim": 16, "intermediate_size": 256}
    return make_model("gpt2", num_layers=16, **sizes)


def traced(function):
    """(peak bytes, bytes kept) of numpy and Python allocations while `function` runs."""
    tracemalloc.start()
    try:
        result = function()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak, kept, result


@pytest.mark.parametrize("meshed", [False, True])
def test_loading_and_saving_hold_one_tensor_beside_the_model(larger, tmp_path, meshed):
    save_pretrained(larger, tmp_path / "first")
    mesh = make_mesh(fsdp=8) if meshed else None
    load_pretrained(tmp_path / "first", mesh=mesh)  # imports and traces are not what is measured
    size = sum(x.nbytes for x in jax.tree.leaves(larger.params))
    tensor = 128 * 384 * 4
    assert size > 40 * tensor
    peak, _, model = traced(lambda: load_pretrained(tmp_path / "first", mesh=mesh))
    assert peak < 1.05 * size + 4 * tensor
    save_pretrained(model, tmp_path / "second")
    peak, kept, _ = traced(lambda: save_pretrained(model, tmp_path / "second"))
    assert peak < 5 * tensor and kept < tensor
