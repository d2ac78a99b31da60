"""Renders prompts and completions by the tokenizer's chat template: token ids, and masks of what is trained on.

A prompt is a text or a list of messages, and so is a completion. The ids of a prompt end where the assistant's message
begins; those of a response end with exactly one EOS. Training, generation and chat render in the same way.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.data.encoding import Encoded, SpecialTokens, Text, encode
from jaxrlhf.data.sources import first_line
from jaxrlhf.data.tokenizer import check_tokenizer, start_ids
from jaxrlhf.errors import InputError

Message = dict[str, Any]
"""role and content, and where the data has them tool_calls, name, tool_call_id."""
Prompt = str | list[Message]
Tools = list[dict[str, Any]]
Span = tuple[int, int]
"""First character and end of a part of a text."""


@dataclass(frozen=True)
class EncodedRow:
    """The tokens of a row.

    Attributes:
        prompt: the prompt's ids, up to where the response begins.
        prompt_mask: 1 at each of them that is trained on, such as those of earlier assistant messages.
        responses: ids and mask of each completion.
    """

    prompt: list[int]
    prompt_mask: list[int]
    responses: list[tuple[list[int], list[int]]]


class RowProblem(Exception):
    """A row that the chat template cannot render. The message says why."""


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    tools: Sequence[Tools | None] | None = None,
    *,
    special_tokens_in_data: bool = False,
) -> list[list[int]]:
    """Token ids of prompts, up to where the response begins.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        prompts: texts or conversations.
        tools: the tools of each prompt, for the chat template.
        special_tokens_in_data: special tokens in the messages' text keep their meaning.

    Raises:
        InputError: the chat template cannot render a prompt.
    """
    rows = encode_rows(tokenizer, prompts, [()] * len(prompts), tools, special_tokens_in_data=special_tokens_in_data)
    for row in rows:
        if isinstance(row, str):
            raise InputError(row)
    return [row.prompt for row in rows if isinstance(row, EncodedRow)]


def encode_conversation(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next message begins."""
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("a conversation must end with a message for the assistant, such as one of the role user")
    return encode_prompts(tokenizer, [messages])[0]


def encode_rows(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Prompt]],
    tools: Sequence[Tools | None] | None = None,
    *,
    train_on: str = "all",
    special_tokens_in_data: bool = False,
) -> list[EncodedRow | str]:
    """Encodes rows, with masks of what is trained on, in two calls of the tokenizer at most.

    The ids of a response are those that follow the prompt's in the tokens of the whole text. When the prompt's ids are
    not a prefix of these (a merge across the border, a chat template that rewrites the prompt), the response is
    encoded alone.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        prompts: a text (the user's message) or a conversation per row.
        completions: the completions of each row: none, one, or two. Each is a text (the assistant's message) or
            messages that end with the assistant's.
        tools: the tools of each row, for the chat template.
        train_on: "all" marks every assistant message, with the token that ends it; "last" the last one only;
            "everything" marks all tokens.
        special_tokens_in_data: special tokens in the messages' text keep their meaning.

    Returns:
        For each row its tokens, or a text that says why it cannot be rendered.
    """
    check_tokenizer(tokenizer)
    special = SpecialTokens(tokenizer)
    renderer = Renderer(tokenizer, None if special_tokens_in_data else special)
    rows: list[_Row | str] = []
    for i, (prompt, responses) in enumerate(zip(prompts, completions, strict=True)):
        try:
            rows.append(renderer.row(prompt, responses, tools[i] if tools else None, train_on))
        except RowProblem as problem:
            rows.append(str(problem))
    good = [row for row in rows if isinstance(row, _Row)]
    encoded = iter(encode(tokenizer, [text for row in good for text in (row.prompt, *row.wholes)], special))
    heads = [(next(encoded), [next(encoded) for _ in row.wholes]) for row in good]
    alone = iter(
        encode(
            tokenizer,
            [
                row.rest(k)
                for row, (head, wholes) in zip(good, heads, strict=True)
                for k, whole in enumerate(wholes)
                if not continues(head, whole)
            ],
            special,
        )
    )
    finish = Finisher(tokenizer.eos_token_id, special.ids, train_on == "everything", renderer.has_marks)
    parts = iter(heads)
    return [row if isinstance(row, str) else finish.row(row, *next(parts), alone) for row in rows]


