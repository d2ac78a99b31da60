"""Weight files of all kinds: wrapped names, tied heads, buffers, indexes, two formats, odd tensors, the hub."""

import json
import logging
import shutil

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained, save_pretrained
from jaxrlhf.models.hf import hub
from jaxrlhf.models.hf.tensor_names import is_buffer


@pytest.fixture(scope="module")
def exported(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for case in ("llama", "llama-tied-mqa", "gpt2", "opt", "gpt_neox"):
        save_pretrained(make_model(case), folder / case)
    return folder


@pytest.fixture
def folder_of(exported, tmp_path):
    return lambda case: shutil.copytree(exported / case, tmp_path / case)


def edit(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / file)
    return tensors


def assert_same(model, other):
    got, expected = (flatten_dict(m.params, sep="/") for m in (model, other))
    assert set(got) == set(expected)
    rows = model.config.vocab_size
    for name, x in got.items():
        table = name in ("embed/embedding", "lm_head/kernel")
        ours, theirs = (np.asarray(a)[:rows] if table else np.asarray(a) for a in (x, expected[name]))
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.", "actor.", "model.", "a.b.c.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("case", ["llama", "gpt2", "opt"])
def test_what_wraps_a_model_in_a_state_dict_is_stripped(make_model, folder_of, caplog, prefix, case):
    folder = folder_of(case)
    edit(folder, lambda tensors: {prefix + name: x for name, x in tensors.items()})
    with caplog.at_level(logging.INFO, "jaxrlhf"):
        assert_same(load_pretrained(folder), make_model(case))
    assert f"begin with '{prefix}'" in caplog.text


def test_wrappers_between_modules_are_stripped(make_model, folder_of):
    folder = folder_of("llama")

    def wrap(tensors):
        return {n.replace("self_attn.", "_fsdp_wrapped_module.self_attn._orig_mod."): x for n, x in tensors.items()}

    edit(folder, wrap)
    assert_same(load_pretrained(folder), make_model("llama"))


def test_a_common_prefix_is_named_when_the_rest_does_not_fit(folder_of):
    folder = folder_of("llama")
    edit(folder, lambda tensors: {f"net.trunk.{name}".replace("_proj", "_map"): x for name, x in tensors.items()})
    with pytest.raises(InputError, match=r"names in the file begin with 'net\.trunk\.'"):
        load_pretrained(folder)


def test_adapters_that_are_not_merged_are_named(folder_of):
    folder = folder_of("llama")
    edit(
        folder,
        lambda tensors: {
            f"base_model.model.{n}".replace("q_proj.", "q_proj.base_layer."): x for n, x in tensors.items()
        },
    )
    with pytest.raises(InputError, match=r"adapters that are not merged.*merge_and_unload"):
        load_pretrained(folder)


def test_a_head_that_differs_from_a_tied_embedding_is_kept(folder_of, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = folder_of("llama-tied-mqa")
    head = np.random.default_rng(0).normal(0, 0.1, (99, 24)).astype(np.float32)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    model = load_pretrained(folder)
    assert "a head that differs" in caplog.text and not model.config.tie_embeddings
    ids = np.random.default_rng(1).integers(3, 99, (2, 8))
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    ours = np.asarray(model.module.apply({"params": model.params}, ids))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    save_pretrained(model, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(tmp_path / "export" / "model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize(
    ("case", "table"),
    [("llama-tied-mqa", "model.embed_tokens"), ("gpt2", "transformer.wte"), ("opt", "model.decoder.embed_tokens")],
)
def test_tied_weights_that_are_stored_once_or_twice_are_found(make_model, folder_of, case, table):
    folder, name = folder_of(case), f"{table}.weight"
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[name].copy()}))
    assert load_pretrained(folder).config.tie_embeddings
    edit(folder, lambda tensors: {n: x for n, x in tensors.items() if n != name})
    assert_same(load_pretrained(folder), make_model(case))
    assert_same(load_pretrained(folder, head="scalar", key=None), load_pretrained(folder, head="scalar"))


BUFFERS = {
    "llama": ("model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"),
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
    "opt": ("model.decoder.version",),
    "gpt_neox": ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
}


