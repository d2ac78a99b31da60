"""Tools: what the model is shown, the calls that it writes, and what it gets back."""

import asyncio
import itertools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer

from jaxrlhf.data import TemplateConfig, encode_prompts, with_template
from jaxrlhf.data.continuations import Continuer
from jaxrlhf.data.renderer import RowProblem
from jaxrlhf.environments import (
    PARSERS,
    Calls,
    Environments,
    Observation,
    ToolCall,
    ToolCallConfig,
    certain_content,
    load_tool,
    parse_hermes,
    parse_llama3,
)
from jaxrlhf.environments.adapter import end_state
from jaxrlhf.environments.protocol import WrongAnswer
from jaxrlhf.errors import InputError
from jaxrlhf.rewards import Rewards
from jaxrlhf.rewards.arguments import EndState
from jaxrlhf.rl.outcomes import data_columns


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


async def look_up(word: str) -> dict:
    """Looks up a word.

    Args:
        word: The word.
    """
    await asyncio.sleep(0)
    return {"word": word, "found": word != "nothing"}


def undocumented(a):
    return a


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("It is 4.", "It is 4.", []),
        (
            'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
            "Let me see.",
            [ToolCall("add", {"a": 1})],
        ),
        (
            '<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call><tool_call>{"name": "f"}</tool_call>',
            "",
            [ToolCall("add", {"a": 2}), ToolCall("f", {})],
        ),
        ("<tool_call>{'name': 'add'}</tool_call>", "", ["the tool call is not valid JSON"]),
        ('<tool_call>{"name": "add", "arg', "", ["the tool call has no </tool_call>"]),
        ('<tool_call>{"name": 3}</tool_call> ok', "ok", ["must be an object with"]),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "", ["arguments of the call of add must be"]),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "", ["nested too deeply"]),
    ],
)
def test_calls_in_the_form_of_hermes_and_qwen(text, content, calls):
    check(parse_hermes(text), content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (" It is 4. ", "It is 4.", []),
        ('{"answer": 4}', '{"answer": 4}', []),
        ('{"name": "add", "parameters": {"a": 1}}', "", [ToolCall("add", {"a": 1})]),
        ('<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g"}', "", [ToolCall("f", {}), ToolCall("g", {})]),
        ('{"name": "add", "parameters": {"a": 1}', "", ["not valid JSON"]),
        ('{"name": "add"} thanks', "", [ToolCall("add", {}), "further text"]),
    ],
)
def test_calls_in_the_form_of_llama3(text, content, calls):
    check(parse_llama3(text), content, calls)


@pytest.mark.parametrize("form", ["hermes", "llama3"])
@pytest.mark.parametrize(
    "text",
    [
        'Well, < a <tool.\n\n<tool_call>{"name": "f"}</tool_call> and <tool_call>{"name": "g"}</tool_call> so',
        '{"name": "f", "parameters": {}}; {"name": "g"}',
        '<|python_tag|>{"name": "f"}',
        "It is {4} <| 5 ",
        "<|pyt",
    ],
)
def test_the_certain_content_of_a_growing_text_is_a_beginning_of_the_content(form, text):
    parsed = PARSERS[form](text)
    certain = [certain_content(text[:n], form) for n in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(certain))
    assert parsed.content.startswith(certain[-1])
    if form == "hermes" and text.startswith("Well"):
        assert certain[-1] == "Well, < a <tool." and certain[len("Well, < a <tool")] == "Well, < a"
    if text.startswith("It is"):
        assert certain[-1] == text.rstrip()


def check(parsed, content, calls):
    assert parsed.content == content and len(parsed.calls) == len(calls)
    for ours, expected in zip(parsed.calls, calls, strict=True):
        assert expected in ours if isinstance(expected, str) else ours == expected


