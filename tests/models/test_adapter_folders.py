"""Adapter folders given as models, adapters with new tokens in PEFT and back, and damaged adapters."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lab import few
from safetensors.numpy import load_file, save_file

from jaxrlhf.commands.convert import ConvertConfig, convert
from jaxrlhf.data import read_tokenizer
from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    LoRAConfig,
    add_lora,
    generation_view,
    load_adapter,
    load_pretrained,
    merged,
    read_config,
    resize_vocabulary,
    save_adapter,
    save_pretrained,
    split_trainable,
    stored_head,
)


def adapted(model, rank=3, **options):
    """The model with adapters (and rows of new tokens) that do something."""
    model = add_lora(model, LoRAConfig(rank, alpha=6, **options), jax.random.key(1))
    rng = np.random.default_rng(5)

    def leaf(path, x):
        name = path[-1].key
        return jnp.asarray(rng.normal(0, 0.2, x.shape), jnp.float32) if name in ("lora_b", "lora_rows") else x

    return model.replace(params=jax.tree_util.tree_map_with_path(leaf, model.params))


def logits(model, ids):
    return np.asarray(model.module.apply({"params": model.params}, jnp.asarray(ids)))


@pytest.fixture
def ids():
    return np.random.default_rng(2).integers(3, 99, (2, 8))


@pytest.fixture
def saved(make_model, tmp_path):
    model = adapted(make_model("llama"))
    save_pretrained(make_model("llama"), tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    return model, tmp_path / "adapter"


def set_option(folder, **options):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize("base", ["absolute", "relative", "hub"])
def test_an_adapter_folder_is_a_model(saved, ids, caplog, base, monkeypatch):
    model, folder = saved
    if base == "relative":
        set_option(folder, base_model_name_or_path="../base")
    if base == "hub":
        set_option(folder, base_model_name_or_path="someone/base")
        monkeypatch.setattr("jaxrlhf.models.hf.checkpoint_files.download", lambda name: folder.parent / "base")
    with caplog.at_level(logging.INFO, "jaxrlhf"):
        loaded = load_pretrained(folder)
    assert loaded.module.lora is None
    np.testing.assert_allclose(logits(loaded, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert f"{folder} is an adapter of" in caplog.text
    assert read_config(folder) == loaded.config and stored_head(folder) == "lm"


def test_convert_merges_an_adapter_folder(saved, ids, tmp_path):
    model, folder = saved
    convert(ConvertConfig(input=str(folder), output=str(tmp_path / "out"), target="hf", verify=True))
    np.testing.assert_allclose(logits(load_pretrained(tmp_path / "out"), ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_the_tokenizer_of_an_adapter_folder_is_that_of_its_base(saved, gpt2_tokenizer_folder):
    _, folder = saved
    set_option(folder, base_model_name_or_path=str(gpt2_tokenizer_folder))
    assert read_tokenizer(folder).get_vocab() == read_tokenizer(gpt2_tokenizer_folder).get_vocab()


@pytest.fixture
def gpt2_tokenizer_folder(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "names no base model"),
        (3, "names no base model"),
        ("../gone", r"adapter of the base model '\.\./gone', which is needed too.*set base_model_name_or_path in"),
        ("nobody/nothing", r"adapter of the base model 'nobody/nothing', which is needed too"),
        ("../adapter", "which is an adapter too; merge that one first"),
    ],
)
def test_an_adapter_without_its_base_says_how_to_name_it(saved, base, message):
    set_option(saved[1], base_model_name_or_path=base)
    with pytest.raises(InputError, match=message):
        load_pretrained(saved[1])


def test_adapters_of_reward_models_and_language_models_are_told_apart(make_model, tmp_path, saved, ids):
    reward = adapted(make_model("llama", head="scalar"))
    reward = reward.replace(params=reward.params | {"score": {"kernel": reward.params["score"]["kernel"] + 1}})
    save_adapter(reward, tmp_path / "reward", str(tmp_path / "base"))
    assert stored_head(tmp_path / "reward") == "scalar"
    loaded = load_pretrained(tmp_path / "reward", head="scalar", new_head=False)
    np.testing.assert_allclose(logits(loaded, ids), logits(reward, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="adapter of a reward model, not of a language model"):
        load_pretrained(tmp_path / "reward")
    with pytest.raises(InputError, match="adapter of a language model, not of a reward model"):
        load_pretrained(saved[1], head="scalar", new_head=False)


# New tokens


@pytest.mark.parametrize("case", few(["llama", "llama-tied-mqa", "gpt2", "opt-350m"], ["llama-tied-mqa", "opt-350m"]))
def test_rows_of_new_tokens_are_trained_saved_and_loaded_by_peft(case, make_model, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = make_model(case)
    rows = base.config.vocab_size
    model = adapted(resize_vocabulary(base, rows + 3))
    trained = model.module.lora.trained_tokens
    assert trained == (rows, rows + 1, rows + 2)
    ids = np.random.default_rng(2).integers(3, rows + 3, (2, 8))
    ids[:, 2:5] = trained
    ours = logits(model, ids)
    np.testing.assert_allclose(logits(merged(model), ids), ours, rtol=1e-4, atol=1e-4)
    save_pretrained(base, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs.resize_token_embeddings(rows + 3)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    for again in (merged(load_adapter(base, tmp_path / "adapter")), load_pretrained(tmp_path / "adapter")):
        assert again.config.vocab_size == rows + 3
        np.testing.assert_allclose(logits(again, ids), ours, rtol=1e-4, atol=1e-4)
    again = load_adapter(base, tmp_path / "adapter")
    save_adapter(again, tmp_path / "again", str(tmp_path / "base"))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    save_pretrained(model, tmp_path / "merged")
    np.testing.assert_allclose(logits(load_pretrained(tmp_path / "merged"), ids), ours, rtol=1e-4, atol=1e-4)
    assert (
        generation_view(model.params, model.module).outer.keys()
        == generation_view(merged(model).params, merged(model).module).outer.keys()
    )


def test_gradients_reach_the_rows_of_new_tokens_as_in_peft(make_model, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = make_model("llama")
    model = adapted(resize_vocabulary(base, 102))
    ids = np.random.default_rng(2).integers(90, 102, (2, 8))
    save_pretrained(base, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs.resize_token_embeddings(102)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    theirs(torch.tensor(ids), use_cache=False).logits.square().sum().backward()
    expected = {n: p.grad.numpy() for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n}
    trainable, frozen = split_trainable(model.params, model.module)

    def total(trainable):
        return jnp.square(model.module.apply({"params": frozen | trainable | joined(frozen, trainable)}, ids)).sum()

    grads = jax.grad(total)(trainable)
    for holder, name in (("embed_rows", "embed_tokens"), ("head_rows", "lm_head")):
        theirs_grad = next(x for n, x in expected.items() if name in n)
        ours = np.asarray(grads[holder]["lora_rows"])
        assert np.abs(ours - theirs_grad).max() < 1e-4 * np.abs(theirs_grad).max()


def joined(frozen, trainable):
    from jaxrlhf.models import join

    return join(frozen, trainable)


@pytest.mark.parametrize("case", ["llama", "llama-tied-mqa"])
def test_embeddings_that_peft_saved_whole_are_loaded(case, make_model, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = make_model(case)
    save_pretrained(base, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs.resize_token_embeddings(102)
    options = {"modules_to_save": ["embed_tokens", "lm_head"]} if case == "llama" else {}
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, **options)
    theirs = peft.get_peft_model(theirs, config).eval()
    if case == "llama":
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "modules_to_save" in name:
                    parameter[5:9] += 0.3
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ids = np.random.default_rng(2).integers(3, 102, (2, 8))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), use_cache=False).logits.numpy()
    ours = load_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(logits(ours, ids), expected, rtol=1e-4, atol=1e-4)


# Damage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 must be a positive integer"),
        ({"r": "8"}, "r='8' must be a positive integer"),
        ({"r": None}, "r=None must be a positive integer"),
        ({"r": 2.5}, r"r=2\.5 must be a positive integer"),
        ({"r": True}, "r=True must be a positive integer"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a positive number"),
        ({"lora_alpha": "x"}, "lora_alpha='x' must be a positive number"),
        ({"lora_dropout": 2}, "lora_dropout=2 must be a number"),
        ({"use_rslora": "yes"}, "use_rslora='yes' must be true or false"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern=.* must hold values by pattern"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "could take forever to match"),
        ({"alpha_pattern": {".*.*.*.*.*x": 2}}, "could take forever to match"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern of 'q_proj'=0 must be a positive number"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern of 'q_proj'=1.5 must be a positive integer"),
        ({"modules_to_save": "score"}, "modules_to_save='score' must be a list of names"),
        ({"modules_to_save": [1]}, "modules_to_save=.* must be a list of names"),
        ({"init_lora_weights": ["x"]}, "not supported: init_lora_weights"),
        ({"trainable_token_indices": "x"}, "must list token ids"),
        ({"trainable_token_indices": {"embed_tokens": [1, 1]}}, "must list token ids"),
    ],
)
def test_wrong_options_of_an_adapter_are_named(saved, make_model, options, message):
    set_option(saved[1], **options)
    with pytest.raises(InputError, match=message):
        load_adapter(make_model("llama"), saved[1])


@pytest.mark.parametrize("value", [np.float32(1), np.ones((3, 24), np.int32), np.ones(24, np.float32)])
def test_tensors_of_an_adapter_are_matrices_of_floats(saved, make_model, value):
    path = saved[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: np.asarray(value)}, path)
    with pytest.raises(InputError, match="an adapter holds floating-point matrices"):
        load_adapter(make_model("llama"), saved[1])


def test_a_folder_with_weights_of_its_own_is_no_adapter(saved, tmp_path, make_model):
    _, folder = saved
    shutil.copytree(tmp_path / "base", folder, dirs_exist_ok=True)
    jax.tree.map(
        np.testing.assert_array_equal, load_pretrained(folder).params["layers"], make_model("llama").params["layers"]
    )


def test_adapters_of_reward_models_as_peft_saves_them(make_model, tmp_path, ids):
    """PEFT lists `classifier` beside `score` for any sequence classification."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    save_pretrained(make_model("llama", head="scalar"), tmp_path / "base")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", attn_implementation="eager")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits[:, 0].numpy()
    ours = load_pretrained(tmp_path / "adapter", head="scalar", new_head=False)
    np.testing.assert_allclose(logits(ours, ids)[:, -1], expected, rtol=1e-4, atol=1e-4)
