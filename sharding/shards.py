"""A function run by each device on its own part of the arrays, for what the compiler cannot split by itself."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxrlhf.sharding.rules import LogicalAxes, current_rules, resolve_spec


def map_shards(
    function: Callable[..., Any], arrays: Sequence[jax.Array], axes: Sequence[LogicalAxes], out: int | tuple[int, ...]
) -> Any:
    """`function(*arrays)` with every array split as its logical `axes` say, its result as `arrays[out]` is.

    With several `out` it gives a tuple, each part split as that array. Only split dimensions that `function` treats
    each element of alike. Outside of a `use(mesh, rules)` a plain call.
    """
    current = current_rules()
    if current is None:
        return function(*arrays)
    mesh, rules = current
    specs = tuple(resolve_spec(names, x.shape, mesh, rules) for names, x in zip(axes, arrays, strict=True))
    out_specs = specs[out] if isinstance(out, int) else tuple(specs[i] for i in out)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)