def test_results_and_errors_go_back_to_the_model_as_messages():
    environments = Environments(None, (add, look_up))
    episode = environments.episode("hermes")
    episode.begin({"prompt": [{"role": "user", "content": "What is 1 + 2?"}]})
    texts = [
        '{"name": "add", "arguments": {"a": 1, "b": 2}}',
        '{"name": "look_up", "arguments": {"word": "nothing"}}',
        '{"name": "divide", "arguments": {}}',
        '{"name": "add", "arguments": {"c": 1}}',
        '{"name": "add", "arguments": {"a": "x", "b": 2}}',
        "{",
    ]
    text = "Well:" + "".join(f"<tool_call>{call}</tool_call>" for call in texts)
    reply = episode.respond(text, text)
    contents = [message["content"] for message in reply.observation.messages]
    assert contents[:2] == ["3", '{"word": "nothing", "found": false}']
    expected = ["no tool 'divide'; there are add, look_up", "missing a required argument: 'a'", "TypeError", "JSON"]
    for found, part in zip(contents[2:], expected, strict=True):
        assert found.startswith("Error") and part in found
    assert (reply.calls, reply.errors, reply.observation.done) == (6, 4, False)
    assert [m["role"] for m in episode.messages] == ["user", "assistant"] + ["tool"] * 6
    assert episode.messages[1]["content"] == "Well:" and len(episode.messages[1]["tool_calls"]) == 5
    assert episode.respond("It is 3.", "It is 3.").observation == Observation(done=True)


