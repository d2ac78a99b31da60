"""The folder of a run: metrics, samples, checkpoints, console and report."""

from jaxrlhf.runs.folder import Run, peak_memory_bytes, what_is_there
from jaxrlhf.runs.trackers import TrackingConfig

__all__ = ["Run", "TrackingConfig", "peak_memory_bytes", "what_is_there"]
