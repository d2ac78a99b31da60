"""Renders prompts and completions by the tokenizer's chat template: token ids, and masks of what is trained on.

A prompt is a text or a list of messages, and so is a completion. The ids of a prompt end where the assistant's message
begins; those of a response end with one end id of the tokenizer. Training, generation and chat render in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.data.encoding import Encoded, SpecialTokens, Text, encode, encode_continuations
from jaxrlhf.data.ends import closing_ids, end_ids, names_of, turn_end, turn_of, without_end
from jaxrlhf.data.renderer import (
    Message,
    Prompt,
    RenderedRow,
    Renderer,
    RowProblem,
    Span,
    Tools,
    Variables,
)
from jaxrlhf.data.tokenizer import Tokenizer, check_tokenizer, start_ids
from jaxrlhf.errors import InputError


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


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    tools: Sequence[Tools | None] | None = None,
    variables: Sequence[Variables | None] | None = None,
    *,
    special_tokens_in_data: bool = False,
) -> list[list[int]]:
    """Token ids of prompts, up to where the response begins.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        prompts: texts or conversations.
        tools: the tools of each prompt, for the chat template.
        variables: values that each prompt gives to variables of the chat template.
        special_tokens_in_data: special tokens in the messages' text keep their meaning.

    Raises:
        InputError: the chat template cannot render a prompt.
    """
    rows = encode_rows(
        tokenizer, prompts, [()] * len(prompts), tools, variables, special_tokens_in_data=special_tokens_in_data
    )
    for row in rows:
        if isinstance(row, str):
            raise InputError(row)
    return [row.prompt for row in rows if isinstance(row, EncodedRow)]


def encode_conversation(tokenizer: Tokenizer, messages: list[Message], tools: Tools | None = None) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next message begins; `tools` go to the template."""
    if not messages or messages[-1]["role"] == "assistant":
        raise InputError("a conversation must end with a message for the assistant, such as one of the role user")
    return encode_prompts(tokenizer, [messages], [tools])[0]


def encode_rows(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Prompt]],
    tools: Sequence[Tools | None] | None = None,
    variables: Sequence[Variables | None] | None = None,
    *,
    train_on: str = "all",
    special_tokens_in_data: bool = False,
) -> list[EncodedRow | str]:
    """Encodes rows, with masks of what is trained on, in a few calls of the tokenizer.

    The ids of a response are those that follow the prompt's in the tokens of the whole text. When the prompt's ids are
    not a prefix of these (a merge across the border, a chat template that rewrites the prompt), the response is
    encoded alone.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        prompts: a text (the user's message) or a conversation per row.
        completions: the completions of each row: none, one, or two. Each is a text (the assistant's message) or
            messages that end with the assistant's.
        tools: the tools of each row, for the chat template.
        variables: values that each row gives to variables of the chat template.
        train_on: "all" marks every assistant message, with the token that ends it; "last" the last one only;
            "everything" marks all tokens.
        special_tokens_in_data: special tokens in the messages' text keep their meaning.

    Returns:
        For each row its tokens, or a text that says why it cannot be rendered.
    """
    check_tokenizer(tokenizer)
    special = SpecialTokens(tokenizer)
    renderer = Renderer(tokenizer, None if special_tokens_in_data else special)
    rows: list[RenderedRow | str] = []
    for i, (prompt, responses) in enumerate(zip(prompts, completions, strict=True)):
        try:
            renderer.variables = dict((variables[i] if variables else None) or {})
            rows.append(renderer.row(prompt, responses, tools[i] if tools else None, train_on))
        except RowProblem as problem:
            rows.append(str(problem))
    good = [row for row in rows if isinstance(row, RenderedRow)]
    ends, own = closing_ids(tokenizer), turn_end(tokenizer)
    closing = own if own in ends and own is not None else end_ids(tokenizer)[0]
    finish = Finisher(ends, closing, frozenset(special.names), train_on == "everything", renderer.has_marks)
    marked, plain = any(row.prompt_spans for row in good), all(map(finish.is_plain, good))
    heads = encode(tokenizer, [row.prompt for row in good], special, places=marked)
    begun = [(row.prompt, head) for row, head in zip(good, heads, strict=True) for _ in row.wholes]
    texts = [whole for row in good for whole in row.wholes]
    each = iter(encode_continuations(tokenizer, texts, begun, special, places=not plain))
    wholes = [[next(each) for _ in row.wholes] for row in good]
    rests = [
        row.rest(k)
        for row, head, given in zip(good, heads, wholes, strict=True)
        for k, whole in enumerate(given)
        if not continues(head, whole)
    ]
    alone = iter(encode(tokenizer, rests, special, places=not plain))
    parts = zip(heads, wholes, strict=True)
    return [row if isinstance(row, str) else checked(row, finish.row(row, *next(parts), alone)) for row in rows]


def checked(row: RenderedRow, encoded: EncodedRow) -> EncodedRow | str:
    """The tokens of a row, or why a completion that has words has none that is trained on."""
    for speaks, (ids, mask) in zip(row.speaks, encoded.responses, strict=True):
        if speaks and sum(mask) == 1:
            return (
                "a token that ends responses stands before the completion's words; name the right ones with "
                "eos_token_ids"
                if len(ids) == 1
                else "the chat template marks none of the completion's words as generated; set chat_template to "
                "another one"
            )
    return encoded


