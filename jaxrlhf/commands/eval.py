"""`jaxrlhf eval`: models side by side, reward models on pairs, verifiable answers, and lm-eval's tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from jaxrlhf.commands.evaluation.comparison import compare
from jaxrlhf.commands.evaluation.page import page_of
from jaxrlhf.commands.evaluation.report import print_comparison, print_scores, print_tasks
from jaxrlhf.commands.evaluation.reward_models import measure
from jaxrlhf.commands.evaluation.settings import EvalConfig, is_server
from jaxrlhf.commands.evaluation.statistics import plain
from jaxrlhf.commands.evaluation.tasks import run_tasks
from jaxrlhf.config import to_dict
from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.errors import InputError
from jaxrlhf.models import stored_head
from jaxrlhf.runs.console import Console

__all__ = ["EvalConfig", "evaluate"]


def evaluate(config: EvalConfig) -> Mapping[str, object]:
    """Evaluates what the settings name: models, a reward model, or models on tasks.

    Returns:
        The results, as JSON has them.

    Raises:
        InputError: a model, the data, a reward function or a task cannot be used.
    """
    check_outputs(config)
    config = with_its_role(config)
    console, shown = Console(), Console(stream=sys.stdout, quiet=config.output.json == "-")
    if config.mode == "tasks":
        results = run_tasks(config, console)
        print_tasks(shown, results)
        write_results(config, console, results)
        return results
    if config.mode == "responses":
        found = compare(config, console)
        print_comparison(shown, found, config.shown)
    else:
        found = measure(config, console)
        print_scores(shown, found, config.shown)
    results = plain(found.summary) | {"settings": to_dict(config)}
    write_results(config, console, results)
    if config.output.jsonl is not None:
        write_text_atomic(config.output.jsonl, "".join(found.lines()))
        console.print(f"wrote {config.output.jsonl}")
    if config.output.html is not None:
        write_text_atomic(config.output.html, page_of(found))
        console.print(f"wrote {config.output.html}")
    return results


def with_its_role(config: EvalConfig) -> EvalConfig:
    """The settings with a reward model that stands alone among the models, as in rw_eval.py, as the one to measure."""
    alone = len(config.models) == 1 and config.mode == "responses" and config.reward_model_name_or_path is None
    if not alone or is_server(config.models[0]) or stored_head(config.models[0]) != "scalar":
        return config
    return config.replace(models=(), reward_model_name_or_path=config.models[0])


def check_outputs(config: EvalConfig) -> None:
    """Raises InputError for a file that cannot be written, before any model is loaded."""
    for name in ("html", "json", "jsonl"):
        path = getattr(config.output, name)
        if path is not None and path != "-" and Path(path).is_dir():
            raise InputError(f"{name} '{path}': is a folder; name a file")


def write_results(config: EvalConfig, console: Console, results: Mapping[str, object]) -> None:
    """Writes the results as JSON, where the settings say."""
    if config.output.json is None:
        return
    text = json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n"
    if config.output.json == "-":
        sys.stdout.write(text)
    else:
        write_text_atomic(config.output.json, text)
        console.print(f"wrote {config.output.json}")
