"""The generate program, compiled for an absent GPU: decoding runs our kernel on a cache that stays in place."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.engine import Requests, SamplingConfig, generate
from jaxrlhf.models import Decoder, config_from_dict, param_shapes

OPT = {"model_type": "opt", "vocab_size": 512, "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512}
OPT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}


@pytest.mark.parametrize(("target", "kv"), [("a100-80g", "auto"), ("h200", "int8"), ("v5e", "fp8"), ("v5e", "auto")])
def test_the_decode_loop_runs_the_kernel_on_a_cache_in_place(target, kv, compile_for):
    options = {"attention_implementation": "pallas", "kv_cache_dtype": kv}
    module = Decoder(config_from_dict(OPT), dtype=jnp.bfloat16, **options)
    make = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))

    def run(params, ids, mask, number, key):
        sampling = SamplingConfig(max_new_tokens=128)
        requests = Requests(ids=ids, mask=mask, number=number)
        return generate(params, requests, key, module=module, sampling=sampling, mesh=None)

    arrays = make(16, 128), make(16, 128, dtype=jnp.bool_), make(16), key
    program, kernels = compile_for(target, run, param_shapes(module), *arrays)
    if target != "v5e":
        assert kernels["decode_attention_share"].spilled == kernels["flash_attention_forward"].spilled == 0
    computations = re.split(r"\n(?=%|ENTRY )", program.as_text())
    (loop,) = (text for text in computations if "decode_attention_share" in text and "custom-call(" in text)
    calls = [line for line in loop.splitlines() if "custom-call(" in line and "decode_attention_share" in line]
    assert len(calls) == 2  # one per layer
    kind = {"auto": "bf16", "int8": "s8", "fp8": "u8"}[kv]
    cache = rf"{kind}\[16,4,256,64\]\{{[^}}]*\}}"
    for call in calls:  # each takes a layer's keys and values and gives them back in their place
        given, taken = call.split(" custom-call(")
        assert len(re.findall(cache, given)) == 2 and "output_to_operand_aliasing=" in taken
    # What else has a cache's shape in the loop only hands it on.
    results = re.findall(rf"= {cache} ([\w-]+)\(", loop)
    assert set(results) == {"get-tuple-element"}, results
