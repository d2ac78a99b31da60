"""The norms against a float64 oracle, in value and gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models.norms import NormOptions, normalise

EPSILON = 1e-5
CASES = {  # centred, plus_one, bias, axes
    "layernorm": (True, False, True, 1),
    "layernorm without bias": (True, False, False, 1),
    "rmsnorm": (False, False, False, 1),
    "rmsnorm plus one": (False, True, False, 1),
    "rmsnorm over two axes": (False, False, False, 2),
    "layernorm over two axes": (True, True, True, 2),
}


def make(case: str, dtype=jnp.float32):
    centred, plus_one, has_bias, axes = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 * rng.standard_normal((2, 5, 4, 6)) + 2, dtype)
    shape = x.shape[-axes:]
    scale = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(shape), jnp.float32) if has_bias else None
    upstream = jnp.asarray(rng.standard_normal(x.shape), dtype)
    return x, scale, bias, upstream, NormOptions(EPSILON, centred, plus_one, dtype)


def oracle(x, scale, bias, upstream, options):
    """The result and the gradients of x, scale and bias, through the Jacobian of each row, in float64."""
    x, scale, upstream = (np.asarray(y, np.float64) for y in (x, scale, upstream))
    size = scale.size
    rows, weights = x.reshape(-1, size), upstream.reshape(-1, size)
    factor = (scale + options.plus_one).reshape(-1)
    project = np.eye(size) - options.centred / size
    values, d_rows = [], []
    for row, weight in zip(rows, weights, strict=True):
        centred = project @ row
        deviation = np.sqrt(np.mean(centred**2) + EPSILON)
        jacobian = (np.eye(size) / deviation - np.outer(centred, centred) / (size * deviation**3)) @ project
        values.append(centred / deviation)
        d_rows.append((weight * factor) @ jacobian)
    values = np.stack(values)
    result = values * factor + (0 if bias is None else np.asarray(bias, np.float64).reshape(-1))
    d_scale, d_bias = (weights * values).sum(0).reshape(scale.shape), weights.sum(0).reshape(scale.shape)
    return result.reshape(x.shape), np.stack(d_rows).reshape(x.shape), d_scale, None if bias is None else d_bias


def with_gradients(function, x, scale, bias, upstream):
    result, pull = jax.vjp(function, x, scale, bias)
    return (result, *pull(upstream))


@pytest.mark.parametrize("case", CASES)
def test_norms_equal_the_oracle_in_value_and_gradient(case):
    x, scale, bias, upstream, options = make(case)
    got = with_gradients(lambda *arrays: normalise(*arrays, options), x, scale, bias, upstream)
    chex.assert_trees_all_close(got, oracle(x, scale, bias, upstream, options), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", ["layernorm", "rmsnorm plus one"])
def test_in_bfloat16_only_what_leaves_is_rounded(case):
    x, scale, bias, upstream, options = make(case, jnp.bfloat16)
    got = with_gradients(lambda *arrays: normalise(*arrays, options), x, scale, bias, upstream)
    assert [y.dtype for y in got[:3]] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    result, d_x, *of_parameters = oracle(x, scale, bias, upstream, options)
    for y, expected in zip(got[:2], (result, d_x), strict=True):
        np.testing.assert_allclose(np.float32(y), expected, rtol=2**-8, atol=1e-6)
    chex.assert_trees_all_close(got[2:], tuple(of_parameters), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", ["layernorm", "rmsnorm"])
def test_the_backward_pass_keeps_the_input_and_no_float32_copy_of_it(case):
    x, scale, bias, _, options = make(case, jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: normalise(x, scale, bias, options), x)[1], x))
    assert [y.dtype for y in kept if y.shape == x.shape] == [jnp.bfloat16]


def test_remat_and_scan_change_no_gradient():
    x, scale, bias, upstream, options = make("layernorm")
    assert bias is not None
    scales, biases = jnp.stack([scale, 0.5 * scale]), jnp.stack([bias, -bias])

    def layers(x, scales, biases):
        for i in range(2):
            x = x + normalise(x, scales[i], biases[i], options)
        return x

    def scanned(x, scales, biases):
        layer = jax.checkpoint(lambda x, own: (x + normalise(x, *own, options), None))
        return jax.lax.scan(layer, x, (scales, biases))[0]

    one, other = (with_gradients(f, x, scales, biases, upstream) for f in (layers, scanned))
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=1e-5)
