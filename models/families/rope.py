"""Rotary parameters in Hugging Face's configs, in both spellings: `rope_parameters`, or separate older options."""

from typing import Any

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.hf.mapping import HFConfig
from jaxrlhf.models.rotary import ROPE_TYPES


def rope_from_hf(
    hf: HFConfig, extra: tuple[str, ...] = (), base_name: str = "rope_theta", default_base: float = 10000.0
) -> dict[str, Any]:
    """Reads `position`, `rotary_base` and `rope_scaling`, and the values of `extra` parameters (None when absent).

    `base_name` is the family's older name of the base frequency.
    """
    older = hf.take("rope_scaling", None) or {}
    parameters = dict(hf.take("rope_parameters", None) or older)
    base = hf.take(base_name, default_base)
    base = parameters.pop("rope_theta", base) or base
    kind = parameters.pop("rope_type", None) or parameters.get("type") or "default"
    parameters.pop("type", None)
    extras = {name: parameters.pop(name, None) for name in extra}
    if kind not in ROPE_TYPES:
        raise InputError(f"{hf.where}: rope_type {kind!r} is not supported (one of {sorted(ROPE_TYPES)})")
    if kind == "llama3":
        parameters.setdefault("original_max_position_embeddings", hf.size("max_position_embeddings", 2048))
    if set(parameters) != set(ROPE_TYPES[kind]):
        raise InputError(
            f"{hf.where}: rope_type {kind!r} takes {sorted(ROPE_TYPES[kind])}, but the config has {sorted(parameters)}"
        )
    scaling = None if kind == "default" else tuple(sorted((parameters | {"rope_type": kind}).items()))
    return {"position": "rotary", "rotary_base": float(base), "rope_scaling": scaling} | extras


def rope_to_hf(c: DecoderConfig, **extra: object) -> dict[str, object]:
    """The inverse of `rope_from_hf`, in today's spelling."""
    parameters = dict(c.rope_scaling or (("rope_type", "default"),))
    return {"rope_parameters": parameters | {"rope_theta": c.rotary_base} | extra}
