"""The demo's quality rule as a reward function, at once and as slow as a judge on another machine is.

For `benchmarks/learning.py`.
"""

import time

from jaxrlhf.data.demo import demo_quality

SECONDS = 1.5


def quality(prompts: list[str], responses: list[str]) -> list[float]:
    """The demo's quality rule."""
    return [float(demo_quality(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)]


def slow_quality(prompts: list[str], responses: list[str]) -> list[float]:
    """The demo's quality rule, SECONDS after it was asked."""
    time.sleep(SECONDS)
    return quality(prompts, responses)
