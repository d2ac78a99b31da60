"""Takes prompt, chosen and rejected out of a row, or says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxrlhf.data.templates import Message, Prompt

PAIR = ("prompt", "chosen", "rejected")
FIELDS = {"sft": ("prompt", "chosen"), "reward": PAIR, "ppo": ("prompt",), "dpo": PAIR}
"""What each step reads of a row."""


@dataclass(frozen=True)
class Example:
    """One valid row; `responses` holds chosen, or chosen and rejected, or nothing, as the step needs.

    `columns`: the values of further fields that were asked for.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    columns: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Problem:
    """Why a row is left out: the field (by the name it has in the file) and what is wrong with it."""

    field: str
    what: str


def read_row(row: Any, step: str, names: dict[str, str]) -> Example | Problem:
    """The example in `row` for `step`; `names` maps prompt, chosen and rejected to the fields' names in the file.

    A prompt is text or a list of messages; a response is text or a list of messages whose last ones, the assistant's,
    count. Where the prompt field is absent and chosen is a whole conversation, its beginning is the prompt.
    """
    if not isinstance(row, Mapping):
        return Problem("row", f"is not an object but {kind(row)}")
    prompt = row.get(names["prompt"])
    if prompt is None and names["prompt"] not in row and is_conversation(row.get(names["chosen"])):
        prompt = list(row[names["chosen"]])
        while prompt and prompt[-1]["role"] == "assistant":
            prompt.pop()
    if isinstance(prompt, list):
        if prompt and not is_conversation(prompt):
            return Problem(names["prompt"], "is a list, but not of messages with text in 'role' and 'content'")
        if prompt and prompt[-1]["role"] == "assistant":
            return Problem(names["prompt"], "ends with an assistant message")
        prompt = [{"role": message["role"], "content": message["content"]} for message in prompt]
    problem = check_text(row, names["prompt"], prompt)
    if problem:
        return problem
    responses = []
    for field in FIELDS[step][1:]:
        value = row.get(names[field])
        if isinstance(value, list) and value:
            if not is_conversation(value):
                return Problem(names[field], "is a list, but not of messages with text in 'role' and 'content'")
            value = assistant_text(value)
        problem = check_text(row, names[field], value)
        if problem:
            return problem
        responses.append(value)
    return Example(prompt, tuple(responses))


def read_columns(row: Mapping, names: tuple[str, ...]) -> tuple[Any, ...] | Problem:
    """The values of the fields `names`, or what is wrong with the first that is absent, null or no JSON value."""
    for name in names:
        if row.get(name) is None:
            return Problem(name, "is null" if name in row else "is missing")
        try:
            json.dumps(row[name])
        except (TypeError, ValueError):
            return Problem(name, f"is no JSON value but a {type(row[name]).__name__}")
    return tuple(row[name] for name in names)


def check_text(row: Mapping, name: str, value: Any) -> Problem | None:
    if value is None:
        return Problem(name, "is null" if name in row else "is missing")
    if not isinstance(value, str | list):
        return Problem(name, f"is not text but {kind(value)}")
    if not value or (isinstance(value, str) and not value.strip()):
        return Problem(name, "is empty")
    return None


def is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in value
        )
    )


def assistant_text(messages: list[Message]) -> str:
    """The text of the assistant messages that end a conversation; empty when it ends with another's."""
    texts: list[str] = []
    for message in reversed(messages):
        if message["role"] != "assistant":
            break
        texts.insert(0, message["content"])
    return "\n".join(texts)


def kind(value: Any) -> str:
    names = {bool: "a true/false value", int: "a number", float: "a number", str: "text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")
