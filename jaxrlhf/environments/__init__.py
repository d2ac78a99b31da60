"""Environments and tools between the turns of the model (docs/environments.md)."""

from jaxrlhf.environments.episode import Episode, Reply
from jaxrlhf.environments.options import EnvironmentConfig, Environments, ToolCallConfig
from jaxrlhf.environments.parsing import PARSERS, ToolCall, as_hermes, certain_content, parse_hermes, parse_llama3
from jaxrlhf.environments.protocol import Environment, Observation
from jaxrlhf.environments.running import Calls
from jaxrlhf.environments.tools import Tool, load_tool

__all__ = [
    "PARSERS",
    "Calls",
    "Environment",
    "EnvironmentConfig",
    "Environments",
    "Episode",
    "Observation",
    "Reply",
    "Tool",
    "ToolCall",
    "ToolCallConfig",
    "as_hermes",
    "certain_content",
    "load_tool",
    "parse_hermes",
    "parse_llama3",
]
