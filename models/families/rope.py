"""Rotary parameters in Hugging Face's configs, in both spellings: `rope_parameters`, or separate older options."""

from typing import Any

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig, Scaling
from jaxrlhf.models.hf.mapping import HFConfig
from jaxrlhf.models.rotary import ROPE_TYPES


def rope_from_hf(
    hf: HFConfig, extra: tuple[str, ...] = (), base_name: str = "rope_theta", default_base: float = 10000.0
) -> dict[str, Any]:
    """Reads `position`, `rotary_base` and `rope_scaling`, and the values of `extra` parameters (None when absent).

    `base_name` is the family's older name of the base frequency.
    """
    base, kind, parameters = rope_parameters(hf, base_name, default_base)
    extras = {name: parameters.pop(name, None) for name in extra}
    scaling = scaling_of(hf, kind, parameters)
    return {"position": "rotary", "rotary_base": base, "rope_scaling": scaling} | extras


def rope_parameters(
    hf: HFConfig, base_name: str = "rope_theta", default_base: float = 10000.0
) -> tuple[float, str, dict[str, Any]]:
    """Reads the base frequency, the `rope_type` and its parameters, unchecked."""
    older = hf.take("rope_scaling", None) or {}
    parameters = dict(hf.take("rope_parameters", None) or older)
    base = hf.take(base_name, default_base)
    base = parameters.pop("rope_theta", base) or base
    kind = parameters.pop("rope_type", None) or parameters.get("type") or "default"
    parameters.pop("type", None)
    return float(base), kind, parameters


def scaling_of(hf: HFConfig, kind: str, parameters: dict[str, Any]) -> Scaling | None:
    """Checks the parameters of a `rope_type`, and returns them as DecoderConfig.rope_scaling."""
    if kind not in ROPE_TYPES:
        raise InputError(f"{hf.where}: rope_type {kind!r} is not supported (one of {sorted(ROPE_TYPES)})")
    known, original = ROPE_TYPES[kind], "original_max_position_embeddings"
    if original in known.required:
        parameters.setdefault(original, hf.size("max_position_embeddings", 2048))
    given = {name: value for name, value in parameters.items() if value is not None or name in known.required}
    if not set(known.required) <= set(given) <= {*known.required, *known.optional}:
        takes = f"{sorted(known.required)}" + (f" and optionally {sorted(known.optional)}" if known.optional else "")
        raise InputError(f"{hf.where}: rope_type {kind!r} takes {takes}, but the config has {sorted(given)}")
    if kind == "default":
        return None
    items: dict[str, Any] = given | {"rope_type": kind}
    return tuple(sorted((name, tuple(x) if isinstance(x, list) else x) for name, x in items.items()))


def rope_to_hf(c: DecoderConfig, **extra: object) -> dict[str, object]:
    """The inverse of `rope_from_hf`, in today's spelling."""
    return {"rope_parameters": scaling_to_hf(c.rope_scaling) | {"rope_theta": c.rotary_base} | extra}


def scaling_to_hf(scaling: Scaling | None) -> dict[str, object]:
    """The inverse of `scaling_of`, with the `rope_type`."""
    items = scaling or (("rope_type", "default"),)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}
