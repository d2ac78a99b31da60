"""Chunked token log-probs and entropy against float64 log-softmax, across chunk sizes, with bias and padded rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.kernels import project_logits, token_logprobs

VOCAB, PADDED = 13, 16


def problem(length):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, length, 6)).astype(np.float32)
    weight = rng.normal(size=(PADDED, 6)).astype(np.float32)
    bias = rng.normal(size=PADDED).astype(np.float32)
    return hidden, weight, bias, rng.integers(0, VOCAB, (2, length))


def oracle(hidden, weight, bias, labels, temperature):
    logits = hidden.astype(np.float64) @ weight[:VOCAB].T.astype(np.float64)
    logits = (logits + (0 if bias is None else bias[:VOCAB])) / temperature
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    return np.take_along_axis(logp, labels[..., None], -1)[..., 0], -(np.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 8, 64])
@pytest.mark.parametrize(("use_bias", "temperature"), [(True, 0.5), (False, 1.0)])
def test_logprobs_and_entropy_equal_float64_for_any_chunk(chunk, use_bias, temperature):
    hidden, weight, bias, labels = problem(7)
    bias = bias if use_bias else None
    got = token_logprobs(hidden, weight, labels, vocab_size=VOCAB, bias=bias, temperature=temperature, chunk=chunk)
    for ours, theirs in zip(got, oracle(hidden, weight, bias, labels, temperature), strict=True):
        assert ours.shape == (2, 7) and ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)


def test_gradients_do_not_depend_on_the_chunk():
    hidden, weight, bias, labels = problem(7)
    scale = np.random.default_rng(3).normal(size=(2, 2, 7)).astype(np.float32)

    def grads(chunk):
        def loss(hidden, weight, bias):
            outputs = token_logprobs(hidden, weight, labels, vocab_size=VOCAB, bias=bias, temperature=0.7, chunk=chunk)
            return sum((s * x).sum() for s, x in zip(scale, outputs, strict=True))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(hidden, weight, bias)

    def plain(hidden, weight, bias):
        logp = jax.nn.log_softmax((hidden @ weight[:VOCAB].T + bias[:VOCAB]) / 0.7)
        outputs = jnp.take_along_axis(logp, labels[..., None], -1)[..., 0], -(jnp.exp(logp) * logp).sum(-1)
        return sum((s * x).sum() for s, x in zip(scale, outputs, strict=True))

    expected = jax.jit(jax.grad(plain, (0, 1, 2)))(hidden, weight, bias)
    for chunk in (3, 64):
        for ours, theirs in zip(grads(chunk), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_full_logits_are_never_held_in_the_backward_pass():
    length, vocab, chunk = 512, 4096, 16
    shapes = ((1, length, 8), (vocab, 8))
    hidden, weight = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    labels = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(hidden, weight, labels):
        return sum(x.sum() for x in token_logprobs(hidden, weight, labels, vocab_size=vocab, chunk=chunk))

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, weight, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * vocab * 4 / 4


def test_projection_hides_padded_columns_and_accumulates_in_float32():
    hidden, weight, bias, _ = problem(3)
    logits = project_logits(hidden, weight, bias, VOCAB)
    assert logits.shape == (2, 3, PADDED) and (logits[..., VOCAB:] == np.float32(-1e30)).all()
    np.testing.assert_allclose(logits[..., :VOCAB], hidden @ weight[:VOCAB].T + bias[:VOCAB], rtol=0, atol=3e-6)
    low = project_logits(hidden.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), None, VOCAB)
    assert low.dtype == jnp.float32


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures_stay_finite(temperature):
    hidden, weight, bias, labels = problem(5)

    def loss(hidden):
        outputs = token_logprobs(hidden, weight, labels, vocab_size=VOCAB, bias=bias, temperature=temperature)
        return sum(x.sum() for x in outputs), outputs

    grad, (logprobs, entropy) = jax.grad(loss, has_aux=True)(hidden)
    assert np.isfinite(grad).all() and np.isfinite(logprobs).all()
    assert (np.asarray(entropy) >= -1e-6).all() and (np.asarray(entropy) <= np.log(VOCAB) + 1e-5).all()
