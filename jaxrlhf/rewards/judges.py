"""Reward functions that ask a server: the scores of a reward model, or the judgement of a language model.

All take conversations as messages, whatever the form of the data.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.errors import InputError
from jaxrlhf.rewards.arguments import Message
from jaxrlhf.rewards.http import Client, ClientOptions, RequestFailed, Unreadable

Conversation = list[Message]
LogMetric = Callable[[str, float], object]

SCORE_TEMPLATE = """Judge how well the assistant's last answer serves the user: whether it is correct, complete, \
relevant and clear. Length alone is no merit. Think about it in at most three sentences. Then end with one line of \
the form "Score: N", where N is a whole number from 1 (useless) to {scale} (could not be better).

[Conversation]
{prompt}
[End of the conversation]

[Answer]
{response}
[End of the answer]
"""
PAIR_TEMPLATE = """Two assistants answered the conversation below. Judge which answer serves the user better: whether \
it is correct, complete, relevant and clear. Neither the order of the answers nor their length alone counts. Think \
about it in at most three sentences. Then end with one line: [[A]] if answer A is better, [[B]] if answer B is \
better, [[C]] if they are equally good.

[Conversation]
{prompt}
[End of the conversation]

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]
"""
_SCORE = re.compile(r"(?:score|rating)\W{0,5}(-?[0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)
_NUMBER = re.compile(r"\A\s*(-?[0-9]+(?:\.[0-9]+)?)\s*\Z")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_VALUES = {"A": 1.0, "B": 0.0, "C": 0.5}


@functools.cache
def client_of(options: ClientOptions) -> Client:
    """One client for all calls with the same options, whose rate is limited as a whole."""
    return Client(options)


def asks_server(function: Callable[..., list[float]]) -> Callable[..., list[float]]:
    """Gives a function the options of a server (`ClientOptions`) as keyword arguments, in place of `client`."""
    own = inspect.signature(function, eval_str=True)
    options = inspect.signature(ClientOptions, eval_str=True).parameters
    label = f"reward function {function.__name__}"

    @functools.wraps(function)
    def call(*args: object, **given: Any) -> list[float]:
        server = ClientOptions(**{name: given.pop(name) for name in options if name in given})
        server.check(label)
        return function(*args, client=client_of(server), **given)

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in options.values()]
    parameters += [p for p in own.parameters.values() if p.name != "client"]
    vars(call)["__signature__"] = own.replace(parameters=sorted(parameters, key=lambda p: p.kind))
    return call


@asks_server
def score_server(
    completions: list[list[Message]],
    prompts: Sequence[Conversation],
    *,
    client: Client,
    model: str = "",
    batch: int = 16,
) -> list[float]:
    """The scores of a reward model behind `jaxrlhf serve`, or another server with `POST …/score`; NaN where it fails.

    Args:
        completions: One message each.
        prompts: The conversations before it.
        client: The server. Callers give `url` and the other options of `ClientOptions` instead.
        model: Name of the reward model; may be left out where the server has one.
        batch: Conversations of one request.
    """
    if batch < 1:
        raise InputError(f"reward function score_server: batch={batch} must be at least 1")
    conversations = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    pieces = [conversations[i : i + batch] for i in range(0, len(conversations), batch)]

    def ask(i: int) -> list[float]:
        body: dict[str, Any] = {"messages": pieces[i]} | ({"model": model} if model else {})
        return client.ask("score", body, lambda answer: _scores(answer, len(pieces[i])))

    scores: list[float] = []
    for piece, found in zip(pieces, client.each(ask, len(pieces)), strict=True):
        scores += [math.nan] * len(piece) if isinstance(found, Exception) else found
        if isinstance(found, Exception):
            print(f"{len(piece)} responses without a score: {found}")
    return scores


def _scores(answer: Any, count: int) -> list[float]:
    """The scores of an answer, in the order of the request. Raises RequestFailed for another form."""
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])
        scores = [float(row["score"]) for row in rows]
        numbers = [row["index"] for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestFailed(f"the server's answer holds no scores: {str(answer)[:200]}") from error
    if numbers != list(range(count)):
        raise RequestFailed(f"the server gave {len(scores)} scores for {count} conversations")
    return scores


@asks_server
def judge(
    completions: list[list[Message]],
    prompts: Sequence[Conversation],
    *,
    client: Client,
    model: str,
    scale: int = 10,
    template: str = "",
    max_tokens: int = 256,
    log_metric: LogMetric | None = None,
) -> list[float]:
    """The grade that a language model behind an OpenAI-compatible server gives, from 0 to 1; NaN without one.

    Args:
        completions: One message each.
        prompts: The conversations before it.
        client: The server. Callers give `url` and the other options of `ClientOptions` instead.
        model: Name of the model.
        scale: The best grade; the worst is 1.
        template: File with the question, which has `{prompt}` and `{response}`, and may have `{scale}`; empty: ours.
        max_tokens: Longest answer.
        log_metric: Gets the share of answers without a grade.
    """
    label = "reward function judge"
    if scale < 2 or max_tokens < 1:
        raise InputError(f"{label}: scale={scale} must be at least 2, and max_tokens={max_tokens} at least 1")
    question = read_template(label, template, ("prompt", "response")) if template else SCORE_TEMPLATE

    def ask(i: int) -> float:
        filled = fill(question, prompt=shown(prompts[i]), response=shown_answer(completions[i]), scale=str(scale))
        return _ask(client, model, max_tokens, filled, functools.partial(grade, scale=scale))

    return _reported(client.each(ask, len(completions)), log_metric)


@asks_server
def judge_pairs(
    completions: list[list[Message]],
    prompts: Sequence[Conversation],
    references: Sequence[object],
    *,
    client: Client,
    model: str,
    template: str = "",
    max_tokens: int = 256,
    log_metric: LogMetric | None = None,
) -> list[float]:
    """1 where the judge prefers the response to the row's reference, 0.5 for a tie, 0 else; NaN without a judgement.

    The judge sees each pair in both orders, and the score is the mean of what it says.

    Args:
        completions: One message each.
        prompts: The conversations before it.
        references: The answer to compare with, a text or messages.
        template: File with the question, which has `{prompt}`, `{first}` and `{second}`; empty: ours.
        client: As in `judge`, as are the others.
    """
    label = "reward function judge_pairs"
    if max_tokens < 1:
        raise InputError(f"{label}: max_tokens={max_tokens} must be at least 1")
    question = read_template(label, template, ("prompt", "first", "second")) if template else PAIR_TEMPLATE
    others = [shown_answer(reference) for reference in references]

    def ask(i: int) -> float:
        k, swapped = divmod(i, 2)
        sides = [shown_answer(completions[k]), others[k]]
        first, second = reversed(sides) if swapped else sides
        filled = fill(question, prompt=shown(prompts[k]), first=first, second=second)
        value = _ask(client, model, max_tokens, filled, verdict)
        return 1 - value if swapped else value

    found = client.each(ask, 2 * len(completions))
    return _reported([_mean(found[2 * k : 2 * k + 2]) for k in range(len(completions))], log_metric)


def _mean(found: list[float | Exception]) -> float | Exception:
    """The mean of the values, or the first failure when there is none."""
    values = [value for value in found if isinstance(value, float)]
    return sum(values) / len(values) if values else found[0]


def _ask(to: Client, model: str, max_tokens: int, question: str, read: Callable[[str], float]) -> float:
    """Asks the judge, and returns `read(answer)`. Raises RequestFailed or Unreadable."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    return to.ask("chat/completions", body, lambda answer: read(_text(answer)))