def continues(head: Encoded, whole: Encoded) -> bool:
    """True when the ids of the whole begin with those of the head."""
    return whole.ids[: len(head.ids)] == head.ids


@dataclass(frozen=True)
class _Row:
    """A rendered row.

    Attributes:
        prompt: the text before the response.
        prompt_spans: the parts of it that are trained on.
        wholes: the text of prompt and completion, for each completion.
        spans: the parts of each that are trained on, within the completion.
        last: the character of each where the last assistant message begins.
        contents: the text of each completion of one message; None for several messages.
    """

    prompt: Text
    prompt_spans: list[Span]
    wholes: list[Text]
    spans: list[list[Span]]
    last: list[int]
    contents: list[Text]

    def start(self, k: int) -> int:
        """The character of `wholes[k]` where `rest(k)` begins; a large one when it is not in there."""
        return len(self.prompt.text) if self.wholes[k].text.startswith(self.prompt.text) else -1

    def rest(self, k: int) -> Text:
        """The completion's text alone."""
        start = self.start(k)
        return self.contents[k] if start < 0 else self.wholes[k][start:]


class Renderer:
    """Renders rows by a tokenizer's chat template."""

    def __init__(self, tokenizer: Any, special: SpecialTokens | None) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise InputError("the tokenizer has no chat template; load it with load_tokenizer, which gives it one")
        self.template: str = tokenizer.chat_template
        self.special = special
        self.names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    def row(self, prompt: Prompt, completions: Sequence[Prompt], tools: Tools | None, train_on: str) -> _Row:
        """Renders a row. Raises RowProblem."""
        messages = as_messages(prompt, "user")
        if not messages:
            raise RowProblem("the prompt has no message")
        ends = [as_messages(completion, "assistant") for completion in completions]
        hidden: dict[str, str] = {}
        if self.special is not None and self.special.among([messages, tools or [], ends]):
            messages, tools, ends = self.special.hide([messages, tools, ends], hidden)
        head, marks = self.render(messages, tools, True)
        if not ends:
            check_content(head, messages)
        inside = train_on == "all" and ends and any(message["role"] == "assistant" for message in messages)
        spans = self.turns(messages, len(messages), tools, head, marks) if inside else []
        wholes, parts, last = [], [], []
        for end in ends:
            whole, marks = self.render([*messages, *end], tools, False)
            check_content(whole, [*messages, *end])
            wholes.append(Text(whole, hidden))
            found, start = self.completion(messages, end, tools, (head, whole), marks, train_on)
            parts.append(found)
            last.append(start)
        contents = [Text(end[-1]["content"], hidden) for end in ends]
        return _Row(Text(head, hidden), spans, wholes, parts, last, contents)

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
                if not (text.startswith(after) and after.startswith(before)):
                    raise RowProblem(REWRITES)
                spans.append((len(before), len(after)))
        return spans

    def render(self, messages: list[Message], tools: Tools | None, prompt: bool) -> tuple[str, list[Span]]:
        """The text of a conversation (`prompt`: up to where the assistant's message begins), and the marked parts."""
        render = renderer_of_transformers()
        try:
            texts, marks = render(
                [messages],
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.has_marks,
                **self.names,
            )
        except Exception as error:  # a template is a program of the user's, which may raise anything
            raise RowProblem(self.refusal(messages, error)) from error
        check_encodable(texts[0], messages)
        return texts[0], marks[0] if marks else []

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


def renderer_of_transformers() -> Callable[..., Any]:
    """The function that renders chat templates in `apply_chat_template`: texts, and the parts marked as generated."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


MERGE = "set system_role to merge, which puts the system message in front of the first user message, "
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


def check_content(text: str, messages: list[Message]) -> None:
    """Raises RowProblem when a message's content or tool call is not in the rendered text.

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
            if isinstance(name, str) and name not in text:
                raise RowProblem(f"the chat template loses the tool call {name} of {name_of(messages, i)}")


def shows(text: str, content: str) -> bool:
    """True when the text holds the content, apart from white space, as it is or as a JSON string."""
    if content.strip() in text:
        return True
    whole = "".join(text.split())
    return any("".join(form.split()) in whole for form in (content, json.dumps(content, ensure_ascii=False)[1:-1]))


