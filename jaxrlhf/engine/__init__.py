"""The hybrid engine: one parameter tree, read by the train program and by the generate program."""

from jaxrlhf.engine.decoding import Requests
from jaxrlhf.engine.episodes import EpisodeBatch
from jaxrlhf.engine.generation import Rollout, generate
from jaxrlhf.engine.hybrid import HybridEngine
from jaxrlhf.engine.sampling import GenerationConfig, SamplingConfig
from jaxrlhf.engine.slots import Sampled, SlotBatch, SlotSampling

__all__ = [
    "EpisodeBatch",
    "GenerationConfig",
    "HybridEngine",
    "Requests",
    "Rollout",
    "Sampled",
    "SamplingConfig",
    "SlotBatch",
    "SlotSampling",
    "generate",
]
