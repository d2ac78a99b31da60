"""Renders rows as text by a chat template, finds the parts that are trained on, and names what goes wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxrlhf.data.encoding import SpecialTokens, Text
from jaxrlhf.data.files import first_line
from jaxrlhf.data.message_forms import (
    Message,
    completed,
    name_of_tool,
    with_function,
    with_written_arguments,
)
from jaxrlhf.data.messages import THOUGHTS
from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from jaxrlhf.data.tokenizer import Tokenizer

Prompt = str | list[Message]
Tools = list[dict[str, Any]]
Variables = Mapping[str, Any]
"""Values by the names of the variables of a chat template."""
Span = tuple[int, int]
"""First character and end of a part of a text."""


PROBE = "\N{OBJECT REPLACEMENT CHARACTER}response\N{OBJECT REPLACEMENT CHARACTER}"
"""Content that no data has, by which a message is found in a rendered text."""
MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""A mark of templates, such as <|im_end|>, </s> or [EOS]."""


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
        begins: the character of each where what follows the prompt begins; -1 when the template rewrites the prompt.
        last: the character of each where the last assistant message begins.
        contents: the content of each completion's last message, without what the prompt has of it already.
        speaks: True for each whose last message has words or tool calls.
    """

    prompt: Text
    prompt_spans: list[Span]
    wholes: list[Text]
    spans: list[list[Span]]
    begins: list[int]
    last: list[int]
    contents: list[Text]
    speaks: list[bool]

    def rest(self, k: int) -> Text:
        """The completion's text alone: what follows the prompt, else the bare content of the last message."""
        begin = self.begins[k]
        return self.contents[k] if begin < 0 else self.wholes[k][begin:]


