"""Renders rows as text by a chat template, finds the parts that are trained on, and names what goes wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxrlhf.data.encoding import SpecialTokens, Text
from jaxrlhf.data.files import first_line
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from jaxrlhf.data.tokenizer import Tokenizer

Message = dict[str, Any]
"""role and content, and where the data has them tool_calls, name, tool_call_id."""
Prompt = str | list[Message]
Tools = list[dict[str, Any]]
Span = tuple[int, int]
"""First character and end of a part of a text."""


class RowProblem(Exception):
    """A row that the chat template cannot render. The message says why."""


@dataclass(frozen=True)
class RenderedRow:
    """A rendered row.

    Attributes:
        prompt: the text before the response.
        prompt_spans: the parts of it that are trained on.
        wholes: the text of prompt and completion, for each completion.
        spans: the parts of each that are trained on, within the completion.
        last: the character of each where the last assistant message begins.
        contents: the content of each completion's last message.
    """

    prompt: Text
    prompt_spans: list[Span]
    wholes: list[Text]
    spans: list[list[Span]]
    last: list[int]
    contents: list[Text]

    def start(self, k: int) -> int:
        """The character of `wholes[k]` where `rest(k)` begins; -1 when the template rewrites the prompt."""
        return len(self.prompt.text) if self.wholes[k].text.startswith(self.prompt.text) else -1

    def rest(self, k: int) -> Text:
        """The completion's text alone: what follows the prompt, else the bare content of the last message."""
        start = self.start(k)
        return self.contents[k] if start < 0 else self.wholes[k][start:]


