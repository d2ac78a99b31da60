"""Counts of the server, in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

import collections
import time
from collections.abc import Iterable

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
WINDOW = 10.0  # seconds that the rate of tokens is taken over


class Histogram:
    """Counts of values up to each of BUCKETS, and their sum."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[sum(value > bound for bound in BUCKETS)] += 1
        self.sum += value

    def samples(self) -> Iterable[tuple[str, dict[str, str], float]]:
        """Yields (suffix of the name, labels, value)."""
        total = 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            total += count
            yield "_bucket", {"le": bound}, total
        yield "_sum", {}, self.sum
        yield "_count", {}, total


class Rate:
    """Events a second over the last WINDOW seconds."""

    def __init__(self) -> None:
        self.times: collections.deque[tuple[int, int]] = collections.deque(maxlen=int(WINDOW) + 2)

    def add(self) -> None:
        now = int(time.monotonic())
        if self.times and self.times[-1][0] == now:
            self.times.append((now, self.times.pop()[1] + 1))
        else:
            self.times.append((now, 1))

    def value(self) -> float:
        since = time.monotonic() - WINDOW
        return sum(count for second, count in list(self.times) if second >= since) / WINDOW


class ModelMetrics:
    """The work of one language model. Written by its scheduler's thread."""

    def __init__(self) -> None:
        self.generated = self.prompt_tokens = 0
        self.rate, self.first_token = Rate(), Histogram()

    def token(self, first: bool, seconds: float, prompt: int) -> None:
        """Counts a token, `seconds` after its sample was submitted with `prompt` tokens."""
        self.generated += 1
        self.rate.add()
        if first:
            self.prompt_tokens += prompt
            self.first_token.add(seconds)


def escaped(text: str) -> str:
    """A label's value."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Page:
    """Collects metrics and writes them as text, those of one name together."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, about: str, value: float, suffix: str = "", **labels: str) -> None:
        """Adds one sample of the metric `jaxrlhf_NAME`."""
        name = f"jaxrlhf_{name}"
        head = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        shown = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
        self.lines.setdefault(name, head).append(f"{name}{suffix}{{{shown}}} {value}")

    def histogram(self, name: str, about: str, histogram: Histogram, **labels: str) -> None:
        for suffix, own, value in histogram.samples():
            self.add(name, "histogram", about, value, suffix, **labels, **own)

    def text(self) -> str:
        return "\n".join(line for lines in self.lines.values() for line in lines) + "\n"
