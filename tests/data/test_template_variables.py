"""Variables of the chat template in a row: how they are read, and that the template gets them."""

import pytest
from chat_tokenizers import chat_tokenizer

from jaxrlhf.data import encode_prompts, encode_rows
from jaxrlhf.data.columns import Columns
from jaxrlhf.data.formats import Reader
from jaxrlhf.data.messages import BadRow

CONVERSATION = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "You"}]


def test_variables_of_the_chat_template_are_read_as_an_object_or_as_json():
    read = Reader("messages", Columns({}))
    for given in ({"enable_thinking": False, "xml_tools": None}, '{"enable_thinking": false, "xml_tools": null}'):
        assert read({"messages": CONVERSATION, "chat_template_kwargs": given}).variables == {"enable_thinking": False}
    for empty in (None, {}, "", {"xml_tools": None}):
        assert read({"messages": CONVERSATION, "chat_template_kwargs": empty}).variables is None
    for wrong, message in (
        ("{", "is not valid JSON"),
        ([1], "is not an object but a list"),
        ({"messages": []}, "holds messages, which comes from the conversation"),
    ):
        with pytest.raises(BadRow, match=f"'chat_template_kwargs' {message}"):
            read({"messages": CONVERSATION, "chat_template_kwargs": wrong})


def test_a_row_may_set_variables_of_the_template():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% set enable_thinking = enable_thinking if enable_thinking is defined else true %}"
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% if not enable_thinking %}<none>{% endif %}{% endif %}"
    )
    prompts, ends = [CONVERSATION[:1]] * 3, [["You"]] * 3
    rows = encode_rows(tokenizer, prompts, ends, None, [{"enable_thinking": False}, None, {"enable_thinking": False}])
    expected = [f"user:hello<|im_end|>assistant:{thoughts}" for thoughts in ("<none>", "", "<none>")]
    assert [tokenizer.decode(row.prompt) for row in rows] == expected
    assert encode_prompts(tokenizer, prompts[:1], None, [{"enable_thinking": False}]) == [rows[0].prompt]
