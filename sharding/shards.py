"""Functions that each device runs on its own part of the arrays, for kernels that the compiler cannot split."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from jaxrlhf.sharding.rules import LogicalAxes, current_rules, resolve_spec

Result = TypeVar("Result")


def map_shards(
    function: Callable[..., Result],
    arrays: Sequence[jax.Array],
    axes: Sequence[LogicalAxes],
    out: int | tuple[int, ...],
) -> Result:
    """Computes `function(*arrays)` shard by shard; a plain call outside of a `use(mesh, rules)`.

    Split only dimensions whose elements `function` treats independently of each other.

    Args:
        function: Computes one shard of the result from a shard of each array.
        arrays: Its arguments.
        axes: Logical axes of each array, which say how it is split.
        out: Index of the array that the result is split like; a tuple of them for a tuple of results.
    """
    current = current_rules()
    if current is None:
        return function(*arrays)
    mesh, rules = current
    specs = tuple(resolve_spec(names, x.shape, mesh, rules) for names, x in zip(axes, arrays, strict=True))
    out_specs = specs[out] if isinstance(out, int) else tuple(specs[i] for i in out)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)