class Renderer:
    """Renders rows by a tokenizer's chat template. Keeps what it rendered."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens | None) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise InputError("the tokenizer has no chat template; load it with load_tokenizer, which gives it one")
        self.template: str = tokenizer.chat_template
        self.special = special
        self.names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.variables: dict[str, Any] = {}  # of the row at hand
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
            check_content(head, messages)
            self.check_tools(head, messages, tools, True)
        spans = self.turns(messages, len(messages), tools, head, marks, prompt=True) if inside else []
        row = RenderedRow(Text(head, hidden), spans, [], [], [], [], [], [])
        for end in ends:
            if not end or end[-1]["role"] != "assistant":
                raise RowProblem("the completion does not end with an assistant message")
            whole, marks = self.render([*messages, *end], tools, False, train_on != "everything")
            begin, content = self.beginning(messages, end, tools, head, whole)
            check_content(whole, [*messages, *end] if content is None else messages)
            self.check_tools(whole, [*messages, *end], tools, False)
            found, start = self.completion(messages, end, tools, (head, whole), begin, marks, train_on)
            row.wholes.append(Text(whole, hidden))
            row.spans.append(found)
            row.begins.append(begin)
            row.last.append(start)
            row.contents.append(Text(end[-1]["content"] if content is None else content, hidden))
            row.speaks.append(bool(end[-1]["content"].strip() or end[-1].get("tool_calls")))
        return row

    def beginning(
        self, messages: list[Message], end: list[Message], tools: Tools | None, head: str, whole: str
    ) -> tuple[int, str | None]:
        """The character of a whole text where what follows the prompt begins, or -1; then the last message's bare
        content follows the prompt, or the content that is returned.

        Some templates open the assistant's message in a prompt otherwise than in a conversation, such as with
        `<think>`. The prompt stays, since the model is asked so, and goes on with what the conversation has there.
        """
        if whole.startswith(head):
            return len(head), None
        message, same = end[-1], common_part(head, whole)
        opened, rest = head[same:], whole[same:]
        if len(end) == 1 and same >= common_part(head, self.render(messages, tools, False)[0]):
            content, mark = message["content"].lstrip(), opened.strip()
            if mark and content.startswith(mark):  # the template may cut thoughts that the data has
                return -1, content[len(mark) :].removeprefix(opened[len(opened.rstrip()) :])
            again = next(n for n in range(min(len(opened), len(rest)), -1, -1) if opened.endswith(rest[:n]))
            if begins_message(rest[again:], message, opened):
                return same + again, None
        if len(end) == 1 and (message.get("tool_calls") or any(name in message for name in THOUGHTS)):
            raise RowProblem(
                "the chat template begins an assistant message otherwise in a prompt than in a conversation, so its "
                "tool calls or thoughts cannot follow the prompt; set chat_template to another one"
            )
        return -1, None

    def check_tools(self, text: str, messages: list[Message], tools: Tools | None, prompt: bool) -> None:
        """Raises RowProblem for a tool call or a tool that the chat template leaves out of a rendered text.

        Calls and tools have the same names. So the calls are rendered under others.
        """
        calls = [
            (i, k, name)
            for i, message in enumerate(messages)
            for k, call in enumerate(message.get("tool_calls") or ())
            if (name := name_of_tool(call)) is not None
        ]
        if calls:
            renamed = [dict(message) for message in messages]
            for i, k, _ in calls:
                changed = with_function(renamed[i]["tool_calls"][k], name=f"renamed_{i}_{k}")
                renamed[i]["tool_calls"] = [*renamed[i]["tool_calls"][:k], changed, *renamed[i]["tool_calls"][k + 1 :]]
            text, _ = self.render_anew(renamed, tools, prompt, False)
        for i, k, name in calls:
            if f"renamed_{i}_{k}" not in text:
                raise RowProblem(f"the chat template loses the tool call {name} of {name_of(messages, i)}; {TOOLS}")
        for tool in tools or ():
            if (name := name_of_tool(tool)) is not None and not adds(text, name, messages):
                raise RowProblem(f"the chat template does not show the tool {name} to the model; {TOOLS}")

    def completion(
        self,
        messages: list[Message],
        end: list[Message],
        tools: Tools | None,
        texts: tuple[str, str],
        begin: int,
        marks: list[Span],
        train_on: str,
    ) -> tuple[list[Span], int]:
        """The parts of a completion that are trained on, and where its last assistant message begins."""
        head, whole = texts
        start = len(head) if begin < 0 else begin
        if len(end) > 1:
            before, _ = self.render([*messages, *end[:-1]], tools, True)
            if not whole.startswith(before) or not before.startswith(head):
                raise RowProblem(
                    "the chat template rewrites the messages before the last one, so the completion has no beginning; "
                    "make the last assistant message alone the completion"
                )
            start = len(before)
        if self.has_marks:
            first = start if train_on == "last" else min(len(head) if begin < 0 else begin, start)
            return [span for span in marks if span[1] > first] or marks[-1:], start
        spans = [(start, len(whole))]
        if train_on == "all" and len(end) > 1:
            every = [*messages, *end]
            spans = self.turns(every, len(every) - 1, tools, whole, [], prompt=False, first=len(messages)) + spans
        return spans, start

    def turns(
        self,
        messages: list[Message],
        stop: int,
        tools: Tools | None,
        text: str,
        marks: list[Span],
        *,
        prompt: bool,
        first: int = 0,
    ) -> list[Span]:
        """The parts of a text that assistant messages `first` to `stop` - 1 are, as marked, or by the difference of
        the texts up to each message and with it. `text` is that of all messages, as a prompt or not."""
        if self.has_marks:
            return marks
        spans = []
        for i in range(first, stop):
            if messages[i]["role"] == "assistant":
                before, _ = self.render(messages[:i], tools, True)
                after, _ = self.render(messages[: i + 1], tools, False)
                end = len(after) if text.startswith(after) else common_part(text, after)
                # Some templates end every text with the header of the next message, asked or not.
                next_header = before.endswith(after[end:]) or self.only_eos(messages[i], after, end)
                if after.startswith(before) and len(before) <= end and next_header:
                    spans.append((len(before), end))
                elif span := self.as_shown(messages, i, tools, text, prompt):
                    spans.append(span)
                else:
                    raise RowProblem(REWRITES)
        return spans

    def as_shown(self, messages: list[Message], i: int, tools: Tools | None, text: str, prompt: bool) -> Span | None:
        """The part of a text from the words of assistant message `i` to the end of its turn.

        For templates that write a turn otherwise when it is the last one, such as with empty thoughts. None where the
        text does not have the words as they are, the message has thoughts, or no mark ends the turn.
        """
        message = messages[i]
        if any(name in message for name in THOUGHTS):
            return None
        probe = [*messages[:i], message | {"content": PROBE}]
        last, _ = self.render_anew(probe, tools, False, False)
        whole, _ = self.render_anew([*probe, *messages[i + 1 :]], tools, prompt, False)
        head, _, tail = whole.partition(PROBE)
        words = text[len(head) : len(text) - len(tail)]
        end = tail[: common_part(tail, last.partition(PROBE)[2])]
        if text != head + words + tail or words.strip() != message["content"].strip() or not end.strip():
            return None
        return len(head), len(head) + len(words) + len(end)

    def only_eos(self, message: Message, text: str, end: int) -> bool:
        """True when only EOS follows a turn that has another end already, such as that of Phi-3."""
        words = message["content"].strip()
        closed = words and text[text.rfind(words) + len(words) : end].strip()
        return bool(closed) and text[end:].strip() == self.names.get("eos_token")

    def render(
        self, messages: list[Message], tools: Tools | None, prompt: bool, marks: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of a conversation (`prompt`: up to where the assistant's message begins); with `marks`, the parts
        that the template marks as generated."""
        turns = tuple((message["role"], message["content"]) for message in messages if len(message) == 2)
        plain = len(turns) == len(messages) and all(isinstance(content, str) for _, content in turns)
        if tools or self.variables or not plain:
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
                **self.names | self.variables,
            )
        except TemplateLimit as error:  # every further row would take as long
            raise InputError(f"the chat template is refused: {error}; set chat_template to another one") from error
        except Exception as error:  # a template is a program of the user's, which may raise anything
            written = [with_written_arguments(message) for message in messages]
            if written != messages:  # templates such as DeepSeek's take the arguments of calls as JSON texts alone
                return self.render_anew(written, tools, prompt, marks)
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
OTHER = "choose another chat template"
REWRITES = "the chat template rewrites earlier turns, so train_on=all cannot mark them; use train_on last"


