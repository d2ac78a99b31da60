"""Tokenizers on disk: published forms load, damaged files are refused by name, and an export keeps its templates."""

import json
import sys

import pytest
from end_tokenizers import SHAPES, TEXTS, write_sentencepiece

from jaxrlhf.data import (
    DataConfig,
    TemplateConfig,
    check_same_tokens,
    encode_prompts,
    load_data,
    load_tokenizer,
    read_tokenizer,
    vocabulary_size,
)
from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.errors import InputError
from jaxrlhf.models.hf.tokenizer_export import save_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer.json and a tokenizer_config.json."""
    train_tokenizer(TEXTS, vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def change(path, *place, to):
    """Sets one value in a JSON file."""
    values = inner = json.loads(path.read_text())
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    path.write_text(json.dumps(values))


# ---- forms


@pytest.mark.parametrize("symbols", [(), ("<|im_start|>", "<|im_end|>")])
def test_a_tokenizer_that_comes_as_a_sentencepiece_model_alone_encodes_as_that_model_does(tmp_path, symbols):
    sentencepiece = pytest.importorskip("sentencepiece")
    write_sentencepiece(tmp_path, symbols)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("The sun is hot!", "You are kind. hello", "naïve"):
        assert tokenizer(text)["input_ids"] == [1, *model.encode(text)]
    assert encode_prompts(tokenizer, ["hello"])[0][0] == tokenizer.bos_token_id == 1


def test_without_its_package_a_sentencepiece_model_is_refused_with_the_packages_name(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    write_sentencepiece(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r"tokenizer.model: .* needs the packages sentencepiece.*pip install sentence"):
        load_tokenizer(tmp_path)


def test_a_damaged_sentencepiece_model_is_named(tmp_path):
    pytest.importorskip("sentencepiece")
    path = write_sentencepiece(tmp_path) / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"tokenizer.model: a damaged SentencePiece model"):
        load_tokenizer(tmp_path)


def test_added_tokens_json_and_a_template_file_are_read(folder):
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 300, "<|im_end|>": 301}))
    (folder / "chat_template.jinja").write_text(SHAPES["yi-chat"][0])
    tokenizer = load_tokenizer(folder)
    assert vocabulary_size(tokenizer) == 302
    assert tokenizer.decode(encode_prompts(tokenizer, ["hello"])[0]) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("form", ["list", "files"])
def test_an_export_has_the_template_of_the_run_and_the_other_named_ones(folder, tmp_path, form):
    named = {"default": "{{ messages[0].content }}", "tool_use": "{{ messages[0].content + 'T' }}", "rag": "R"}
    if form == "list":
        listed = [{"name": name, "template": text} for name, text in named.items()]
        change(folder / "tokenizer_config.json", "chat_template", to=listed)
    else:
        tokenizer = read_tokenizer(folder)
        tokenizer.chat_template = named
        tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).chat_template == named["default"]
    for name in ("tool_use", "vicuna"):
        tokenizer = load_tokenizer(folder, TemplateConfig(chat_template=name))
        save_tokenizer(tokenizer, tmp_path / name)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / name).chat_template
        assert again == {"default": tokenizer.chat_template, "tool_use": named["tool_use"], "rag": "R"}
        assert load_tokenizer(tmp_path / name).chat_template == tokenizer.chat_template
    save_tokenizer(load_tokenizer(folder, TemplateConfig("Q {prompt} A {response}")), tmp_path / "plain")
    assert load_tokenizer(tmp_path / "plain").chat_template.startswith("{% for message in messages %}")


# ---- damage


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("text", ["[1]", "5", "null", "{", "[" * 5000, '{"a": ' + "9" * 5000 + "}"])
def test_a_file_that_is_no_json_object_is_named(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: (not valid JSON|must hold a JSON object)"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("model",), []),
        (("model", "vocab"), [1]),
        (("model", "vocab", "the"), 2**40),
        (("model", "vocab", "the"), "x"),
        (("model", "merges"), 5),
        (("normalizer",), "x"),
        (("added_tokens",), "x"),
        (("pre_tokenizer",), {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}),
    ],
)
def test_values_of_a_wrong_type_in_tokenizer_json_are_refused(folder, place, value):
    change(folder / "tokenizer.json", *place, to=value)
    with pytest.raises(InputError, match=r"tokenizer.*(cannot be read|of a wrong form)"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "vocab", "zzz"), 2**30, r"the token 'zzz' has the id 1073741824, above 16777216"),
        (("normalizer",), {"type": "Prepend", "prepend": "x" * 10**5}, r"makes \d+ tokens of the letter a"),
    ],
)
def test_huge_ids_and_texts_that_explode_are_refused_at_once(folder, place, value, message):
    change(folder / "tokenizer.json", *place, to=value)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("i", [2**40, 777])
def test_an_added_token_whose_id_leaves_a_gap_is_refused(folder, file, i):
    if file == "added_tokens.json":
        (folder / file).write_text(json.dumps({"<a>": i}))
    else:
        change(folder / file, "added_tokens_decoder", to={str(i): {"content": "<a>", "special": True}})
    with pytest.raises(InputError, match=rf"{file}: gives '<a>' the id {i}, but its place is 300"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("chat_template", 5, r"tokenizer_config.json: chat_template=5 must be a text"),
        ("chat_template", True, r"chat_template=True must be a text"),
        ("chat_template", [{"name": 1, "template": 2}], r"chat_template=.* must be a text, or a list"),
        ("chat_template", [1], r"chat_template=\[1\] must be a text, or a list"),
        ("chat_template", "{% if %}", r"chat template: line 1 is not valid"),
        ("chat_template", [{"name": "rag", "template": "x"}], r"no template of that name \(its names: rag\)"),
        ("eos_token", 5, r"tokenizer_config.json: eos_token=5 must be a text"),
        ("eos_token", {"content": 5}, r"eos_token=.* must be a text"),
        ("model_max_length", "x", r"model_max_length='x' must be a number"),
        ("added_tokens_decoder", {"x": {"content": "<q>"}}, r"the added tokens are of a wrong form"),
        ("tokenizer_class", [1], r"tokenizer_class=\[1\] must be a text"),
    ],
)
def test_values_of_a_wrong_type_in_tokenizer_config_are_refused(folder, name, value, message):
    change(folder / "tokenizer_config.json", name, to=value)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("hello", r"the chat template loses the content of message 1 \(user\)"),
        ("{{ messages[0].content + 5 }}", r"refuses a conversation of the roles user: TypeError: .*set chat_template"),
        ("{{ 1 / 0 }}", r"refuses a conversation of the roles user: ZeroDivisionError"),
    ],
)
def test_a_template_that_loses_the_text_or_fails_is_refused(folder, tmp_path, template, message):
    change(folder / "tokenizer_config.json", "chat_template", to=template)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(InputError, match=message):
        encode_prompts(tokenizer, ["What is hot?"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"What is {i}?", "chosen": "The sun."}) + "\n" for i in range(8)))
    with pytest.raises(InputError, match=message):
        load_data(DataConfig(data_path=(str(rows),), data_cache_dir=str(tmp_path / "cache")), tokenizer, "sft")


# ---- two tokenizers


def test_tokenizers_are_compared_by_their_tokens_and_not_by_their_size():
    first, same = (train_tokenizer(TEXTS, vocab_size=300) for _ in range(2))
    other = train_tokenizer([" ".join(f"quite another text {i * i}" for i in range(99))] * 9, vocab_size=300)
    same.add_special_tokens({"pad_token": "<own pad>"})
    check_same_tokens(first, same, ("the actor", "the reward model"))
    assert len(first) == len(other)
    with pytest.raises(InputError, match=r"the actor and the reward model have different tokenizers: .* of 300 tokens"):
        check_same_tokens(first, other, ("the actor", "the reward model"))
    with pytest.raises(InputError, match=r"'<own pad>' has the id 300 for the actor and does not exist for the reward"):
        check_same_tokens(same, first, ("the actor", "the reward model"))
