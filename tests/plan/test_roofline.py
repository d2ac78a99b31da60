"""The roofline that `plan` and `bench` share: every cost against a count by hand, and both ways of counting."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.kernels import attention_mask
from jaxrlhf.models import Decoder, config_from_dict
from jaxrlhf.plan import roofline
from jaxrlhf.plan.cost import run_cost
from jaxrlhf.plan.roofline import Cost, Peaks, forward
from jaxrlhf.plan.settings import PlanConfig
from jaxrlhf.plan.system import build_system

SHAPE = {"model_type": "opt", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
LOCAL = {"model_type": "gpt_neo", "vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
LOCAL |= {"attention_types": [[["global", "local"], 1]], "window_size": 3, "max_position_embeddings": 64}


def test_costs_are_what_a_hand_count_gives():
    actor = Decoder(config_from_dict(SHAPE), head="lm", dtype=np.float32)
    body, head = 2 * (4 * 32 * 32 + 2 * 32 * 64), 96 * 32
    assert roofline.matrices(actor) == (body, head)
    once = forward(actor, 3, 5, 5, 2)
    assert once.flops == 2 * 3 * (5 * body + 2 * head) + 4 * 3 * 15 * 32 * 2
    assert once.bytes == 4 * (body + head)
    step = roofline.decode(actor, rows=3, positions=7)
    assert step.flops == 2 * 3 * (body + head) + 4 * 3 * 7 * 32 * 2
    assert step.bytes == 4 * (body + head) + 3 * 7 * 2 * 2 * 32 * 4
    generated = roofline.generate(actor, rows=3, prompt=5, response=4)
    assert len(generated) == 2 + 3
    assert generated[1] == Cost(0.0, 3 * 5 * 2 * 2 * 32 * 4)
    peaks = Peaks(flops=100.0, bandwidth=10.0)
    assert roofline.roofline_seconds((Cost(200.0, 5.0), Cost(1.0, 40.0)), peaks) == 2.0 + 4.0
    waiting = Cost(200.0, 5.0, hidden=3.0, exposed=0.5, host=8.0)
    assert waiting.seconds(dataclasses.replace(peaks, host_link=4.0)) == 3.0 + 0.5 + 2.0


def test_costs_leave_out_what_local_windows_hide():
    """Counted against the masks that attention applies, for layers with and without a window."""
    module = Decoder(config_from_dict(LOCAL), head="lm", dtype=np.float32)
    whole = Decoder(module.config.replace(windows=None), head="lm", dtype=np.float32)
    assert module.config.windows == (0, 3)
    for length in (2, 3, 7):
        masks = [np.asarray(attention_mask(np.ones((1, length)), length, window=w)) for w in (0, 3)]
        pairs, seen = sum(mask.sum() for mask in masks), sum(mask[..., -1, :].sum() for mask in masks)
        fewer = whole.config.num_layers * length * (length + 1) // 2 - pairs, 2 * length - seen
        passes, whole_pass = forward(module, 5, length, length, 1), forward(whole, 5, length, length, 1)
        assert whole_pass.flops - passes.flops == 4 * 5 * fewer[0] * 32 and whole_pass.bytes == passes.bytes
        step, whole_step = roofline.decode(module, 5, length), roofline.decode(whole, 5, length)
        assert whole_step.flops - step.flops == 4 * 5 * fewer[1] * 32
        assert whole_step.bytes - step.bytes == 5 * fewer[1] * 2 * 32 * 4
        (local,) = roofline.attention_layer(module, 5, length, 3, backward=False)
        assert local.flops == 4 * 5 * masks[1].sum() * 32


@pytest.mark.parametrize("vocab_size", [96, 100])
def test_padded_costs_add_masked_positions_and_the_rows_that_pad_the_vocabulary(vocab_size):
    module = Decoder(config_from_dict(LOCAL | {"vocab_size": vocab_size}), head="lm", dtype=jnp.bfloat16)
    padding = module.config.padded_vocab_size - vocab_size
    least, padded = forward(module, 5, 7, 7, 4), forward(module, 5, 7, 7, 4, padded=True)
    hidden = 2 * 7 * 7 - 7 * 8 // 2 - sum(min(t, 3) for t in range(1, 8))
    assert padded.flops - least.flops == 4 * 5 * hidden * 32 + 2 * 5 * 4 * 32 * padding
    assert padded.bytes - least.bytes == 2 * 32 * padding


def test_the_planner_and_the_benchmark_count_the_same_iteration_alike():
    """On one device they differ by masked positions, padded rows of the vocabulary, and nothing else."""
    config = PlanConfig.create(actor="opt-1.3b", reward="opt-350m", device="a100-80g")
    system = build_system(config)
    actor, critic = system.modules["actor"], system.modules["critic"]
    prompt, response = config.ppo.data.max_prompt_seq_len, config.ppo.sampling.max_new_tokens
    phases, length = run_cost(system, config).phases, prompt + response

    def beyond(module: Decoder, queries: int, keys: int, headed: int) -> float:
        """FLOPs that only the planner counts."""
        c = module.config
        masked = queries * keys * c.num_layers - roofline.attention_pairs(module, queries, keys)
        rows_of_padding = (c.padded_vocab_size - c.vocab_size) * c.embedding_size if module.head == "lm" else 0
        return system.rows * (4 * masked * c.num_heads * c.head_dim + 2 * headed * rows_of_padding)

    both = beyond(actor, length, length, response) + beyond(critic, length, length, response)
    scored = roofline.total(roofline.score(actor, critic, system.rows, prompt, response))
    assert phases["score"].flops == scored.flops + 2 * both
    trained = roofline.total(roofline.train(actor, critic, system.rows, prompt, response))
    assert phases["train"].flops == trained.flops + 3 * both
    prefill, _, *steps = roofline.generate(actor, system.rows, prompt, response)
    assert phases["prefill"].flops == prefill.flops + beyond(actor, prompt, prompt, 1)
    decoded = sum(beyond(actor, 1, prompt + step, 1) for step in range(1, response))
    columns = sum(length - (prompt + step) for step in range(1, response))  # of the cache that no position fills yet
    decoded += system.rows * 4 * columns * actor.config.hidden_size * actor.config.num_layers
    assert phases["decode"].flops == roofline.total(steps).flops + decoded
