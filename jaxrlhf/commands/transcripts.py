"""Conversations and episodes as text for people."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.rl.outcomes import Outcome

LIMITS = {"turns": "max_turns", "tokens": "max_new_tokens"}
"""The settings that cut an episode, by an outcome's reason."""


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """A paragraph for each message: its role and its text, and a line for each tool call."""
    return "\n".join(map(message_text, messages))


def message_text(message: Mapping[str, Any]) -> str:
    """One message; lines after the first are indented."""
    role, content, calls = str(message["role"]), message.get("content"), message.get("tool_calls") or ()
    name = message.get("name")
    lines = [f"{role} {name}: {content}" if role == "tool" and name else f"{role}: {content}"]
    if calls and not content:
        lines = []
    for call in calls:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        lines.append(f"{role} calls {function.get('name')} {shown}")
    return "\n".join(line.replace("\n", "\n    ") for line in lines)


def facts_of(outcome: Outcome) -> str:
    """The facts of an episode in a line: its reward, turns and tool calls, and why it ended early."""
    facts = [f"reward {outcome.score:.4g}"] if outcome.rewards and outcome.status != "failed" else []
    facts.append(_count(outcome.turns, "turn"))
    if outcome.calls:
        errors = f" ({_count(outcome.errors, 'error')})" if outcome.errors else ""
        facts.append(_count(outcome.calls, "tool call") + errors)
    if outcome.status == "truncated":
        facts.append(f"cut at {LIMITS[outcome.reason]}")
    if outcome.status == "failed":
        facts.append(f"failed: {outcome.reason}")
    return ", ".join(facts)


def transcript_text(title: str, outcome: Outcome, scores: Mapping[str, float]) -> str:
    """An episode under a line with its facts; `scores` are those of others than the environment, by scorer."""
    facts = [facts_of(outcome), *(f"{name} {score:.4g}" for name, score in scores.items())]
    return f"── {title}: {', '.join(facts)}\n{conversation_text(outcome.messages)}\n"


def record_of(outcome: Outcome) -> dict[str, Any]:
    """An episode as JSON has it."""
    reward = outcome.score if outcome.rewards and outcome.status != "failed" else None
    return {
        "messages": outcome.messages,
        "status": outcome.status,
        "reason": outcome.reason,
        "reward": reward,
        "turns": outcome.turns,
        "tool_calls": outcome.calls,
        "tool_errors": outcome.errors,
        "environment_tokens": outcome.given,
        "info": outcome.info,
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
