"""Tools in chats with OpenAI's client: calls in responses, results in requests, streams, and what is refused."""

import json

import pytest
from serving import one_device, serving  # noqa: F401 - a fixture

from jaxrlhf.commands.evaluation.rows import Prompts
from jaxrlhf.commands.evaluation.servers import ServerModel
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.commands.serve import ServeConfig
from jaxrlhf.commands.serve.models import LanguageModel
from jaxrlhf.commands.serve.scheduler import Event
from jaxrlhf.environments import ToolCall, ToolCallConfig, parse_hermes
from jaxrlhf.runs.console import Console

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

TEMPLATE = """{% for tool in tools or [] %}{{ tool.function.name + ' ' + (tool.function.return or '') }}{% endfor %}
{%- for message in messages %}{{ message.role + ': ' + message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": {{
call.function.arguments | tojson }}}</tool_call>{% endfor %}{{ eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}{{ mood }}"""
LLAMA3 = (
    TEMPLATE.replace("<tool_call>", "<|python_tag|>")
    .replace("</tool_call>", "")
    .replace('arguments": ', 'parameters": ')
)

ASK = [{"role": "user", "content": "2 + 3?"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS, "return": "int "},
}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
OTHER = '<tool_call>{"name": "add", "arguments": {"a": "é"}}</tool_call>'


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    """A server whose model says what a test has put into `script`."""
    path = tmp_path_factory.mktemp("template") / "tools.jinja"
    path.write_text(TEMPLATE)
    config = ServeConfig.create(model=(demo.lm,), port=0, max_slots=2, chat_template=str(path))
    with pytest.MonkeyPatch.context() as patch, serving_without_programs(patch, config) as running:
        model = running.models[demo.lm]
        running.model, running.script, running.prompts = model, "", []
        end, model.length = next(iter(model.scheduler.ends)), 1000

        def submit(jobs):
            for job in jobs:
                running.prompts.append(model.tokenizer.decode(job.prompt))
                ids = model.tokenizer(running.script, add_special_tokens=False)["input_ids"][: job.max_tokens]
                short = len(ids) == job.max_tokens
                for k, token in enumerate(ids):
                    job.deliver(Event(job, token, -0.5, finish="length" if short and k == len(ids) - 1 else None))
                if not short:
                    job.deliver(Event(job, end, -0.5, finish="stop"))

        patch.setattr(model.scheduler, "submit", submit)
        yield running


def serving_without_programs(patch, config):
    patch.setattr(LanguageModel, "warm_up", lambda self, ready: None)
    return serving(config)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def chat(server, client, demo):
    def ask(script, messages=ASK, **options):
        server.script = script
        options = {"tools": [ADD], "max_tokens": 200} | options
        return client.chat.completions.create(model=demo.lm, messages=messages, **options)

    return ask