def continues(head: Encoded, whole: Encoded) -> bool:
    """True when the ids of the whole begin with those of the head."""
    return whole.ids[: len(head.ids)] == head.ids


@dataclass(frozen=True)
class Finisher:
    """Puts the ids and masks of rows together from encoded texts.

    Attributes:
        ends: the ids of which the first one ends a response.
        closing: the id that ends a response without any.
        special: the ids of the special tokens.
        everything: train on all tokens.
        has_marks: the chat template marks what is trained on.
    """

    ends: frozenset[int]
    closing: int
    special: frozenset[int]
    everything: bool
    has_marks: bool

    def row(self, row: RenderedRow, head: Encoded, wholes: list[Encoded], alone: Iterator[Encoded]) -> EncodedRow:
        """The row's tokens. `alone` yields the encoded completions that do not continue the prompt."""
        prompt_mask = [int(self.everything)] * len(head.ids)
        if not self.everything:
            self.mark(prompt_mask, head, row.prompt_spans, -1)
        responses = []
        for k, whole in enumerate(wholes):
            if continues(head, whole):
                responses.append(self.response(row, k, whole, len(head.ids), 0))
            else:
                responses.append(self.response(row, k, next(alone), 0, row.begins[k]))
        return EncodedRow(head.ids, prompt_mask, responses)

    def response(
        self, row: RenderedRow, k: int, encoded: Encoded, first: int, start: int
    ) -> tuple[list[int], list[int]]:
        """Ids and mask from token `first` on. The encoded text begins at character `start` of the whole text; -1: it
        is the bare content."""
        spans = [(a - start, b - start) for a, b in row.spans[k] if b > start]
        simple = start < 0 or self.is_whole(row, k)
        mask = [int(self.everything or simple)] * len(encoded.ids)
        last = first
        if not simple:
            last = max(first, encoded.tokens(max(row.last[k] - start, 0), len(row.wholes[k].text) - start)[0])
            if not self.everything:
                self.mark(mask, encoded, spans, last)
        ids = encoded.ids
        end = min((ids.index(token, last) for token in self.ends.intersection(ids[last:])), default=len(ids))
        closing = ids[end] if end < len(ids) else self.closing
        return [*ids[first:end], closing], [*mask[first:end], 1]

    def is_plain(self, row: RenderedRow) -> bool:
        """True when the places of the tokens of a row's completions are not needed."""
        return all(self.is_whole(row, k) for k in range(len(row.wholes)))

    def is_whole(self, row: RenderedRow, k: int) -> bool:
        """True when a completion is one message that is trained on from its first token to its last."""
        begins = row.begins[k]
        if begins < 0:
            return True
        if row.last[k] != begins:
            return False
        spans = row.spans[k]
        return not self.has_marks or (
            len(spans) == 1 and spans[0][0] <= begins and spans[0][1] >= len(row.wholes[k].text)
        )

    def mark(self, mask: list[int], encoded: Encoded, spans: list[Span], last: int) -> None:
        """Sets the mask to 1 in the spans. A message that has no marks ends with its end id, else with its last
        special token; what follows is the template's. The one that begins at token `last` ends elsewhere."""
        for a, b in spans:
            first, end = encoded.tokens(max(a, 0), b)
            ids = encoded.ids[first:end]
            if not self.has_marks and first != last:
                ends = [i for i, token in enumerate(ids) if token in self.ends][:1]
                ends = ends or [i for i, token in enumerate(ids) if token in self.special][-1:]
                end = first + ends[0] + 1 if ends else end
            mask[first:end] = [1] * (end - first)


def plain_response(tokenizer: Tokenizer, text: str) -> str:
    """Removes from the decoded text of a response what the chat template puts around it."""
    template: Any = tokenizer.chat_template
    token_of: Any = tokenizer.convert_ids_to_tokens
    turn = turn_of(template, names_of(tokenizer))
    ends = {token_of(i) for i in closing_ids(tokenizer)}
    before, after = turn.before, turn.after
    for token in ends:
        after = after.partition(token)[0]
    for token in SpecialTokens(tokenizer).names.values():
        before, after = before.replace(token, ""), after.replace(token, "")
    return text.removeprefix(before).removesuffix(after)


def answer_text(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, stop_strings: Sequence[str] = ()) -> str:
    """Decodes a generated response, without special tokens, the end id or stop string that ended it, and the
    template's text."""
    decode: Any = tokenizer.decode  # one text, though its type says perhaps several
    text = decode(without_end(tokenizer, ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stop = next((s for s in stop_strings if text.endswith(s)), "")
    return plain_response(tokenizer, text.removesuffix(stop))


def encode_texts_as_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of documents: BOS once where the tokenizer adds one, the text, and one EOS.

    Special tokens in the text keep their meaning.
    """
    check_tokenizer(tokenizer)
    start, eos = start_ids(tokenizer), tokenizer.eos_token_id
    result = []
    for encoded in encode(tokenizer, [Text(text) for text in texts]):
        ids = encoded.ids
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        result.append([*(start if ids[: len(start)] != start else ()), *ids, eos])
    return result
