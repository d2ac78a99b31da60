"""Reward models as OpenRLHF, TRL, DeepSpeed-Chat and transformers save them, and ours as transformers reads them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.errors import InputError
from jaxrlhf.models import (
    for_transformers,
    load_pretrained,
    resize_vocabulary,
    save_adapter,
    save_pretrained,
    score_offset,
    stored_head,
    without_score_offset,
)
from jaxrlhf.models.config import LoRAConfig
from jaxrlhf.models.lora import add_lora
from jaxrlhf.objectives import score_at_last_token


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama", head="scalar")


@pytest.fixture
def folder(model, tmp_path):
    save_pretrained(model, tmp_path / "reward")
    return tmp_path / "reward"


def edit(folder, rename=None, add=None, **options):
    """Renames and adds tensors and options; an option of None is removed."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {rename(name) if rename else name: x for name, x in tensors.items()}
    save_file(tensors | (add or {}), folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | options
    values = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def as_module(name):
    return lambda tensor: tensor.replace("score.", f"{name}.") if tensor.startswith("score.") else tensor


def values(model, ids, mask=None):
    mask = np.ones_like(ids) if mask is None else mask
    return np.asarray(model.module.apply({"params": model.params}, jnp.asarray(ids), jnp.asarray(mask)))


def scores(model, ids, mask):
    return np.asarray(score_at_last_token(values(model, ids, mask), mask))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(3, 99, (2, 7))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("score", {}),
        ("value_head", {"value_head_prefix": "value_head", "normalize_reward": False, "mean": 0.5, "std": 2.0}),
        ("reward_head", {"value_head_prefix": "reward_head", "normalize_reward": False}),
        ("v_head", {"architectures": ["LlamaForCausalLM"]}),
    ],
)
def test_heads_are_found_under_the_names_of_other_trainers(model, folder, ids, name, options):
    edit(folder, as_module(name), **options)
    assert stored_head(folder) == "scalar"
    loaded = load_pretrained(folder, head="scalar", new_head=False)
    np.testing.assert_array_equal(values(loaded, ids), values(model, ids))
    with pytest.raises(InputError, match="is a reward model"):
        load_pretrained(folder)


@pytest.mark.parametrize("where", ["config", "tensors"])
def test_openrlhf_rewards_are_normalised_by_the_saved_mean_and_std(model, folder, ids, where, tmp_path):
    options = {"value_head_prefix": "score", "normalize_reward": True, "mean": 0.75, "std": 2.5}
    add = {}
    if where == "tensors":
        add = {"mean": np.array([0.75], np.float32), "std": np.array([2.5], np.float32)}
        options |= {"mean": 0.0, "std": 1.0}
    edit(folder, add=add, **options)
    loaded = load_pretrained(folder, head="scalar", new_head=False)
    np.testing.assert_allclose(values(loaded, ids), (values(model, ids) - 0.75) / 2.5, rtol=1e-5, atol=1e-6)
    assert score_offset(loaded) == pytest.approx(-0.3)
    with pytest.raises(InputError, match=r"adds -0\.3 to every score.*cannot.*normalize_reward to false"):
        save_pretrained(loaded, tmp_path / "export")
    with pytest.raises(InputError, match="adapter cannot hold"):
        save_adapter(add_lora(loaded, LoRAConfig(2)), tmp_path / "adapter")
    bare = without_score_offset(loaded)
    np.testing.assert_allclose(values(bare, ids), values(model, ids) / 2.5, rtol=1e-5, atol=1e-6)
    save_pretrained(bare, tmp_path / "export")
    again = load_pretrained(tmp_path / "export", head="scalar", new_head=False)
    np.testing.assert_array_equal(values(again, ids), values(bare, ids))


@pytest.mark.parametrize(
    "options", [{"std": 0.0}, {"std": -1.0}, {"std": None}, {"mean": "0"}, {"mean": float("inf")}, {"std": True}]
)
def test_a_normalisation_that_is_none_is_refused(folder, options):
    edit(folder, **{"normalize_reward": True, "mean": 0.0, "std": 1.0} | options)
    with pytest.raises(InputError, match=r"normalize_reward asks for a finite mean and a std above 0"):
        load_pretrained(folder, head="scalar")