@dataclass(frozen=True)
class Finisher:
    """Puts the ids and masks of rows together from encoded texts."""

    eos: int
    special: set[int]
    everything: bool
    has_marks: bool

    def row(self, row: _Row, head: Encoded, wholes: list[Encoded], alone: Any) -> EncodedRow:
        """The row's tokens. `alone` yields the encoded completions that do not continue the prompt."""
        prompt_mask = [int(self.everything)] * len(head.ids)
        if not self.everything:
            self.mark(prompt_mask, head, row.prompt_spans, -1)
        responses = []
        for k, whole in enumerate(wholes):
            if continues(head, whole):
                responses.append(self.response(row, k, whole, len(head.ids), 0))
            else:
                responses.append(self.response(row, k, next(alone), 0, row.start(k)))
        return EncodedRow(head.ids, prompt_mask, responses)

    def response(self, row: _Row, k: int, encoded: Encoded, first: int, start: int) -> tuple[list[int], list[int]]:
        """Ids and mask from token `first` on. The encoded text begins at character `start` of the whole text; -1: it
        is the bare content."""
        spans = [(a - start, b - start) for a, b in row.spans[k] if b > start]
        simple = start < 0 or (row.last[k] == len(row.prompt.text) and not self.has_marks)
        mask = [int(self.everything or simple)] * len(encoded.ids)
        last = first
        if not simple:
            last = max(first, encoded.tokens(max(row.last[k] - start, 0), len(row.wholes[k].text) - start)[0])
            if not self.everything:
                self.mark(mask, encoded, spans, last)
        ids = encoded.ids
        end = ids.index(self.eos, last) if self.eos in ids[last:] else len(ids)
        return [*ids[first:end], self.eos], [*mask[first:end], 1]

    def mark(self, mask: list[int], encoded: Encoded, spans: list[Span], last: int) -> None:
        """Sets the mask to 1 in the spans. A message that has no marks ends with its EOS, else with its last special
        token; what follows is the template's. The one that begins at token `last` ends elsewhere."""
        for a, b in spans:
            first, end = encoded.tokens(max(a, 0), b)
            ids = encoded.ids[first:end]
            if not self.has_marks and first != last:
                ends = [i for i, token in enumerate(ids) if token == self.eos][:1]
                ends = ends or [i for i, token in enumerate(ids) if token in self.special][-1:]
                end = first + ends[0] + 1 if ends else end
            mask[first:end] = [1] * (end - first)


@functools.lru_cache(maxsize=16)
def _around_response(template: str, names: tuple[tuple[str, str], ...], special: frozenset[str]) -> tuple[str, str]:
    """The plain text that a chat template puts before and after a response, found with a probe."""
    render = renderer_of_transformers()
    probe = "\N{OBJECT REPLACEMENT CHARACTER}response\N{OBJECT REPLACEMENT CHARACTER}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
    options: dict[str, Any] = {"chat_template": template, **dict(names)}
    try:
        (prompt,), _ = render([messages[:1]], add_generation_prompt=True, **options)
        (whole,), _ = render([messages], **options)
    except Exception:  # a template that refuses even this leaves nothing to remove
        return "", ""
    if not whole.startswith(prompt) or probe not in whole[len(prompt) :]:
        return "", ""
    before, _, after = whole[len(prompt) :].partition(probe)
    after = after.split(dict(names)["eos_token"])[0]
    for token in special:
        before, after = before.replace(token, ""), after.replace(token, "")
    return before, after


def plain_response(tokenizer: Any, text: str) -> str:
    """Removes from the decoded text of a response what the chat template puts around it."""
    names = tuple((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    special = frozenset(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    before, after = _around_response(tokenizer.chat_template, names, special)
    return text.removeprefix(before).removesuffix(after)


def answer_text(tokenizer: Any, ids: Sequence[int] | np.ndarray, stop_strings: Sequence[str] = ()) -> str:
    """Decodes a generated response, without special tokens, the stop string that ended it, and the template's text."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stop = next((s for s in stop_strings if text.endswith(s)), "")
    return plain_response(tokenizer, text.removesuffix(stop))


def encode_texts_as_documents(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of documents: BOS where the tokenizer adds one, never twice; the text, whose markup keeps its meaning;
    one EOS at the end."""
    check_tokenizer(tokenizer)
    start, eos = start_ids(tokenizer), tokenizer.eos_token_id
    result = []
    for encoded in encode(tokenizer, [Text(text) for text in texts]):
        ids = encoded.ids
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        result.append([*(start if ids[: len(start)] != start else ()), *ids, eos])
    return result
