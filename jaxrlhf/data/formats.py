"""Formats of rows: the columns that each has, and its reader, which gives a prompt with scored completions.

Whatever its format, a row becomes a `Scored`: a prompt and completions with a score each. A step takes from it what it
needs: ppo the prompt, sft the best completion, reward and dpo pairs of a better and a worse one, kto each completion
with its label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxrlhf.config.files import parse_json
from jaxrlhf.data.columns import Columns, look_up
from jaxrlhf.data.message_forms import GIVEN
from jaxrlhf.data.messages import (
    BadRow,
    Completion,
    Message,
    Prompt,
    as_messages,
    check_turns,
    joined_answer,
    json_list,
    kind_of,
    parse_turns,
    read_content,
)

PairRule = Literal["best_worst", "adjacent", "all"]

STEPS = ("sft", "reward", "ppo", "dpo", "kto")
SAME = "is the same as the better response, so there is nothing to prefer"


@dataclass(frozen=True)
class Scored:
    """A row, whatever its format.

    Attributes:
        prompt: text, or a conversation that the assistant answers next; empty for language modelling.
        completions: each completion with its score; higher is better.
        tools: the row's tools, for the chat template.
        variables: values that the row gives to variables of the chat template.
        document: the one completion is a text of its own, trained on from its first token.
        margin: by how much the score of the chosen completion should be above the rejected one's.
    """

    prompt: Prompt
    completions: tuple[tuple[Completion, float], ...] = ()
    tools: list[Any] | None = None
    variables: dict[str, Any] | None = None
    document: bool = False
    margin: float | None = None


def split_conversation(messages: list[Message], field: str) -> tuple[list[Message], Completion]:
    """Splits a conversation before its last assistant turn; messages after that turn are left out."""
    end = len(messages)
    while end and messages[end - 1]["role"] != "assistant":
        end -= 1
    if not end:
        roles = ", ".join(m["role"] for m in messages)
        raise BadRow(field, f"has no assistant message (roles: {roles})")
    start = end
    while start and messages[start - 1]["role"] == "assistant":
        start -= 1
    check_turns(messages[:end], field)
    return messages[:start], joined_answer(messages[start:end], field)


def read_variables(row: Mapping, columns: Columns) -> dict[str, Any]:
    """The variables of the chat template in a row: an object or its JSON. A null is a variable without a value."""
    field = columns.path("chat_template_kwargs")
    given = look_up(row, field, None)
    if isinstance(given, str) and given.strip():
        try:
            given = parse_json(given)
        except ValueError as error:
            raise BadRow(field, f"is not valid JSON: {error}") from error
    if not given:
        return {}
    if not isinstance(given, Mapping):
        raise BadRow(field, f"is not an object but {kind_of(given)}")
    if taken := [name for name in given if name in GIVEN]:
        raise BadRow(field, f"holds {taken[0]}, which comes from the conversation")
    return {str(name): value for name, value in given.items() if value is not None}


def read_text(row: Mapping, columns: Columns) -> Scored:
    text = read_content(columns.get(row, "text"), columns.path("text"))
    if not isinstance(text, str):
        raise BadRow(columns.path("text"), "is not text but messages")
    return Scored("", ((text, 1.0),), document=True)


def read_conversation(row: Mapping, columns: Columns, column: str = "messages") -> Scored:
    field = columns.path(column)
    messages = read_content(columns.get(row, column), field)
    if isinstance(messages, str):
        raise BadRow(field, "is not a list of messages but text")
    prompt, completion = split_conversation(messages, field)
    if not prompt:
        raise BadRow(field, "has no message before the assistant's")
    return Scored(prompt, ((completion, 1.0),))


def read_sharegpt(row: Mapping, columns: Columns) -> Scored:
    return read_conversation(row, columns, "conversations")


def read_prompt(row: Mapping, columns: Columns, column: str = "prompt") -> Scored:
    field = columns.path(column)
    prompt = read_content(columns.get(row, column), field)
    if isinstance(prompt, list):
        if prompt[-1]["role"] == "assistant":
            raise BadRow(field, "ends with an assistant message")
        check_turns(prompt, field)
    return Scored(prompt)


def read_instruction(row: Mapping, columns: Columns) -> Prompt:
    """The prompt of an Alpaca row: instruction and input, after the turns of its `history` and its `system` message."""
    field = columns.path("instruction")
    prompt = read_content(columns.get(row, "instruction"), field)
    if not isinstance(prompt, str):
        raise BadRow(field, "is not text but messages")
    extra = look_up(row, columns.path("input"))
    if isinstance(extra, str) and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    before: list[Message] = []
    system = look_up(row, columns.path("system") or "system", None)
    if isinstance(system, str) and system.strip():
        before.append({"role": "system", "content": system})
    for turns in look_up(row, "history", None) or ():
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(text, str) for text in turns):
            raise BadRow("history", "is not a list of pairs of a question and an answer")
        before += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]
    return [*before, {"role": "user", "content": prompt}] if before else prompt


def prompt_of_pair(row: Mapping, columns: Columns) -> Prompt:
    """The prompt of a preference, from the first of its columns that the row has; empty where it has none."""
    if columns.has(row, "instruction") and not columns.has(row, "prompt"):
        return read_instruction(row, columns)
    column = next((name for name in ("prompt", "conversations") if columns.has(row, name)), None)
    return read_prompt(row, columns, column).prompt if column else ""


def read_completion(row: Mapping, columns: Columns, column: str) -> Completion:
    """The completion in a column, as text or as messages that follow the prompt."""
    field = columns.path(column)
    return joined_answer(read_content(columns.get(row, column), field), field)


def read_prompt_completion(row: Mapping, columns: Columns) -> Scored:
    column = "chosen" if columns.has(row, "chosen") and not columns.has(row, "completion") else "completion"
    prompt = read_prompt(row, columns).prompt
    value = read_content(columns.get(row, column), columns.path(column))
    if isinstance(value, list) and value[0]["role"] != "assistant":  # the whole conversation
        prompt, completion = split_conversation(_after(prompt, value, columns.path("prompt")), columns.path(column))
    else:
        completion = joined_answer(value, columns.path(column))
    return Scored(prompt, ((completion, 1.0),))


def read_unpaired(row: Mapping, columns: Columns) -> Scored:
    scored, label = read_prompt_completion(row, columns), columns.get(row, "label")
    if isinstance(label, str):  # a cell of a CSV file
        label = {"true": 1, "1": 1, "false": 0, "0": 0}.get(label.strip().lower(), label)
    if label not in (0, 1, True, False):
        found = "null" if label is None else repr(label)
        raise BadRow(columns.path("label"), f"is {found}; it must be true or false")
    return Scored(scored.prompt, ((scored.completions[0][0], float(label)),))


def read_alpaca(row: Mapping, columns: Columns) -> Scored:
    return Scored(read_instruction(row, columns), ((read_completion(row, columns, "output"), 1.0),))


def read_ranked(row: Mapping, columns: Columns) -> Scored:
    field, prompt = columns.path("responses"), read_prompt(row, columns).prompt
    responses = columns.get(row, "responses")
    if not isinstance(responses, list) or not responses:
        raise BadRow(field, "is not a list of responses")
    column = "scores" if columns.has(row, "scores") else "ranks"
    scores, sign = columns.get(row, column), 1.0 if column == "scores" else -1.0
    if not isinstance(scores, list) or len(scores) != len(responses):
        found = f"{len(scores)} values" if isinstance(scores, list) else kind_of(scores)
        raise BadRow(columns.path(column), f"has {found} for {len(responses)} responses")
    completions = []
    for response, score in zip(responses, scores, strict=True):
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise BadRow(columns.path(column), f"holds {kind_of(score)} where a number must be")
        completions.append((joined_answer(read_content(response, field), field), sign * score))
    return Scored(prompt, tuple(completions))


def _after(prompt: Prompt, conversation: list[Message], field: str) -> list[Message]:
    """A conversation that a row gives beside a prompt. Raises BadRow when the prompt does not stand in it."""
    if isinstance(prompt, str):
        if not any(m["role"] != "assistant" and m["content"].strip() == prompt.strip() for m in conversation):
            raise BadRow(field, "is text that does not stand in the conversation beside it")
    elif conversation[: len(prompt)] != prompt:
        raise BadRow(field, "is not the beginning of the conversation beside it")
    return conversation


def read_preference(row: Mapping, columns: Columns) -> Scored:
    """A pair, with the prompt in a column of its own or as the common beginning of both sides."""
    sides = [read_content(columns.get(row, name), columns.path(name)) for name in ("chosen", "rejected")]
    prompt = prompt_of_pair(row, columns)
    if not prompt and all(isinstance(side, str) for side in sides):
        turns = [parse_turns(str(side)) for side in sides]
        if all(turns):
            sides = [turn for turn in turns if turn]
    if all(isinstance(side, str) for side in sides):
        if not prompt:
            return _common_text(str(sides[0]), str(sides[1]), columns)
        return Scored(prompt, ((sides[0], 1.0), (sides[1], 0.0)))
    whole = []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        messages = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        if messages[0]["role"] != "assistant":
            messages = _after(prompt, messages, columns.path("prompt")) if prompt else messages
        elif prompt:
            messages = as_messages(prompt) + messages
        if messages[-1]["role"] != "assistant":
            raise BadRow(columns.path(name), f"ends with a {messages[-1]['role']} message, not with the assistant's")
        check_turns(messages, columns.path(name))
        whole.append(messages)
    return _common_messages(whole[0], whole[1], columns)


def read_margin(row: Mapping, columns: Columns) -> float | None:
    """The margin of a pair; None where it is null."""
    value = columns.get(row, "margin")
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise BadRow(
            columns.path("margin"), f"is {value!r}; the margin of a pair is a number (name another --margin_field)"
        )
    return value


def _common_messages(chosen: list[Message], rejected: list[Message], columns: Columns) -> Scored:
    """The common beginning of two conversations is the prompt; what differs is the completion."""
    pairs = zip(chosen, rejected, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    # A prompt ends where the assistant's turn begins, and a completion is not empty.
    while shared and (min(len(chosen), len(rejected)) <= shared or chosen[shared - 1]["role"] == "assistant"):
        shared -= 1
    if not shared or all(m["role"] == "system" for m in chosen[:shared]):
        raise BadRow(columns.path("rejected"), f"shares no beginning with '{columns.path('chosen')}'")
    ends = [joined_answer(side[shared:], columns.path("chosen")) for side in (chosen, rejected)]
    return Scored(chosen[:shared], ((ends[0], 1.0), (ends[1], 0.0)))


def _common_text(chosen: str, rejected: str, columns: Columns) -> Scored:
    """The common beginning of two texts, up to the end of a word, is the prompt."""
    pairs = zip(chosen, rejected, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if not chosen[shared:].strip() or not rejected[shared:].strip():
        shared = len(chosen[:shared].rstrip())
    while shared and not (chosen[shared : shared + 1].isspace() or chosen[shared - 1].isspace()):
        shared -= 1
    while shared and chosen[shared - 1] == " ":  # a space belongs to the word that follows it
        shared -= 1
    if not chosen[:shared].strip():
        raise BadRow(columns.path("rejected"), f"shares no beginning with '{columns.path('chosen')}'")
    return Scored(chosen[:shared], ((chosen[shared:], 1.0), (rejected[shared:], 0.0)))


@dataclass(frozen=True)
class Format:
    """One format of rows.

    Attributes:
        title: its name in messages.
        columns: canonical columns that a row must have; alternatives are separated by `|`.
        steps: the steps that it serves.
        read: reads a row.
    """

    title: str
    columns: tuple[str, ...]
    steps: tuple[str, ...]
    read: Callable[[Mapping, Columns], Scored]

    @property
    def listed(self) -> str:
        """The columns that a row must have, in words."""
        return ", ".join(self.columns).replace("|", " or ")

    @property
    def names(self) -> set[str]:
        """All canonical columns that rows of the format may have."""
        extra = {"input"} if any("instruction" in column for column in self.columns) else set()
        extra |= {"tools", "chat_template_kwargs"}
        return extra | {name for column in self.columns for name in column.split("|")}

    def missing(self, row: Mapping, columns: Columns) -> list[str]:
        """The columns that a row lacks."""
        return [c for c in self.columns if not any(columns.has(row, name) for name in c.split("|"))]


FORMATS = {
    "preference": Format(
        "preference, explicit prompt",
        ("prompt|conversations|instruction", "chosen", "rejected"),
        STEPS,
        read_preference,
    ),
    "sharegpt": Format("ShareGPT", ("conversations",), ("sft", "ppo"), read_sharegpt),
    "preference_implicit": Format("preference, implicit prompt", ("chosen", "rejected"), STEPS, read_preference),
    "ranked": Format("ranked responses", ("prompt", "responses", "scores|ranks"), STEPS[:4], read_ranked),
    "unpaired": Format("unpaired preference", ("prompt", "completion|chosen", "label"), STEPS, read_unpaired),
    "prompt_completion": Format(
        "prompt-completion", ("prompt", "completion|chosen"), ("sft", "ppo"), read_prompt_completion
    ),
    "alpaca": Format("Alpaca", ("instruction", "output"), ("sft", "ppo"), read_alpaca),
    "messages": Format("language modelling", ("messages",), ("sft", "ppo"), read_conversation),
    "prompt": Format("prompt only", ("prompt",), ("ppo",), read_prompt),
    "text": Format("language modelling", ("text",), ("sft",), read_text),
}
"""The formats by the names of `--data_format`, the most particular first."""
PREFERENCES = ("preference", "preference_implicit")
"""Formats of one pair, whose rows may have a margin."""


@dataclass(frozen=True)
class Reader:
    """Reads the rows of one source: their format, their columns, and what a step takes from them."""

    format: str
    columns: Columns
    pairs: PairRule = "best_worst"
    margin: float = 0.0
    convert: Callable[[Mapping], Sequence[Mapping]] | None = None

    def all(self, raw: object) -> list[Scored]:
        """Reads the rows that `convert` makes of a row, or the row itself. Raises BadRow when there are none."""
        if self.convert is None:
            return [self(raw)]
        if not isinstance(raw, Mapping):
            raise BadRow("row", f"is not an object but {kind_of(raw)}")
        rows = [self(row) for row in self.convert(raw)]
        if not rows:
            raise BadRow("row", "is left out by the data set's rule for labels")
        return rows

    def __call__(self, row: object) -> Scored:
        """Reads a row. Raises BadRow for one that does not fit the format."""
        if not isinstance(row, Mapping):
            raise BadRow("row", f"is not an object but {kind_of(row)}")
        scored, columns = FORMATS[self.format].read(row, self.columns), self.columns
        system = look_up(row, columns.names["system"]) if columns.names.get("system") else None
        if isinstance(system, str) and system.strip() and not scored.document:
            messages = as_messages(scored.prompt)
            if messages[0]["role"] != "system":
                scored = _replace(scored, prompt=[{"role": "system", "content": system}, *messages])
        if self.format in PREFERENCES and columns.has(row, "margin"):
            scored = _replace(scored, margin=read_margin(row, columns))
        tools = look_up(row, columns.path("tools"))
        if isinstance(tools, str):
            tools = json_list(tools)
        if isinstance(tools, list) and tools:
            scored = _replace(scored, tools=tools)
        variables = read_variables(row, columns)
        return _replace(scored, variables=variables) if variables else scored

    def examples(self, scored: Scored, step: str) -> list[tuple[Completion, ...]]:
        """The completions of each example that a step makes of a row; one example has 0 (ppo), 1 (sft, kto) or 2."""
        if step == "ppo":
            return [()]
        if step == "kto":
            if self.format in PREFERENCES and scored.completions[0][0] == scored.completions[1][0]:
                raise BadRow(self.columns.path("rejected"), SAME)
            return [(completion,) for completion, _ in scored.completions]
        best = sorted(scored.completions, key=lambda item: -item[1])
        if step == "sft":
            if self.format == "unpaired" and best[0][1] <= 0:
                raise BadRow(self.columns.path("label"), "is false, and sft learns from the good completions only")
            return [(best[0][0],)]
        chosen = {
            "best_worst": [(best[0], best[-1])],
            "adjacent": list(itertools.pairwise(best)),
            "all": list(itertools.combinations(best, 2)),
        }[self.pairs]
        kept = [(a[0], b[0]) for a, b in chosen if a[1] > b[1] and a[1] - b[1] >= self.margin]
        if not kept:
            raise BadRow(self.columns.path("scores"), "gives no pair whose scores differ enough")
        if not (pairs := [(a, b) for a, b in kept if a != b]):
            raise BadRow(self.columns.path("rejected"), SAME)
        return pairs


def _replace(scored: Scored, **changes: Any) -> Scored:
    return Scored(**(vars(scored) | changes))