def test_value_heads_of_trl(make_model, tmp_path, ids):
    torch = pytest.importorskip("torch")
    trl = pytest.importorskip("trl.experimental.ppo")
    save_pretrained(make_model("llama"), tmp_path / "lm")
    theirs = trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "lm")).eval()
    with torch.no_grad():
        theirs.v_head.summary.weight.normal_()
        theirs.v_head.summary.bias.fill_(0.7)
        expected = theirs(torch.tensor(ids))[2].numpy()
    theirs.save_pretrained(tmp_path / "trl")
    lm = load_pretrained(tmp_path / "trl")
    heads = [np.asarray(m.params["lm_head"]["kernel"])[:99] for m in (lm, make_model("llama"))]
    np.testing.assert_array_equal(*heads)
    assert stored_head(tmp_path / "trl") == "lm"
    critic = load_pretrained(tmp_path / "trl", head="scalar", new_head=False)
    np.testing.assert_allclose(values(critic, ids), expected, rtol=1e-4, atol=1e-4)
    assert score_offset(critic) == pytest.approx(0.7)
    file = next((tmp_path / "trl").glob("*.safetensors"))
    tensors = load_file(file)
    wrapped = {name if name.startswith("v_head") else f"pretrained_model.{name}": x for name, x in tensors.items()}
    save_file(wrapped, file)
    again = load_pretrained(tmp_path / "trl", head="scalar", new_head=False)
    np.testing.assert_array_equal(values(again, ids), values(critic, ids))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"score.0.weight": (24, 24), "score.2.weight": (2, 24)}, "process reward model.*Qwen2.5-Math-PRM"),
        ({"regression_layer.weight": (19, 24), "gating.layers.0.weight": (4, 24)}, "multi-objective.*ArmoRM"),
        ({"score_head.weight": (1, 24), "score_head.bias": (1,)}, "safe-rlhf"),
        ({"score.weight": (3, 24)}, r"gives 3 scores \(labels\).*num_labels 1"),
        ({"regression_head.weight": (1, 24)}, 'code of its own.*"value_head_prefix": "regression_head"'),
        ({"regression_head.weight": (5, 24)}, "code of its own, with several scores"),
    ],
)
def test_other_heads_are_refused_by_name(folder, tensors, message):
    edit(folder, as_module("unused"))
    stored = {n: x for n, x in load_file(folder / "model.safetensors").items() if not n.startswith("unused")}
    stored |= {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    for head in ("scalar", "lm"):
        with pytest.raises(InputError, match=message):
            load_pretrained(folder, head=head)


# What transformers reads


def word_tokenizer(size, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 1, "</s>": 2, "<pad>": 0} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special)


TEXTS = ["w4 w5 w6 </s>", "w7 w8 w9 w10 w11 w12", "w20 w21 </s> w22 </s> </s>", "w5"]


def score_by_transformers(folder, side, texts=TEXTS):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt", add_special_tokens=False)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        positions = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return batch, theirs(**ids, **positions).logits[:, 0].numpy()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("size", "special", "config"),
    [
        (99, {"pad_token": "</s>"}, {"pad_token_id": 2}),
        (99, {}, {"pad_token_id": None}),
        (97, {"pad_token": "</s>"}, {}),
        (99, {"pad_token": "<pad>"}, {"pad_token_id": 2}),
        (99, {"pad_token": "</s>"}, {"pad_token_id": 2, "vocab_size": 104}),
    ],
)
def test_an_exported_reward_model_scores_alike_in_transformers(make_model, tmp_path, side, size, special, config):
    model = make_model("llama", head="scalar", **{k: v for k, v in config.items() if k != "vocab_size"})
    if "vocab_size" in config:  # a table without rows to spare
        model, size = resize_vocabulary(model, 104), 104
    tokenizer = word_tokenizer(size, **special)
    before = len(tokenizer)
    save_pretrained(model, tmp_path, tokenizer)
    batch, expected = score_by_transformers(tmp_path, side)
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    known = np.where(mask, ids, 0)  # the pad token may be new
    np.testing.assert_allclose(scores(model, known, mask), expected, rtol=1e-4, atol=1e-4)
    again = load_pretrained(tmp_path, head="scalar", new_head=False)
    np.testing.assert_allclose(scores(again, ids, mask), expected, rtol=1e-4, atol=1e-4)
    pad = json.loads((tmp_path / "config.json").read_text())["pad_token_id"]
    assert pad not in (2, None) and not (ids[mask == 1] == pad).any()
    assert len(tokenizer) == before and tokenizer.pad_token == special.get("pad_token")


def test_a_spare_token_of_the_tokenizer_pads(make_model):
    tokenizer = word_tokenizer(90, pad_token="</s>")
    tokenizer.add_tokens(["<|reserved_special_token_0|>"], special_tokens=True)
    model, padded = for_transformers(make_model("llama", head="scalar"), tokenizer)
    assert model.config.pad_token_id == padded.pad_token_id == 90
    assert model.config.vocab_size == 99


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model_trained_with_pad_as_eos_scores_as_in_transformers(make_model, tmp_path, side):
    """It was trained to read the token before EOS, and goes on doing so, also after another export."""
    save_pretrained(make_model("llama", head="scalar"), tmp_path / "a", word_tokenizer(99))
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(values | {"pad_token_id": 2}))
    tokenizer = word_tokenizer(99, pad_token="</s>")
    tokenizer.save_pretrained(tmp_path / "a")
    model = load_pretrained(tmp_path / "a", head="scalar", new_head=False)
    save_pretrained(model, tmp_path / "b", tokenizer)
    for folder in ("a", "b"):
        batch, expected = score_by_transformers(tmp_path / folder, side)
        ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
        mask = np.where((ids == 2) & (mask == 0), 0, mask)
        np.testing.assert_allclose(scores(model, ids, mask), expected, rtol=1e-4, atol=1e-4)
    plain = model.module.clone(config=model.config.replace(score_skips=None))
    assert np.abs(scores(model.replace(module=plain), ids, mask) - expected).max() > 1e-2


def test_a_packed_sequence_that_begins_with_the_skipped_token_takes_no_value_of_the_one_before(make_model):
    model = make_model("llama", head="scalar")
    model = model.replace(module=model.module.clone(config=model.config.replace(score_skips=2)))
    sequences = np.array([[5, 6, 2, 2], [2, 2, 7, 2]])
    alone = model.module.apply({"params": model.params}, sequences)
    packed = model.module.apply(
        {"params": model.params}, sequences.reshape(1, 8), segment_ids=np.repeat([[1, 2]], 4, axis=1)
    )
    np.testing.assert_allclose(packed.reshape(2, 4), alone, rtol=1e-5, atol=1e-5)
