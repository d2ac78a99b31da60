"""The hybrid engine: one parameter tree, read by the train program and by the generate program."""

from jaxrlhf.engine.decoding import Requests
from jaxrlhf.engine.generation import Rollout, generate
from jaxrlhf.engine.hybrid import HybridEngine
from jaxrlhf.engine.sampling import GenerationConfig, SamplingConfig

__all__ = ["GenerationConfig", "HybridEngine", "Requests", "Rollout", "SamplingConfig", "generate"]
