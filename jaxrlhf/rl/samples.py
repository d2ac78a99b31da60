"""The samples of a rollout batch: prompts, the plan of sampling, and scored samples."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxrlhf.engine import Rollout, SamplingConfig
from jaxrlhf.rewards import Handle
from jaxrlhf.rl.experience import Experience
from jaxrlhf.rl.outcomes import Played

Metrics = dict[str, float]
Each = Callable[[np.ndarray, Rollout], None]
"""Called with the row numbers and the rollout of every generated piece."""


class Reading(TypedDict, total=False):
    """Prompts and columns for reward functions and environments; see `Prompts`."""

    columns: Mapping[str, Sequence[object]]
    texts: Sequence[str]
    messages: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts of a rollout batch, with the columns and texts that reward functions read."""

    ids: np.ndarray
    """int32 `[B, P]`, left-padded."""
    mask: np.ndarray
    """bool `[B, P]`."""
    real: np.ndarray
    """bool `[B]`: false for filler rows."""
    columns: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    """B values each."""
    texts: Sequence[str] | None = None
    """The prompts as text; None: as decoded from the ids."""
    messages: Sequence[Any] | None = None
    """The prompts as the data has them, text or messages; None: `texts`."""
    progress: Mapping[str, float] | None = None
    """Attributes of the `trainer_state` that functions read; None: nothing is trained."""
    numbers: np.ndarray | None = None
    """int `[B·n]`: numbers of the samples, which key their randomness; None: 0 … B·n-1."""

    @classmethod
    def of(cls, batch: Mapping[str, ArrayLike], **reading: Any) -> "Prompts":
        """Prompts of a batch with `prompt_ids`, `prompt_mask` and perhaps `row_mask`."""
        ids = np.asarray(batch["prompt_ids"])
        real = np.asarray(batch.get("row_mask", np.ones(len(ids)))) > 0
        return cls(ids, np.asarray(batch["prompt_mask"]), real, **reading)


class Record(TypedDict):
    """One scored sample."""

    index: int
    """Number of the prompt."""
    prompt: str
    response: str
    score: float
    kl: float
    """Nats to the reference."""
    length: int
    """Tokens of the response."""
    ended: bool
    """True if the response ends with EOS or a stop sequence, False if it was cut off."""
    rewards: dict[str, float]
    """Scores of the reward functions and the reward model by name, before weighting; empty without functions."""


class Sampled(NamedTuple):
    """Scored samples."""

    experience: Experience
    metrics: Metrics
    """Metrics and seconds by name."""
    rewards: dict[str, np.ndarray]
    """`[B]` scores of the reward functions and the reward model by name; empty without functions."""
    extras: dict[str, np.ndarray]
    """Values `[B]` that reward functions logged by `log_extra`, by name."""


class Started(NamedTuple):
    """Responses that are generated, and that reward functions work on."""

    rollout: Rollout
    handles: list[tuple[np.ndarray, Handle]]
    """For each generated piece: its row numbers, and the handle that waits for the reward functions."""
    episodes: Played | None = None
    """The episodes that the responses belong to."""
    seconds: float = 0.0
    """Time of the generation."""


class RolloutPlan(NamedTuple):
    """The key and the sampling of a rollout, and the number of pieces that it is generated in."""

    key: jax.Array
    sampling: SamplingConfig
    pieces: int = 1
