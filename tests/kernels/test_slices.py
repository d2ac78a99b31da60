"""Slices of 16-bit floats on a CPU: the same values and gradients, and no stack that a loop converts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.kernels.slices import slice_bits_on_cpu

LAYERS, ROWS, WIDTH = 7, 24, 40


def chain(kernels, x):
    """The sum of a scan over stacked kernels `[L, D, D]`, whose gradient is a stack too."""

    def layer(x, kernel):
        y = jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return x + jnp.tanh(y.astype(x.dtype)), None

    return jax.lax.scan(layer, x, kernels)[0].astype(jnp.float32).sum()


def arrays(dtype):
    rng = np.random.default_rng(0)
    kernels, x = rng.normal(0, 0.1, (LAYERS, WIDTH, WIDTH)), rng.normal(size=(ROWS, WIDTH))
    return jnp.asarray(kernels, dtype), jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_loop_over_layers_converts_no_whole_stack(dtype):
    text = jax.jit(jax.grad(chain)).lower(*arrays(dtype)).compile().as_text()
    assert re.search(rf"f16\[{LAYERS},{WIDTH},{WIDTH}\]", text), "the stack of gradients"
    assert not re.search(rf"f32\[{LAYERS},", text)


@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.bfloat16, 2**-7), (jnp.float16, 2**-9), (jnp.float32, 1e-6)])
def test_gradients_of_a_stack_are_those_of_its_layers_one_by_one(dtype, rounding):
    kernels, x = arrays(dtype)

    def unrolled(kernels, x):
        for kernel in kernels:
            x = x + jnp.tanh(jnp.dot(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype))
        return x.astype(jnp.float32).sum()

    one_by_one = jnp.stack(jax.jit(jax.grad(unrolled))(list(kernels), x)).astype(jnp.float32)
    stacked = jax.jit(jax.grad(chain))(kernels, x).astype(jnp.float32)
    np.testing.assert_allclose(stacked, one_by_one, rtol=0, atol=rounding * float(jnp.abs(one_by_one).max()))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.bool_])
def test_slices_hold_and_replace_the_same_elements_in_every_dtype(dtype):
    x = (np.arange(35).reshape(5, 7) % 3).astype(dtype)
    update = np.ones((2, 3), dtype)
    cut = jax.jit(lambda x, i: jax.lax.dynamic_slice(x, (i, 1), (2, 3)))
    put = jax.jit(lambda x, i: jax.lax.dynamic_update_slice(x, update, (i, 4)))
    np.testing.assert_array_equal(cut(x, 2), x[2:4, 1:4])
    np.testing.assert_array_equal(cut(x, 9), x[3:, 1:4], "starts are clamped")
    expected = x.copy()
    expected[2:4, 4:] = update
    np.testing.assert_array_equal(put(x, 2), expected)


def test_slices_keep_every_bit():
    bits = np.array([[0x7FC1, 0x8000, 0x0001, 0xFF80]], np.uint16)  # a NaN with a payload, -0, a subnormal, -inf
    x = jax.lax.bitcast_convert_type(jnp.asarray(np.repeat(bits, 3, 0)), jnp.bfloat16)
    kept = jax.jit(
        lambda x, i: jax.lax.dynamic_update_slice(jnp.roll(x, 0), jax.lax.dynamic_slice(x, (i, 0), (1, 4)), (0, 0))
    )
    np.testing.assert_array_equal(jax.lax.bitcast_convert_type(kept(x, 1), jnp.uint16), np.repeat(bits, 3, 0))


def test_newer_versions_of_jax_slice_by_themselves():
    assert not slice_bits_on_cpu("0.11.0")
    assert not slice_bits_on_cpu("1.0.0")
