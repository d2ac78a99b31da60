"""Turns the tokens of samples into OpenAI's responses: text, finish reasons, log-probs, usage, chunks of a stream."""

import json
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxrlhf.commands.chat import BROKEN, StreamedText
from jaxrlhf.commands.serve.requests import Generation
from jaxrlhf.commands.serve.scheduler import Event
from jaxrlhf.data import Tokenizer
from jaxrlhf.environments import PARSERS, ToolCall, certain_content


class Entry(NamedTuple):
    """A token whose log-prob is reported."""

    event: Event
    start: int
    """The character of the text that it begins at."""


class Piece(NamedTuple):
    """The part that an event adds to a choice."""

    text: str
    entries: list[Entry]
    finish: str | None
    calls: tuple[dict[str, object], ...] = ()
    """Tool calls in OpenAI's form, with the last piece."""


class CallReader:
    """Divides a growing text into the content of a message and its tool calls.

    Text that may belong to a call is held back until the end. When a call cannot be read, all of the text is content,
    so that the client sees it.

    Args:
        form: The form of the calls, one of PARSERS.
        parallel: False keeps the first call only.
    """

    def __init__(self, form: str, parallel: bool) -> None:
        self.form, self.parallel = form, parallel
        self._text = self._sent = ""

    def add(self, text: str, ended: bool) -> tuple[str, tuple[dict[str, object], ...]]:
        """Takes further text; returns the content that it makes certain, and at the end the calls."""
        self._text += text
        content, calls = self._divided() if ended else (certain_content(self._text, self.form), [])
        new, self._sent = content[len(self._sent) :], content
        return new, tuple(as_call(call) for call in (calls if self.parallel else calls[:1]))

    def _divided(self) -> tuple[str, list[ToolCall]]:
        """The content and the calls of the whole text."""
        parsed = PARSERS[self.form](self._text)
        calls = [call for call in parsed.calls if isinstance(call, ToolCall)]
        return (parsed.content, calls) if calls and len(calls) == len(parsed.calls) else (self._text, [])


def as_call(call: ToolCall) -> dict[str, object]:
    """A tool call as OpenAI's protocol has it: with an id, and the arguments as a text."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


class Choice:
    """One sample of a request as it grows.

    Args:
        index: Its number among the choices of the request.
        tokenizer: The model's.
        stops: Texts that end it; they are not shown.
        strip: Drop white space at the start, as in a chat.
        ends: Token ids that end a response; they are not shown.
        calls: Finds its tool calls; None without tools.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        strip: bool,
        ends: frozenset[int],
        calls: CallReader | None = None,
    ) -> None:
        self.index, self.ends, self.calls = index, ends, calls
        self.stream = StreamedText(tokenizer, stops, strip, special=calls is not None)
        self.tokens = 0
        """Tokens sampled, the end token included."""
        self.finish: str | None = None
        self._held: list[Entry] = []

    def add(self, event: Event) -> Piece:
        """Takes the next event: the text and the log-probs that it makes certain."""
        self.tokens += 1
        text = ""
        if event.token is not None and event.token not in self.ends:
            self._held.append(Entry(event, len(self.stream.decoded)))
            text = self.stream.add(event.token)
        self.finish = event.finish
        if event.finish and not self.stream.stopped:
            text += self.stream.finish()
        if self.stream.stopped:
            self.finish = "stop"
        shown = len(self.stream.text)
        everything = self.finish is not None and not self.stream.stopped
        released = [entry for entry in self._held if everything or entry.start < shown]
        self._held = self._held[len(released) :]
        if self.calls is None:
            return Piece(text, released, self.finish)
        content, calls = self.calls.add(text, ended=self.finish is not None)
        if calls and self.finish == "stop":
            self.finish = "tool_calls"
        return Piece(content, released, self.finish, calls)