class Renderer:
    """Renders rows by a tokenizer's chat template. Keeps what it rendered."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens | None) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise InputError("the tokenizer has no chat template; load it with load_tokenizer, which gives it one")
        self.template: str = tokenizer.chat_template
        self.special = special
        self.names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.rendered: dict[Any, tuple[str, list[Span]]] = {}
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def row(self, prompt: Prompt, completions: Sequence[Prompt], tools: Tools | None, train_on: str) -> RenderedRow:
        """Renders a row. Raises RowProblem."""
        messages = as_messages(prompt, "user")
        if not messages:
            raise RowProblem("the prompt has no message")
        ends = [as_messages(completion, "assistant") for completion in completions]
        hidden: dict[str, str] = {}
        if self.special is not None and self.special.among([messages, tools or [], ends]):
            messages, tools, ends = self.special.hide([messages, tools, ends], hidden)
        inside = train_on == "all" and ends and any(message["role"] == "assistant" for message in messages)
        head, marks = self.render(messages, tools, True, bool(inside))
        if not ends:
            check_content(head, messages, tools)
        spans = self.turns(messages, len(messages), tools, head, marks) if inside else []
        wholes, parts, last = [], [], []
        for end in ends:
            whole, marks = self.render([*messages, *end], tools, False, train_on != "everything")
            check_content(whole, [*messages, *end], tools)
            wholes.append(Text(whole, hidden))
            found, start = self.completion(messages, end, tools, (head, whole), marks, train_on)
            parts.append(found)
            last.append(start)
        contents = [Text(end[-1]["content"], hidden) for end in ends]
        return RenderedRow(Text(head, hidden), spans, wholes, parts, last, contents)

    def completion(
        self,
        messages: list[Message],
        end: list[Message],
        tools: Tools | None,
        texts: tuple[str, str],
        marks: list[Span],
        train_on: str,
    ) -> tuple[list[Span], int]:
        """The parts of a completion that are trained on, and where its last assistant message begins."""
        head, whole = texts
        if not end or end[-1]["role"] != "assistant":
            raise RowProblem("the completion does not end with an assistant message")
        start = len(head)
        if len(end) > 1:
            before, _ = self.render([*messages, *end[:-1]], tools, True)
            if not whole.startswith(before) or not before.startswith(head):
                raise RowProblem(
                    "the chat template rewrites the messages before the last one, so the completion has no beginning; "
                    "make the last assistant message alone the completion"
                )
            start = len(before)
        if self.has_marks:
            first = start if train_on == "last" else min(len(head), start)
            return [span for span in marks if span[1] > first] or marks[-1:], start
        spans = [(start, len(whole))]
        if train_on == "all" and len(end) > 1:
            every = [*messages, *end]
            spans = self.turns(every, len(every) - 1, tools, whole, [], first=len(messages)) + spans
        return spans, start

    def turns(
        self, messages: list[Message], stop: int, tools: Tools | None, text: str, marks: list[Span], first: int = 0
    ) -> list[Span]:
        """The parts of a text that assistant messages `first` to `stop` - 1 are, as marked, or by the difference of
        the texts up to each message and with it."""
        if self.has_marks:
            return marks
        spans = []
        for i in range(first, stop):
            if messages[i]["role"] == "assistant":
                before, _ = self.render(messages[:i], tools, True)
                after, _ = self.render(messages[: i + 1], tools, False)
                end = len(after) if text.startswith(after) else common_length(text, after)
                # Some templates end every text with the header of the next message, whether or not they are asked to.
                if not (after.startswith(before) and len(before) <= end and before.endswith(after[end:])):
                    raise RowProblem(REWRITES)
                spans.append((len(before), end))
        return spans

    def render(
        self, messages: list[Message], tools: Tools | None, prompt: bool, marks: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of a conversation (`prompt`: up to where the assistant's message begins); with `marks`, the parts
        that the template marks as generated."""
        turns = tuple((message["role"], message["content"]) for message in messages if len(message) == 2)
        if tools or len(turns) < len(messages) or not all(isinstance(content, str) for _, content in turns):
            return self.render_anew(messages, tools, prompt, marks)
        key = (turns, prompt, marks)
        if key not in self.rendered:  # rows repeat prompts and responses
            self.rendered[key] = self.render_anew(messages, tools, prompt, marks)
        return self.rendered[key]

    def render_anew(
        self, messages: list[Message], tools: Tools | None, prompt: bool, marks: bool
    ) -> tuple[str, list[Span]]:
        from jaxrlhf.data.template_limits import TemplateLimit

        render = renderer_of_transformers()
        try:
            texts, found = render(
                [messages],
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks and self.has_marks,
                **self.names,
            )
        except TemplateLimit as error:  # every further row would take as long
            raise InputError(f"the chat template is refused: {error}; set chat_template to another one") from error
        except Exception as error:  # a template is a program of the user's, which may raise anything
            raise RowProblem(self.refusal(messages, error)) from error
        check_encodable(texts[0], messages)
        return texts[0], found[0] if found else []

    def refusal(self, messages: list[Message], error: Exception) -> str:
        """Why the chat template did not render a conversation."""
        from jinja2.exceptions import TemplateError

        roles = ", ".join(str(message.get("role")) for message in messages)
        what = first_line(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {first_line(error)}"
        system = "system" in roles or "{# system_prompt #}" in self.template
        return (
            f"the chat template refuses a conversation of the roles {roles}: {what}; correct the row, "
            f"{MERGE if system else ''}or set chat_template or prompt_template"
        )


def renderer_of_transformers() -> Callable[..., tuple[list[str], list[list[Span]]]]:
    """The function that renders chat templates in `apply_chat_template`: texts, and the parts marked as generated.

    Templates are limited from here on (`template_limits`).
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    from jaxrlhf.data.template_limits import limit_templates

    limit_templates()
    render: Any = render_jinja_template  # annotated as if it gave one text
    return render


MERGE = "set system_role to merge, which puts the system message in front of the first user message, "
TOOLS = "set chat_template to one with tools, such as hermes, or tools_field to the name of no column"
REWRITES = "the chat template rewrites earlier turns, so train_on=all cannot mark them; use train_on last"


def as_messages(value: Prompt, role: str) -> list[Message]:
    """A text as one message, and messages without nulls, which templates misread; null content is an empty text."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowProblem(f"message {i + 1} is not an object with a role")
    return [
        message if None not in message.values() and "content" in message else without_nulls(message)
        for message in value
    ]


def common_length(first: str, second: str) -> int:
    """The number of characters that two texts begin with alike."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def without_nulls(message: Message) -> Message:
    return {"content": ""} | {name: value for name, value in message.items() if value is not None}


def check_encodable(text: str, messages: list[Message]) -> None:
    """Raises RowProblem for half of a surrogate pair, which no encoding of Unicode has."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = re.compile("[\ud800-\udfff]")
        places = [i for i, message in enumerate(messages) if half.search(json.dumps(message, ensure_ascii=False))]
        raise RowProblem(
            f"{name_of(messages, places[0]) if places else 'the text'} holds half of a surrogate pair "
            f"({text[error.start]!r}), which is no character; correct the text"
        ) from error


def name_of(messages: list[Message], i: int) -> str:
    return f"message {i + 1} ({messages[i].get('role')})"


def check_content(text: str, messages: list[Message], tools: Tools | None = None) -> None:
    """Raises RowProblem when a message's content, a tool call or a tool is not in the rendered text.

    Templates may change white space, write tool results as JSON, and shorten earlier assistant messages.
    """
    for i, message in enumerate(messages):
        content = message["content"]
        earlier = message["role"] == "assistant" and i < len(messages) - 1
        if isinstance(content, str) and not earlier and not shows(text, content):
            hint = f"; {MERGE}or choose another chat template" if message["role"] == "system" else ""
            raise RowProblem(f"the chat template loses the content of {name_of(messages, i)}{hint}")
        for call in message.get("tool_calls") or ():
            name = call.get("function", call).get("name") if isinstance(call, dict) else None
            if isinstance(name, str) and not adds(text, name, messages):
                raise RowProblem(f"the chat template loses the tool call {name} of {name_of(messages, i)}; {TOOLS}")
    for tool in tools or ():
        name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
        if isinstance(name, str) and not adds(text, name, messages):
            raise RowProblem(f"the chat template does not show the tool {name} to the model; {TOOLS}")


def adds(text: str, name: str, messages: list[Message]) -> bool:
    """True when a rendered text holds a name more often than the messages of users, system and tools do."""
    contents = (message["content"] for message in messages if message["role"] != "assistant")
    return text.count(name) > sum(content.count(name) for content in contents if isinstance(content, str))


def shows(text: str, content: str) -> bool:
    """True when the text holds the content, apart from white space, as it is or as a JSON string."""
    if content.strip() in text:
        return True
    whole = "".join(text.split())
    return any("".join(form.split()) in whole for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]))