def as_messages(value: Prompt, role: str) -> list[Message]:
    """A text as one message, and messages as templates read them (`completed`)."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowProblem(f"message {i + 1} is not an object with a role")
    return [
        message if len(message) == 2 and isinstance(message.get("content"), str) else completed(message)
        for message in value
    ]


def common_part(first: str, second: str) -> int:
    """The number of characters that two texts begin with alike, up to the last whole mark such as `<|im_end|>`."""
    shorter = min(len(first), len(second))
    same = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    begun = re.search(r"[<\[][^<>\[\]\s]*\Z", first[max(same - 100, 0) : same])
    return same - len(begun[0]) if begun else same


def begins_message(text: str, message: Message, opened: str) -> bool:
    """True when a text begins with the words of a message, or with marks before them; not with a header of its own.

    Args:
        text: what a conversation has after a prompt, apart from `opened`.
        message: the assistant's message.
        opened: what the prompt has there. A mark of it does not come again, such as the end of thoughts.
    """
    words = [str(message.get(name, "")).strip() for name in ("content", *THOUGHTS)]
    places = [text.find(word) for word in words if word and word in text]
    if not places:
        return text.lstrip().startswith(("<", "["))
    again = any(mark in opened for mark in MARK.findall(text[: max(places)]))
    return not again and not MARK.sub("", text[: min(places)]).strip()


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


def check_content(text: str, messages: list[Message]) -> None:
    """Raises RowProblem when a message's content, or the thoughts of the last one, are not in the rendered text.

    Templates may change white space, write tool results as JSON, and shorten earlier assistant messages.
    """
    for i, message in enumerate(messages):
        content = message["content"]
        earlier = message["role"] == "assistant" and i < len(messages) - 1
        if isinstance(content, str) and not earlier and not shows(text, content):
            hint = MERGE + "or " if message["role"] == "system" else ""
            raise RowProblem(f"the chat template loses the content of {name_of(messages, i)}; {hint}{OTHER}")
        thoughts = next((message[name] for name in THOUGHTS if name in message), None)
        if isinstance(thoughts, str) and message["role"] == "assistant" and not earlier and not shows(text, thoughts):
            raise RowProblem(
                f"the chat template loses the thoughts ({' or '.join(THOUGHTS)}) of {name_of(messages, i)}; {OTHER}, "
                "write the thoughts into the content, or remove them"
            )


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
