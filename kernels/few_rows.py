"""Products of few rows with a kernel that holds its outputs first, as decode on a CPU computes them.

XLA's products on a CPU read the left operand in large panels. With the kernel on the left, 8 to 64 rows take a tenth
to a third less time than with the rows there. For many rows both orders are alike, and this one adds a transposition.
"""

import math

import jax
import jax.numpy as jnp

FEW_ROWS = 128


def outputs_first_product(
    x: jax.Array, kernel: jax.Array, inputs: int = 1, dtype: jnp.dtype | None = None
) -> jax.Array:
    """Computes x `[…, in…]` · kernel `[out…, in…]`: `[…, out…]`.

    Args:
        x: The rows.
        kernel: Its last `inputs` axes are contracted with those of `x`.
        inputs: Number of input axes.
        dtype: Of sums and result; None: that of the operands.
    """
    rows, outputs = x.ndim - inputs, kernel.ndim - inputs
    of_x, of_kernel = tuple(range(rows, x.ndim)), tuple(range(outputs, kernel.ndim))
    if math.prod(x.shape[:rows]) > FEW_ROWS:
        return jax.lax.dot_general(x, kernel, ((of_x, of_kernel), ((), ())), preferred_element_type=dtype)
    y = jax.lax.dot_general(kernel, x, ((of_kernel, of_x), ((), ())), preferred_element_type=dtype)
    # The barrier keeps XLA from turning a transposed product into that of swapped operands.
    return jnp.moveaxis(jax.lax.optimization_barrier(y), range(outputs), range(rows, y.ndim))
