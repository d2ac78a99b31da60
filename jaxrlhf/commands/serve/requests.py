"""Reads the bodies of requests: types and ranges checked, what is not supported refused by name, in OpenAI's errors."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxrlhf.commands.serve.conversations import Message, read_messages, read_tools
from jaxrlhf.commands.serve.fields import ApiError, Fields
from jaxrlhf.engine import SlotSampling
from jaxrlhf.engine.slots import TOP

MAX_N = 128
MAX_STOPS = 16
MAX_TEXTS = 256


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


def sampling(wants: Generation, number: int) -> SlotSampling:
    """The sampling settings of sample `number` of a prompt."""
    return SlotSampling(
        seed=wants.seed,
        number=number,
        temperature=wants.temperature,
        top_k=wants.top_k,
        top_p=wants.top_p,
        top_logprobs=wants.top_logprobs > 0,
    )


def token_limit(length: int, prompt: int, wanted: int | None, name: str) -> int:
    """Most tokens of a response. Raises ApiError when prompt and response do not fit the context."""
    most = length - prompt
    if most < 1 or (wanted or 0) > most:
        asked = f" and max_tokens is {wanted}" if wanted else ""
        raise ApiError(
            f"this model's context is {length} tokens; the {name} has {prompt} tokens{asked}. Shorten the {name}"
            f"{' or lower max_tokens' if wanted else ''}",
            name,
            "context_length_exceeded",
        )
    return wanted or most


class Chat(NamedTuple):
    """A chat request."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    """Those that the model may call; empty with tool_choice none."""
    parallel: bool
    """False: at most one call in a response."""
    variables: dict[str, bool | float | str]
    """Values of the variables that the chat template reads, by name."""
    wants: Generation


def read_chat(body: Mapping[str, object]) -> Chat:
    """A chat request: its conversation, its tools, and what it wants."""
    fields = Fields(body)
    messages = read_messages(fields.left.pop("messages", None))
    tools, parallel = read_tools(fields), fields.flag("parallel_tool_calls", default=True)
    return Chat(messages, tools, parallel, read_variables(fields), read_generation(fields, chat=True))


def read_variables(fields: Fields) -> dict[str, bool | float | str]:
    """Takes `chat_template_kwargs`: variables of the chat template, as vLLM's clients give them."""
    given = fields.left.pop("chat_template_kwargs", {})
    if not isinstance(given, dict) or not all(isinstance(value, bool | int | float | str) for value in given.values()):
        raise fields.bad("chat_template_kwargs", given, 'an object such as {"enable_thinking": false}')
    return given


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


def read_score(body: Mapping[str, object]) -> tuple[str, list[str] | None, list[list[Message]]]:
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
