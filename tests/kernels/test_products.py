"""Products on a CPU: values and gradients, and the forms that the compiler keeps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.kernels.products import FEW_ROWS, cpu_product, outputs_first_product
from tests.support.compiled import operand_types


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


def test_the_compiler_keeps_the_kernel_of_products_on_the_left():
    kernel = jnp.zeros((96, 64))
    for rows, shape in ((8, "96,8"), (FEW_ROWS + 8, f"{FEW_ROWS + 8},96")):
        call = jax.jit(lambda x: outputs_first_product(x, kernel) + 1)
        text = call.lower(jnp.zeros((rows, 64))).compile().as_text()
        assert re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text) == [shape]


def test_products_of_bfloat16_are_summed_in_float32_both_ways():
    rng = np.random.default_rng(0)
    x, kernel, weight = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 64, 4, 32), (4, 32, 3, 16), (2, 64, 3, 16))
    )

    def loss(x, kernel):
        return jnp.sum((weight * cpu_product(x, kernel, 2)).astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    d_x, d_kernel = gradient(x, kernel)
    wide = [np.asarray(a, np.float64) for a in (x, kernel, weight)]
    for found, equation, operands in (
        (cpu_product(x, kernel, 2), "btij,ijop->btop", (wide[0], wide[1])),
        (d_x, "btop,ijop->btij", (wide[2], wide[1])),
        (d_kernel, "btij,btop->ijop", (wide[0], wide[2])),
    ):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), np.einsum(equation, *operands), rtol=2**-8, atol=2e-2)
    products = re.findall(r"stablehlo.dot_general.*->\s*tensor<[0-9x]*(\w+)>", gradient.lower(x, kernel).as_text())
    assert len(products) >= 2 and set(products) == {"f32"}


@pytest.mark.parametrize("rows", [(2, 64), (3, 43)])
def test_the_compiler_makes_no_float32_copies_for_the_gradient_of_a_kernel(rows):
    x, kernel = jnp.ones((*rows, 4, 32), jnp.bfloat16), jnp.ones((4, 32, 96), jnp.bfloat16)
    if operand_types(lambda x, kernel: cpu_product(x, kernel, 2), x, kernel) != {"bf16"}:
        pytest.skip("this XLA computes no product from bfloat16 operands")
    loss = lambda kernel: jnp.sum(cpu_product(x, kernel, 2).astype(jnp.float32) ** 2)  # noqa: E731
    assert operand_types(jax.grad(loss), kernel) == {"bf16"}
