"""Rendering of prompts, responses and conversations as token ids."""

import pytest

from jaxrlhf.data import encode_conversation, encode_pair, encode_prompt, load_tokenizer, pad_token_id
from jaxrlhf.data.demo import train_tokenizer
from jaxrlhf.data.templates import check_template, start_ids
from jaxrlhf.errors import InputError

TEXTS = ["Human: What is hot? Assistant: The sun is hot.", "<|user|>hello there<|end|>", "You are kind."] * 50
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def chat():
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.chat_template = CHATML
    return tokenizer


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_the_default_template_puts_the_space_before_the_response_into_it(plain):
    prompt, response = encode_pair(plain, "What is hot?", "The sun")
    assert text(plain, prompt) == "Human: What is hot? Assistant:"
    assert text(plain, response) == " The sun<eos>"
    assert encode_prompt(plain, "What is hot?") == prompt
    assert encode_pair(plain, "What is hot?", "The sun")[1] == response


def test_a_template_of_ones_own_and_raw(plain):
    prompt, response = encode_pair(plain, "Hi {response}", "You", "Q: {prompt}\nA:  {response}!")
    assert (text(plain, prompt), text(plain, response)) == ("Q: Hi {response}\nA:", "  You!<eos>")
    prompt, response = encode_pair(plain, "Hi there", " You", "raw")
    assert (text(plain, prompt), text(plain, response)) == ("Hi there", " You<eos>")


def test_eos_is_one_id_and_closes_a_response_once(plain, chat):
    for tokenizer in (plain, chat):
        for given in ("You are kind.", "You are kind.<eos>", "You are kind.<eos>\nmore<eos>"):
            response = encode_pair(tokenizer, "hello", given)[1]
            assert response.count(tokenizer.eos_token_id) == 1
            assert response[-1] == tokenizer.eos_token_id
            assert text(tokenizer, response).strip() == "You are kind.<eos>"


def test_a_chat_template_renders_prompt_and_response(chat):
    prompt, response = encode_pair(chat, "hello there", "You are kind.")
    assert text(chat, prompt) == "<|user|>hello there<eos>\n<|assistant|>"
    assert text(chat, response) == "You are kind.<eos>"
    expected = chat.apply_chat_template(
        [{"role": "user", "content": "hello there"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == expected


def test_a_chat_template_that_rewrites_the_prompt_falls_back_to_the_response_alone(plain):
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.chat_template = CHATML.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    prompt, response = encode_pair(tokenizer, "hello", "You")
    assert text(tokenizer, prompt).endswith("<think>")
    assert text(tokenizer, response) == "You<eos>"


def test_an_explicit_template_is_used_instead_of_the_chat_template(chat):
    assert text(chat, encode_prompt(chat, "hello", "raw")) == "hello"


def test_a_chat_template_that_refuses_a_conversation_is_named(plain):
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(InputError, match=r"refuses a conversation of the roles user: no system message"):
        encode_prompt(tokenizer, "hello")


ROUNDS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "You"},
    {"role": "user", "content": "there"},
]


def test_a_conversation_is_rendered_round_by_round(plain, chat):
    ids = encode_conversation(plain, ROUNDS)
    assert text(plain, ids) == "Be kind. Human: hello Assistant: You Human: there Assistant:"
    ids = encode_conversation(plain, ROUNDS, "\n\nHuman: {prompt}\n\nAssistant: {response}")
    assert text(plain, ids) == "Be kind.\n\nHuman: hello\n\nAssistant: You\n\nHuman: there\n\nAssistant:"
    ids = encode_conversation(chat, ROUNDS)
    assert (
        text(chat, ids)
        == "<|system|>Be kind.<eos>\n<|user|>hello<eos>\n<|assistant|>You<eos>\n<|user|>there<eos>\n<|assistant|>"
    )
    with pytest.raises(InputError, match="must end with a message for the assistant"):
        encode_conversation(plain, ROUNDS[:3])


def test_bos_begins_the_prompt_only():
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    assert start_ids(tokenizer, "raw") == [0]
    prompt, response = encode_pair(tokenizer, "hello", "You")
    assert text(tokenizer, prompt) == "<pad>Human: hello Assistant:"
    assert text(tokenizer, response) == " You<eos>"


def test_pad_is_an_id_that_exists_and_eos_stays_eos():
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    size = len(tokenizer)
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id == 0
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id == 1
    assert len(tokenizer) == size
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"has no EOS token.*set eos_token in its tokenizer_config\.json"):
        pad_token_id(tokenizer)


@pytest.mark.parametrize("template", ["{prompt}", "{response} {prompt}", "{prompt} {prompt} {response}", ""])
def test_a_template_without_prompt_then_response_is_refused(template):
    with pytest.raises(InputError, match=r"must hold \{prompt\} and after it \{response\}"):
        check_template(template)


def test_unreadable_tokenizer_folders_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere': no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no tokenizer files; copy tokenizer\.json"):
        load_tokenizer(tmp_path)
    train_tokenizer(TEXTS, vocab_size=320).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token == "<eos>"
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(InputError, match=r"tokenizer\.json: not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer files cannot be read"):
        load_tokenizer(tmp_path)