def alarmed(seconds: int) -> str:
    """Waits.

    Args:
        seconds: How long.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return "done"


def test_a_tool_that_sets_a_signal_fails_its_episode_with_a_reason():
    episode = Environments(None, (alarmed,)).episode("hermes")
    episode.begin({"prompt": [{"role": "user", "content": "Wait."}]})
    call = '<tool_call>{"name": "alarmed", "arguments": {"seconds": 1}}</tool_call>'
    with ThreadPoolExecutor(1) as pool, pytest.raises(WrongAnswer, match=r"alarmed sets a signal.*environment_timeout"):
        pool.submit(episode.respond, call, call).result()


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ((undocumented,), "tools undocumented: a tool needs an annotation"),
        ((add, add), "two are named add"),
        (("jaxrlhf.errors:missing",), "jaxrlhf.errors has no 'missing'"),
    ],
)
def test_functions_that_are_no_tools_are_refused_by_name(tools, message):
    with pytest.raises(InputError, match=message):
        Environments(None, tools)


# ---- the template

CALL = {"role": "assistant", "content": "", "tool_calls": [ToolCall("add", {"a": 1}).as_message()]}


@pytest.fixture(scope="module")
def hermes():
    return with_template(chat_tokenizer("chatml"), TemplateConfig(chat_template="hermes"))


def test_the_template_hermes_shows_tools_calls_and_results(hermes):
    schema = load_tool(add).schema
    conversation = [
        {"role": "user", "content": "1 + 1?"},
        CALL,
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "tool", "name": "add", "content": "3"},
    ]
    (ids,) = encode_prompts(hermes, [conversation], [[schema]])
    text = hermes.decode(ids)
    assert '"name": "add"' in text and "Adds two numbers." in text
    calls = '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
    results = "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response><|im_end|>\n"
    assert text.endswith(f"<|im_start|>user\n1 + 1?<|im_end|>\n{calls}{results}<|im_start|>assistant\n")
    plain = with_template(chat_tokenizer("chatml"), TemplateConfig(chat_template="chatml"))
    for messages in ([conversation[0]], [{"role": "system", "content": "Be kind."}, conversation[0]]):
        assert encode_prompts(hermes, [messages]) == encode_prompts(plain, [messages])


CALL_TURNS = (
    "{%% for t in tools %%}{{ t.function.name }}{%% endfor %%}{%% for m in messages %%}{{ m.role + ': ' + m.content }}"
    "{%% for c in m.tool_calls or [] %%}%s{%% endfor %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ 'assistant: ' }}{%% endif %%}"
)
CALLS_IN_XML = CALL_TURNS % "{{ '<tool_call>\n<function=' + c.function.name + '>\n</function>\n</tool_call>' }}"
CALLS_IN_LIST = CALL_TURNS % (
    """{{ '[{"name": "' + c.function.name + '", "parameters": ' + (c.function.arguments | tojson) + '}]' }}"""
)


def test_a_template_that_refuses_results_of_tools_is_refused_at_once():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template += (
        "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    )
    tokenizer.chat_template += "{{ raise_exception('no call before') }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match=r"the result of a tool cannot follow a turn: .*no call before"):
        Continuer(tokenizer, [load_tool(add).schema])


def test_a_template_that_needs_tools_continues_a_turn(hermes):
    schema = load_tool(add).schema
    needing = chat_tokenizer("chatml")
    needing.chat_template = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + hermes.chat_template
    needing = with_template(needing, TemplateConfig())
    result = [{"role": "tool", "name": "add", "content": "2"}]
    assert Continuer(needing, [schema]).after_turn(result, True) == Continuer(hermes, [schema]).after_turn(result, True)


def whole(tokenizer, messages, tools=None):
    return encode_prompts(tokenizer, [messages], [tools])[0]


@pytest.mark.parametrize("style", ["chatml", "llama3", "hermes"])
def test_what_follows_a_turn_is_what_the_template_puts_there(style, hermes):
    tokenizer = hermes if style == "hermes" else chat_tokenizer(style)
    question = [{"role": "user", "content": "What is 1 + 1?"}]
    more = [{"role": "user", "content": "And 2 + 2? <|im_end|>"}]
    turn = tokenizer("It is 2.", add_special_tokens=False)["input_ids"]
    expected = whole(tokenizer, [*question, {"role": "assistant", "content": "It is 2."}, *more])
    continuer = Continuer(tokenizer)
    cut = continuer.after_turn(more, ended=False)
    assert whole(tokenizer, question) + turn + cut == expected
    end = next(i for i, token in enumerate(cut) if tokenizer.decode([token]) in ("<|im_end|>", "<|eot|>"))
    assert continuer.after_turn(more, ended=True) == cut[end + 1 :]


def test_results_of_tools_continue_a_turn(hermes):
    schema = load_tool(add).schema
    question, result = [{"role": "user", "content": "1 + 1?"}], [{"role": "tool", "name": "add", "content": "2"}]
    continuer = Continuer(hermes, [schema])
    (prompt,) = continuer.prompts([question])
    rest = continuer.after_turn(result, ended=True)
    every = whole(hermes, [*question, CALL, *result], [schema])
    assert every[: len(prompt)] == prompt and every[-len(rest) :] == rest


def test_a_template_without_tools_or_with_another_form_is_refused(hermes):
    schema = load_tool(add).schema
    plain = with_template(chat_tokenizer("chatml"), TemplateConfig(chat_template="chatml"))
    with pytest.raises(InputError, match=r"does not show the tool add.*chat_template"):
        Continuer(plain, [schema])
    with pytest.raises(InputError, match="set tool_format"):
        ToolCallConfig().form(chat_tokenizer("llama3").chat_template)
    assert ToolCallConfig().form(hermes.chat_template) == "hermes"
    assert ToolCallConfig(tool_format="llama3").form(hermes.chat_template) == "llama3"
    for template in (CALLS_IN_XML, CALLS_IN_LIST):
        with pytest.raises(InputError, match="set tool_format"):
            ToolCallConfig().form(template)
    assert ToolCallConfig().form(CALLS_IN_LIST.replace("[{", "{").replace("}]", "}")) == "llama3"
    dropping = with_template(chat_tokenizer("chatml"), TemplateConfig(prompt_template="{prompt}{response}"))
    dropping.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(RowProblem, match="loses the content"):
        Continuer(dropping).after_turn([{"role": "tool", "content": "unseen"}], ended=True)


# ---- environments whose methods are tools


class Shop:
    """As TRL's `environment_factory` has them."""

    def reset(self, stock: int, prompt, sold: int = 0, **columns):
        self.stock = stock - sold
        self.place, self.day = columns.get("place", "here"), columns.pop("day", 1)
        return f" There are {stock}."

    def buy(self, count: int) -> str:
        """Buys things.

        Args:
            count: How many.
        """
        self.stock -= count
        return f"{self.stock} left"

    async def get_reward(self):
        return float(self.stock == 0)


