"""The prompts that `jaxrlhf eval` compares models on: the data's, those of the command line, or the built-in ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxrlhf.commands.evaluation.rows import Prompts, read_prompts
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.data.messages import BadRow, read_content
from jaxrlhf.data.selection import limit_rows
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import Console

BUILT_IN = (
    "Which planet is closest to the sun?",
    "In two sentences, explain what a bank does.",
    "Why is the sky blue? Answer as you would for a child of seven.",
    "How does a refrigerator keep food cold?",
    "Give three tips for sleeping better.",
    "I am nervous about an exam tomorrow. What can I do tonight?",
    "Write a short poem about the first snow of the year.",
    "Write a polite e-mail that asks a colleague to move a meeting to Thursday.",
)
"""General prompts for a first look at a chat model, when no data is named."""


def prompts_of(config: EvalConfig, columns: Sequence[str], console: Console, wanted: tuple[str, ...] = ()) -> Prompts:
    """The prompts that the settings name, at most `config.limit` of them; the built-in ones where they name none.

    Args:
        config: the settings.
        columns: columns that reward functions or the environment read.
        console: says that the built-in prompts are used.
        wanted: columns that reward functions read where the data has them.

    Raises:
        InputError: the data cannot be read, a prompt is empty, or a reward function reads a column and there is no
            data.
    """
    if config.names_data:
        return read_prompts(config.data, columns, config.limit, wanted)
    names = [*columns, *config.data.reward_columns]
    if names:
        raise InputError(
            "data_path: no data given, and a reward function, the environment or reward_columns asks for the column "
            f"'{names[0]}'; name data that has it"
        )
    if not config.prompts:
        console.print(f"no data given: the {len(BUILT_IN)} built-in prompts; --data_path or --prompts names others")
    return typed_prompts(config.prompts or BUILT_IN, config.limit, config.data.seed)


def typed_prompts(texts: Sequence[str], limit: int, seed: int) -> Prompts:
    """Each text as the message of a user. Raises InputError for one that is empty or no text."""
    found = Prompts([], [], [], {}, [], {})
    for i in limit_rows(np.arange(len(texts)), limit, seed).tolist():
        try:
            found.prompts.append(read_content(texts[i], "prompts"))
        except BadRow as problem:
            raise InputError(f"{problem} at place {i + 1}; correct it, or leave it out") from problem
        found.tools.append(None)
        found.variables.append(None)
        found.places.append(f"prompt {i + 1}")
    return found