def calls_of(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def test_a_call_in_the_text_is_a_tool_call_of_the_message(chat, server):
    reply = chat(f"Let me see.\n{CALL}{OTHER}")
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    assert calls_of(choice.message) == [("add", {"a": 2, "b": 3}), ("add", {"a": "é"})]
    first, second = choice.message.tool_calls
    assert first.type == "function" and first.id != second.id and first.id.startswith("call_")
    assert server.prompts[-1].startswith("add int user: 2 + 3?") and server.prompts[-1].endswith("assistant: ")
    alone = chat(CALL).choices[0].message
    assert alone.content is None and len(alone.tool_calls) == 1
    one = chat(CALL + OTHER, parallel_tool_calls=False).choices[0].message
    assert calls_of(one) == [("add", {"a": 2, "b": 3})]
    several = chat(CALL, n=2, logprobs=True).choices
    assert len({choice.message.tool_calls[0].id for choice in several}) == 2
    assert all(len(choice.logprobs.content) == len(several[0].logprobs.content) > 0 for choice in several)


@pytest.mark.parametrize(
    ("script", "content", "calls", "finish"),
    [
        ("It is 5.", "It is 5.", 0, "stop"),
        (f"Well … <tool {CALL} done", "Well … <tool  done", 1, "tool_calls"),
        (f"{CALL}\n{OTHER}", None, 2, "tool_calls"),
        ("I write <tool_call>{'name': add}</tool_call>", "I write <tool_call>{'name': add}</tool_call>", 0, "stop"),
        (f"{CALL}<tool_call>[]</tool_call>", f"{CALL}<tool_call>[]</tool_call>", 0, "stop"),
        ("ends with <tool", "ends with <tool", 0, "stop"),
    ],
)
def test_a_stream_has_the_content_and_the_calls_of_a_plain_response(chat, script, content, calls, finish):
    plain = chat(script).choices[0]
    assert (plain.message.content, len(plain.message.tool_calls or []), plain.finish_reason) == (content, calls, finish)
    pieces, streamed, ends = [], [], []
    for chunk in chat(script, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            streamed += choice.delta.tool_calls or []
            ends.append(choice.finish_reason)
    assert all(pieces[1:-1]) and "".join(pieces) == (content or "") and ends[-1] == finish and not any(ends[:-1])
    assert [call.index for call in streamed] == list(range(calls))
    expected = [call.function for call in plain.message.tool_calls or []]
    assert [(call.function.name, call.function.arguments) for call in streamed] == [
        (function.name, function.arguments) for function in expected
    ]


def test_text_before_a_call_is_streamed_before_the_call_is_complete(chat):
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(f"Let me see. {CALL}", stream=True)]
    assert sum(map(bool, pieces)) > 3 and "".join(pieces) == "Let me see."


def test_a_response_that_is_cut_says_so_beside_the_calls_that_are_whole(chat, server):
    size = len(server.model.tokenizer(CALL, add_special_tokens=False)["input_ids"])
    whole, cut = (chat(CALL, max_tokens=most).choices[0] for most in (size, size - 1))
    assert whole.finish_reason == cut.finish_reason == "length"
    assert calls_of(whole.message) == [("add", {"a": 2, "b": 3})]
    assert cut.message.tool_calls is None and cut.message.content.startswith('<tool_call>{"name"')


def test_results_go_back_to_the_model_under_the_names_of_their_tools(chat, server):
    first = chat(f"Let me see. {CALL}").choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": [{"type": "text", "text": "5"}]}
    reply = chat("It is 5.", [*ASK, first, result])
    assert reply.choices[0].message.content == "It is 5." and reply.choices[0].finish_reason == "stop"
    messages = [
        *ASK,
        {"role": "assistant", "content": "Let me see."}
        | {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]},
        {"role": "tool", "name": "add", "content": "5"},
    ]
    rendered = server.model.tokenizer.apply_chat_template(
        messages, tools=[ADD], tokenize=False, add_generation_prompt=True
    )
    assert server.prompts[-1] == rendered and CALL in rendered


def test_without_tools_or_with_tool_choice_none_the_text_stays_text(chat, server):
    for options in ({"tool_choice": "none"}, {"tools": []}):
        reply = chat(CALL, **options).choices[0]
        assert reply.message.content == CALL and reply.message.tool_calls is None and reply.finish_reason == "stop"
        assert server.prompts[-1].startswith("user: ")


def test_calls_in_the_form_of_llama3_are_read_where_the_template_shows_them(chat, server, monkeypatch):
    monkeypatch.setattr(server.model.tokenizer, "chat_template", LLAMA3)
    reply = chat('{"name": "add", "parameters": {"a": 2}}').choices[0]
    assert calls_of(reply.message) == [("add", {"a": 2})] and reply.message.content is None
    assert chat('{"sum": 5}').choices[0].message.content == '{"sum": 5}'


def test_a_form_that_is_named_goes_before_that_of_the_template(chat, server, monkeypatch):
    monkeypatch.setattr(server.model, "tool_calls", ToolCallConfig(tool_format="llama3"))
    reply = chat('{"name": "add", "parameters": {"a": 2}}').choices[0]
    assert calls_of(reply.message) == [("add", {"a": 2})] and reply.message.content is None
    assert chat(CALL).choices[0].message.content == CALL


