"""Rotary parameters in Hugging Face's configs, in both spellings: `rope_parameters`, or separate older options.

transformers 5 writes one table `rope_parameters`. transformers 4 reads the base frequency and the share of rotated
features from options of their own, and the rest from the table `rope_scaling`. Exports hold both spellings.
"""

from collections.abc import Mapping
from typing import Any

from jaxrlhf.errors import InputError
from jaxrlhf.models.config import DecoderConfig, Scaling
from jaxrlhf.models.hf.mapping import HFConfig
from jaxrlhf.models.rotary import ROPE_TYPES

_ORIGINAL = "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"
ROPE_OPTIONS = {
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "rotary_emb_base",
    "rotary_pct",
    _SHARE,
}
"""All spellings. An export holds those that agree with each other, whatever the source had."""


def rope_from_hf(
    hf: HFConfig, extra: tuple[str, ...] = (), base_name: str = "rope_theta", default_base: float = 10000.0
) -> dict[str, Any]:
    """Reads `position`, `rotary_base` and `rope_scaling`, and the values of `extra` parameters (None when absent).

    Args:
        hf: The config.
        extra: Parameters that this family reads beside those of the `rope_type`.
        base_name: The family's older name of the base frequency.
        default_base: Base frequency if the config has none.
    """
    base, kind, parameters = rope_parameters(hf, base_name, default_base)
    extras = {name: parameters.pop(name, None) for name in extra}
    if _SHARE not in extra:
        inside, beside = parameters.pop(_SHARE, None), hf.take(_SHARE)
        share = beside if inside is None else inside
        if share not in (None, 1):
            raise hf.refuse(_SHARE, share, "models of this family rotate all features of a head")
    return {"position": "rotary", "rotary_base": base, "rope_scaling": scaling_of(hf, kind, parameters)} | extras


def rope_parameters(
    hf: HFConfig, base_name: str = "rope_theta", default_base: float = 10000.0
) -> tuple[float, str, dict[str, Any]]:
    """Reads the base frequency, the `rope_type` and its parameters, which `scaling_of` checks.

    As in transformers, `rope_scaling` has priority over `rope_parameters`, and what stands in these tables over options
    of their own. Values that contradict each other are refused.
    """
    older, today = hf.table("rope_scaling"), hf.table("rope_parameters")
    name = "rope_scaling" if older else "rope_parameters"
    parameters = with_rope_type(hf, name, older or today)
    base = parameters.pop("rope_theta", None)
    if base is None:
        base = hf.positive(base_name, default_base)
    hf.check_number(f"{name}.rope_theta", base, positive=True)
    hf.same(base_name, f"{name}.rope_theta", base)
    if older and today:
        check_equal(hf, parameters | {"rope_theta": base}, with_rope_type(hf, "rope_parameters", today))
    return float(base), parameters.pop("rope_type"), parameters


def with_rope_type(hf: HFConfig, name: str, table: dict[str, Any]) -> dict[str, Any]:
    """A table with `rope_type`, which was once called `type`."""
    older, today = table.pop("type", None), table.get("rope_type")
    if None not in (older, today) and older != today:
        raise InputError(f"{hf.where}: {name} has rope_type={today!r} and type={older!r}, which contradict each other")
    return table | {"rope_type": (older if today is None else today) or "default"}


def check_equal(hf: HFConfig, older: Mapping[str, object], today: Mapping[str, object]) -> None:
    """Raises InputError if a parameter differs between `rope_scaling` and `rope_parameters`."""
    for name in sorted(older.keys() & today.keys()):
        if older[name] != today[name]:
            raise InputError(
                f"{hf.where}: {name} is {older[name]!r} by rope_scaling and {today[name]!r} in rope_parameters; "
                f"remove the wrong one"
            )


