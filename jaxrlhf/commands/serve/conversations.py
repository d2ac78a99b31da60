"""Reads the conversation of a request and its tools, in OpenAI's form, as chat templates take them."""

from collections.abc import Mapping
from typing import Any

from jaxrlhf.commands.serve.fields import ApiError, Fields, shown
from jaxrlhf.config.files import parse_json

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
OWN = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}
"""Keys of the messages of a role, besides role and content."""


def read_content(content: object, where: str) -> str:
    """The text of a message: a text, or a list of parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(f"{where}.content={shown(content)} must be a text", "messages")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(f"{where}.content: a part must be of the type text, not {shown(part)}", "messages")
    return "\n".join(part["text"] for part in content)


def read_messages(value: object, where: str = "messages") -> list[Message]:
    """A conversation: roles and texts, the assistant's tool calls and the tools' results."""
    if not isinstance(value, list) or not value:
        raise ApiError(f"{where} must be a list with at least one message", "messages")
    result: list[Message] = []
    names: dict[str, str] = {}
    for i, message in enumerate(value):
        place = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise ApiError(f"{place}={shown(message)} must be an object with role and content", "messages")
        role = {"developer": "system"}.get(str(message.get("role")), message.get("role"))
        if role not in ROLES:
            raise ApiError(f"{place}.role={shown(role)} must be system, developer, user, assistant or tool", "messages")
        known = ("role", "content", *OWN.get(role, ()))
        others = [key for key, held in message.items() if key not in known and held not in (None, [], {})]
        if others:
            raise ApiError(f"{place}.{others[0]} is not supported; remove it", "messages")
        result.append(_message(role, message, place, names))
    return result


def _message(role: str, message: Mapping[str, Any], place: str, names: dict[str, str]) -> Message:
    """A checked message. `names` has the tool of each call so far by the call's id."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ApiError(f"{place}.tool_calls={shown(calls)} must be a list of tool calls", "messages")
    content = message.get("content")
    text = "" if calls and content is None else read_content(content, place)
    if role == "tool":
        number = message.get("tool_call_id")
        if not isinstance(number, str) or number not in names:
            raise ApiError(
                f"{place}.tool_call_id={shown(number)} must be the id of a tool call in an assistant message before it",
                "messages",
            )
        # Templates name the tool, whose name OpenAI's protocol leaves to the call.
        return {"role": role, "content": text, "name": names[number], "tool_call_id": number}
    read = [_call(call, f"{place}.tool_calls[{k}]") for k, call in enumerate(calls)]
    names |= {call["id"]: call["function"]["name"] for call in read}
    return {"role": role, "content": text} | ({"tool_calls": read} if read else {})


def _call(call: object, place: str) -> dict[str, Any]:
    """A tool call of the assistant, with its arguments as an object."""
    if not isinstance(call, dict) or not isinstance(call.get("id"), str) or call.get("type") != "function":
        raise ApiError(f"{place}={shown(call)} must have an id, and the type function", "messages")
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(f"{place}.function={shown(function)} must have a name", "messages")
    given = function.get("arguments", "{}")
    try:
        arguments = parse_json(given) if isinstance(given, str) else None
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(f"{place}.function.arguments={shown(given)} must be a text with a JSON object", "messages")
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def read_tools(fields: Fields) -> list[dict[str, Any]]:
    """Takes `tools` and `tool_choice`: the tools that the model may call."""
    tools, choice = fields.left.pop("tools", []), fields.left.pop("tool_choice", "auto")
    if not isinstance(tools, list):
        raise fields.bad("tools", tools, "a list of functions")
    read = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in read]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ApiError(f"tools: two are named {twice}; rename one", "tools")
    if choice not in ("auto", "none"):
        raise ApiError(
            f"tool_choice={shown(choice)} is not supported: no response is forced to call a tool; give auto or none",
            "tool_choice",
            "unsupported_parameter",
        )
    return read if choice == "auto" else []


def _tool(tool: object, place: str) -> dict[str, Any]:
    """A checked tool."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(function, dict):
        raise ApiError(f'{place}={shown(tool)} must be {{"type": "function", "function": {{…}}}}', "tools")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        raise ApiError(f"{place}.function.name={shown(name)} must be a text", "tools")
    if parameters is not None and not isinstance(parameters, dict):
        raise ApiError(f"{place}.function.parameters={shown(parameters)} must be a JSON schema", "tools")
    if function.get("strict"):
        raise ApiError(
            f"{place}.function.strict is not supported: nothing binds a call to its schema; remove it", "tools"
        )
    # The other keys stay as they are, so that the prompt is the one of training with the same schema.
    kept = {key: value for key, value in function.items() if key != "strict" and value is not None}
    return {"type": "function", "function": kept}
