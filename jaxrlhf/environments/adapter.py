"""Environments whose methods are the model's tools, as for TRL's `environment_factory`."""

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

from jaxrlhf.config.imports import constant_keys
from jaxrlhf.environments.protocol import Message, Observation, WrongAnswer, kind_of
from jaxrlhf.environments.running import resolved
from jaxrlhf.environments.tools import Tool, load_tool
from jaxrlhf.errors import InputError

RESERVED = ("reset", "get_reward")


def has_methods_as_tools(instance: object) -> bool:
    """True for an instance with `reset` and without `step`."""
    return callable(getattr(instance, "reset", None)) and not hasattr(instance, "step")


def end_state(environment: object) -> dict[str, Any]:
    """A copy of an environment's public attributes and properties that are numbers, texts, None, or lists and dicts of
    these."""
    instance = environment._instance if isinstance(environment, MethodEnvironment) else environment
    found = {}
    for name in dir(instance):
        if name.startswith("_"):
            continue
        try:
            value = getattr(instance, name)
        except Exception:  # whatever a property of the user's raises
            continue
        value = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
        if _is_plain(value):
            found[name] = copy.deepcopy(value)
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)


class MethodEnvironment:
    """Adapts such an instance.

    Its public methods but `reset` and `get_reward` are tools. `reset(**columns)` begins an episode; text that it
    returns is appended to the last user message. The first turn without a tool call ends the episode, whose reward is
    `get_reward()` where there is such a method.

    Attributes:
        tools: Its methods.
        columns: Columns of the data that `reset` needs, by the names of its parameters.
        wanted: Parameters of `reset` with a default, and names that it reads from its `**columns`: columns that it gets
            where the data has them.
        rewards: True if it has `get_reward`.
    """

    def __init__(self, instance: object) -> None:
        self._instance: Any = instance
        names = [name for name in dir(instance) if not name.startswith("_") and name not in RESERVED]
        lazy = (property, functools.cached_property)  # which may need an episode
        values = [getattr(instance, n) for n in names if not isinstance(inspect.getattr_static(instance, n), lazy)]
        self.tools: tuple[Tool, ...] = tuple(load_tool(value) for value in values if inspect.ismethod(value))
        parameters = inspect.signature(self._instance.reset).parameters.values()
        keywords = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        named = {} if keywords is None else dict.fromkeys(constant_keys(self._instance.reset, keywords), False)
        named |= {p.name: p.default is p.empty for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        named.pop("prompt", None)
        self.columns: tuple[str, ...] = tuple(name for name, needed in named.items() if needed)
        self.wanted: tuple[str, ...] = tuple(name for name, needed in named.items() if not needed)
        self.rewards = callable(getattr(instance, "get_reward", None))
        if not self.tools and not self.rewards:
            raise InputError(
                f"environment {type(instance).__name__}: it has neither step, nor public methods for the model to "
                "call, nor get_reward; give it the methods of the protocol"
            )

    def reset(self, row: Mapping[str, Any]) -> list[Message] | None:
        reset = self._instance.reset
        parameters = inspect.signature(reset).parameters.values()
        every = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = {p.name for p in parameters}
        shown = resolved(reset(**{name: value for name, value in row.items() if every or name in names}))
        if shown is None:
            return None
        if not isinstance(shown, str):
            raise WrongAnswer(f"reset must return None or a text for the last user message; found {kind_of(shown)}")
        messages = [dict(message) for message in row["prompt"]]
        messages[-1]["content"] += shown
        return messages

    def step(self, messages: list[Message], response: str) -> Observation:
        return Observation(reward=self._reward(), done=True)

    def truncated(self) -> float | None:
        return self._reward()

    def _reward(self) -> float | None:
        return resolved(self._instance.get_reward()) if self.rewards else None
