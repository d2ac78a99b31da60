"""Experts in one tensor per layer: transformers 5 holds them so, and writes them with `save_original_format=False`."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.mapping import Family
from jaxrlhf.models.hf.tensor_source import TensorSource


class _Part(NamedTuple):
    """One expert's tensor inside a fused one."""

    fused: str
    expert: int
    start: int
    stop: int


def unfused(source: TensorSource, family: Family, config: DecoderConfig) -> TensorSource:
    """Presents fused tensors `[E, n · out, in]` under the names of each expert's n tensors `[out, in]`.

    Tensors of other names stay as they are. The last fused tensor that was read is kept, because its parts are read one
    after the other.
    """
    parts: dict[str, _Part] = {}
    shapes = dict(source.shapes)
    for fused in family.fused_experts:
        for layer in range(config.num_layers):
            long = fused.hf.format(i=layer)
            name = long if long in shapes else long.removeprefix(f"{family.prefix}.")
            shape = shapes.get(name, ())
            if len(shape) != 3 or shape[0] != config.num_experts or shape[1] % len(fused.parts):
                continue  # absent, or of another shape, which the check of names reports
            del shapes[name]
            rows = shape[1] // len(fused.parts)
            for j, part in enumerate(fused.parts):
                for e in range(shape[0]):
                    own = part.format(i=layer, e=e).removeprefix("" if name == long else f"{family.prefix}.")
                    parts[own] = _Part(name, e, j * rows, (j + 1) * rows)
                    shapes[own] = (rows, shape[2])
    if not parts:
        return source
    last: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        part = parts.get(name)
        if part is None:
            return source.read(name)
        if part.fused not in last:
            last.clear()
            last[part.fused] = source.read(part.fused)
        return last[part.fused][part.expert, part.start : part.stop]

    def peek(name: str) -> np.ndarray:
        return read(name)[:1] if name in parts else source.peek(name)

    return replace(source, shapes=shapes, read=read, peek=peek)
