"""What each family accepts and refuses by name: published spellings, unsupported values, and foreign checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrlhf.errors import InputError
from jaxrlhf.models import config_from_dict, config_to_dict, load_pretrained, save_pretrained
from jaxrlhf.models.families import FAMILIES


def options(make_model, case, **changes):
    return config_to_dict(make_model(case).config) | changes


def test_every_family_is_in_the_matrix(case, make_model):
    assert make_model(case).config.family in FAMILIES


def test_configs_come_back_from_their_export(case, make_model):
    config = make_model(case).config
    values = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(values) == config
    assert values["architectures"] == [FAMILIES[config.family].lm_class]


@pytest.mark.parametrize(
    ("case_name", "changes", "message"),
    [
        ("opt", {"layerdrop": 0.1}, r"layerdrop=0.1 is not supported \(only 0.0 is\)"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
        ("llama", {"num_key_value_heads": 3}, "3 key/value heads do not divide 4 heads"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types=.*must name 2 layers"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types="),
        ("qwen2", {"use_sliding_window": False}, "needs use_sliding_window=True"),
        ("bloom", {"n_inner": 10}, r"n_inner=10 is not supported \(only 96 is\)"),
        ("bloom", {"n_head": 5}, "hidden_size=24 is not a multiple of n_head=5"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.1}}, "rotary_pct=0.1.*rotates 0 of 8"),
        ("gpt_neox", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob=0.1"),
        ("gptj", {"rotary_dim": 9}, "rotary_dim=9 is not supported: it must be even"),
        ("gptj", {"rotary_dim": None}, "rotary_dim=None"),
        ("gptj", {"tie_word_embeddings": True}, "a head with a bias cannot be tied"),
        ("codegen", {"n_head": 6, "rotary_dim": 4}, "n_head=6 is not supported: it must be a multiple of 4"),
        ("gpt_neo", {"attention_types": [[["global"], 2]]}, "attention_layers"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True.*only causal"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types=.*must name 2 layers, each 'full_attention' or"),
        ("gemma2", {"layer_types": [[], {}]}, "layer_types=.*must name 2 layers"),
        ("gemma2", {"sliding_window": None}, "layer_types=.*sliding layers need a sliding_window"),
        ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping=-1.0 must be a positive number"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters=.*entries 'full_attention' and"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "'sliding_attention' may only have rope_type 'default'",
        ),
        ("olmo3", {"rope_parameters": None, "rope_theta": 1e4}, "rope_theta=10000.0 is not supported: versions"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers=.*at least 2 numbers, each 0 or 1"),
        ("smollm3", {"no_rope_layers": [[], {}]}, "no_rope_layers=.*each 0 or 1"),
        ("cohere2", {"head_dim": 8}, r"head_dim=8 is not supported \(only 6 is\)"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling=0.0 is not supported: it must be positive"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling='linear'.*'longrope' or"),
        ("phi3", {"partial_rotary_factor": 0.1, "rope_parameters": None}, "partial_rotary_factor=0.1.*rotates 0 of 6"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            r"short_factor=\[1.0\] is not supported: it must have 3 numbers",
        ),
        (
            "gpt_neo",
            {"attention_types": [[["global", "sparse", "local"], 1]], "attention_layers": None},
            "attention_types=.*must name 3 layers, each 'global' or 'local'",
        ),
    ],
)
def test_unsupported_values_are_refused_by_name(make_model, case_name, changes, message):
    with pytest.raises(InputError, match=message):
        config_from_dict(options(make_model, case_name, **changes))


def test_older_spellings_of_published_configs():
    bloom = {"model_type": "bloom", "vocab_size": 64, "n_embed": 16, "n_layer": 1, "num_attention_heads": 2}
    bloom |= {"n_inner": None, "offset_alibi": 100, "seq_length": 128, "unk_token_id": 0}
    config = config_from_dict(bloom)
    assert (config.hidden_size, config.num_heads, config.max_positions) == (16, 2, 128)
    neox = {"model_type": "gpt_neox", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    neox |= {"num_attention_heads": 2, "intermediate_size": 64, "rotary_pct": 0.5, "rotary_emb_base": 123}
    config = config_from_dict(neox)
    assert (config.rotary_dim, config.rotary_base) == (8, 123.0)


def test_published_layers_of_gemma_3_and_olmo_3_have_their_own_bases():
    small = _LLAMA | {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 16}
    gemma3 = {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
    config = config_from_dict(small | gemma3 | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}})
    assert config.windows == (16, 16, 0) * 2
    assert (config.rotary_base, config.local_rotary_base) == (1e6, 1e4)
    assert dict(config.rope_scaling or ()) == {"rope_type": "linear", "factor": 8.0}
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    config = config_from_dict(small | {"model_type": "olmo3", "rope_theta": 5e5, "rope_scaling": yarn})
    assert config.windows == (16, 16, 16, 0, 16, 16)
    assert (config.rotary_base, config.local_rotary_base) == (5e5, 5e5)
    assert dict(config.rope_scaling or ()) == yarn


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_the_original_context_of_phi_3_is_the_option_beside_its_rope_parameters(kind):
    factors = {"type": kind, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    phi3 = _LLAMA | {"model_type": "phi3", "rope_scaling": factors | {"original_max_position_embeddings": 9}}
    config = config_from_dict(phi3 | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 16})
    scaling = dict(config.rope_scaling or ())
    assert (config.rotary_dim, scaling["rope_type"], scaling["original_max_position_embeddings"]) == (6, "longrope", 16)


def test_the_share_that_phi_3_writes_gives_the_same_number_of_rotated_features():
    phi3 = _LLAMA | {"model_type": "phi3", "head_dim": 44, "partial_rotary_factor": 0.69}
    config = config_from_dict(phi3)
    assert config.rotary_dim == 30  # 30 / 44 · 44 is a little below 30 in floating point
    assert config_from_dict(config_to_dict(config)) == config


def test_the_first_gemma_says_gelu_and_means_its_tanh_form():
    gemma = _LLAMA | {"model_type": "gemma", "hidden_act": "gelu", "head_dim": 8}
    config = config_from_dict(gemma)
    assert config.activation == "gelu_new"
    assert config_from_dict(config_to_dict(config)).activation == "gelu_new"


@pytest.mark.parametrize("divisor", [6.0, 8, 10.0, 49.0, 0.3, 1.1])
def test_the_logits_divisor_of_granite_comes_back_exactly(divisor):
    config = config_from_dict(_LLAMA | {"model_type": "granite", "logits_scaling": divisor})
    assert config_to_dict(config)["logits_scaling"] == divisor
    assert config_from_dict(config_to_dict(config)) == config


def test_an_absent_window_is_mistrals_default_and_null_is_none():
    mistral = {"model_type": "mistral", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
    mistral |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    assert config_from_dict(mistral).windows == (4096, 4096)
    assert config_from_dict(mistral | {"sliding_window": None}).windows is None


def test_neox_heads_are_read_under_either_name(make_model, tmp_path):
    model = make_model("gpt_neox")
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        load_pretrained(tmp_path).params["lm_head"]["kernel"][:101], model.params["lm_head"]["kernel"][:101]
    )
    tensors["embed_out.weight"] = tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="stored twice under different names"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("case_name", ["opt-350m", "gpt2"])
@pytest.mark.parametrize("wrapper", ["rwtransformer.", "rwtranrsformer."])
def test_deepspeed_chat_reward_checkpoints(make_model, make_batch, case_name, wrapper, tmp_path):
    """A base model under `rwtransformer` and a value head, in one pytorch_model.bin beside the base model's config."""
    torch = pytest.importorskip("torch")
    model = make_model(case_name, head="scalar")
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = FAMILIES[model.config.family].prefix + "."
    state = {wrapper + name.removeprefix(prefix): torch.tensor(x) for name, x in tensors.items()}
    state["v_head.weight"] = state.pop(wrapper + "score.weight")
    config = json.loads((tmp_path / "config.json").read_text()) | {"end_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load_pretrained(tmp_path, head="scalar", new_head=False)
    ids, mask = make_batch("right", model.config.vocab_size)
    values = [
        jax.jit(m.module.apply)({"params": m.params}, jnp.asarray(ids), jnp.asarray(mask)) for m in (model, loaded)
    ]
    np.testing.assert_array_equal(*values)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)


