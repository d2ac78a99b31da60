"""Runs tasks of lm-eval on a model, and writes their results in its format."""

from __future__ import annotations

import difflib
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.data.files import first_line
from jaxrlhf.errors import InputError
from jaxrlhf.runs.console import Console

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

INSTALL = "pip install 'jaxrlhf[eval]'"
NEAR = 5  # names that a message suggests


def run_tasks(config: EvalConfig, console: Console) -> dict[str, dict[str, object]]:
    """Runs the tasks on every model, one after the other.

    Returns:
        lm-eval's results by model, without the samples.

    Raises:
        InputError: lm-eval is not installed, it has no such task, or a task's data cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"tasks need lm-eval, which is not installed: {INSTALL}")
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.loggers import EvaluationTracker  # pyright: ignore[reportMissingImports]

    from jaxrlhf.commands.evaluation import harness  # noqa: F401 - registers the model

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    tasks = config.tasks
    with console.status("finding the tasks…"):
        manager = find_tasks(tasks.tasks, tasks.include_path)
    found = {}
    for model in config.models:
        loaded = load_tasks(manager, tasks.tasks)  # anew, because lm-eval keeps responses in them
        tracker = EvaluationTracker(output_path=tasks.output_dir)
        results = lm_eval.simple_evaluate(
            model="jaxrlhf",
            model_args=model_args(config, model),
            tasks=loaded,
            num_fewshot=tasks.num_fewshot,
            batch_size=config.per_device_batch_size,
            limit=config.limit or None,
            evaluation_tracker=tracker,
            system_instruction=config.data.template.system_prompt,
            apply_chat_template=tasks.apply_chat_template,
            gen_kwargs=dict(tasks.gen_kwargs) or None,
            task_manager=manager,
            random_seed=config.data.seed,
            numpy_random_seed=config.data.seed,
            torch_random_seed=config.data.seed,
            fewshot_random_seed=config.data.seed,
            confirm_run_unsafe_code=tasks.confirm_run_unsafe_code,
        )
        samples = results.pop("samples", {})
        if tasks.output_dir:
            tracker.save_results_aggregated(results=results, samples=samples)
            for name, rows in samples.items():
                tracker.save_results_samples(task_name=name, samples=rows)
        found[model] = results
    return found


def model_args(config: EvalConfig, model: str) -> dict[str, object]:
    """The arguments of the model `jaxrlhf` for lm-eval."""
    mesh = config.mesh
    return {
        "pretrained": model,
        "tokenizer": config.tokenizer.tokenizer_name_or_path,
        "dtype": mesh.dtype,
        "mesh": [mesh.mesh_data, mesh.mesh_fsdp, mesh.mesh_tensor],
        "seed": config.data.seed,
        "kv_cache_dtype": config.generation.kv_cache_dtype,
        "generation_slots": config.generation.generation_slots,
    }


def find_tasks(names: tuple[str, ...], include_path: tuple[str, ...]) -> TaskManager:
    """lm-eval's task manager. Raises InputError, with near names, for a task that it does not have."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    missing = [folder for folder in include_path if not Path(folder).is_dir()]
    if missing:
        raise InputError(f"include_path '{missing[0]}': no such folder; check the path")
    manager = TaskManager(include_path=list(include_path) or None)
    for name in names:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = difflib.get_close_matches(name, manager.all_tasks, NEAR, cutoff=0.5)
            near += [task for task in manager.all_tasks if name.lower() in task.lower() and task not in near]
            near_names = f"; near names: {', '.join(near[:NEAR])}" if near else ""
            raise InputError(
                f"tasks: lm-eval has no task '{name}'{near_names}. `lm_eval ls tasks` lists all; --include_path adds "
                "folders with tasks of your own"
            )
    return manager


def load_tasks(manager: TaskManager, names: tuple[str, ...]) -> list[object]:
    """The tasks and groups, with their data. Raises InputError when the data of one cannot be loaded."""
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # whatever the task's code and its data set raise
            remedy = "check the network, or the cache of `datasets` when offline"
            if isinstance(error, ImportError):
                remedy = f"install what the task needs: pip install {error.name or 'lm-eval[…]'}"
            raise InputError(
                f"task '{name}': lm-eval cannot load it or its data ({type(error).__name__}: {first_line(error)}); "
                f"{remedy}"
            ) from error
        for kind, entries in loaded.items():
            entries |= found.get(kind, {})
    inner = {child for children in loaded["group_map"].values() for child in children}
    every = loaded["groups"] | loaded["tasks"]
    return [item for name, item in every.items() if name not in inner]
