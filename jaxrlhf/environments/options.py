"""The flags of environments and tools, and the source of episodes that they load."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxrlhf.config import MayChange, NonNegative, NonNegativeInt, PositiveInt, Settings, default_of
from jaxrlhf.config.imports import import_function
from jaxrlhf.environments.adapter import MethodEnvironment, has_methods_as_tools
from jaxrlhf.environments.episode import Episode
from jaxrlhf.environments.parsing import PARSERS, ToolFormat, format_of
from jaxrlhf.environments.protocol import Environment, check_environment
from jaxrlhf.environments.tools import Tool, load_tools
from jaxrlhf.errors import InputError


@dataclass(frozen=True)
class ToolCallConfig(Settings):
    """Tool calls of the model."""

    tool_format: ToolFormat = "auto"
    """Form of the model's tool calls: hermes (Hermes, Qwen) or llama3; auto: as the chat template shows them."""

    def form(self, template: str) -> str:
        """The form of tool calls, one of PARSERS. Raises InputError when auto finds none in the chat template."""
        found = format_of(template) if self.tool_format == "auto" else self.tool_format
        if found is None:
            raise InputError(
                f"tools: the chat template shows no form of tool calls that is known ({', '.join(PARSERS)}); set "
                "tool_format, or a chat_template with tools such as hermes"
            )
        return found


@dataclass(frozen=True)
class EnvironmentConfig(ToolCallConfig):
    """Rollouts of several turns, with an environment or tools between them."""

    environment: str = ""
    """Class that answers the model between its turns and rewards it: package.module:Class or path/to/file.py:Class. It
    has the methods reset and step; or reset, and methods that are tools, as TRL's environment_factory has them."""
    tools: tuple[str, ...] = ()
    """Python functions that the model may call: package.module:function or path/to/file.py:function."""
    max_turns: PositiveInt = 8
    """Most turns of the model in an episode."""
    max_turn_tokens: NonNegativeInt = 0
    """Longest turn of the model in tokens; 0: only max_new_tokens bounds it, which counts the tokens of all turns and
    of the environment."""
    environment_timeout: MayChange[NonNegative] = 60.0
    """Seconds of one step of the environment, tool calls included, after which the episode has failed; 0: no limit."""

    def check(self) -> None:
        tools = (self.tools,) if isinstance(self.tools, str) else tuple(self.tools)
        object.__setattr__(self, "tools", tools)
        for name in ("tool_format", "max_turns", "max_turn_tokens"):
            value = getattr(self, name)
            if not self.used and value != default_of(EnvironmentConfig, name):
                raise InputError(f"{name}={value} requires environment or tools; set one of them, or remove {name}")
        for name, specs in (("environment", (self.environment,) if self.environment else ()), ("tools", tools)):
            for spec in specs:
                if isinstance(spec, str) and ":" not in spec:
                    raise InputError(f"{name} {spec!r}: must be package.module:name or path/to/file.py:name")

    def check_slots(self, slots: int, instead: str) -> None:
        """Refuses slots of continuous batching beside episodes. `instead` says what takes less memory otherwise."""
        if self.used and slots:
            raise InputError(
                f"generation_slots={slots} with an environment or tools: a row keeps its cache from turn to turn; "
                f"remove generation_slots, and {instead} for less memory"
            )

    @property
    def used(self) -> bool:
        """True if rollouts have several turns."""
        return bool(self.environment or self.tools)

    def load(self) -> "Environments | None":
        """Imports the environment and the tools; None without any. Raises InputError."""
        if not self.used:
            return None
        factory = import_function(self.environment, "environment") if self.environment else None
        return Environments(factory, self.tools, label=f"environment {self.environment!r}")


class Environments:
    """A source of episodes. Instances are reused, each for one episode at a time.

    Args:
        factory: Makes an instance, called without arguments; None: there are tools alone.
        tools: Further tools, as specs or functions.
        label: Subject of messages.

    Attributes:
        tools: All tools, those of the environment's methods included.
        columns: Columns of the data that the environment reads.
        wanted: Further columns that it gets where the data has them.
        rewards: True if the environment rewards the model.
        has_instances: False where there are tools alone.

    Raises:
        InputError: The factory does not make an environment, or a tool cannot be used.
    """

    def __init__(
        self,
        factory: Callable[[], object] | None,
        tools: tuple[str | Callable[..., object], ...] = (),
        label: str = "environment",
    ) -> None:
        self._factory, self._given, self._label = factory, load_tools(tools), label
        self._free: list[Any] = []
        self.has_instances = factory is not None
        first = None if factory is None else self._made()
        self.tools = self._tools_of(first)
        names = getattr(first, "columns", ())
        self.columns = (names,) if isinstance(names, str) else tuple(names)
        self.wanted = first.wanted if isinstance(first, MethodEnvironment) else ()
        self.rewards = first is not None and (not isinstance(first, MethodEnvironment) or first.rewards)
        if first is not None:
            self._free.append(first)

    def episode(self, tool_format: str) -> Episode:
        """A new episode. `tool_format` is one of PARSERS, where there are tools."""
        environment = None
        if self._factory is not None:
            try:  # rollouts ahead of their updates play in a thread beside those that replace groups
                environment = self._free.pop()
            except IndexError:
                environment = self._made()
        tools = self._tools_of(environment)
        return Episode(environment, tools, PARSERS[tool_format] if tools else None)

    def release(self, episode: Episode) -> None:
        """Takes back the environment of an episode that did not fail."""
        if episode.environment is not None:
            self._free.append(episode.environment)

    def check_scored(self, otherwise: bool) -> None:
        """Raises InputError when nothing scores the responses; `otherwise`: a reward model or a function does."""
        if not (self.rewards or otherwise):
            raise InputError(
                "environment: it has no get_reward, and nothing else scores responses; name a reward model or "
                "reward_functions"
            )

    def _tools_of(self, environment: object) -> tuple[Tool, ...]:
        own = environment.tools if isinstance(environment, MethodEnvironment) else ()
        tools = (*own, *self._given)
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise InputError(f"tools: {', '.join(names)}: two have the same name; rename one")
        return tools

    def _made(self) -> Environment:
        assert self._factory is not None
        try:
            instance: Any = self._factory()
        except Exception as error:  # whatever the user's code raises
            raise InputError(
                f"{self._label}: making an instance failed: {type(error).__name__}: {error}; an environment is made "
                "without arguments"
            ) from error
        if has_methods_as_tools(instance):
            return MethodEnvironment(instance)
        check_environment(instance, self._label)
        return instance
