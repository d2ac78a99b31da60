"""The flags of reward functions, for the settings of every trainer and command that scores responses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxrlhf.config import field
from jaxrlhf.errors import InputError
from jaxrlhf.rewards.functions import check_spec, read_specs
from jaxrlhf.rewards.scoring import Rewards


@dataclass(frozen=True)
class RewardFunctionOptions:
    """Rewards from functions, beside the reward model's or in its place."""

    reward_functions: tuple[str, ...] = field(
        (),
        "functions (prompts, responses, **columns) -> one number per response: package.module:function, "
        "path/to/file.py:function, or the built-in exact_match, number_match, regex and length; options follow after "
        "colons, as in number_match:column=answer or length:target=200",
        read=read_specs,
    )
    reward_weights: tuple[float, ...] = field(
        (), "weight of each reward function in the score; 0: only watched; default: 1 each"
    )
    reward_model_weight: float = field(1.0, "weight of the reward model in the score, beside reward functions; 0: none")

    def __post_init__(self) -> None:
        for name in ("reward_functions", "reward_weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for spec in self.reward_functions:
            if isinstance(spec, str):
                check_spec(spec)
        given, functions = len(self.reward_weights), len(self.reward_functions)
        if given and given != functions:
            raise InputError(
                f"reward_weights: {given} weights for {functions} reward_functions; give one each, or none"
            )
        for weight in (*self.reward_weights, self.reward_model_weight):
            if not math.isfinite(weight):
                raise InputError(f"reward_weights and reward_model_weight must be finite numbers, found {weight}")
        if not any((self.reward_model_weight, *(self.reward_weights or (1.0,) * functions))):
            raise InputError(
                "reward_model_weight=0 and no reward function with a weight: nothing scores the responses; name "
                "reward_functions, or leave reward_model_weight at 1"
            )
        following = getattr(super(), "__post_init__", None)
        if following is not None:
            following()

    def rewards(self, say: Callable[[str], Any] = print) -> Rewards:
        """The functions, imported and ready; `say` gets what they print and what went wrong."""
        return Rewards(self.reward_functions, self.reward_weights, say=say)