# The options that published config.json files hold, with every name they use; what is generic stands in _GENERIC.
_GENERIC = {"_name_or_path": "x", "torch_dtype": "float16", "transformers_version": "4.30.0"}
_GENERIC |= {"use_cache": True, "tokenizer_class": "GPT2Tokenizer", "task_specific_params": {"text-generation": {}}}
_SUMMARY = {"summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True}
_SUMMARY |= {"summary_type": "cls_index", "summary_use_proj": True}
_GPT = {"activation_function": "gelu_new", "attn_pdrop": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0, "n_ctx": 64}
_GPT |= {"eos_token_id": 2, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_embd": 32, "n_head": 4}
_GPT |= {"n_layer": 2, "n_positions": 64, "resid_pdrop": 0.0, "vocab_size": 64} | _SUMMARY
_LLAMA = {"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02}
_LLAMA |= {"intermediate_size": 48, "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_LLAMA |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 64}
_J = {"gradient_checkpointing": False, "n_inner": None, "rotary_dim": 4, "scale_attn_weights": True}
PUBLISHED = {
    "gpt2-large": {"model_type": "gpt2", "output_past": True} | _GPT,
    "opt-1.3b": {"model_type": "opt", "activation_dropout": 0.0, "activation_function": "relu", "bos_token_id": 2}
    | {"attention_dropout": 0.0, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 48}
    | {"hidden_size": 32, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 64, "vocab_size": 64}
    | {"num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 1, "prefix": "</s>"}
    | {"word_embed_proj_dim": 32, "_remove_final_layer_norm": False},
    "bloom-560m": {"model_type": "bloom", "apply_residual_connection_post_layernorm": False, "unk_token_id": 0}
    | {"attention_dropout": 0.0, "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "bos_token_id": 1}
    | {"eos_token_id": 2, "pad_token_id": 3, "hidden_dropout": 0.0, "initializer_range": 0.02, "n_inner": None}
    | {"layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "n_embed": 32, "n_layer": 2, "seq_length": 64}
    | {"num_attention_heads": 4, "offset_alibi": 100, "pretraining_tp": 1, "skip_bias_add": True, "vocab_size": 64}
    | {"skip_bias_add_qkv": False, "slow_but_exact": False},
    "gpt-neox-20b": {"model_type": "gpt_neox", "attention_probs_dropout_prob": 0, "bos_token_id": 0}
    | {"eos_token_id": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0, "hidden_size": 32}
    | {"initializer_range": 0.02, "intermediate_size": 48, "layer_norm_eps": 1e-05, "max_position_embeddings": 64}
    | {"num_attention_heads": 4, "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 0.25}
    | {"tie_word_embeddings": False, "vocab_size": 64, "use_parallel_residual": True},
    "gpt-j-6b": {"model_type": "gptj", "rotary": True, "tie_word_embeddings": False} | _GPT | _J,
    "codegen-350m": {"model_type": "codegen", "tie_word_embeddings": False} | _GPT | _J,
    "gpt-neo-125m": {"model_type": "gpt_neo", "activation_function": "gelu_new", "attention_dropout": 0}
    | {"attention_layers": ["global", "local"], "attention_types": [[["global", "local"], 1]], "bos_token_id": 1}
    | {"embed_dropout": 0, "eos_token_id": 2, "gradient_checkpointing": False, "hidden_size": 32, "num_heads": 4}
    | {"initializer_range": 0.02, "intermediate_size": None, "layer_norm_epsilon": 1e-05, "num_layers": 2}
    | {"max_position_embeddings": 64, "resid_dropout": 0, "vocab_size": 64, "window_size": 16}
    | _SUMMARY,
    "llama-2-7b": {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None} | _LLAMA,
    "llama-3.1-8b": {"model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}
    | (_LLAMA | {"eos_token_id": [2, 3], "rope_theta": 500000.0})
    | {
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
        | {"original_max_position_embeddings": 32}
    },
    "mistral-7b": {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 16} | _LLAMA,
    "qwen2.5-7b": {"model_type": "qwen2", "attention_dropout": 0.0, "max_window_layers": 2, "use_mrope": False}
    | (_LLAMA | {"rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False}),
    "gemma-2-9b": {"model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 8}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh"}
    | _LLAMA
    | {"pad_token_id": 0, "query_pre_attn_scalar": 256, "rope_theta": 10000.0, "sliding_window": 16},
    "gemma-3-1b": {"model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 8}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh"}
    | _LLAMA
    | {"pad_token_id": 0, "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None}
    | {"rope_theta": 1000000, "sliding_window": 16, "sliding_window_pattern": 6},
    "smollm3-3b": {"model_type": "smollm3", "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}
    | {"layer_types": ["full_attention"] * 2, "no_rope_layer_interval": 4, "no_rope_layers": [1, 0]}
    | (_LLAMA | {"bos_token_id": None, "pad_token_id": 3, "rope_scaling": None, "rope_theta": 5000000.0})
    | {"sliding_window": None, "use_sliding_window": False},
    "olmo-2-7b": {"model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0, "pad_token_id": 1}
    | {"rope_scaling": None, "rope_theta": 500000}
    | _LLAMA,
    "phi-3-mini-128k": {"model_type": "phi3", "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    | {"original_max_position_embeddings": 16, "pad_token_id": 2, "rope_theta": 10000.0, "sliding_window": 16}
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}
    | _LLAMA,
    "granite-3.0-2b": {"model_type": "granite", "attention_bias": False, "attention_dropout": 0.1, "mlp_bias": False}
    | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "pad_token_id": 0}
    | {"residual_multiplier": 0.22, "rope_scaling": None, "rope_theta": 10000.0}
    | _LLAMA,
    "command-r7b": {"model_type": "cohere2", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 8}
    | {"layer_norm_eps": 1e-05, "logit_scale": 0.25, "pad_token_id": 0, "rope_scaling": None, "rope_theta": 50000.0}
    | {"sliding_window": 16, "sliding_window_pattern": 4}
    | {name: value for name, value in _LLAMA.items() if name != "rms_norm_eps"},
    "qwen3-8b": {"model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 16}
    | (_LLAMA | {"max_window_layers": 2, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None})
    | {"use_sliding_window": False},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_completely(name):
    config = config_from_dict(PUBLISHED[name] | _GENERIC)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.vocab_size) == (32, 2, 4, 64)
    for option in PUBLISHED[name].keys() - {"model_type"}:
        with pytest.raises(InputError, match=option + "_"):  # a misspelt name that a user typed
            config_from_dict(PUBLISHED[name] | {option + "_": 1}, strict=True)
