"""Reads the bodies of requests: types and ranges checked, what is not supported refused by name, in OpenAI's errors."""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.config.files import parse_json
from jaxrlhf.engine.slots import TOP

MAX_BODY = 4 * 1024 * 1024
MAX_N = 128
MAX_STOPS = 16
MAX_TEXTS = 256

# Parameters of OpenAI's API that change nothing here, whatever their value.
INERT = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Parameters that are not supported, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """An error in the shape that OpenAI's clients read.

    Args:
        message: What is wrong, with the value found, and the remedy.
        param: The parameter.
        code: Such as model_not_found.
        status: The HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, object]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def parse_body(data: bytes) -> dict[str, object]:
    """The JSON object of a body. Raises ApiError for anything else, also for text that is no Unicode."""
    try:
        body = parse_json(data.decode("utf-8"))
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, not {shown(body)}")
    return body


def shown(value: object) -> str:
    """A value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


class Fields:
    """Takes the parameters of a body one by one; null counts as not given."""

    def __init__(self, body: Mapping[str, object]) -> None:
        self.left: dict[str, Any] = {name: value for name, value in body.items() if value is not None}

    def bad(self, name: str, value: object, must: str) -> ApiError:
        return ApiError(f"{name}={shown(value)} must be {must}", name)

    def number(self, name: str, default: float, low: float, high: float = math.inf) -> float:
        value = self.left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.bad(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
        value = self.left.pop(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(name, value, f"a whole number from {low} to {high}")
        return value

    def flag(self, name: str) -> bool:
        value = self.left.pop(name, False)
        if not isinstance(value, bool):
            raise self.bad(name, value, "true or false")
        return value

    def text(self, name: str) -> str:
        if name not in self.left:
            raise ApiError(f"{name} is missing; give a text", name)
        value = self.left.pop(name)
        if not isinstance(value, str):
            raise self.bad(name, value, "a text")
        return value

    def end(self) -> None:
        """Refuses what is left."""
        for name in INERT:
            self.left.pop(name, None)
        for name, value in self.left.items():
            if name not in NEUTRAL:
                raise ApiError(f"{name} is no parameter of this request; remove it", name, "unknown_parameter")
            if not any(
                value == other and isinstance(value, bool) == isinstance(other, bool) for other in NEUTRAL[name]
            ):
                raise ApiError(f"{name} is not supported; remove it", name, "unsupported_parameter")


@dataclass(frozen=True)
class Generation:
    """The wishes of a request for each of its prompts."""

    model: str
    n: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stops: tuple[str, ...]
    max_tokens: int | None
    """None: as many as fit."""
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool


def read_stops(fields: Fields) -> tuple[str, ...]:
    value = fields.left.pop("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise fields.bad("stop", value, "a text or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise ApiError(f"stop has {len(stops)} texts; give at most {MAX_STOPS}", "stop")
    return tuple(stops)


def read_max_tokens(fields: Fields, names: Sequence[str]) -> int | None:
    given = {name: fields.integer(name, None, 1, 2**31 - 1) for name in names}
    values = {value for value in given.values() if value is not None}
    if len(values) > 1:
        raise ApiError(f"{' and '.join(names)} differ; give one of them", names[0])
    return values.pop() if values else None


def read_logprobs(fields: Fields, chat: bool) -> tuple[bool, int]:
    """Reads if log-probs are wanted, and of how many of the likeliest tokens."""
    if not chat:
        top = fields.integer("logprobs", None, 0, TOP)
        return top is not None, top or 0
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", None, 0, TOP)
    if top is not None and not wanted:
        raise ApiError("top_logprobs requires logprobs: set it to true", "top_logprobs")
    return wanted, top or 0


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """Reads if the response is streamed, and if it ends with the usage."""
    stream, options = fields.flag("stream"), fields.left.pop("stream_options", None)
    if options is None:
        return stream, False
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise fields.bad("stream_options", options, 'an object such as {"include_usage": true}')
    if not stream:
        raise ApiError("stream_options requires stream: set it to true", "stream_options")
    inner = Fields(options)
    inner.flag("include_obfuscation")
    return stream, inner.flag("include_usage")


def read_generation(fields: Fields, chat: bool) -> Generation:
    """Takes what chats and completions have in common; then nothing may be left."""
    model = fields.text("model")
    stream, include_usage = read_stream(fields)
    logprobs, top_logprobs = read_logprobs(fields, chat)
    n = fields.integer("n", 1, 1, MAX_N)
    if fields.left.get("best_of") == n:
        del fields.left["best_of"]
    names = ("max_completion_tokens", "max_tokens") if chat else ("max_tokens",)
    seed = fields.integer("seed", None, -(2**63), 2**64 - 1)
    result = Generation(
        model=model,
        n=n,
        temperature=fields.number("temperature", 1.0, 0, 2),
        top_p=fields.number("top_p", 1.0, 0, 1),
        top_k=max(fields.integer("top_k", 0, -1, 2**31 - 1), 0),
        seed=secrets.randbits(63) if seed is None else seed,
        stops=read_stops(fields),
        max_tokens=read_max_tokens(fields, names),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=stream,
        include_usage=include_usage,
    )
    fields.end()
    return result


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


def read_messages(value: object, where: str = "messages") -> list[dict[str, str]]:
    """A conversation as roles and texts."""
    if not isinstance(value, list) or not value:
        raise ApiError(f"{where} must be a list with at least one message", "messages")
    result = []
    for i, message in enumerate(value):
        place = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise ApiError(f"{place}={shown(message)} must be an object with role and content", "messages")
        role = {"developer": "system"}.get(str(message.get("role")), message.get("role"))
        if role not in ("system", "user", "assistant"):
            raise ApiError(f"{place}.role={shown(role)} must be system, developer, user or assistant", "messages")
        others = [key for key, held in message.items() if key not in ("role", "content") and held not in (None, [], {})]
        if others:
            raise ApiError(f"{place}.{others[0]} is not supported; remove it", "messages")
        result.append({"role": role, "content": read_content(message.get("content"), place)})
    return result


def read_chat(body: Mapping[str, object]) -> tuple[list[dict[str, str]], Generation]:
    """The conversation of a chat request, and what it wants."""
    fields = Fields(body)
    return read_messages(fields.left.pop("messages", None)), read_generation(fields, chat=True)


def read_completion(body: Mapping[str, object]) -> tuple[list[str] | list[list[int]], Generation]:
    """The prompts of a completion request, texts or token ids, and what it wants."""
    fields = Fields(body)
    prompt = fields.left.pop("prompt", None)

    def ids(value: object) -> bool:
        return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)

    if isinstance(prompt, str) or ids(prompt):
        prompt = [prompt]
    good = isinstance(prompt, list) and prompt and (all(isinstance(p, str) for p in prompt) or all(map(ids, prompt)))
    if not good:
        raise fields.bad("prompt", prompt, "a text, a list of token ids, or a list of such")
    return prompt, read_generation(fields, chat=False)


def read_score(body: Mapping[str, object]) -> tuple[str, list[str] | None, list[list[dict[str, str]]]]:
    """The model of a score request, and its texts or its conversations."""
    fields = Fields(body)
    model = fields.text("model")
    texts, messages = fields.left.pop("texts", None), fields.left.pop("messages", None)
    fields.end()
    if (texts is None) == (messages is None):
        raise ApiError("give texts or messages: a list of texts, or of conversations", "texts")
    name: str = "messages" if texts is None else "texts"
    value: Any = messages if texts is None else texts
    if name == "texts" and isinstance(value, str):
        value = [value]
    if name == "messages" and isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        value = [value]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TEXTS:
        raise ApiError(f"{name} must be a list of 1 to {MAX_TEXTS} entries", name)
    if name == "texts":
        if not all(isinstance(text, str) for text in value):
            raise ApiError("texts must hold texts alone", "texts")
        return model, value, []
    conversations = [read_messages(messages, f"messages[{i}]") for i, messages in enumerate(value)]
    for i, conversation in enumerate(conversations):
        if len(conversation) < 2 or conversation[-1]["role"] != "assistant":
            raise ApiError(f"messages[{i}] must end with the assistant's message, after a prompt", "messages")
    return model, None, conversations


def read_vote(body: Mapping[str, object]) -> dict[str, object]:
    """A vote of the chat page as a row that `jaxrlhf reward` reads, with the models that wrote the responses."""
    fields = Fields(body)
    messages = read_messages(fields.left.pop("messages", None))
    if messages[-1]["role"] != "user":
        raise ApiError("messages must end with the user's message, which both responses answer", "messages")
    row: dict[str, Any] = {"prompt": messages}
    for name in ("chosen", "rejected"):
        row[name] = [{"role": "assistant", "content": fields.text(name)}]
    row |= {name: fields.text(name) for name in ("chosen_model", "rejected_model")}
    if row["chosen"] == row["rejected"]:
        raise ApiError("chosen and rejected are the same text; nothing is preferred", "rejected")
    fields.end()
    return row
