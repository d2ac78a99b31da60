"""Takes prompt, chosen and rejected out of a row, or names what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

from jaxrlhf.data.renderer import Message, Prompt

PAIR = ("prompt", "chosen", "rejected")
FIELDS = {"sft": ("prompt", "chosen"), "reward": PAIR, "ppo": ("prompt",), "dpo": PAIR}
"""Fields of a row that each step reads."""


@dataclass(frozen=True)
class Example:
    """A valid row.

    Attributes:
        prompt: text, or a conversation that ends before an assistant message.
        responses: chosen, or chosen and rejected, or nothing, as the step needs.
        columns: values of the further fields that the caller asks for.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    columns: tuple[object, ...] = ()


class BadRow(Exception):
    """A step cannot use a row. The message names the field, as the file does, and what is wrong with it."""

    def __init__(self, field: str, what: str):
        super().__init__(f"'{field}' {what}")


def read_row(row: object, step: str, names: Mapping[str, str]) -> Example:
    """Reads the example in a row for a step.

    A prompt is text or a list of messages. A response is text, or a list of messages that ends with the assistant's.
    Without a prompt field, the prompt is the beginning of chosen, when that is a whole conversation.

    Args:
        row: a mapping of field to value.
        step: "sft", "reward", "ppo" or "dpo".
        names: names of prompt, chosen and rejected in the file.

    Raises:
        BadRow: a field is missing, empty, or of another kind.
    """
    if not isinstance(row, Mapping):
        raise BadRow("row", f"is not an object but {kind(row)}")
    name, chosen = names["prompt"], row.get(names["chosen"])
    if name not in row and is_conversation(chosen):
        beginning = list(chosen)
        while beginning and beginning[-1]["role"] == "assistant":
            beginning.pop()
        row = {**row, name: beginning}
    prompt = read_field(row, name)
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            raise BadRow(name, "ends with an assistant message")
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
    responses = []
    for field in FIELDS[step][1:]:
        value = read_field(row, names[field])
        response = assistant_text(value) if isinstance(value, list) else value
        if not response.strip():
            raise BadRow(names[field], "is empty")
        responses.append(response)
    return Example(prompt, tuple(responses))


def read_field(row: Mapping[str, object], name: str) -> Prompt:
    """The text or the messages in a field. Raises BadRow for anything else, and for an empty field."""
    value = row.get(name)
    if value is None:
        raise BadRow(name, "is null" if name in row else "is missing")
    if not isinstance(value, str | list):
        raise BadRow(name, f"is not text but {kind(value)}")
    if not value or (isinstance(value, str) and not value.strip()):
        raise BadRow(name, "is empty")
    if isinstance(value, list) and not is_conversation(value):
        raise BadRow(name, "is a list, but not of messages with text in 'role' and 'content'")
    return value


def read_columns(row: Mapping[str, object], names: tuple[str, ...]) -> tuple[object, ...]:
    """The values of the fields `names`. Raises BadRow for a field that is missing, null, or no JSON value."""
    for name in names:
        if row.get(name) is None:
            raise BadRow(name, "is null" if name in row else "is missing")
        try:
            json.dumps(row[name])
        except (TypeError, ValueError) as error:
            raise BadRow(name, f"is not a JSON value but a {type(row[name]).__name__}") from error
    return tuple(row[name] for name in names)


def is_conversation(value: object) -> TypeGuard[list[Message]]:
    """True for a list of one message or more with text in `role` and `content`."""
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value: object) -> bool:
    """True for a mapping with text in `role` and `content`."""
    return isinstance(value, Mapping) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def assistant_text(messages: list[Message]) -> str:
    """The text of the assistant messages that end a conversation; empty when it ends with another's."""
    texts: list[str] = []
    for message in reversed(messages):
        if message["role"] != "assistant":
            break
        texts.insert(0, message["content"])
    return "\n".join(texts)


def kind(value: object) -> str:
    """The kind of a JSON value, for messages."""
    names = {bool: "a true/false value", int: "a number", float: "a number", str: "text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
