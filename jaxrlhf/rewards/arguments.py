"""The arguments of a reward function: which ones its parameters name, and their values for a batch."""

import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxrlhf.config.imports import constant_keys
from jaxrlhf.errors import InputError

Message = dict[str, Any]
Function = Callable[..., object]

TEXTS = ("prompts", "responses")
"""Texts, the first two parameters of a function of our own form."""
OF_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Parameters that TRL's trainers fill besides columns, with prompts and completions in the form of the data."""
PROVIDED = (*OF_TRL, "responses")
ROW_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that TRL does not pass on."""
KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
ENVIRONMENTS = "environments"
"""Column with the `EndState` of each episode's environment."""


class EndState(types.SimpleNamespace):
    """Attributes and properties of an environment at the end of its episode, those with plain values."""

    def __getattr__(self, name: str) -> object:
        raise AttributeError(
            f"environments: {name!r} is none of the plain values that the environment has at its end "
            f"({', '.join(vars(self)) or 'none'}); keep a number, text, list or dict in an attribute, or let "
            "get_reward give the reward"
        )


class Samples(NamedTuple):
    """The rows of a batch that are scored."""

    rows: list[int]
    prompts: list[str]
    responses: list[str]
    columns: dict[str, list[object]]
    conversations: list[list[Message] | None] | None = None
    """Each prompt as messages where the data has messages; None: no row has."""
    completion_ids: list[list[int]] | None = None
    """Token ids of the responses; None: not known."""
    progress: dict[str, float] | None = None
    """Attributes of `trainer_state`; None: nothing is trained."""
    completions: list[list[Message]] | None = None
    """Each response as messages, where it has several turns; None: it is one message."""

    def take(self, which: Sequence[int]) -> "Samples":
        """Some of the samples, in lists of their own."""
        conversations = None if self.conversations is None else [self.conversations[k] for k in which]
        return Samples(
            [self.rows[k] for k in which],
            [self.prompts[k] for k in which],
            [self.responses[k] for k in which],
            {name: [values[k] for k in which] for name, values in self.columns.items()},
            conversations,
            None if self.completion_ids is None else [list(self.completion_ids[k]) for k in which],
            self.progress,
            None if self.completions is None else [self.completions[k] for k in which],
        )


class Log:
    """Values that a function logs in one call: numbers by name, and a value per sample by name."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.numbers: dict[str, list[float]] = {}
        self.columns: dict[str, list[object]] = {}

    def metric(self, name: str, value: float) -> None:
        """`log_metric` of TRL. Raises TypeError for a value that is no number."""
        self.numbers.setdefault(str(name), []).append(float(value))

    def extra(self, column: str, values: Sequence[object]) -> None:
        """`log_extra` of TRL. Raises ValueError for another number of values than there are samples."""
        if len(values) != self.size:
            raise ValueError(f"log_extra({column!r}): {len(values)} values for {self.size} responses")
        self.columns[str(column)] = [_plain(value) for value in values]


def _plain(value: Any) -> object:
    """A value as a table shows it: text and numbers stay, those of NumPy and JAX become Python's."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, str | int | float | None) else str(value)


