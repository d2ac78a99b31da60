"""Chat templates in the shapes of published ones: opened thoughts, marks within a turn, lost calls, EOS at the end."""

import pytest
from chat_tokenizers import chat_tokenizer

from jaxrlhf.data import TemplateConfig, encode_prompts, encode_rows, end_ids, with_template
from jaxrlhf.data.messages import read_messages

TURNS = "{% for m in messages %}"
USER = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + (c.function.arguments | tojson) }}{% endfor %}"
)
OPENED = (
    TURNS + "{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1].strip() }}" + CALLS + "{{ '<|im_end|>\n' }}"
    "{% else %}" + USER + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Prompts open thoughts; conversations have none."""
EMPTY = OPENED.replace("assistant\n' + m", "assistant\n<think></think>' + m")
"""Conversations have empty thoughts where prompts open them."""
CLOSED = OPENED.replace("<think>\n' }}", "<think>\n\n</think>\n\n' }}").replace(
    "m.content.split('</think>')[-1].strip()",
    "('<think>\n' + m.thinking + '\n</think>\n\n' if m.thinking else '') + m.content",
)
"""Prompts ask for no thoughts; conversations show them."""
INSTRUCTION = (
    TURNS + "{{ '### ' + m.role + '\n' if m.role == 'user' else '\n\n### answer:\n' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### answer:\n' }}{% endif %}"
)
"""The header of the assistant has one line break more in conversations."""
WRAPPED = (
    TURNS + "{{ '<|im_start|>' + m.role }}{{ '<|say|>' + m.content + '<|said|>' if m.role == 'assistant' "
    "else m.content }}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|quiet|>' }}{% endif %}"
)
"""Marks stand around the words of a turn; prompts have another one."""
CLOSING = (
    TURNS + USER.replace("<|im_end|>", "<|said|>") + "{% endfor %}{{ '' if add_generation_prompt else eos_token }}"
)
CLOSING += ASKED
"""EOS closes every text that is no prompt, after the end of a turn."""
NESTED = (
    TURNS + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant<|say|>' + (m.thinking or '') + '<|said|><|say|>' "
    "+ m.content + '<|said|><|im_end|>' }}{% else %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|say|>' }}{% endif %}"
)
"""One mark closes thoughts and words."""
NAMED = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + TURNS + USER + "{% endfor %}" + ASKED
"""Tools are shown, calls are not."""
CALLING = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + TURNS + USER.replace("' + m.role", "' ~ m.role")
)
CALLING = CALLING.replace("m.content +", "m.content }}" + CALLS + "{{") + "{% endfor %}" + ASKED
JOINED = CALLING.replace("(c.function.arguments | tojson)", "c.function.arguments")
"""Arguments are joined as texts."""
LAST = (
    TURNS
    + "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if loop.last else '')"
    " + m.content.split('</think>')[-1].strip() }}" + CALLS + "{{ '<|im_end|>\n' }}{% else %}" + USER + "{% endif %}"
    "{% endfor %}" + ASKED
)
"""The last message alone has empty thoughts."""
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def make(template, eos="<|im_end|>"):
    tokenizer = chat_tokenizer("chatml")
    names = ["<|im_start|>", "<|im_end|>", "<|say|>", "<|said|>", "<|quiet|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return with_template(tokenizer, TemplateConfig())


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(arguments):
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


def one(tokenizer, prompt, end, tools=None, **options):
    (row,) = encode_rows(tokenizer, [prompt], [[end]], [tools], **options)
    return row


def texts(template, end, tools=None, **options):
    """Prompt and response of a row with one question, as text; all of the response is trained on."""
    tokenizer = make(template, **options)
    row = one(tokenizer, [user("Why?")], [end], tools)
    if isinstance(row, str):
        return row
    (ids, mask) = row.responses[0]
    assert set(mask) == {1} and row.prompt == encode_prompts(tokenizer, [[user("Why?")]], [tools])[0]
    return tokenizer.decode(row.prompt), tokenizer.decode(ids)


QUESTION = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


# ---- the prompt opens the assistant's message otherwise than the conversation does


def test_thoughts_in_the_content_go_on_where_the_prompt_opens_them():
    prompt, response = texts(OPENED, assistant("<think>\nIt is hot.\n</think>\n\nThe sun."))
    assert prompt == QUESTION + "<think>\n"
    assert response == "It is hot.\n</think>\n\nThe sun.<|im_end|>"
    assert texts(OPENED, assistant("The sun.")) == (QUESTION + "<think>\n", "The sun.<|im_end|>")


def test_what_the_conversation_has_in_place_of_opened_thoughts_follows_the_prompt():
    assert texts(EMPTY, assistant("The sun.")) == (QUESTION + "<think>\n", "</think>The sun.<|im_end|>")
    prompt, response = texts(WRAPPED, assistant("The sun."))
    assert prompt.endswith("<|im_start|>assistant<|quiet|>")
    assert response == "<|say|>The sun.<|said|><|im_end|>"


@pytest.mark.parametrize("template", [OPENED, EMPTY])
def test_a_tool_call_follows_a_prompt_that_opens_thoughts(template):
    given = assistant("", tool_calls=[call({"at": "sun"})])
    _, response = texts(template, given)
    assert response.removeprefix("</think>") == '<call>look{"at": "sun"}<|im_end|>'


def test_thoughts_after_a_prompt_that_has_closed_them_are_a_problem():
    problem = texts(CLOSED, assistant("The sun.", thinking="It is hot."))
    assert problem.startswith("the chat template begins an assistant message otherwise in a prompt than in a conv")
    assert texts(CLOSED, assistant("The sun.")) == (QUESTION + "<think>\n\n</think>\n\n", "The sun.<|im_end|>")


def test_a_header_of_words_is_not_written_twice():
    assert texts(INSTRUCTION, assistant("The sun."))[1] == "The sun.<|im_end|>"
    assert "otherwise in a prompt" in texts(
        INSTRUCTION.replace("{{ m.content }}", "{{ m.content }}" + CALLS), assistant("", tool_calls=[call({})])
    )


# ---- ends


def test_marks_within_a_turn_are_no_end_where_eos_closes_it():
    assert end_ids(make(WRAPPED)) == (make(WRAPPED).eos_token_id,)
    tokenizer = make(NESTED, eos="<|im_end|>")
    ids, _ = one(tokenizer, [user("Why?")], [assistant("The sun.", thinking="Hot.")]).responses[0]
    assert tokenizer.decode(ids) == "Hot.<|said|><|say|>The sun.<|said|><|im_end|>"
    assert end_ids(make(NESTED.replace("<|im_end|>", ""), eos="<eos>")) == (make(NESTED, eos="<eos>").eos_token_id,)


def test_every_turn_is_trained_on_where_eos_alone_follows_the_last_one():
    tokenizer = make(CLOSING, eos="<eos>")
    row = one(tokenizer, [user("Why?"), assistant("The sun."), user("How?")], "It is hot.")
    ids, mask = row.prompt + row.responses[0][0], row.prompt_mask + row.responses[0][1]
    shown = tokenizer.decode([token for token, bit in zip(ids, mask, strict=True) if bit])
    assert shown == "The sun.<|said|>It is hot.<|said|>"


def test_an_end_that_stands_before_the_words_is_a_problem():
    tokenizer = make(NESTED, eos="<|said|>")
    problem = one(tokenizer, [user("Why?")], "The sun.")
    assert problem == (
        "a token that ends responses stands before the completion's words; name the right ones with eos_token_ids"
    )


def test_marks_that_leave_out_the_words_are_a_problem():
    template = TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% generation %}{{ '<|im_end|>' }}"
    template += "{% endgeneration %}{{ '\n' }}{% endfor %}" + ASKED
    assert "marks none of the completion's words" in one(make(template), [user("Why?")], "The sun.")


# ---- tools and thoughts


def test_a_lost_tool_call_is_a_problem_though_the_tools_show_its_name():
    for row in ([user("Why?"), assistant("", tool_calls=[call({})]), user("And?")], [user("Why?")]):
        end = [assistant("", tool_calls=[call({})])] if len(row) == 1 else "The sun."
        problem = one(make(NAMED), row, end, [TOOL], train_on="last")
        assert problem.startswith("the chat template loses the tool call look of message 2 (assistant)")


def test_the_name_of_a_call_does_not_show_a_tool():
    template = CALLING.replace("tools or []", "[]")
    problem = one(make(template), [user("Why?")], [assistant("", tool_calls=[call({})])], [TOOL])
    assert problem.startswith("the chat template does not show the tool look to the model")


@pytest.mark.parametrize("template", [CALLING, JOINED], ids=["objects", "texts"])
@pytest.mark.parametrize("arguments", [{"at": "sun"}, '{"at": "sun"}'], ids=["an object", "a text"])
def test_arguments_are_given_as_the_template_takes_them(template, arguments):
    _, response = texts(template, assistant("", tool_calls=[call(arguments)]), [TOOL])
    assert response == '<call>look{"at": "sun"}<|im_end|>'


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_of_any_name_reach_the_template(name, read):
    template = TURNS + USER.replace("m.content", "(m.%s or '') + m.content" % read) + "{% endfor %}" + ASKED  # noqa: UP031
    (message,) = read_messages([{"role": "assistant", "content": "The sun.", name: "Hot."}], "messages")
    assert texts(template, message)[1] == "Hot.The sun.<|im_end|>"


def test_lost_thoughts_are_a_problem_where_they_would_be_trained_on():
    template = TURNS + USER + "{% endfor %}" + ASKED
    assert texts(template, assistant("The sun.", reasoning_content="Hot.")) == (
        "the chat template loses the thoughts (reasoning_content or thinking or reasoning) of message 2 (assistant); "
        "choose another chat template, write the thoughts into the content, or remove them"
    )
    earlier = [user("Why?"), assistant("The sun.", reasoning_content="Hot."), user("And?")]
    assert not isinstance(one(make(template), earlier, "It is hot."), str)


# ---- the template writes earlier turns otherwise than the last one


def trained(tokenizer, row):
    ids, mask = (row.prompt + row.responses[0][0], row.prompt_mask + row.responses[0][1])
    return tokenizer.decode([token for token, real in zip(ids, mask, strict=True) if real])


def test_an_earlier_turn_is_trained_on_as_the_conversation_shows_it():
    tokenizer = make(LAST)
    prompt = [user("Why?"), assistant("The sun."), user("There?")]
    last = "<think>\n\n</think>\n\nhot<|im_end|>"
    assert trained(tokenizer, one(tokenizer, prompt, [assistant("hot")])) == "The sun.<|im_end|>" + last
    whole = one(tokenizer, prompt[:1], [*prompt[1:], assistant("hot")])
    assert trained(tokenizer, whole) == "The sun.<|im_end|>" + last
    prompt[1] = assistant("Look:", tool_calls=[call({"at": "sun"})])
    row = one(tokenizer, prompt, [assistant("hot")])
    assert trained(tokenizer, row) == 'Look:<call>look{"at": "sun"}<|im_end|>' + last


def test_an_earlier_turn_whose_thoughts_are_left_out_is_a_problem():
    tokenizer = make(LAST)
    for earlier in (assistant("<think>hot</think>The sun."), assistant("The sun.", thinking="hot")):
        problem = one(tokenizer, [user("Why?"), earlier, user("There?")], [assistant("hot")])
        assert "rewrites earlier turns" in problem and "train_on last" in problem
