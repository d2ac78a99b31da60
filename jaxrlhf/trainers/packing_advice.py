"""Advice to pack rows, for runs whose batches are mostly padding."""

from jaxrlhf.data import Data, DataConfig
from jaxrlhf.data.settings import packed_length

JUDGED_STEPS = 5
MUCH_PADDING = 0.3
"""Packing is advised where the mean padding of the first JUDGED_STEPS is above this share."""


class PackingAdvice:
    """Judges the first steps of a run whose rows could be packed."""

    def __init__(self, length: int) -> None:
        """`length`: tokens of a packed row."""
        self.length = length
        self._padding: list[float] = []

    def after(self, padding: float) -> str | None:
        """The advice after a step with this share of padding; None before and after the step that decides."""
        if len(self._padding) == JUDGED_STEPS:
            return None
        self._padding.append(padding)
        mean = sum(self._padding) / len(self._padding)
        if len(self._padding) < JUDGED_STEPS or mean <= MUCH_PADDING:
            return None
        return (
            f"perf/padding: {mean:.0%} of the positions of a batch hold no token. --packing true puts several rows "
            f"into one of {self.length:,} tokens; per_device_train_batch_size then counts those"
        )


def packing_advice(config: DataConfig, data: Data, step: str) -> PackingAdvice | None:
    """The judge of a run's steps; None where its rows are packed, or where the user has chosen.

    Args:
        config: how the rows are read.
        data: the rows.
        step: the step that they are read for.
    """
    if config.packing is not None or data.bins is not None:
        return None
    return PackingAdvice(packed_length(config.replace(packing=True), step))
