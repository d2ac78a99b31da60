"""Text and messages in the columns of rows, whatever form they have there."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.config.files import parse_json

Message = dict[str, Any]
Prompt = str | list[Message]
Completion = str | list[Message]

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "bing": "assistant", "bard": "assistant", "observation": "tool", "prompter": "user",
    "function_call": "assistant",
}  # fmt: skip
"""Other names of roles, as ShareGPT and its relatives have them."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Names of the thoughts of an assistant, apart from its content."""
KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", *THOUGHTS)
"""Keys of a message that templates read."""
TURN = re.compile(r"\n\n(Human|Assistant):[ \n]?")
"""The beginning of a turn in Anthropic's texts."""


class BadRow(Exception):
    """A row cannot be used. The message names the field, as the file does, and what is wrong with it."""

    def __init__(self, field: str, what: str):
        super().__init__(f"'{field}' {what}")


def kind_of(value: object) -> str:
    """The kind of a JSON value, for messages."""
    names = {bool: "a true/false value", int: "a number", float: "a number", str: "text", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def read_content(value: object, field: str) -> Prompt:
    """Text, or the messages of a conversation. Raises BadRow for anything else, and for nothing."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[ "):  # a cell of a CSV file that holds messages
        parsed = json_list(value)
        value = parsed if parsed and _is_conversation(parsed) else value
    if isinstance(value, Mapping) and isinstance(value.get("role"), list):  # messages as columns
        sizes = {len(items) if isinstance(items, list) else kind_of(items) for items in value.values()}
        if len(sizes) > 1:
            raise BadRow(field, f"holds messages as columns of unlike lengths ({', '.join(map(str, value))})")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if isinstance(value, Mapping) and _is_conversation([value]):  # one message, as LLaMA-Factory's chosen and rejected
        value = [value]
    if value is None or not isinstance(value, str | list):
        raise BadRow(field, "is null" if value is None else f"is not text but {kind_of(value)}")
    if not value or (isinstance(value, str) and not value.strip()):
        raise BadRow(field, "is empty")
    if isinstance(value, list):
        return read_messages(value, field)
    check_text(value, field)
    return value


def check_text(text: str, field: str) -> None:
    """Raises BadRow for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(field, f"holds half of a surrogate pair at character {error.start}, which is no text") from error


def read_messages(value: Sequence[object], field: str) -> list[Message]:
    """Messages of role and content, whatever form they have in the row: ShareGPT's keys and roles, text in parts."""
    if not all(isinstance(m, Mapping) and isinstance(m.get("role", m.get("from")), str) for m in value):
        found = next((m for m in value if not (isinstance(m, Mapping) and ("role" in m or "from" in m))), value[0])
        keys = f"an object of {', '.join(map(str, found))}" if isinstance(found, Mapping) else kind_of(found)
        raise BadRow(field, f"is a list, but not of messages with 'role' and 'content': it holds {keys}")
    messages = []
    for number, raw in enumerate(value, start=1):
        assert isinstance(raw, Mapping)
        role = str(raw.get("role", raw.get("from")))
        if role.lower() == "function_call":
            raw = called(raw, field, number)
        message = {key: raw[key] for key in KEPT if raw.get(key) is not None}
        message["role"] = ROLES.get(role.lower(), role)
        if not isinstance(calls := message.get("tool_calls", []), list):
            raise BadRow(field, f"message {number} ({role}) has {kind_of(calls)} as tool_calls, not a list")
        content = raw.get("content", raw.get("value"))
        message["content"] = _message_text(content, bool(calls), field, number, role)
        messages.append(message)
    return messages


def called(raw: Mapping[str, Any], field: str, number: int) -> Mapping[str, Any]:
    """The assistant's message of a `function_call`, whose text is the JSON of one call or of several."""
    text = raw.get("content", raw.get("value"))
    try:
        parsed = parse_json(text) if isinstance(text, str) else text
    except ValueError:
        parsed = None
    calls: list[Any] = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise BadRow(field, f"message {number} (function_call) is not the JSON of calls with name and arguments")
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": dict(call)} for call in calls]}


def _message_text(content: object, calls: bool, field: str, number: int, role: str) -> str:
    """The text of a message, which may be given in parts."""
    if isinstance(content, list):
        parts: list[Any] = [{"text": part} if isinstance(part, str) else part for part in content]
        kinds = {str(part.get("type", "text")) if isinstance(part, Mapping) else kind_of(part) for part in parts}
        if kinds - {"text"}:
            raise BadRow(field, f"message {number} ({role}) holds parts of the type {', '.join(sorted(kinds))}")
        texts = [part.get("text") for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise BadRow(field, f"message {number} ({role}) holds a part without text")
        content = "".join(texts)
    if content is None and calls:
        return ""
    if not isinstance(content, str):
        raise BadRow(field, f"message {number} ({role}) has {kind_of(content)} as content, not text")
    check_text(content, field)
    if not content.strip() and role not in ("system", "tool") and not calls:
        raise BadRow(field, f"message {number} ({role}) is empty")
    return content


def json_list(text: str) -> list[object] | None:
    try:
        parsed = parse_json(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, list) else None


def _is_conversation(value: list[object]) -> bool:
    return all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in value)


def check_turns(messages: Sequence[Message], field: str) -> None:
    """Raises BadRow unless a user begins, after the system message, and no user speaks twice in a row."""
    roles = [message["role"] for message in messages]
    first = next((role for role in roles if role != "system"), None)
    if first == "assistant":
        raise BadRow(field, "starts with the assistant; a conversation starts with the user")
    if any(pair == ("user", "user") for pair in itertools.pairwise(roles)):
        raise BadRow(field, f"has two user messages in a row (roles: {', '.join(roles)}); join them")


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as a conversation: text is the user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def joined_answer(messages: Completion, field: str) -> Completion:
    """A completion as text where it is nothing but assistant text, else as messages."""
    if isinstance(messages, str) or any(set(m) - {"role", "content"} or m["role"] != "assistant" for m in messages):
        return messages
    text = "\n".join(m["content"] for m in messages)
    if not text.strip():
        raise BadRow(field, "is empty")
    return text


def parse_turns(text: str) -> list[Message] | None:
    """The messages of a text in Anthropic's form (`\\n\\nHuman: … \\n\\nAssistant: …`), or None."""
    pieces = TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": content.strip()}
        for name, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
