"""Whole models under each `attention_implementation`: the same tokens, on one device and on a mesh; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.engine import HybridEngine
from jaxrlhf.errors import InputError
from jaxrlhf.models import decode_step, generation_view, init_cache, prefill, with_attention
from jaxrlhf.sampling import SamplingConfig
from jaxrlhf.sharding import make_mesh

PROMPT, STEPS = 6, 5
DECODED = ("gpt2", "bloom", "llama", "gpt_neo", "mistral", "llama-tied-mqa")


def greedy(model, ids, mask):
    """Greedy answers `[B, STEPS]` and the logits that each token was read from, decoded token by token."""
    module = model.module

    @jax.jit
    def run(params, ids, mask):
        view = generation_view(params, module)
        caches = init_cache(module, len(ids), PROMPT + STEPS)
        logits, caches = prefill(module, view, ids, mask, caches)

        def step(carry, column):
            logits, caches = carry
            token = logits.argmax(-1)
            after, caches = decode_step(module, view, token, column, (mask == 0).sum(1), caches)
            return (after, caches), (token, logits)

        return jax.lax.scan(step, (logits, caches), PROMPT + jnp.arange(STEPS))[1]

    return (np.asarray(x) for x in run(model.params, ids[:, :PROMPT], mask[:, :PROMPT]))


@pytest.mark.parametrize("case", DECODED)
def test_greedy_answers_of_the_decode_kernel_are_those_of_xla(case, make_model, make_batch):
    model = make_model(case)
    batch = make_batch("left", model.config.vocab_size)
    tokens, logits = greedy(with_attention(model, "xla"), *batch)
    ours, our_logits = greedy(with_attention(model, "pallas"), *batch)
    np.testing.assert_array_equal(ours, tokens)
    real = np.s_[..., : model.config.vocab_size]
    assert np.abs(our_logits - logits)[real].max() < 1e-5 * np.abs(logits[real]).max()


@pytest.mark.parametrize("case", ["llama", "llama-tied-mqa", "bloom"])
def test_generation_on_a_mesh_is_that_of_one_device(case, make_model, make_batch):
    four_heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 6} if case == "bloom" else {}
    model = with_attention(make_model(case, **four_heads), "pallas")
    ids, mask = (np.concatenate([x, x[:1]])[:, :PROMPT] for x in make_batch("left", model.config.vocab_size))
    sampling = SamplingConfig(max_new_tokens=STEPS, temperature=0.0)
    rollouts = [
        HybridEngine(model, mesh, 2 if mesh else None).generate(ids, mask, jax.random.key(0), sampling)
        for mesh in (None, make_mesh(2, 2, 2))
    ]
    np.testing.assert_array_equal(*(np.asarray(rollout.tokens) for rollout in rollouts))
    np.testing.assert_allclose(*(np.asarray(rollout.logprobs) for rollout in rollouts), rtol=0, atol=1e-5)


def test_unknown_and_unfit_implementations_are_refused(make_model, make_batch, monkeypatch):
    model = make_model("llama")
    with pytest.raises(InputError, match="attention_implementation='fast' is not one of 'auto', 'xla', 'pallas'"):
        with_attention(model, "fast")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(InputError, match=r"attention_implementation: .*'pallas'.* not on tpu; take 'xla'"):
        greedy(with_attention(model, "pallas"), *make_batch("left", model.config.vocab_size))
