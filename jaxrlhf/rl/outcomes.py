"""The outcomes of episodes, their metrics, and the part of them that reward functions read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxrlhf.environments import Environments
from jaxrlhf.errors import InputError
from jaxrlhf.rewards import Rewards
from jaxrlhf.rewards.arguments import ENVIRONMENTS, EndState

TRANSCRIPT = "transcript"
"""Column in which reward functions find the messages of an episode."""
OF_EPISODES = (TRANSCRIPT, ENVIRONMENTS)
"""Columns that an episode gives to reward functions."""


@dataclass
class Outcome:
    """The outcome of one row's episode; the same on every process."""

    status: str = "running"
    """done, truncated, failed, or absent for a filler row."""
    reason: str = ""
    """Why the episode failed or was cut."""
    rewards: dict[int, float] = field(default_factory=dict)
    """Rewards by the length of the response up to and with the turn."""
    reply: str = ""
    """The model's last turn as text."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation."""
    begun: int = 0
    """Messages that it began with, before the model's first turn."""
    turns: int = 0
    calls: int = 0
    """Tool calls."""
    errors: int = 0
    """Tool calls that could not be read, or failed."""
    given: int = 0
    """Tokens of environment and tools."""
    info: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    """Plain values of the environment at its end, where reward functions read them."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Outcome":
        """Restores an outcome from its `vars` as JSON."""
        restored: dict[str, Any] = dict(value)
        restored["rewards"] = {int(at): reward for at, reward in value["rewards"].items()}
        return cls(**restored)

    @property
    def score(self) -> float:
        """The sum of the rewards; NaN for a failed episode."""
        return float("nan") if self.status == "failed" else sum(self.rewards.values())


@dataclass
class Played:
    """The outcomes of a rollout's episodes, B·n rows."""

    outcomes: list[Outcome]
    waited: float = 0.0
    """Seconds in which the devices waited for environments."""
    has_tools: bool = False

    def as_json(self) -> str:
        """All of it as a text, for a checkpoint; what JSON lacks in an environment's messages becomes text too."""
        rows = [vars(outcome) for outcome in self.outcomes]
        return json.dumps({"outcomes": rows, "waited": self.waited, "has_tools": self.has_tools}, default=str)

    @classmethod
    def from_json(cls, text: str) -> "Played":
        """Restores what `as_json` has written."""
        value = json.loads(text)
        return cls([Outcome.from_json(row) for row in value["outcomes"]], value["waited"], value["has_tools"])

    @property
    def scores(self) -> np.ndarray:
        """float64 `[B·n]`: sums of the rewards; NaN for failed episodes, 0 for filler rows."""
        return np.array([outcome.score for outcome in self.outcomes])

    def metrics(self) -> dict[str, float]:
        """Metrics of all episodes but those of filler rows."""
        present = [outcome for outcome in self.outcomes if outcome.status != "absent"]
        played = [outcome for outcome in present if outcome.turns]

        def mean(values: Sequence[float]) -> float:
            return float(np.mean(values)) if len(values) else 0.0

        metrics = {
            "environment/failures": float(sum(outcome.status == "failed" for outcome in present)),
            "environment/truncated": mean([outcome.status == "truncated" for outcome in present]),
            "environment/turns": mean([outcome.turns for outcome in played]),
            "environment/tokens": mean([outcome.given for outcome in played]),
            "environment/seconds": self.waited,
        }
        if self.has_tools:
            metrics["environment/tool_calls"] = mean([outcome.calls for outcome in played])
            metrics["environment/tool_errors"] = float(sum(outcome.errors for outcome in played))
        for name in sorted({name for outcome in present for name in outcome.info}):
            metrics[f"environment/info/{name}"] = mean([o.info[name] for o in present if name in o.info])
        return metrics


class Graded(NamedTuple):
    """The part of B episodes that reward functions read."""

    replies: list[str]
    """The model's last turn of each, in the place of the response."""
    prompts: list[list[dict[str, Any]]]
    """The messages that each began with."""
    completions: list[list[dict[str, Any]]]
    """The messages after these, up to the model's last turn."""
    columns: dict[str, list[Any]]
    """Columns beside those of the data."""
    scored: np.ndarray
    """bool `[B]`: False for failed episodes, which have no score."""

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Graded":
        """Reads the outcomes of finished episodes."""
        return cls(
            [outcome.reply for outcome in outcomes],
            [outcome.messages[: outcome.begun] for outcome in outcomes],
            [to_last_turn(outcome.messages)[outcome.begun :] for outcome in outcomes],
            {
                TRANSCRIPT: [outcome.messages for outcome in outcomes],
                ENVIRONMENTS: [EndState(**outcome.state) for outcome in outcomes],
            },
            np.array([outcome.status != "failed" for outcome in outcomes]),
        )


def data_columns(rewards: Rewards, environments: Environments | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that the data must have for rewards and environments, and those that they take where it has them."""
    if ENVIRONMENTS in rewards.columns and not (environments and environments.has_instances):
        raise InputError(
            "reward_functions: a function takes environments, and the run has none; name the class as environment"
        )
    if environments is None:
        return rewards.columns, rewards.wanted
    needed = dict.fromkeys((*(name for name in rewards.columns if name not in OF_EPISODES), *environments.columns))
    wanted = dict.fromkeys((*rewards.wanted, *environments.wanted))
    return tuple(needed), tuple(name for name in wanted if name not in (*needed, *OF_EPISODES))


def reads_state(rewards: Rewards) -> bool:
    """True if a function takes what environments have at the end of an episode."""
    return ENVIRONMENTS in (*rewards.columns, *rewards.wanted)


def to_last_turn(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation up to the model's last turn, without what an environment said after it."""
    last = max((k for k, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return [dict(message) for message in messages[: last + 1]]