@dataclass(frozen=True)
class Signature:
    """The way in which a function takes prompts, responses and what belongs to them.

    Attributes:
        parameters: the parameters that columns and options may fill.
        open_ended: it takes any keyword.
        by_position: prompts and responses are its first two arguments.
        provided: those of PROVIDED that it takes by name.
        of_trl: prompts and completions have the form of the data, messages or text.
        messages: a prompt that is text becomes messages, too: the annotation of `completions` asks for them.
        keys: constant names that it reads from its `**kwargs`.
    """

    parameters: dict[str, inspect.Parameter]
    open_ended: bool
    by_position: bool = True
    provided: tuple[str, ...] = ()
    of_trl: bool = False
    messages: bool = False
    keys: tuple[str, ...] = ()

    def values(self, samples: Samples, log: Log) -> tuple[tuple[object, ...], dict[str, object]]:
        """The arguments by position and by name that are no columns or options."""
        if self.by_position:
            args: tuple[object, ...] = (list(samples.prompts), list(samples.responses))
        else:
            args = ()
        return args, {name: self._value(name, samples, log) for name in self._available(samples)}

    def _available(self, samples: Samples) -> list[str]:
        missing = {"completion_ids"} if samples.completion_ids is None else set()
        return [name for name in self.provided if name not in missing]

    def _value(self, name: str, samples: Samples, log: Log) -> object:
        if name == "responses":
            return list(samples.responses)
        if name == "prompts" and not self.of_trl:
            return list(samples.prompts)
        if name in ("prompts", "completions"):
            return self._in_form_of_data(name, samples)
        if name == "completion_ids":
            return [list(ids) for ids in samples.completion_ids or ()]
        if name == "trainer_state":
            nothing = {"global_step": 0, "max_steps": 0, "epoch": 0.0}
            return types.SimpleNamespace(**(nothing if samples.progress is None else samples.progress))
        return log.extra if name == "log_extra" else log.metric

    def _in_form_of_data(self, name: str, samples: Samples) -> list[str | list[Message]]:
        """Prompts or completions, each as text, or as messages where the prompt is a conversation."""
        if samples.completions is not None and name == "completions":
            return [[dict(message) for message in messages] for messages in samples.completions]
        texts = samples.prompts if name == "prompts" else samples.responses
        role = "user" if name == "prompts" else "assistant"
        conversations = samples.conversations or [None] * len(texts)
        result: list[str | list[Message]] = []
        for text, conversation in zip(texts, conversations, strict=True):
            if conversation is not None and name == "prompts":
                result.append([dict(message) for message in conversation])
            elif conversation is not None or self.messages:
                result.append([{"role": role, "content": text}])
            else:
                result.append(text)
        return result


def read_signature(label: str, function: Function) -> Signature:
    """Reads how a function takes its arguments.

    Args:
        label: names the function in messages.
        function: takes (prompts, responses, …) by position; or `responses`, or TRL's `completions` or
            `completion_ids`, by name.

    Raises:
        InputError: it does not take responses.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return Signature({}, True)  # a function written in C may have no signature
    with contextlib.suppress(NameError, TypeError, AttributeError, SyntaxError):  # only type checkers need annotations
        signature = inspect.signature(function, eval_str=True)
    parameters = list(signature.parameters.values())
    names = [p.name for p in parameters if p.kind in KEYWORD]
    places = [p.name for p in parameters if p.kind in POSITIONAL]
    keywords = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    spread = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    few = len(places) < 2 and not spread
    of_trl = "completions" in names or ("completion_ids" in names and "responses" not in names)
    of_trl = of_trl or (few and keywords is not None and "responses" not in names)
    misplaced = any(p in PROVIDED and p != text for p, text in zip(places, TEXTS, strict=False))
    by_name = of_trl or few or misplaced
    if "solution_str" in names:
        raise InputError(
            f"{label}: scores one response, as for verl; give a function of lists that calls it for each, as in "
            "def scores(prompts, responses, ground_truth)"
        )
    if by_name and not of_trl and "responses" not in names:
        raise InputError(
            f"{label}: must take (prompts, responses, **columns), or completions by name, but takes {signature}"
        )
    if by_name and (lone := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]):
        raise InputError(f"{label}: takes {lone[0]} by position only; remove the / from {signature}")
    rest = [p for p in parameters if by_name or p.name not in places[:2]]
    provided = [name for name in PROVIDED if any(p.name == name and p.kind in KEYWORD for p in rest)]
    if of_trl and keywords is not None:
        provided = list(dict.fromkeys((*provided, *OF_TRL)))
    read_keys = constant_keys(function, keywords) if of_trl and keywords is not None else ()
    return Signature(
        parameters={p.name: p for p in rest if p.kind in KEYWORD and p.name not in provided},
        open_ended=keywords is not None,
        by_position=not by_name,
        provided=tuple(provided),
        of_trl=of_trl,
        messages="completions" in names and _holds_messages(signature.parameters["completions"].annotation),
        keys=tuple(key for key in read_keys if key not in PROVIDED),
    )


def _holds_messages(annotation: object) -> bool:
    """True for `list[list[…]]` and the like."""
    inner = typing.get_args(annotation)
    return bool(inner) and typing.get_origin(inner[0]) in (list, Sequence)


def option_kinds(parameter: inspect.Parameter | None, known: Collection[object]) -> Collection[object]:
    """The types of an option, from its parameter's annotation or default; without both, any of four."""
    every = {int, float, bool, str}
    if parameter is None:
        return every
    hint = parameter.annotation
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for kinds in (set(typing.get_args(hint)) if is_union else {hint}, {type(parameter.default)} & every):
        if kinds and kinds <= set(known):
            return kinds
    return every
