"""Rewards from Python functions, verifiable ones among them, run beside the work on the devices (docs/rewards.md)."""

from jaxrlhf.rewards.calls import Failure
from jaxrlhf.rewards.functions import RewardFunction, load_function
from jaxrlhf.rewards.instructions import instructions
from jaxrlhf.rewards.options import RewardsConfig
from jaxrlhf.rewards.processes import Limits
from jaxrlhf.rewards.scoring import Handle, RewardResult, Rewards, finite_mean
from jaxrlhf.rewards.verifiable import exact_match, final_number, length, math_verify, number_match, regex

__all__ = [
    "Failure",
    "Handle",
    "Limits",
    "RewardFunction",
    "RewardResult",
    "Rewards",
    "RewardsConfig",
    "exact_match",
    "final_number",
    "finite_mean",
    "instructions",
    "length",
    "load_function",
    "math_verify",
    "number_match",
    "regex",
]