@dataclass(frozen=True)
class Replies:
    """Builds the objects of one request.

    Attributes:
        chat: A chat, or a completion.
        wants: The request.
        tokenizer: The model's.
        prompt_tokens: Of all prompts.
        id: The request's id.
        created: When it came, in seconds since 1970.
    """

    chat: bool
    wants: Generation
    tokenizer: Tokenizer
    prompt_tokens: int
    id: str
    created: int

    @classmethod
    def of(cls, chat: bool, wants: Generation, tokenizer: Tokenizer, prompt_tokens: int) -> "Replies":
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        return cls(chat, wants, tokenizer, prompt_tokens, name, int(time.time()))

    def response(self, choices: list[Choice], pieces: list[list[Piece]]) -> dict[str, object]:
        """The response of a request that is not streamed."""
        result = []
        for choice, own in zip(choices, pieces, strict=True):
            text = "".join(piece.text for piece in own)
            entries = [entry for piece in own for entry in piece.entries]
            held: dict[str, object] = {"index": choice.index, "finish_reason": choice.finish}
            held |= {"logprobs": self._logprobs(entries)}
            if self.chat:
                calls = [call for piece in own for call in piece.calls]
                message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
                if calls:
                    message |= {"content": text or None, "tool_calls": calls}
                held["message"] = message
            else:
                held["text"] = text
            result.append(held)
        return self._object("chat.completion", choices=result, usage=self.usage(choices))

    def opening(self, index: int) -> dict[str, object]:
        """The first chunk of a choice of a chat, with its role."""
        return self._chunk(index, {"role": "assistant", "content": ""}, [], None)

    def chunk(self, index: int, piece: Piece) -> dict[str, object]:
        """A chunk of a stream."""
        delta: dict[str, object] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": k} | call for k, call in enumerate(piece.calls)]
        return self._chunk(index, delta, piece.entries, piece.finish)

    def last(self, choices: list[Choice]) -> dict[str, object]:
        """The chunk that holds the usage."""
        return self._object("chat.completion.chunk", choices=[], usage=self.usage(choices))

    def usage(self, choices: list[Choice]) -> dict[str, int]:
        generated = sum(choice.tokens for choice in choices)
        total = self.prompt_tokens + generated
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": generated, "total_tokens": total}

    def _object(self, kind: str, **rest: object) -> dict[str, object]:
        kind = kind if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.wants.model} | rest

    def _chunk(
        self, index: int, delta: dict[str, object], entries: list[Entry], finish: str | None
    ) -> dict[str, object]:
        choice: dict[str, object] = {"index": index, "finish_reason": finish, "logprobs": self._logprobs(entries)}
        choice |= {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        usage = {"usage": None} if self.wants.include_usage else {}
        return self._object("chat.completion.chunk", choices=[choice], **usage)

    def _logprobs(self, entries: list[Entry]) -> dict[str, object] | None:
        if not self.wants.logprobs:
            return None
        if self.chat:
            content = [
                self._token(entry.event.token, entry.event.logprob)
                | {"top_logprobs": [self._token(*top) for top in entry.event.top]}
                for entry in entries
            ]
            return {"content": content, "refusal": None}
        tops = [{self.token_text(token): logprob for token, logprob in entry.event.top} for entry in entries]
        return {
            "tokens": [self.token_text(entry.event.token) for entry in entries],
            "token_logprobs": [entry.event.logprob for entry in entries],
            "top_logprobs": tops if self.wants.top_logprobs else None,
            "text_offset": [entry.start for entry in entries],
        }

    def _token(self, token: int | None, logprob: float) -> dict[str, object]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": None if BROKEN in text else list(text.encode())}

    def token_text(self, token: int | None) -> str:
        """The text of one token; a part of a character is U+FFFD."""
        tokenizer: Any = self.tokenizer
        text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(token)
        return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text


def total_tokens(prompts: Iterable[list[int]]) -> int:
    """Tokens of all prompts."""
    return sum(map(len, prompts))
