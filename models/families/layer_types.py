"""Options of Hugging Face's configs that differ between full and sliding layers: `layer_types` and rope by layer."""

from collections.abc import Callable

from jaxrlhf.models.config import DecoderConfig
from jaxrlhf.models.families.rope import check_equal, scaling_of, scaling_to_hf, with_rope_type
from jaxrlhf.models.hf.mapping import HFConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def windows_from_hf(
    hf: HFConfig,
    window: int | None,
    slides: Callable[[int], bool],
    needs: str = "sliding layers need a sliding_window",
) -> tuple[int, ...] | None:
    """Reads `layer_types` as the window of each layer, 0 for none; None if no layer has one.

    Args:
        hf: The config.
        window: Its sliding window.
        slides: Whether layer i has the window if the config has no `layer_types`.
        needs: The error for layers that slide without a window.
    """
    layers, types = hf.size("num_hidden_layers"), hf.take("layer_types")
    if types is None:
        types = [SLIDING if slides(i) else FULL for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise hf.refuse("layer_types", types, f"it must name {layers} layers, each {FULL!r} or {SLIDING!r}")
    if SLIDING not in types:
        return None
    if window is None:
        raise hf.refuse("layer_types", types, needs)
    return tuple(window if kind == SLIDING else 0 for kind in types)


def windows_to_hf(c: DecoderConfig) -> dict[str, object]:
    """The inverse of `windows_from_hf`."""
    windows = c.windows or (0,) * c.num_layers
    return {"layer_types": [SLIDING if window else FULL for window in windows], "sliding_window": max(windows) or None}


def one_window_from_hf(hf: HFConfig, default: int | None) -> tuple[int, ...] | None:
    """Reads `sliding_window` as the window of every layer; None without one."""
    window = hf.size_or_none("sliding_window", default)
    return None if window is None else (window,) * hf.size("num_hidden_layers")


def one_window_to_hf(c: DecoderConfig) -> dict[str, object]:
    """The inverse of `one_window_from_hf`."""
    return {"sliding_window": c.windows[0] if c.windows else None}


def ropes_from_hf(hf: HFConfig, base: float, local_base: float, local_name: str | None = None) -> dict[str, object]:
    """Reads rope parameters by layer type: sliding layers have a base of their own and no scaling.

    Args:
        hf: The config.
        base: Default base frequency of full layers.
        local_base: The same of sliding layers.
        local_name: Older name of the base frequency of sliding layers; None: the family had none.
    """
    given, scaling = hf.table("rope_parameters"), hf.table("rope_scaling")
    tables = [given.get(kind) or {} for kind in (FULL, SLIDING)]
    if not set(given) <= {FULL, SLIDING} or not all(isinstance(table, dict) for table in tables):
        raise hf.refuse("rope_parameters", given, f"it must have the entries {FULL!r} and {SLIDING!r}")
    full, local = (with_rope_type(hf, "rope_parameters", dict(table)) for table in tables)
    if scaling:
        scaling = with_rope_type(hf, "rope_scaling", scaling)
        check_equal(hf, scaling, full if tables[0] else {})
        full |= scaling
    older = hf.positive("rope_theta", base)
    if local_name is None and older != base and "rope_theta" not in local:
        why = "versions of transformers read it differently for sliding layers; set rope_parameters of both layer types"
        raise hf.refuse("rope_theta", older, why)
    theta = full.pop("rope_theta", older)
    local_theta = local.pop("rope_theta", local_base if local_name is None else hf.positive(local_name, local_base))
    for value in (theta, local_theta):
        hf.check_number("rope_parameters.rope_theta", value, positive=True)
    hf.same("rope_theta", f"rope_parameters.{FULL}.rope_theta", theta)
    if local_name is not None:
        hf.same(local_name, f"rope_parameters.{SLIDING}.rope_theta", local_theta)
    if local.pop("rope_type") != "default" or local:
        raise hf.refuse("rope_parameters", given, f"{SLIDING!r} may only have rope_type 'default'")
    return {
        "position": "rotary",
        "rotary_base": float(theta),
        "rope_scaling": scaling_of(hf, full.pop("rope_type"), full),
        "local_rotary_base": float(local_theta),
    }


def ropes_to_hf(c: DecoderConfig, local_name: str | None = None) -> dict[str, object]:
    """The inverse of `ropes_from_hf`, in both spellings as far as the family has them."""
    full = scaling_to_hf(c.rope_scaling)
    nested = {FULL: full | {"rope_theta": c.rotary_base}}
    nested[SLIDING] = {"rope_type": "default", "rope_theta": c.local_rotary_base}
    older: dict[str, object] = {"rope_theta": c.rotary_base, "rope_scaling": full if c.rope_scaling else None}
    return {"rope_parameters": nested} | older | ({local_name: c.local_rotary_base} if local_name else {})