def _text(answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise RequestFailed(f"the server's answer holds no message: {str(answer)[:200]}") from error
    return str(text)


def _reported(found: Sequence[float | Exception], log_metric: LogMetric | None) -> list[float]:
    """The values, NaN for a failure; the kinds of failures are printed and the unreadable answers logged."""
    unread = [error for error in found if isinstance(error, Unreadable)]
    failed = [error for error in found if isinstance(error, RequestFailed)]
    for errors, what in ((unread, "answers of the judge without a judgement"), (failed, "requests failed")):
        if errors:
            print(f"{len(errors)} {what}, such as: {errors[0]}")
    if log_metric is not None and found:
        log_metric("unreadable", len(unread) / len(found))
    return [math.nan if isinstance(value, Exception) else value for value in found]


def grade(text: str, scale: int) -> float:
    """The last grade in a judge's answer, from 0 to 1. Raises Unreadable without one from 1 to `scale`."""
    grades = _SCORE.findall(text) or _NUMBER.findall(text)
    if not grades:
        raise Unreadable(f"no grade in {text[-200:]!r}")
    value = float(grades[-1])
    if not 1 <= value <= scale:
        raise Unreadable(f"the grade {value:g} is not from 1 to {scale} in {text[-200:]!r}")
    return (value - 1) / (scale - 1)


def verdict(text: str) -> float:
    """1 if a judge's answer ends with [[A]], 0 with [[B]], 0.5 with [[C]]. Raises Unreadable without any."""
    found = _VERDICT.findall(text)
    if not found:
        raise Unreadable(f"no verdict [[A]], [[B]] or [[C]] in {text[-200:]!r}")
    return _VALUES[found[-1]]


def read_template(label: str, path: str, names: Sequence[str]) -> str:
    """Reads a template. Raises InputError for a file that cannot be read or lacks a name in braces."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{label}: template={path}: cannot be read ({error}); name a text file") from error
    missing = [name for name in names if f"{{{name}}}" not in text]
    if missing:
        needed = ", ".join(f"{{{name}}}" for name in names)
        raise InputError(f"{label}: template={path}: has no {{{missing[0]}}}; it needs {needed}")
    return text


def fill(template: str, **values: str) -> str:
    """The template with the names in braces replaced, in one pass: braces within the values stay."""
    pattern = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))
    return pattern.sub(lambda match: values[match.group()[1:-1]], template)


def shown(conversation: Conversation) -> str:
    """A conversation as text; one message of the user stands alone."""
    if len(conversation) == 1 and conversation[0].get("role") == "user":
        return str(conversation[0]["content"])
    return "\n\n".join(f"{message.get('role')}: {message.get('content')}" for message in conversation)


def shown_answer(answer: object) -> str:
    """An answer, a text or messages, as text."""
    if isinstance(answer, list) and all(isinstance(message, dict) for message in answer):
        return "\n\n".join(str(message.get("content")) for message in answer)
    return str(answer)
