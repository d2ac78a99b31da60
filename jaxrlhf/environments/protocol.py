"""The protocol of environments: what answers the model between its turns, and rewards it (docs/environments.md)."""

import math
import numbers
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxrlhf.errors import InputError

Message = dict[str, Any]
"""Role and content, and where a message has them the other keys of KEPT."""
KEPT = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Keys of a message that templates read."""


@dataclass(frozen=True)
class Observation:
    """An environment's answer to a turn of the model."""

    messages: Sequence[Message] = ()
    """Messages that follow the model's; needed unless the episode is done."""
    reward: float | None = None
    """Reward of this turn; None: none."""
    done: bool = False
    """True ends the episode."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Its numbers are averaged over the episodes, the last value of each, as metrics `environment/NAME`."""


class Environment(Protocol):
    """One conversation at a time. Both methods may be coroutines.

    An instance is made without arguments, and `reset` begins each of its episodes. Several instances work at the same
    time, each in a thread. An environment may have the attribute `columns`, names of the columns of the data that it
    reads, and a method `truncated()` that returns the reward (or None) of an episode that a limit ended.
    """

    def reset(self, row: Mapping[str, Any]) -> Sequence[Message] | Awaitable[Sequence[Message] | None] | None:
        """Begins an episode.

        Args:
            row: The data's row: `prompt` (messages), and its columns.

        Returns:
            The messages that the model answers first; None: the row's prompt.
        """
        ...

    def step(self, messages: list[Message], response: str) -> Observation | Awaitable[Observation]:
        """Answers the model.

        Args:
            messages: The conversation before the response.
            response: The model's turn as text.
        """
        ...


class WrongAnswer(Exception):
    """An environment or a tool returned something else than the protocol says. The message says what."""


def read_messages(value: object, what: str) -> list[Message]:
    """Copies messages, with the keys of KEPT.

    Raises:
        WrongAnswer: It is no list of messages, or one of them lacks a role or a text.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise WrongAnswer(
            f"{what} must be a list of messages, as in [{{'role': 'user', 'content': 'Go on.'}}]; found "
            f"{kind_of(value)}"
        )
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise WrongAnswer(f"message {number} of {what} must have a role and a content; found {kind_of(message)}")
        if not isinstance(message.get("content"), str):
            raise WrongAnswer(
                f"the content of message {number} of {what} must be text; found {kind_of(message.get('content'))}"
            )
        messages.append({key: message[key] for key in KEPT if key in message})
    return messages


def read_reward(value: object, what: str) -> float | None:
    """A reward as a float. Raises WrongAnswer for anything but a finite number or None."""
    number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value  # type: ignore
    if number is None:
        return None
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise WrongAnswer(f"{what} must be a finite number or None; found {number!r}"[:300])
    return float(number)


def read_observation(value: object) -> Observation:
    """A checked copy of an observation. Raises WrongAnswer."""
    if not isinstance(value, Observation):
        raise WrongAnswer(f"step must return an Observation; found {kind_of(value)}")
    if not isinstance(value.info, Mapping):
        raise WrongAnswer(f"the info of an Observation must be a mapping; found {kind_of(value.info)}")
    done = bool(value.done)
    messages = read_messages(value.messages, "an Observation")
    if not messages and not done:
        raise WrongAnswer("an Observation without messages must have done=True: the model has nothing to answer")
    return Observation(messages, read_reward(value.reward, "the reward of an Observation"), done, dict(value.info))


def kind_of(value: object) -> str:
    """The type of a value, for messages."""
    known = {str: "a text", dict: "a dict", tuple: "a tuple", type(None): "None", list: "a list"}
    return known.get(type(value), f"an object of type {type(value).__name__}")


def check_environment(value: object, what: str) -> None:
    """Raises InputError unless an instance has `reset` and `step`."""
    missing = [name for name in ("reset", "step") if not callable(getattr(value, name, None))]
    if missing:
        raise InputError(f"{what}: an environment has the methods reset and step; {kind_of(value)} lacks {missing[0]}")
