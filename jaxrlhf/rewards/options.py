"""The flags of reward functions, for the settings of every trainer and command that scores responses."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, cast

from jaxrlhf.config import FromYaml, MayChange, NonNegative, Settings
from jaxrlhf.errors import InputError
from jaxrlhf.rewards.functions import check_spec, read_specs
from jaxrlhf.rewards.processes import DEFAULT_LIMITS, Limits
from jaxrlhf.rewards.scoring import Rewards, Say


@dataclass(frozen=True)
class RewardsConfig(Settings):
    """Rewards from functions, beside the reward model or in its place."""

    reward_functions: Annotated[tuple[str, ...], FromYaml(read_specs)] = ()
    """Functions (prompts, responses, **columns) that return one number per response, or of TRL's form (completions,
    **columns): package.module:function, path/to/file.py:function, or the built-in exact_match, number_match,
    math_verify, instructions, regex, length, score_server, judge and judge_pairs. Options follow after colons, as in
    number_match:column=answer."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward function in the score; 0 only logs it; default: 1 each."""
    reward_model_weight: float = 1.0
    """Weight of the reward model in the score, beside reward functions."""
    reward_time_limit: MayChange[NonNegative] = DEFAULT_LIMITS.seconds
    """Seconds of one call of a reward function, after which its process is stopped; 0: none."""
    reward_memory_limit: MayChange[NonNegative | None] = DEFAULT_LIMITS.gib
    """GiB of memory of a reward function's process; 0: no limit; default: half of the machine's memory."""

    def check(self) -> None:
        object.__setattr__(self, "reward_functions", tuple(cast(Iterable, read_specs(self.reward_functions))))
        object.__setattr__(self, "reward_weights", tuple(self.reward_weights))
        for spec in self.reward_functions:
            if isinstance(spec, str):
                check_spec(spec)
        given, functions = len(self.reward_weights), len(self.reward_functions)
        if given and given != functions:
            raise InputError(
                f"reward_weights has {given} weights for {functions} reward_functions; give one each, or none"
            )
        if not any((self.reward_model_weight, *(self.reward_weights or (1.0,) * functions))):
            raise InputError(
                "reward_model_weight=0 and no reward function with a weight: nothing scores the responses; name "
                "reward_functions, or leave reward_model_weight at 1"
            )
        if self.reward_model_weight != 1 and not functions:
            raise InputError(
                f"reward_model_weight={self.reward_model_weight} requires reward_functions; give some, or leave it at 1"
            )

    def rewards(self, say: Say = print) -> Rewards:
        """The functions, imported and ready; `say` gets what they print and what went wrong."""
        limits = Limits(self.reward_time_limit, self.reward_memory_limit)
        return Rewards(self.reward_functions, self.reward_weights, say=say, limits=limits)
