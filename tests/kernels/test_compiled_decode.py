"""The generate program, compiled for an absent GPU: decoding runs our kernel on a cache that stays in place."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf.engine import generate
from jaxrlhf.models import Decoder, config_from_dict, param_shapes
from jaxrlhf.sampling import SamplingConfig

OPT = {"model_type": "opt", "vocab_size": 512, "hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512}
OPT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}


@pytest.mark.parametrize("device", ["A100", "H200"])
def test_the_decode_loop_runs_the_kernel_on_a_cache_in_place(device, compile_for):
    module = Decoder(config_from_dict(OPT), dtype=jnp.bfloat16, attention_implementation="pallas")
    make = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))

    def run(params, ids, mask, number, key):
        sampling = SamplingConfig(max_new_tokens=128)
        return generate(params, ids, mask, number, key, module=module, sampling=sampling, mesh=None)

    arrays = make(16, 128), make(16, 128, dtype=jnp.bool_), make(16), key
    program, kernels = compile_for(device, run, param_shapes(module), *arrays)
    assert kernels["decode_attention_share"][1] == kernels["flash_attention_forward"][1] == 0
    computations = re.split(r"\n(?=%|ENTRY )", program.as_text())
    (loop,) = (text for text in computations if "decode_attention_share" in text and "custom-call(" in text)
    assert len(re.findall(r"= bf16\[16,4,[\d,]*64\]\S* custom-call\(", loop)) == 2  # one per layer
    cache = r"bf16\[16,4,256,64\]\S*"
    results = re.findall(rf"= {cache} ([\w-]+)\((.*)", loop)
    assert len(results) == 2 * 4  # keys and values of each layer: as they come in, and with the new column
    for opcode, rest in results:
        assert opcode == "get-tuple-element" or "dynamic_update_slice" in rest, (opcode, rest)
    assert not re.search(rf"= {cache} copy", program.as_text())
