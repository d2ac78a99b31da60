"""Python functions as tools of the model: their schema for the chat template, and their calls."""

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxrlhf.config.imports import exception_line, import_function
from jaxrlhf.environments.parsing import Parsed, ToolCall
from jaxrlhf.environments.protocol import Message, WrongAnswer
from jaxrlhf.environments.running import resolved
from jaxrlhf.errors import InputError


class Tool(NamedTuple):
    """A function that the model may call."""

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]
    """As chat templates take it."""


class Results(NamedTuple):
    """The results of a turn's calls."""

    messages: list[Message]
    calls: int
    errors: int
    """Calls that could not be read, or failed."""


def load_tool(spec: str | Callable[..., object]) -> Tool:
    """A tool from `package.module:function`, `path/to/file.py:function` or a Python function.

    Raises:
        InputError: It cannot be imported, or lacks the annotations or the docstring that make its schema.
    """
    function = import_function(spec, "tools") if isinstance(spec, str) else spec
    name = getattr(function, "__name__", type(function).__name__)
    label = f"tools {repr(spec) if isinstance(spec, str) else name}"
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema = get_json_schema(function)
    except Exception as error:  # transformers raises several kinds, and annotations are evaluated
        raise InputError(
            f"{label}: a tool needs an annotation of each parameter, and a docstring that describes the function and, "
            f"under Args:, each parameter; {exception_line(error).partition(' (line')[0]}"
        ) from error
    return Tool(name, function, schema)


def load_tools(specs: Sequence[str | Callable[..., object]]) -> tuple[Tool, ...]:
    """Several tools. Raises InputError as `load_tool`, and for two of one name."""
    tools = tuple(load_tool(spec) for spec in specs)
    names = [tool.name for tool in tools]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise InputError(f"tools: two are named {doubled}; rename one of the functions")
    return tools


def call_tools(tools: Sequence[Tool], parsed: Parsed) -> Results:
    """Calls the tools that a turn asks for, one after the other. An error goes back to the model as a message.

    Raises:
        WrongAnswer: A tool sets a signal, which fails in every call.
    """
    by_name = {tool.name: tool for tool in tools}
    messages, errors = [], 0
    for call in parsed.calls:
        name, text, failed = _answer(by_name, call)
        errors += failed
        messages.append({"role": "tool", "name": name, "content": text})
    return Results(messages, len(parsed.calls), errors)


def _answer(tools: dict[str, Tool], call: ToolCall | str) -> tuple[str, str, bool]:
    """Name, result as text, and whether it is an error."""
    if isinstance(call, str):
        return "error", f"Error: {call}.", True
    tool = tools.get(call.name)
    if tool is None:
        return call.name, f"Error: there is no tool {call.name!r}; there are {', '.join(tools)}.", True
    try:
        inspect.signature(tool.function).bind(**call.arguments)
    except TypeError as error:
        return tool.name, f"Error: {tool.name}: {error}.", True
    try:
        return tool.name, as_text(resolved(tool.function(**call.arguments))), False
    except Exception as error:  # whatever the user's code raises
        if "signal only works in main thread" in str(error):
            raise WrongAnswer(
                f"the tool {tool.name} sets a signal, which works in the main thread alone, and tools run in others; "
                "leave its time limit to environment_timeout"
            ) from error
        return tool.name, f"Error: {type(error).__name__}: {error}"[:500], True


def as_text(value: object) -> str:
    """A tool's result as text: texts as they are, other values as JSON, else as Python shows them."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)
