"""Slices of 16-bit floats on a CPU, for JAX below 0.11.

Up to JAX 0.10, XLA's CPU compiler computes everything on 16-bit floats in float32, slices included. A loop over layers
that writes one layer's gradient into a stack of all layers then converts the whole stack, once per layer. A loop that
reads a layer holds a float32 copy of the whole stack. Integers of 16 bits are sliced as they are. So on a CPU, these
two operations of JAX are lowered to those of the same bits. JAX 0.11 needs no help: this file goes with Python 3.11.
"""

import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir

AFFECTED_BELOW = (0, 11)


def _lower_as_bits(primitive: Any, default: Any, arrays: int) -> None:
    """Lowers `primitive`, whose first `arrays` operands are arrays, to that of their bits; `default` other dtypes."""

    def of_bits(*operands: jax.Array, **params: Any) -> jax.Array:
        bits = [lax.bitcast_convert_type(x, jnp.uint16) for x in operands[:arrays]]
        return lax.bitcast_convert_type(primitive.bind(*bits, *operands[arrays:], **params), operands[0].dtype)

    as_bits = mlir.lower_fun(of_bits, multiple_results=False)

    def lower(context: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Sequence[Any]:
        dtype = context.avals_in[0].dtype  # pyright: ignore[reportAttributeAccessIssue]
        rule = as_bits if dtype in (jnp.bfloat16, jnp.float16) else default
        return rule(context, *operands, **params)

    mlir.register_lowering(primitive, lower, platform="cpu")


def slice_bits_on_cpu(version: str | None = None) -> bool:
    """Sets these lowerings for all programs of this process if this version of JAX needs them; returns if so."""
    # Read from the installed package, as help pages are printed without JAX.
    numbers = re.findall(r"\d+", version or metadata.version("jax"))
    if tuple(map(int, numbers[:2])) >= AFFECTED_BELOW:
        return False
    from jax._src.lax import slicing  # the default lowerings have no public name; the versions that need it are known

    _lower_as_bits(slicing.dynamic_slice_p, slicing._dynamic_slice_lower, 1)
    _lower_as_bits(slicing.dynamic_update_slice_p, slicing._dynamic_update_slice_lower, 2)
    return True
