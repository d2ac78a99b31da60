"""Settings of `jaxrlhf plan`, and questions that its tests ask of them."""

from jaxrlhf.plan.command import make_plan
from jaxrlhf.plan.memory import estimate
from jaxrlhf.plan.search import capacity
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system

PUBLISHED = {"reward": "opt-350m", "device": "a100-80g"}


def config_of(**settings) -> PlanConfig:
    return PlanConfig.create(**(PUBLISHED | settings))


def fits(config: PlanConfig) -> bool:
    plan = make_plan(config)
    assert plan.fits == (plan.peak <= capacity(config))
    return plan.fits


def programs_of(config: PlanConfig):
    return estimate(build_system(config), config.accelerator.platform)
