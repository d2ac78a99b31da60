"""Products of activations with a kernel, in the forms that XLA's CPU backend is fast at.

Three things make it slow. It computes a product of 16-bit numbers with a 16-bit result from float32 copies of its
operands; summed into float32, the product uses the processor's own 16-bit instructions, in half the time. It does the
same where the left operand is contracted over its first axis, as in the gradient of a kernel; with that operand
transposed before, the gradient takes half the time. And it reads the left operand in large panels: with the kernel on
the left, 8 to 64 rows, as decode has them, take a tenth to a third less time than with the rows there. For many rows
both orders are alike, and that one adds a transposition.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

FEW_ROWS = 128


def cpu_product(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """Computes x `[…, in…]` · kernel `[in…, out…]` with `inputs` input axes: `[…, out…]` in the dtype of both."""
    if x.dtype == jnp.float32:
        return _sum(x, kernel, range(x.ndim - inputs, x.ndim), range(inputs))
    return _rounded_product(x, kernel, inputs)


def _sum(a: jax.Array, b: jax.Array, of_a: range, of_b: range) -> jax.Array:
    """The product over these axes, in float32."""
    dims = (tuple(of_a), tuple(of_b)), ((), ())
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rounded_product(x: jax.Array, kernel: jax.Array, inputs: int) -> jax.Array:
    return _sum(x, kernel, range(x.ndim - inputs, x.ndim), range(inputs)).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array, inputs: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded_product(x, kernel, inputs), (x, kernel)


def _backward(inputs: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows = x.ndim - inputs
    d_x = _sum(gradient, kernel, range(rows, gradient.ndim), range(inputs, kernel.ndim))
    d_kernel = sum_of_rows(x, gradient, rows)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


def sum_of_rows(a: jax.Array, b: jax.Array, rows: int) -> jax.Array:
    """The product of 16-bit `[rows…, m…]` and `[rows…, n…]` over their rows, in float32: `[m…, n…]`."""
    count = math.prod(a.shape[:rows])
    left, right = a.reshape(count, 1, -1), b.reshape(count, -1)
    # XLA would only note the transposition in the operand's layout; it has to write out a result that it reshapes.
    # The barriers keep it from turning that round again.
    left = left.transpose(2, 0, 1).reshape(-1, count)
    left, right = jax.lax.optimization_barrier((left, right))
    total = jax.lax.optimization_barrier(_sum(left, right, range(1, 2), range(1)))
    return total.reshape(*a.shape[rows:], *b.shape[rows:])


_rounded_product.defvjp(_forward, _backward)


def outputs_first_product(
    x: jax.Array, kernel: jax.Array, inputs: int = 1, dtype: jnp.dtype | None = None
) -> jax.Array:
    """Computes x `[…, in…]` · kernel `[out…, in…]`: `[…, out…]`, summed in float32.

    Args:
        x: The rows.
        kernel: Its last `inputs` axes are contracted with those of `x`.
        inputs: Number of input axes.
        dtype: Of the result; None: that of the operands.
    """
    rows, outputs = x.ndim - inputs, kernel.ndim - inputs
    of_x, of_kernel = range(rows, x.ndim), range(outputs, kernel.ndim)
    if math.prod(x.shape[:rows]) > FEW_ROWS:
        return _sum(x, kernel, of_x, of_kernel).astype(dtype or x.dtype)
    # The barrier keeps XLA from turning a transposed product into that of swapped operands.
    y = jax.lax.optimization_barrier(_sum(kernel, x, of_kernel, of_x)).astype(dtype or x.dtype)
    return jnp.moveaxis(y, range(outputs), range(rows, y.ndim))