@pytest.mark.parametrize("case", sorted(BUFFERS))
def test_buffers_of_every_family_are_passed_over(make_model, folder_of, case):
    folder = folder_of(case)
    edit(folder, lambda tensors: tensors.update({name: np.zeros(4, np.uint8) for name in BUFFERS[case]}))
    assert_same(load_pretrained(folder), make_model(case))
    prefix = BUFFERS[case][0].split(".")[0] + "."
    if case != "gpt_neox":
        heads = ("lm_head.weight",)
        edit(folder, lambda tensors: {n if n in heads else n.removeprefix(prefix): x for n, x in tensors.items()})
        assert_same(load_pretrained(folder), make_model(case))


def test_no_weight_is_taken_for_a_buffer(exported):
    for file in exported.glob("*/model.safetensors"):
        assert not [name for name in load_file(file) if is_buffer(name)]


# Indexes


@pytest.fixture
def sharded(make_model, tmp_path):
    save_pretrained(make_model("llama"), tmp_path / "model", max_shard_bytes=20_000)
    return tmp_path / "model"


def index(folder, change):
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values["weight_map"])
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("outside", ["../elsewhere/{}", "{0.parent}/elsewhere/{1}", "sub/{}", "", 3, None])
def test_an_index_stays_in_its_folder(sharded, outside):
    name = sorted(sharded.glob("model-*.safetensors"))[0].name
    (sharded.parent / "elsewhere").mkdir()
    shutil.copy(sharded / name, sharded.parent / "elsewhere")
    if isinstance(outside, str):
        outside = outside.format(sharded, name) if "{1}" in outside else outside.format(name)

    def change(weight_map):
        weight_map |= {k: outside for k, v in weight_map.items() if v == name}

    index(sharded, change)
    with pytest.raises(InputError, match="outside its folder"):
        load_pretrained(sharded)


def test_an_index_lists_what_its_files_hold(sharded):
    index(sharded, lambda weight_map: weight_map.update({"model.ghost.weight": next(iter(weight_map.values()))}))
    with pytest.raises(InputError, match=r"does not fit its files(.|\n)*missing model\.ghost\.weight"):
        load_pretrained(sharded)
    index(sharded, lambda weight_map: [weight_map.pop(name) for name in ("model.ghost.weight", "model.norm.weight")])
    with pytest.raises(InputError, match=r"model\.norm\.weight is in .*, but not in the index"):
        load_pretrained(sharded)


# Formats and kinds of tensors


def as_bin(folder, change=None):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    torch.save(tensors if change is None else change(torch, tensors), folder / "pytorch_model.bin")


@pytest.mark.parametrize("kind", ["same", "half", "wrapped", "values", "shape", "names"])
def test_two_formats_must_hold_the_same_model(make_model, folder_of, kind):
    folder = folder_of("llama")

    def change(torch, tensors):
        if kind == "half":
            return {name: x.to(torch.bfloat16) for name, x in tensors.items()}
        if kind == "wrapped":
            return {f"module.{name}": x for name, x in tensors.items()}
        name = "model.layers.1.mlp.up_proj.weight"
        if kind == "values":
            tensors[name] = tensors[name] * 1.01
        elif kind == "shape":
            tensors[name] = tensors[name][:-1].clone()
        elif kind == "names":
            del tensors[name]
        return tensors

    as_bin(folder, change)
    if kind in ("same", "half", "wrapped"):
        assert_same(load_pretrained(folder), make_model("llama"))
        return
    with pytest.raises(InputError, match=r"two formats that differ, safetensors and \.bin(.|\n)*mlp\.up_proj"):
        load_pretrained(folder)


BIN_KINDS = {
    "list": (lambda torch, tensors: list(tensors.values()), "holds a list, not tensors by name"),
    "number": (lambda torch, tensors: 3, "holds a int, not tensors by name"),
    "nested": (lambda torch, tensors: {"state_dict": tensors}, r"holds no tensors by name, but 'state_dict'"),
    "sparse": (lambda torch, tensors: one(tensors, lambda x: x.to_sparse()), r"norm\.weight is sparse"),
    "meta": (lambda torch, tensors: one(tensors, lambda x: x.to("meta")), r"norm\.weight is on the meta device"),
    "float8": (
        lambda torch, tensors: one(tensors, lambda x: x.to(torch.float8_e4m3fn)),
        r"norm\.weight is quantised \(torch\.float8",
    ),
    "quantised": (
        lambda torch, tensors: one(tensors, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        r"quantised|cannot be read safely",
    ),
    "complex": (lambda torch, tensors: one(tensors, lambda x: x.to(torch.complex64)), r"norm\.weight is complex64"),
}


def one(tensors, change):
    return tensors | {"model.norm.weight": change(tensors["model.norm.weight"])}


@pytest.mark.parametrize("kind", sorted(BIN_KINDS))
def test_a_bin_file_that_holds_something_else_is_refused(folder_of, kind):
    folder = folder_of("llama")
    change, message = BIN_KINDS[kind]
    as_bin(folder, change)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=message):
        load_pretrained(folder)


