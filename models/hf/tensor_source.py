"""The tensors of a checkpoint, whatever its format, read by name; and how their faults are reported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxrlhf.errors import InputError


def _no_peek(name: str) -> np.ndarray:
    raise NotImplementedError(f"{name}: this source reads whole tensors only")


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a checkpoint, read one at a time."""

    where: str
    """File or folder, for messages."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes by the names of the tensors."""
    read: Callable[[str], np.ndarray]
    """Reads the tensor of a name."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of a single safetensors file."""
    peek: Callable[[str], np.ndarray] = _no_peek
    """Reads the first row of the tensor of a name."""


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raises one InputError that lists up to 20 problems under `what`; does nothing without problems."""
    if problems:
        more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise InputError("\n  ".join([f"{what}:", *problems[:20], *more]))


def all_finite(array: np.ndarray) -> bool:
    """True if no value is NaN or infinite."""
    if array.dtype == np.float32:  # the sum decides nearly every case without a temporary array
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(array.sum()):
                return True
    return bool(np.isfinite(array).all())
