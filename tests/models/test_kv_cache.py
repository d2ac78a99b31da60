"""Whole generations on a cache of eight bits: as right as its rounding allows, in every form and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.kernels import KV_CACHE_DTYPES
from jaxrlhf.kernels.kv_cache import quantise, widened
from jaxrlhf.models import decode_step, generation_view, init_cache, prefill, with_kernels
from jaxrlhf.sharding import make_mesh

PROMPT, STEPS = 6, 8
ROUNDING = {"int8": lambda x, scale: 0.5001 * scale, "fp8": lambda x, scale: np.maximum(np.abs(x) / 16, scale / 1024)}


@pytest.mark.parametrize("name", ROUNDING)
def test_what_is_quantised_is_off_by_its_rounding_at_most(name):
    x = np.random.default_rng(0).normal(size=(3, 40, 16)).astype(np.float32) * 10.0 ** np.arange(-20, 20)[:, None]
    x[0, 0], x[1, 1] = 0, np.eye(16)[3]
    stored, scale = jax.jit(quantise, static_argnums=1)(x, KV_CACHE_DTYPES[name])
    back = np.asarray(widened(stored, jnp.float32)) * np.asarray(scale)[..., None]
    assert stored.dtype.itemsize == 1 and scale.shape == x.shape[:-1]
    assert (np.abs(back - x) <= ROUNDING[name](x, np.asarray(scale)[..., None])).all()
    assert not back[0, 0].any() and (np.abs(back).max(-1) >= 0.99 * np.abs(x).max(-1)).all()


def logits_of(model, ids, mask, answer):
    """Of each of STEPS given tokens, decoded one after the other: float32 `[STEPS, B, V]`."""
    module = model.module

    @jax.jit
    def run(params, ids, mask, answer):
        view = generation_view(params, module)
        caches = prefill(module, view, ids, mask, init_cache(module, len(ids), PROMPT + STEPS))[1]

        def step(caches, xs):
            token, column = xs
            logits, caches = decode_step(module, view, token, column, (mask == 0).sum(1), caches)
            return caches, logits

        return jax.lax.scan(step, caches, (answer, PROMPT + jnp.arange(STEPS)))[1]

    logits = run(model.params, ids[:, :PROMPT], mask[:, :PROMPT], answer)
    return np.asarray(logits)[..., : model.config.vocab_size]


def rounded_logits(model, ids, mask, answer, name, monkeypatch):
    """The same on a float cache of which each entry was rounded as `name` says: what eight bits must come to."""

    def entries(key, value, cache):
        parts = (quantise(x, KV_CACHE_DTYPES[name]) for x in (key, value))
        return tuple(widened(x, jnp.float32) * scale[..., None] for x, scale in parts)

    with monkeypatch.context() as patch:
        for module in ("jaxrlhf.models.attend", "jaxrlhf.models.layers"):
            patch.setattr(f"{module}.entries", entries)
        return logits_of(model, ids, mask, answer)


@pytest.mark.parametrize(("case", "name"), [("bloom", "int8"), ("llama-tied-mqa", "fp8"), ("mistral", "int8")])
def test_logits_on_eight_bits_are_those_of_rounded_keys_and_values(case, name, make_model, make_batch, monkeypatch):
    model = make_model(case)
    ids, mask = make_batch("left", model.config.vocab_size)
    answer = np.random.default_rng(0).integers(0, model.config.vocab_size, (STEPS, len(ids)))
    exact = logits_of(with_kernels(model, attention_implementation="xla"), ids, mask, answer)
    expected = rounded_logits(with_kernels(model, attention_implementation="xla"), ids, mask, answer, name, monkeypatch)
    largest = np.abs(exact).max()
    gap = np.abs(expected - exact).max() / largest
    assert 1e-5 < gap < {"int8": 0.02, "fp8": 0.08}[name]
    for implementation in ("xla", "pallas"):
        options = {"attention_implementation": implementation, "kv_cache_dtype": name}
        got = logits_of(with_kernels(model, **options), ids, mask, answer)
        assert np.abs(got - expected).max() < 2e-5 * largest


@pytest.mark.parametrize("slots", [0, 2])
def test_a_mesh_copies_of_a_prompt_and_slots_change_no_token(slots, make_model, make_batch):
    model = with_kernels(make_model("llama"), kv_cache_dtype="int8")
    ids, mask = (x[:2, :PROMPT] for x in make_batch("left", model.config.vocab_size))
    sampling = SamplingConfig(max_new_tokens=STEPS, samples_per_prompt=2)
    rollouts = [
        HybridEngine(model, mesh, 2 if mesh else None).generate(ids, mask, jax.random.key(0), sampling, slots=held)
        for mesh, held in ((None, 0), (make_mesh(1, 2, 1, devices=jax.devices()[:2]), slots))
    ]
    np.testing.assert_array_equal(*(np.asarray(rollout.tokens) for rollout in rollouts))
    np.testing.assert_allclose(*(np.asarray(rollout.logprobs) for rollout in rollouts), rtol=0, atol=1e-5)


def test_an_unknown_cache_dtype_is_refused(make_model):
    with pytest.raises(InputError, match=r"kv_cache_dtype='int4' is not one of 'auto', 'int8', 'fp8'"):
        with_kernels(make_model("llama"), kv_cache_dtype="int4")
