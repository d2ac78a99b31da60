"""The command `jaxrlhf plan`: estimate, search, proof by compilation, report."""

import dataclasses

import jax

from jaxrlhf.config.files import check_output, write_json_atomic
from jaxrlhf.errors import InputError
from jaxrlhf.plan.compile import check_compiler, compile_programs
from jaxrlhf.plan.cost import run_cost
from jaxrlhf.plan.memory import estimate, host_bytes
from jaxrlhf.plan.report import Plan, as_dict, draw, show, verdict
from jaxrlhf.plan.search import (
    capacity,
    flags_between,
    largest_micro_batches,
    nearest_on_mesh,
    nearest_with_more_devices,
)
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system
from jaxrlhf.runs.console import Console


def make_plan(config: PlanConfig) -> Plan:
    """The plan by arithmetic alone; with the nearest setting that fits where the asked one does not."""
    system = build_system(config)
    plan = Plan(
        config=config,
        system=system,
        programs=estimate(system, config.accelerator.platform),
        cost=run_cost(system, config),
        capacity=capacity(config),
        host_bytes=host_bytes(system),
    )
    if plan.fits:
        return plan
    nearest = nearest_on_mesh(config)
    larger = None if nearest is not None and nearest.same_training else nearest_with_more_devices(config)
    return dataclasses.replace(plan, nearest=nearest, larger=larger)


def run_plan(config: PlanConfig, console: Console | None = None) -> Plan:
    """Plan, compile when asked, print and write.

    Raises InputError, after all was written, when nothing fits the devices or when the compiler refutes the plan.
    """
    console = Console() if console is None else console
    for path, option in ((config.json, "json"), (config.plot, "plot")):
        check_output(path, option)
    jax.config.update("jax_platforms", "cpu")  # what little is computed must not take an accelerator's memory
    if config.compile:
        check_compiler(config.accelerator)
    plan = make_plan(config)
    if config.compile:
        plan = dataclasses.replace(plan, compiled=compile_programs(config, console))
    if plan.fits:
        larger = largest_micro_batches(config)
        plan = dataclasses.replace(plan, micro_batches=flags_between(config, larger))
    show(plan, console)
    if config.json is not None:
        write_json_atomic(config.json, as_dict(plan))
    if config.plot is not None:
        draw(plan, config.plot)
    if plan.problems:
        raise InputError("--compile: " + "\n  ".join(plan.problems))
    if not plan.fits and plan.nearest is None:
        raise InputError("\n  ".join(verdict(plan)))
    return plan
