"""Products with kernels that hold their outputs first: values, and the order that the compiler keeps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.kernels.few_rows import FEW_ROWS, outputs_first_product


@pytest.mark.parametrize("rows", [1, 6, FEW_ROWS + 1])
def test_the_product_and_its_gradient_are_those_of_einsum(rows):
    rng = np.random.default_rng(rows)
    x, kernel = rng.normal(size=(rows, 1, 4, 5)), rng.normal(size=(3, 2, 4, 5))
    weight = rng.normal(size=(rows, 1, 3, 2))

    def loss(x, kernel):
        return jnp.sum(jnp.asarray(weight, jnp.float32) * outputs_first_product(x, kernel, 2))

    arrays = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    expected = np.einsum("ntij,opij->ntop", x, kernel)
    np.testing.assert_allclose(outputs_first_product(*arrays, 2), expected, rtol=0, atol=1e-5)
    d_x, d_kernel = jax.grad(loss, argnums=(0, 1))(*arrays)
    np.testing.assert_allclose(d_x, np.einsum("ntop,opij->ntij", weight, kernel), rtol=0, atol=1e-5)
    np.testing.assert_allclose(d_kernel, np.einsum("ntop,ntij->opij", weight, x), rtol=0, atol=2e-5)


def test_the_compiler_keeps_the_kernel_of_few_rows_on_the_left():
    kernel = jnp.zeros((96, 64))
    for rows, shape in ((8, "96,8"), (FEW_ROWS + 8, f"{FEW_ROWS + 8},96")):
        call = jax.jit(lambda x: outputs_first_product(x, kernel) + 1)
        text = call.lower(jnp.zeros((rows, 64))).compile().as_text()
        assert re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text) == [shape]
