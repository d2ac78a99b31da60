"""A reward function that takes its time, as a judge on another machine does, for `benchmarks/learning.py`."""

import time

from jaxrlhf.data.demo import demo_quality

SECONDS = 1.5


def slow_quality(prompts: list[str], responses: list[str]) -> list[float]:
    """The demo's quality rule, SECONDS after it was asked."""
    time.sleep(SECONDS)
    return [float(demo_quality(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)]