def test_public_methods_of_an_environment_are_its_tools():
    environments = Environments(Shop)
    assert [tool.name for tool in environments.tools] == ["buy"] and environments.rewards
    assert (environments.columns, set(environments.wanted)) == (("stock",), {"sold", "place", "day"})
    first, second = (environments.episode("hermes") for _ in range(2))
    prompt = [{"role": "user", "content": "Buy all."}]
    assert first.begin({"prompt": prompt, "stock": 3})[0]["content"] == "Buy all. There are 3."
    second.begin({"prompt": prompt, "stock": 5})
    text = '<tool_call>{"name": "buy", "arguments": {"count": 3}}</tool_call>'
    assert [e.respond(text, text).observation.messages[0]["content"] for e in (first, second)] == ["0 left", "2 left"]
    done = first.respond("Done.", "Done.").observation
    assert (done.done, done.reward, second.cut()) == (True, 1.0, 0.0)
    environments.release(first)
    assert environments.episode("hermes").environment is first.environment
    assert prompt == [{"role": "user", "content": "Buy all."}]


# ---- calls


def test_calls_run_side_by_side_and_late_ones_are_given_up():
    calls, together, released = Calls(0.5), threading.Barrier(3), threading.Event()
    good = {calls.start(lambda: together.wait(60)): "good" for _ in range(3)}
    late = {calls.start(lambda: released.wait(60)): "late", calls.start(lambda: _forever()): "late"}
    broken = {calls.start(lambda: 1 / 0): "broken"}
    kinds, found = good | late | broken, {}
    while len(found) < len(kinds):
        found |= {call: call.error for call in calls.finished(block=True)}
    errors = {kind: {str(found[call]) for call, own in kinds.items() if own == kind} for kind in ("good", "late")}
    assert errors == {"good": {"None"}, "late": {"took longer than 0.5 s (--environment_timeout)"}}
    assert all("ZeroDivisionError" in str(found[call]) for call in broken)
    released.set()
    looping = [call for call in late if call.thread is not None]
    for call in looping:
        call.thread.join(10)
        assert not call.thread.is_alive()


def _forever():
    while True:
        time.monotonic()


def test_tools_alone_need_something_else_that_scores():
    environments = Environments(None, (add,))
    environments.check_scored(True)
    with pytest.raises(InputError, match="nothing else scores responses"):
        environments.check_scored(False)


class Ended:
    """With values of many kinds at the end of an episode."""

    size = 4
    _secret = 1

    def __init__(self):
        self.score, self.board, self.seen = np.float32(2.5), [[1, None], ["a", True]], {"a": {"b": 1.0}}
        self.client, self.counts, self._hidden = object(), {1: 2}, 3

    @property
    def half(self):
        return self.score / 2

    @property
    def broken(self):
        raise RuntimeError("the connection is closed")

    def reset(self):
        """Begins."""

    def get_reward(self):
        return 1.0


def test_functions_get_a_copy_of_an_environments_plain_values():
    environments = Environments(Ended)
    instance = environments.episode("hermes").environment
    state = end_state(instance)
    expected = {"size": 4, "score": 2.5, "board": [[1, None], ["a", True]], "seen": {"a": {"b": 1.0}}, "half": 1.25}
    assert state == expected and type(state["score"]) is float
    state["board"].clear()
    assert end_state(instance)["board"] == expected["board"]
    assert EndState(**state).half == 1.25
    with pytest.raises(AttributeError, match=r"'client' is none of the plain values .*score.*get_reward"):
        EndState(**state).client  # noqa: B018
    assert end_state(None) == {}


def test_a_function_that_takes_environments_asks_the_data_for_nothing_and_needs_an_environment():
    def required(environments, **kwargs):
        return [environment.score for environment in environments]

    def read(completions, transcript=None, **kwargs):
        return [environment.score for environment in kwargs["environments"]]

    rewards = Rewards([required, read])
    assert data_columns(rewards, Environments(Ended)) == ((), ())
    for without in (None, Environments(None, (add,))):
        with pytest.raises(InputError, match="takes environments, and the run has none"):
            data_columns(rewards, without)
    assert data_columns(Rewards([read]), Environments(None, (add,))) == ((), ())
