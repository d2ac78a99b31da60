"""One episode: the conversation of the model with an environment and its tools."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxrlhf.environments.adapter import end_state
from jaxrlhf.environments.parsing import Parsed
from jaxrlhf.environments.protocol import (
    Environment,
    Message,
    Observation,
    WrongAnswer,
    read_messages,
    read_observation,
    read_reward,
)
from jaxrlhf.environments.running import resolved
from jaxrlhf.environments.tools import Tool, call_tools


class Reply(NamedTuple):
    """The answer to a turn of the model."""

    observation: Observation
    calls: int = 0
    """Tool calls of the turn."""
    errors: int = 0
    """Those of them that could not be read, or failed."""


class Episode:
    """A conversation. Its methods run in the threads of `Calls`, one at a time.

    Args:
        environment: An instance of the protocol; None: the tools alone, and a turn without a call ends the episode.
        tools: Functions that the model may call.
        parse: Finds the tool calls in a turn; None without tools.

    Attributes:
        messages: The conversation so far.
        keeps_state: True if `state` is asked for.
        state: Plain values of the environment at the end (`end_state`).
    """

    def __init__(
        self,
        environment: Environment | None,
        tools: tuple[Tool, ...] = (),
        parse: Callable[[str], Parsed] | None = None,
    ) -> None:
        self.environment, self.tools, self.parse = environment, tools, parse
        self.messages: list[Message] = []
        self.keeps_state = False
        self.state: dict[str, Any] = {}

    def begin(self, row: Mapping[str, Any]) -> list[Message]:
        """Resets the environment; returns the messages that the model answers first. Raises WrongAnswer."""
        messages = None if self.environment is None else resolved(self.environment.reset(row))
        messages = read_messages(row["prompt"] if messages is None else messages, "what reset returns")
        if not messages:
            raise WrongAnswer("reset must return at least one message, or None for the row's prompt")
        self.messages = messages
        return messages

    def respond(self, response: str, raw: str) -> Reply:
        """Answers a turn of the model: with the results of its tool calls, else as the environment does.

        Args:
            response: The turn as text.
            raw: The same with its special tokens, among which may be those of tool calls.

        Raises:
            WrongAnswer: The environment returned something else than an Observation.
        """
        before = [dict(message) for message in self.messages]
        parsed = Parsed(response, []) if self.parse is None else self.parse(raw)
        if parsed.calls:
            calls = [call.as_message() for call in parsed.calls if not isinstance(call, str)]
            turn = {"role": "assistant", "content": response if not calls else parsed.content}
            self.messages.append(turn | ({"tool_calls": calls} if calls else {}))
            results = call_tools(self.tools, parsed)
            self.messages += results.messages
            return Reply(Observation(results.messages), results.calls, results.errors)
        self.messages.append({"role": "assistant", "content": response})
        if self.environment is None:
            return Reply(Observation(done=True))
        observation = read_observation(resolved(self.environment.step(before, response)))
        self.messages += [dict(message) for message in observation.messages]
        if observation.done and self.keeps_state:
            self.state = end_state(self.environment)
        return Reply(observation)

    def cut(self) -> float | None:
        """The reward of an episode that a limit ended, by the environment's `truncated`; None without it."""
        truncated = getattr(self.environment, "truncated", None)
        reward = None if truncated is None else read_reward(resolved(truncated()), "the reward of truncated")
        if self.keeps_state:
            self.state = end_state(self.environment)
        return reward
