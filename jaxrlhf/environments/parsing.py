"""Tool calls in the model's text: the forms of Hermes and Qwen, and of Llama 3."""

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxrlhf.data.message_forms import Message
from jaxrlhf.data.renderer import common_part, renderer_of_transformers

ToolFormat = Literal["auto", "hermes", "llama3"]

_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
CALL_TAG = "<tool_call>"
_DECODER = json.JSONDecoder()
PYTHON_TAG = "<|python_tag|>"
MOST_CALLS = 16
"""Calls of one turn that are read; a model that repeats itself writes hundreds."""


class ToolCall(NamedTuple):
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]

    def as_message(self) -> dict[str, object]:
        """The call as chat templates read it."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


_PROBE = ToolCall("look_up", {"word": "sun"})


class Parsed(NamedTuple):
    """A turn of the model."""

    content: str
    """The text beside the calls."""
    calls: list[ToolCall | str]
    """In their order; a text says why a call cannot be read."""


def parse_hermes(text: str) -> Parsed:
    """Reads `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them, with text around."""
    calls: list[ToolCall | str] = []
    for match in list(_HERMES.finditer(text))[:MOST_CALLS]:
        if match[0].endswith("</tool_call>"):
            calls.append(_read_call(match[1]))
        else:
            calls.append("the tool call has no </tool_call> at its end")
    return Parsed(_HERMES.sub("", text).strip(), calls)


def parse_llama3(text: str) -> Parsed:
    """Reads `{"name": …, "parameters": {…}}`, one or several with semicolons between, as the whole text.

    `<|python_tag|>` may stand first. Text that does not begin with a brace is an answer.
    """
    body = text.strip().removeprefix(PYTHON_TAG).strip()
    if not body.startswith("{") or '"name"' not in body:
        return Parsed(text.strip(), [])
    calls: list[ToolCall | str] = []
    while body and len(calls) < MOST_CALLS:
        try:
            value, end = _DECODER.raw_decode(body)
        except (ValueError, RecursionError) as error:
            calls.append(f"the tool call is not valid JSON ({_reason(error)})")
            break
        calls.append(_checked(value))
        body = body[end:].lstrip()
        if body and not body.startswith(";"):
            calls.append("after a tool call there is further text; write nothing else, or separate calls by ';'")
            break
        body = body.lstrip("; \n")
    return Parsed("", calls)


def as_hermes(content: str, calls: Sequence[tuple[str, str]]) -> str:
    """A turn as Hermes writes it, which `parse_hermes` reads.

    Args:
        content: The text before the calls.
        calls: The name of each tool, and its arguments as a JSON text, written as they are.
    """
    written = [
        f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    ]
    return "\n".join([content] * bool(content) + written)


PARSERS: dict[str, Callable[[str], Parsed]] = {"hermes": parse_hermes, "llama3": parse_llama3}


def certain_content(text: str, form: str) -> str:
    """The beginning of a growing text that stays beside its tool calls, whatever follows; for streams.

    It ends before white space and before the possible beginning of a call. The parsers' `content` begins with it.

    Args:
        text: The text so far, without white space at its start.
        form: One of PARSERS.
    """
    if form == "llama3":
        begun = not text or text[0] == "{" or PYTHON_TAG.startswith(text[: len(PYTHON_TAG)])
        return "" if begun else text.rstrip()
    before, tag, _ = text.partition(CALL_TAG)
    if not tag:
        begun = max((n for n in range(1, len(CALL_TAG)) if text.endswith(CALL_TAG[:n])), default=0)
        before = text[: len(text) - begun]
    return before.rstrip()


@functools.lru_cache(maxsize=16)
def format_of(template: str) -> str | None:
    """The form of tool calls that a chat template asks for; None where it shows none that is known.

    A parser must read a call that the template writes. Templates that write none are known by their text.
    """
    written = written_call(template)
    if written:
        return next((form for form, parse in PARSERS.items() if parse(written).calls[:1] == [_PROBE]), None)
    if CALL_TAG in template:
        return "hermes"
    return "llama3" if "python_tag" in template or '"parameters": ' in template else None


def written_call(template: str) -> str:
    """A turn with a tool call, as a chat template writes it; empty where it writes none."""
    call = _PROBE.as_message() | {"id": "call00001"}  # nine letters, as Mistral's templates ask for
    properties = {name: {"type": "string", "description": "a"} for name in _PROBE.arguments}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    tool = {"type": "function", "function": {"name": _PROBE.name, "description": "a", "parameters": parameters}}
    question: Message = {"role": "user", "content": "a"}
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
    options: dict[str, Any] = {"chat_template": template, "tools": [tool], **names}
    render = renderer_of_transformers()
    try:
        (prompt,), _ = render([[question]], add_generation_prompt=True, **options)
        (whole,), _ = render([[question, {"role": "assistant", "content": "", "tool_calls": [call]}]], **options)
    except Exception:  # a template that refuses this leaves nothing to read
        return ""
    turn = whole[common_part(prompt, whole) :]
    return turn if _PROBE.name in turn else ""


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"


def _read_call(text: str) -> ToolCall | str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"the tool call is not valid JSON ({_reason(error)})"
    return _checked(value)


def _checked(value: object) -> ToolCall | str:
    """A call from its JSON value, or what is wrong with it."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return 'the tool call must be an object with "name" and "arguments"'
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as a JSON text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if arguments is None or not isinstance(arguments, Mapping):
        return f"the arguments of the call of {value['name']} must be an object"
    return ToolCall(value["name"], dict(arguments))
