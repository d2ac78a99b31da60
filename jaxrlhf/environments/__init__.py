"""Environments and tools between the turns of the model (docs/environments.md)."""

from jaxrlhf.environments.episode import Episode, Reply
from jaxrlhf.environments.options import EnvironmentConfig, Environments
from jaxrlhf.environments.parsing import ToolCall, parse_hermes, parse_llama3
from jaxrlhf.environments.protocol import Environment, Observation
from jaxrlhf.environments.running import Calls
from jaxrlhf.environments.tools import Tool, load_tool

__all__ = [
    "Calls",
    "Environment",
    "EnvironmentConfig",
    "Environments",
    "Episode",
    "Observation",
    "Reply",
    "Tool",
    "ToolCall",
    "load_tool",
    "parse_hermes",
    "parse_llama3",
]
