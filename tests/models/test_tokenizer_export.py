"""Saved tokenizers: what is completed for transformers 4, and that transformers 5 reads it as before."""

import json

import pytest

from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.models import save_pretrained
from jaxrlhf.models.hf.tokenizer_export import write_for_transformers_4

TEXTS = ["Hello , world !", "<x1>naïve 漢字\n\n  two<eos>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"


@pytest.fixture
def tokenizer():
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x1>", "<x2>"]})
    return tokenizer


def test_names_and_defaults_of_transformers_4_are_written(tokenizer, make_model, tmp_path):
    tokenizer.chat_template = TEMPLATE
    save_pretrained(make_model("llama"), tmp_path, tokenizer)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<x1>", "<x2>"]
    assert "extra_special_tokens" not in config
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["clean_up_tokenization_spaces"] is False
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == TEMPLATE
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)


@pytest.mark.parametrize("template", [None, TEMPLATE, {"default": TEMPLATE, "rag": "{{ messages[0]['content'] }}"}])
def test_transformers_5_reads_the_same_tokenizer(tokenizer, template, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    write_for_transformers_4(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS).data == tokenizer(TEXTS).data
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    assert loaded.chat_template == template
    if isinstance(template, dict):
        named = json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
        assert {entry["name"]: entry["template"] for entry in named} == template


def test_merges_with_spaces_stay_pairs(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].append(["a ", "b"])
    path.write_text(json.dumps(content))
    write_for_transformers_4(tmp_path)
    assert json.loads(path.read_text()) == content
