"""Generation: equal to transformers, EOS and masks, early exit, streaming, log-probs, and keys that follow samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.engine import HybridEngine, Rollout, SamplingConfig, decoding
from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained

_SMALL = {"vocab_size": 101, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
FAMILIES = {
    "gpt2": _SMALL | {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 48, "initializer_range": 0.3},
    "opt": _SMALL
    | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 40}
    | {"max_position_embeddings": 48, "word_embed_proj_dim": 24, "init_std": 0.3},
    "llama": _SMALL
    | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 40, "max_position_embeddings": 48, "initializer_range": 0.3},
}
_WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_WIDE |= {"max_position_embeddings": 48, "initializer_range": 0.3} | _SMALL
_GROUPED = _WIDE | {"num_key_value_heads": 2}
# Tied, tiny models with scaled embeddings repeat their last token.
_GEMMA = _GROUPED | {"head_dim": 8, "tie_word_embeddings": False}
_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}
FAMILIES |= {
    "bloom": _SMALL
    | {"hidden_size": 24, "n_layer": 2, "n_head": 3, "initializer_range": 0.3, "tie_word_embeddings": False},
    "gpt_neox": _WIDE | {"num_attention_heads": 3, "rotary_pct": 0.5},
    "gptj": FAMILIES["gpt2"] | {"rotary_dim": 4},
    "codegen": FAMILIES["gpt2"] | {"n_embd": 32, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": _SMALL
    | {"hidden_size": 24, "num_layers": 3, "num_heads": 3, "intermediate_size": 40, "max_position_embeddings": 48}
    | {"attention_types": [[["global", "local"], 1], [["local"], 1]], "window_size": 5, "initializer_range": 0.3},
    "mistral": _GROUPED | {"sliding_window": 5},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 10},
    "mixtral": _GROUPED | {"num_local_experts": 4, "sliding_window": 5},
    "qwen3_moe": _GROUPED
    | {"head_dim": 10, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"sliding_window": 5, "query_pre_attn_scalar": 8} | _CAPS,
    "gemma3_text": _GEMMA
    | {"sliding_window": 5, "query_pre_attn_scalar": 8, "num_hidden_layers": 3}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "smollm3": _GROUPED | {"no_rope_layers": [1, 0]},
    "olmo2": _GROUPED,
    "olmo3": _GROUPED | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _GROUPED | {"sliding_window": 5},
    "granite": _GROUPED | {"embedding_multiplier": 2.0, "residual_multiplier": 0.8, "logits_scaling": 0.5},
    "cohere2": _GROUPED | {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture(scope="module")
def rollout(setup, lab) -> Rollout:
    """A sampled rollout in which some responses end early and some do not."""
    rollout = jax.device_get(setup.rollout(lab.sampling))
    lengths = rollout.response_mask.sum(1)
    assert lengths.min() < lab.ANSWER == lengths.max()
    return rollout


def cut_at_eos(tokens: np.ndarray, eos: tuple[int, ...], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """What a response `[B, N]` drawn without EOS must look like with it: tokens up to and with EOS, and their mask."""
    is_eos = np.isin(tokens, eos)
    mask = np.cumsum(is_eos, axis=1) - is_eos == 0
    return np.where(mask, tokens, pad), mask


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_generation_equals_transformers_token_for_token(family, lab, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    torch.set_num_threads(1)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    reference.save_pretrained(tmp_path)
    ids, mask = lab.prompts(rows=5, width=9)
    ids = np.where(mask, ids, 0)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask.astype(int))}
    options = {"do_sample": False, "max_new_tokens": 32, "pad_token_id": 0}
    free = reference.generate(**inputs, **options, eos_token_id=None).numpy()[:, 9:]
    assert len(set(free[:, 16:].ravel().tolist())) > 8, "a degenerate model would prove nothing"
    eos = int(free[0, 12])
    expected = reference.generate(**inputs, **options, eos_token_id=eos).numpy()[:, 9:]

    ours = HybridEngine(load_pretrained(tmp_path), lab.mesh_of())
    sampling = SamplingConfig(32, temperature=0, eos_token_id=eos)
    got = jax.device_get(ours.generate(ids, mask, jax.random.key(0), sampling))
    tokens, response = cut_at_eos(free, (eos,), 0)
    np.testing.assert_array_equal(got.tokens[:, 9:], tokens)
    np.testing.assert_array_equal(got.tokens[:, 9 : 9 + expected.shape[1]], expected)
    np.testing.assert_array_equal(got.tokens[:, :9], ids)
    np.testing.assert_array_equal(got.response_mask[:, 9:], response)
    assert response.sum(1).min() <= 13


def test_the_rollout_is_laid_out_as_documented(rollout, lab):
    ids, mask = lab.prompts()
    assert rollout.prompt_length == lab.PROMPT
    for name, dtype in (("tokens", "int32"), ("mask", "bool"), ("response_mask", "bool"), ("logprobs", "float32")):
        array = getattr(rollout, name)
        assert (array.shape, array.dtype.name) == ((lab.ROWS, lab.PROMPT + lab.ANSWER), dtype)
    np.testing.assert_array_equal(rollout.mask[:, : lab.PROMPT], mask)
    np.testing.assert_array_equal(rollout.tokens[:, : lab.PROMPT], np.where(mask, ids, 0))
    assert not rollout.response_mask[:, : lab.PROMPT].any()
    np.testing.assert_array_equal(rollout.mask[:, lab.PROMPT :], rollout.response_mask[:, lab.PROMPT :])
    assert (rollout.logprobs[rollout.response_mask] < 0).all()
    assert (rollout.logprobs[~rollout.response_mask] == 0).all()


def test_eos_ends_a_row_and_early_exit_changes_nothing(rollout, setup, lab):
    free = setup.rollout(lab.sampling.replace(eos_token_id=None))
    assert np.asarray(free.response_mask)[:, lab.PROMPT :].all()
    tokens, mask = cut_at_eos(np.asarray(free.tokens)[:, lab.PROMPT :], lab.EOS, 0)
    np.testing.assert_array_equal(rollout.tokens[:, lab.PROMPT :], tokens)
    np.testing.assert_array_equal(rollout.response_mask[:, lab.PROMPT :], mask)
    logprobs = np.where(mask, np.asarray(free.logprobs)[:, lab.PROMPT :], 0)
    np.testing.assert_allclose(rollout.logprobs[:, lab.PROMPT :], logprobs, rtol=0, atol=1e-5)


def test_eos_stays_inside_the_mask_when_it_is_the_padding_too(rollout, setup, lab):
    """One EOS of several is also the pad: same draws, same masks, only the filling differs."""
    pad = lab.EOS[0]
    got = jax.device_get(setup.rollout(lab.sampling.replace(pad_token_id=pad)))
    np.testing.assert_array_equal(got.response_mask, rollout.response_mask)
    np.testing.assert_array_equal(got.tokens[got.mask], rollout.tokens[rollout.mask])
    assert (got.tokens[~got.mask] == pad).all()
    ended = got.response_mask.sum(1) < lab.ANSWER
    last = got.tokens[np.arange(lab.ROWS), lab.PROMPT + got.response_mask.sum(1) - 1]
    assert ended.any()
    assert np.isin(last[ended], lab.EOS).all()


def test_the_loop_stops_when_every_row_is_done_and_no_row_before_min_new_tokens(setup, lab, monkeypatch):
    steps = []

    def counting(*args):
        jax.debug.callback(lambda column: steps.append(int(column)), args[3])
        return original(*args)

    original = decoding.decode_step
    monkeypatch.setattr(decoding, "decode_step", counting)
    # A pad id of its own: this program is traced here, and used by no other test.
    sampling = lab.sampling.replace(eos_token_id=tuple(range(0, 101, 2)), min_new_tokens=4, pad_token_id=3)
    got = jax.block_until_ready(setup.rollout(sampling))
    jax.effects_barrier()
    lengths = np.asarray(got.response_mask).sum(1)
    assert len(steps) == lengths.max() - 1 < lab.ANSWER - 1
    assert lengths.min() == 5
    assert not np.isin(np.asarray(got.tokens)[:, lab.PROMPT : lab.PROMPT + 4], sampling.eos_ids).any()


def test_stream_yields_the_same_tokens(rollout, setup, lab):
    ids, mask = lab.prompts()
    streamed = np.stack(list(setup.engine.stream(ids, mask, jax.random.key(3), lab.sampling)), axis=1)
    np.testing.assert_array_equal(streamed, rollout.tokens[:, lab.PROMPT :])


def test_a_stream_ends_after_the_last_eos(setup, lab):
    ids, mask = lab.prompts()
    first = next(iter(setup.engine.stream(ids, mask, jax.random.key(3), lab.sampling)))
    everything = lab.sampling.replace(eos_token_id=tuple(np.unique(first).tolist()))
    assert len(list(setup.engine.stream(ids, mask, jax.random.key(3), everything))) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_a_full_forward(temperature, setup, lab):
    rollout = jax.device_get(setup.rollout(lab.sampling.replace(temperature=temperature)))
    logits = setup.actor.module.apply({"params": setup.actor.params}, rollout.tokens, rollout.mask)
    logp = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32) / temperature))[:, :-1]
    logp = np.take_along_axis(logp, rollout.tokens[:, 1:, None], axis=-1)[..., 0]
    keep = rollout.response_mask[:, 1:]
    np.testing.assert_allclose(rollout.logprobs[:, 1:][keep], logp[keep], rtol=0, atol=5e-5)


def test_a_sample_follows_its_number_not_its_place_or_its_batch(rollout, setup, lab):
    ids, mask = lab.prompts()
    order = np.random.default_rng(4).permutation(lab.ROWS)
    key = jax.random.key(3)
    moved = setup.engine.generate(ids[order], mask[order], key, lab.sampling, sample_index=order)
    np.testing.assert_array_equal(moved.tokens, rollout.tokens[order])
    few = order[:4]
    alone = setup.engine.generate(ids[few], mask[few], key, lab.sampling, sample_index=few)
    np.testing.assert_array_equal(alone.tokens, rollout.tokens[few])
    renumbered = setup.engine.generate(ids, mask, key, lab.sampling, sample_index=np.arange(lab.ROWS) + 100)
    assert (np.asarray(renumbered.tokens) != rollout.tokens).any(axis=1).mean() > 0.9


def test_equal_prompts_get_different_samples(setup, lab):
    ids, mask = (np.repeat(x[2:3], lab.ROWS, axis=0) for x in lab.prompts())
    got = setup.engine.generate(ids, mask, jax.random.key(3), lab.sampling)
    assert len({tuple(row) for row in np.asarray(got.tokens).tolist()}) > lab.ROWS // 2


def test_compact_moves_rows_to_the_left_edge_and_loses_nothing(rollout, lab):
    compact = jax.device_get(jax.jit(Rollout.compact)(rollout))
    for row in range(lab.ROWS):
        n = int(rollout.mask[row].sum())
        np.testing.assert_array_equal(compact.mask[row], np.arange(lab.PROMPT + lab.ANSWER) < n)
        for name in ("tokens", "response_mask", "logprobs"):
            before, after = getattr(rollout, name)[row], getattr(compact, name)[row]
            np.testing.assert_array_equal(after[:n], before[rollout.mask[row]])
            assert not after[n:].any()


def test_what_the_context_cannot_hold_is_refused_by_name(setup, lab):
    ids, mask = lab.prompts(rows=2, width=60)
    with pytest.raises(InputError, match=r"prompts of 60 tokens.*max_new_tokens=10.*context of 64.*shorten"):
        setup.engine.generate(ids, mask, jax.random.key(0), lab.sampling)
    with pytest.raises(InputError, match="context of 64"):
        next(setup.engine.stream(ids, mask, jax.random.key(0), lab.sampling))


def test_prompts_that_are_not_left_padded_are_refused_by_row(setup, lab):
    ids, mask = lab.prompts(rows=3, width=6)
    for bad in ([1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]):
        mask[1] = bad
        with pytest.raises(InputError, match=r"prompt_mask row 1.*left"):
            setup.engine.generate(ids, mask, jax.random.key(0), lab.sampling)


def test_ids_and_mask_of_different_shapes_are_refused(setup, lab):
    ids, mask = lab.prompts()
    with pytest.raises(InputError, match=r"prompt_ids.*prompt_mask.*\[B, P\]"):
        setup.engine.generate(ids, mask[:, 1:], jax.random.key(0), lab.sampling)
