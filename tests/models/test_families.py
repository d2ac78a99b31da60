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
        ("mistral", {"attention_bias": True}, "does not know: attention_bias=True"),
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


@pytest.mark.parametrize("case_name", ["opt", "opt-350m", "gpt2", "bloom"])
@pytest.mark.parametrize("value_head", ["v_head.weight", "score.weight"])
def test_deepspeed_chat_reward_checkpoints(make_model, make_batch, case_name, value_head, tmp_path):
    """A base model under `rwtransformer` and a value head, in one pytorch_model.bin beside the base model's config."""
    torch = pytest.importorskip("torch")
    model = make_model(case_name, head="scalar")
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = FAMILIES[model.config.family].prefix + "."
    state = {"rwtransformer." + name.removeprefix(prefix): torch.tensor(x) for name, x in tensors.items()}
    state[value_head] = state.pop("rwtransformer.score.weight")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = load_pretrained(tmp_path, head="scalar", new_head=False)
    ids, mask = make_batch("right", model.config.vocab_size)
    values = [m.module.apply({"params": m.params}, jnp.asarray(ids), jnp.asarray(mask)) for m in (model, loaded)]
    np.testing.assert_array_equal(*values)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(model.params)
