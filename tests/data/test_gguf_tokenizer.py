"""Tokenizers in GGUF files."""

import pytest

from jaxrlhf.data import load_tokenizer
from jaxrlhf.errors import InputError

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")  # transformers' reader needs it

LETTERS = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))] + [chr(256 + i) for i in range(68)]


def write(path, pre="gpt-2", tokens=("he", "12", "Ġ1"), template=None):
    """A byte-level BPE tokenizer with three special tokens."""
    writer = gguf.GGUFWriter(str(path), "llama")
    names = ["<pad>", "<s>", "<end>", *LETTERS, *tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types([3] * 3 + [1] * (len(names) - 3))
    writer.add_token_merges([f"{token[0]} {token[1]}" for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if template:
        writer.add_chat_template(template)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def test_vocabulary_special_tokens_and_template_are_the_files(tmp_path):
    template = "{% for m in messages %}<s>{{ m['content'] }}<end>{% endfor %}"
    tokenizer = load_tokenizer(write(tmp_path / "model.gguf", template=template))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.convert_ids_to_tokens(tokenizer("he<end>", add_special_tokens=False)["input_ids"]) == [
        "he",
        "<end>",
    ]
    assert tokenizer.chat_template == template


@pytest.mark.parametrize(("pre", "tokens"), [("gpt-2", ["a", "Ġ", "12"]), ("smollm", ["a", "Ġ", "1", "2"])])
def test_numbers_are_split_as_the_file_says(pre, tokens, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "model.gguf", pre))
    assert tokenizer.tokenize("a 12") == tokens


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(path)
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(InputError, match="holds no tokenizer that can be read"):
        load_tokenizer(path)