def scaling_of(hf: HFConfig, kind: str, parameters: dict[str, object]) -> Scaling | None:
    """Checks the parameters of a `rope_type`, and returns them as DecoderConfig.rope_scaling.

    Parameters that the `rope_type` does not take are left out, as transformers does not read them.
    """
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise InputError(f"{hf.where}: rope_type {kind!r} is not supported (one of {sorted(ROPE_TYPES)})")
    if tables := sorted(name for name, value in parameters.items() if isinstance(value, dict)):
        raise InputError(f"{hf.where}: rope parameters by kind of layer ({', '.join(tables)}) are not supported here")
    known = ROPE_TYPES[kind]
    if _ORIGINAL in known.required:
        _set_original(hf, parameters)
    given = {name: value for name, value in parameters.items() if value is not None}
    if not set(known.required) <= set(given):
        takes = f"{sorted(known.required)}" + (f" and optionally {sorted(known.optional)}" if known.optional else "")
        raise InputError(f"{hf.where}: rope_type {kind!r} takes {takes}, but the config has {sorted(given)}")
    hf.ignored += [f"rope parameter {name}" for name in sorted(set(given) - {*known.required, *known.optional})]
    items: dict[str, Any] = {"rope_type": kind}
    for name in (*known.required, *known.optional):
        if name in given:
            items[name] = _checked(hf, name, given[name])
    if kind == "llama3" and not items["low_freq_factor"] < items["high_freq_factor"]:
        raise hf.refuse("high_freq_factor", items["high_freq_factor"], "it must be above low_freq_factor")
    return None if kind == "default" else tuple(sorted(items.items()))


def _set_original(hf: HFConfig, parameters: dict[str, object]) -> None:
    """Fills in the context length before scaling: an option beside the table has priority, as in transformers."""
    beside, inside = hf.take(_ORIGINAL), parameters.get(_ORIGINAL)
    if inside is None:
        parameters[_ORIGINAL] = hf.size("max_position_embeddings", 2048) if beside is None else beside
    else:
        hf.same(_ORIGINAL, f"rope_parameters.{_ORIGINAL}", inside)


def _checked(hf: HFConfig, name: str, value: object) -> object:
    """A rope parameter: a positive number, a flag, or a list of positive numbers as a tuple."""
    if isinstance(value, bool) and name == "truncate":
        return value
    for number in value if isinstance(value, list | tuple) and name.endswith("_factor") else [value]:
        hf.check_number(f"rope_parameters.{name}", number, positive=True)
    return tuple(value) if isinstance(value, list) else value


def rope_to_hf(
    c: DecoderConfig, base_name: str = "rope_theta", share_name: str | None = None, **extra: object
) -> dict[str, object]:
    """The inverse of `rope_from_hf`, in both spellings.

    Args:
        c: Our configuration.
        base_name: The family's older name of the base frequency.
        share_name: The family's older name of the share of rotated features; None: it rotates all.
        extra: Further rope parameters.
    """
    older: dict[str, object] = {base_name: c.rotary_base, "rope_theta": c.rotary_base}
    if share_name is not None:
        extra[_SHARE] = rotated_share(c)
        older |= {share_name: extra[_SHARE], _SHARE: extra[_SHARE]}
    today = scaling_to_hf(c.rope_scaling) | {"rope_theta": c.rotary_base} | extra
    return older | {"rope_scaling": _scaling_to_older_hf(c.rope_scaling), "rope_parameters": today}


def rotated_share(c: DecoderConfig) -> float:
    """The share of rotated features, which multiplied with the head's size and cut gives their number again."""
    share = c.rotated_dim / c.head_dim
    return share if int(c.head_dim * share) == c.rotated_dim else (c.rotated_dim + 0.5) / c.head_dim


def scaling_to_hf(scaling: Scaling | None) -> dict[str, object]:
    """The inverse of `scaling_of`, with the `rope_type`."""
    items = scaling or (("rope_type", "default"),)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


def _scaling_to_older_hf(scaling: Scaling | None) -> dict[str, object] | None:
    """`rope_scaling` as transformers 4 takes it.

    Up to 4.42 the table must hold `type` and `factor`, a float, and nothing else; later versions and 5 read it too.
    """
    if scaling is None:
        return None
    table = scaling_to_hf(scaling)
    if table["rope_type"] in ("linear", "dynamic"):
        return {"type": table["rope_type"], "factor": float(table["factor"])}  # pyright: ignore[reportArgumentType]
    return table