@pytest.mark.parametrize("form", ["hermes", "llama3"])
def test_eval_scores_the_calls_in_a_servers_reply_as_hermes_writes_them(server, demo, monkeypatch, form):
    monkeypatch.setattr(server.model, "tool_calls", ToolCallConfig(tool_format=form))
    server.script = f"Let me see. {CALL}{OTHER}"
    if form == "llama3":
        server.script = '{"name": "add", "parameters": {"a": 2, "b": 3}}; {"name": "add", "parameters": {"a": "é"}}'
    config = EvalConfig.create(models=(f"{server.url}/v1",), max_new_tokens=200)
    prompts = Prompts([ASK], [[ADD]], [{"mood": "calm"}], {}, ["rows.jsonl line 1"], {})
    ((text,),) = ServerModel(config.models[0], config).respond(prompts, Console(quiet=True)).texts
    assert server.prompts[-1].endswith("assistant: calm")
    parsed = parse_hermes(text)
    assert parsed.calls == [ToolCall("add", {"a": 2, "b": 3}), ToolCall("add", {"a": "é"})]
    assert parsed.content == ("Let me see." if form == "hermes" else "")
    server.script = "It is 5."
    assert ServerModel(config.models[0], config).respond(prompts, Console(quiet=True)).texts == [["It is 5."]]


def assistant(**call):
    good = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    return [*ASK, {"role": "assistant", "content": None, "tool_calls": [good | call]}]


RESULT = {"role": "tool", "tool_call_id": "c", "content": "5"}


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", 'tool_choice="required" is not supported'),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice", "give auto or none"),
        ({"tools": "add"}, "tools", "must be a list"),
        ({"tools": [{"type": "function"}]}, "tools", r"tools\[0\]=.* must be"),
        ({"tools": [{"type": "web_search"}]}, "tools", r"tools\[0\]=.* must be"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools", r"function.name="),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools", "a JSON schema"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools", "strict is not"),
        ({"tools": [ADD, ADD]}, "tools", "two are named add"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
        ({"messages": [*ASK, RESULT]}, "messages", r"messages\[1\].tool_call_id=\"c\" must be the id of a tool call"),
        ({"messages": [*assistant(), RESULT | {"tool_call_id": "d"}]}, "messages", 'tool_call_id="d"'),
        ({"messages": assistant(id=3)}, "messages", r"tool_calls\[0\]=.* must have an id"),
        ({"messages": assistant(function={"arguments": "{}"})}, "messages", "must have a name"),
        ({"messages": assistant(function={"name": "f", "arguments": "[1]"})}, "messages", "a JSON object"),
        ({"messages": assistant(function={"name": "f", "arguments": {"a": 1}})}, "messages", "a JSON object"),
        ({"messages": assistant()}, "messages", "must end with a message for the assistant"),
    ],
)
def test_what_is_wrong_with_tools_is_named(chat, options, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        chat("", **options)
    assert raised.value.param == param


def test_a_request_may_set_variables_of_the_template(chat, server, monkeypatch):
    own = TEMPLATE + "{% if add_generation_prompt and enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    monkeypatch.setattr(server.model.tokenizer, "chat_template", own)
    for given, end in ((None, "assistant: "), ({"enable_thinking": False}, "assistant: False")):
        chat("Yes.", tools=[], extra_body={"chat_template_kwargs": given})
        assert server.prompts[-1].endswith(end)
    for given, message in (
        ({"enable_thinkin": False}, "reads no 'enable_thinkin'"),
        ({"messages": ""}, "messages comes from the conversation"),
        ({"enable_thinking": [1]}, 'an object such as {"enable_thinking": false}'),
        ("enable_thinking", "an object such as"),
    ):
        with pytest.raises(openai.BadRequestError, match=message) as raised:
            chat("Yes.", extra_body={"chat_template_kwargs": given})
        assert raised.value.param == "chat_template_kwargs"


def test_a_template_without_tools_is_refused(chat, server, monkeypatch):
    monkeypatch.setattr(server.model.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(openai.BadRequestError, match="does not show the tool add") as raised:
        chat("")
    assert raised.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="loses the tool call add"):
        chat("", [*assistant(), RESULT], tools=[])
    monkeypatch.setattr(server.model.tokenizer, "chat_template", TEMPLATE.replace("tool_call>", "call>"))
    with pytest.raises(openai.BadRequestError, match="no form of tool calls that is known"):
        chat("")
