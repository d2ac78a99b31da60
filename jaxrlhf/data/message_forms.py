"""Messages in the forms that chat templates read: no nulls, names of thoughts, arguments of tool calls."""

from __future__ import annotations

import json
from typing import Any

from jaxrlhf.config.files import parse_json
from jaxrlhf.data.messages import THOUGHTS

Message = dict[str, Any]
"""role and content, and where the data has them tool_calls, name, tool_call_id and the assistant's thoughts."""
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
"""Variables of a chat template that every rendering sets."""


def completed(message: Message) -> Message:
    """The message without nulls, which templates misread, with an empty text for null content; its thoughts under each
    name that templates have for them; the arguments of its tool calls as objects, not as JSON texts."""
    given = {"content": ""} | {name: value for name, value in message.items() if value is not None}
    thoughts = next((given[name] for name in THOUGHTS if isinstance(given.get(name), str)), None)
    if thoughts is not None:
        given = dict.fromkeys(THOUGHTS, thoughts) | given
    if isinstance(calls := given.get("tool_calls"), list):
        given["tool_calls"] = [with_read_arguments(call) for call in calls]
    return given


def with_read_arguments(call: object) -> object:
    """A tool call whose arguments are an object, where they are the JSON text of one."""
    arguments = function_of(call).get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        read = parse_json(arguments)
    except ValueError:
        return call
    return with_function(call, arguments=read) if isinstance(read, dict) else call


def with_written_arguments(message: Message) -> Message:
    """A message whose tool calls have their arguments as JSON texts."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    written = []
    for call in calls:
        arguments = function_of(call).get("arguments")
        text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
        written.append(call if text is arguments else with_function(call, arguments=text))
    return message | {"tool_calls": written}


def function_of(call: object) -> dict[str, Any]:
    """Name and arguments of a tool call or tool, which stand under `function` or without it."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return function if isinstance(function, dict) else {}


def with_function(call: Any, **changes: object) -> dict[str, Any]:
    """A tool call with another name or arguments."""
    return call | ({"function": call["function"] | changes} if "function" in call else changes)


def name_of_tool(call: object) -> str | None:
    name = function_of(call).get("name")
    return name if isinstance(name, str) else None
