"""The folder of a run: metrics, samples, checkpoints, console and report."""

from jaxrlhf.runs.folder import Run, peak_memory_bytes, what_is_there

__all__ = ["Run", "peak_memory_bytes", "what_is_there"]