def test_a_bin_file_from_before_torch_1_6_is_read(folder_of, make_model):
    torch, folder = pytest.importorskip("torch"), folder_of("llama")
    tensors = {k: torch.tensor(v) for k, v in load_file(folder / "model.safetensors").items()}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    assert_same(load_pretrained(folder), make_model("llama"))


def test_values_beyond_the_range_of_the_stored_dtype_are_refused(folder_of):
    folder = folder_of("llama")

    def enlarge(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
        tensors["model.norm.weight"][3] = 1e300

    edit(folder, enlarge)
    with pytest.raises(InputError, match=r"model\.norm\.weight holds values too large for float32"):
        load_pretrained(folder)


def test_float8_safetensors_are_refused(folder_of):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    folder = folder_of("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight is F8_E4M3; quantised"):
        load_pretrained(folder)


# The hub

_NAMES = """
.gitattributes README.md config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model
merges.txt chat_template.jinja model-00001-of-00002.safetensors model-00002-of-00002.safetensors
model.safetensors.index.json pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin
pytorch_model.bin.index.json consolidated.safetensors flax_model.msgpack tf_model.h5 onnx/model.onnx
onnx/config.json original/params.json checkpoint-5/model.safetensors training_args.bin optimizer.bin
"""
REPOSITORY = _NAMES.split()


def test_one_weight_format_is_downloaded():
    chosen = hub.files_to_fetch(REPOSITORY)
    assert [f for f in chosen if "model-" in f or "index" in f] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert {"config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"} < set(chosen)
    assert not [f for f in chosen if "/" in f or f.endswith((".bin", ".h5", ".msgpack")) or "consolidated" in f]
    old = hub.files_to_fetch(f for f in REPOSITORY if "safetensors" not in f)
    assert [f for f in old if ".bin" in f] == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]
    assert hub.files_to_fetch(["adapter_config.json", "adapter_model.safetensors", "x.bin"]) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.fixture
def fake_hub(monkeypatch):
    import types

    import huggingface_hub

    def set_up(info, snapshot=None):
        def model_info(name):
            if isinstance(info, Exception):
                raise info
            return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in info])

        monkeypatch.setattr(huggingface_hub, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    return set_up


def test_a_hub_model_is_loaded_from_the_chosen_files(make_model, folder_of, fake_hub, capsys):
    folder, asked = folder_of("llama"), []

    def snapshot(name, allow_patterns):
        asked.extend([name, *allow_patterns])
        return str(folder)

    fake_hub(["config.json", "model.safetensors", "pytorch_model.bin"], snapshot)
    assert_same(load_pretrained("someone/llama"), make_model("llama"))
    assert asked == ["someone/llama", "config.json", "model.safetensors"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["GatedRepoError", "RepositoryNotFoundError", "HfHubHTTPError"])
def test_a_hub_model_that_needs_a_login_says_how_and_prints_no_token(fake_hub, kind):
    import huggingface_hub.errors

    class Response:
        status_code = 403

    made = getattr(huggingface_hub.errors, kind)
    error = made.__new__(made, "403: hf_secretsecret")
    OSError.__init__(error, "403: hf_secretsecret")
    error.response = Response()
    fake_hub(error)
    with pytest.raises(InputError) as raised:
        load_pretrained("meta/llama")
    text = str(raised.value)
    assert "hf auth login" in text and "HF_TOKEN" in text and "secret" not in text
    assert ("gated" in text and "https://huggingface.co/meta/llama" in text) == (kind == "GatedRepoError")
    assert raised.value.__cause__ is None
