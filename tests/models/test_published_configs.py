"""Configs of published checkpoints against transformers: what is accepted, what it means, and what an export keeps."""

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from jaxrlhf.errors import InputError
from jaxrlhf.models import DecoderConfig, config_from_dict, config_to_dict
from jaxrlhf.models.families import FAMILIES

PUBLISHED = json.loads((Path(__file__).parent / "fixtures" / "published_configs.json").read_text())
REFUSED = {
    "gpt-j-6B as first GPT-Neo port (finetuneanon)": "rotary=True is not supported: this is GPT-J",
    "baichuan-inc/Baichuan-7B": r"model type 'baichuan' is not supported; supported are \['bloom'",
    "Qwen/Qwen2.5-Math-PRM-7B": r"architectures=\['Qwen2ForProcessRewardModel'\] is not supported: .*another class",
}
ACCEPTED = sorted(
    name for name, values in PUBLISHED.items() if name not in REFUSED and values["model_type"] in FAMILIES
)
# What is no option of the network, or what only our side names.
_OWN = {"vocab_multiple", "source"}
_ACTIVATIONS = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "swish": "silu"}


def meaning(values: dict) -> dict:
    """Our fields, computed from the attributes of the config that transformers builds; others have their default."""
    c = CONFIG_MAPPING[values["model_type"]].from_dict(json.loads(json.dumps(values)))
    heads, hidden = c.num_attention_heads, c.hidden_size
    fields = {"family": c.model_type, "hidden_size": hidden, "num_layers": c.num_hidden_layers, "num_heads": heads}
    fields |= {"head_dim": getattr(c, "head_dim", None) or hidden // heads, "num_kv_heads": heads}
    fields |= {"tie_embeddings": c.tie_word_embeddings, "vocab_size": c.vocab_size}
    fields |= {"initializer_range": c.init_std if c.model_type == "opt" else c.initializer_range}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(c, name, None)
        fields[name] = tuple(ids) if isinstance(ids, list) else ids
    return fields | _OF[c.model_type](c)


def activation(name: str) -> str:
    return _ACTIVATIONS.get(name, name)


def rope(c, share: float = 1.0) -> dict:
    parameters = {name: value for name, value in c.rope_parameters.items() if name != "type"}
    base, share = parameters.pop("rope_theta"), parameters.pop("partial_rotary_factor", share)
    kind = parameters["rope_type"]
    fields = {"position": "rotary", "rotary_base": base}
    if kind != "default":
        fields["rope_scaling"] = tuple(sorted(parameters.items()))
    return fields | ({} if share == 1 else {"rotary_dim": int(c.hidden_size // c.num_attention_heads * share)})


def llama_like(c) -> dict:
    bias = getattr(c, "attention_bias", False)
    kinds = getattr(c, "layer_types", None) or []
    if c.model_type == "mistral":
        kinds = ["sliding_attention" if c.sliding_window else "full_attention"] * c.num_hidden_layers
    windows = tuple(c.sliding_window if kind == "sliding_attention" else 0 for kind in kinds)
    fields = {"num_kv_heads": c.num_key_value_heads, "intermediate_size": c.intermediate_size, "gated_mlp": True}
    fields |= {"norm": "rmsnorm", "norm_eps": c.rms_norm_eps, "activation": activation(c.hidden_act)}
    fields |= {"qkv_bias": bias or c.model_type == "qwen2", "out_bias": bias, "mlp_bias": getattr(c, "mlp_bias", False)}
    fields |= {"qk_norm": c.model_type == "qwen3", "attention_dropout": c.attention_dropout}
    fields |= {"max_positions": c.max_position_embeddings, "windows": windows if any(windows) else None}
    return fields | rope(c)


def neox(c) -> dict:
    fields = {"intermediate_size": c.intermediate_size, "max_positions": c.max_position_embeddings}
    fields |= {"norm_eps": c.layer_norm_eps, "activation": activation(c.hidden_act), "qkv_bias": c.attention_bias}
    fields |= {"residual": "parallel" if c.use_parallel_residual else "sequential", "out_bias": c.attention_bias}
    fields |= {"embed_dropout": c.hidden_dropout, "residual_dropout": c.hidden_dropout}
    rotary = {"rotary_dim": c.hidden_size // c.num_attention_heads} | rope(c)
    return fields | {"attention_dropout": c.attention_dropout} | rotary


def gpt(c) -> dict:
    fields = {"intermediate_size": c.n_inner or 4 * c.n_embd, "max_positions": c.n_positions}
    fields |= {"activation": activation(c.activation_function), "norm_eps": c.layer_norm_epsilon}
    fields |= {"embed_dropout": c.embd_pdrop, "attention_dropout": c.attn_pdrop, "residual_dropout": c.resid_pdrop}
    if c.model_type == "gpt2":
        scale = {"scale_by_inverse_layer": c.scale_attn_by_inverse_layer_idx}
        return fields | scale | {"attention_scale": None if c.scale_attn_weights else 1.0}
    fields |= {"position": "rotary", "rotary_dim": c.rotary_dim, "rotary_interleaved": True, "lm_head_bias": True}
    return fields | {"residual": "parallel_shared_norm", "qkv_bias": False, "out_bias": False}


def gpt_neo(c) -> dict:
    windows = tuple(c.window_size if kind == "local" else 0 for kind in c.attention_layers)
    fields = {"intermediate_size": c.intermediate_size or 4 * c.hidden_size, "qkv_bias": False, "attention_scale": 1.0}
    fields |= {"max_positions": c.max_position_embeddings, "norm_eps": c.layer_norm_epsilon}
    fields |= {"activation": activation(c.activation_function), "windows": windows if any(windows) else None}
    fields |= {"embed_dropout": c.embed_dropout, "attention_dropout": c.attention_dropout}
    return fields | {"residual_dropout": c.resid_dropout}


def opt(c) -> dict:
    pre = c.do_layer_norm_before
    fields = {"intermediate_size": c.ffn_dim, "max_positions": c.max_position_embeddings, "position_offset": 2}
    fields |= {"embed_size": 0 if c.word_embed_proj_dim == c.hidden_size else c.word_embed_proj_dim}
    fields |= {"norm_placement": "pre" if pre else "post", "final_norm": pre and not c._remove_final_layer_norm}
    fields |= {name: c.enable_bias for name in ("qkv_bias", "out_bias", "mlp_bias")}
    fields |= {"activation": activation(c.activation_function), "attention_dropout": c.attention_dropout}
    return fields | {"residual_dropout": c.dropout}


def bloom(c) -> dict:
    fields = {"intermediate_size": 4 * c.hidden_size, "max_positions": getattr(c, "seq_length", 2048)}
    fields |= {"position": "alibi", "embed_norm": True, "norm_eps": c.layer_norm_epsilon}
    fields |= {"residual_from_norm": c.apply_residual_connection_post_layernorm}
    return fields | {"attention_dropout": c.attention_dropout, "residual_dropout": c.hidden_dropout}


def gemma(c) -> dict:
    return llama_like(c) | {"norm_plus_one": True, "embed_scale_sqrt": True}


_OF = {"gemma": gemma} | {name: llama_like for name in ("llama", "mistral", "qwen2", "qwen3")}
_OF |= {"gpt_neox": neox, "gpt2": gpt, "gptj": gpt, "codegen": gpt, "gpt_neo": gpt_neo, "opt": opt, "bloom": bloom}


def check(values: dict, where: str) -> DecoderConfig:
    """Reads a config, and asserts that each of our fields is what transformers reads."""
    config, expected = config_from_dict(values, where), meaning(values)
    for name, field in DecoderConfig.__dataclass_fields__.items():
        if name not in _OWN:
            assert getattr(config, name) == expected.get(name, field.default), (where, name)
    return config


COMPARED = [name for name in ACCEPTED if PUBLISHED[name]["model_type"] in _OF]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_checkpoints_of_other_models_are_refused_with_the_reason(name):
    with pytest.raises(InputError, match=REFUSED[name]):
        config_from_dict(PUBLISHED[name])


def test_every_other_checkpoint_of_a_supported_family_is_accepted():
    refused = {name for name in PUBLISHED if PUBLISHED[name]["model_type"] not in FAMILIES} | set(REFUSED)
    assert sorted(PUBLISHED.keys() - refused) == ACCEPTED
    for name in refused - set(REFUSED):
        with pytest.raises(InputError, match="is not supported; supported are"):
            config_from_dict(PUBLISHED[name])


@pytest.mark.parametrize("name", COMPARED)
def test_every_field_is_what_transformers_reads(name):
    config = check(PUBLISHED[name], name)
    exported = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(exported) == config
    assert meaning(exported) == meaning(PUBLISHED[name])


@pytest.mark.parametrize("name", COMPARED)
def test_absent_options_have_the_defaults_of_transformers(name):
    """Each option removed in turn; the sizes without which there is no model are asked for."""
    for option in PUBLISHED[name].keys() - {"model_type"}:
        values = {key: value for key, value in PUBLISHED[name].items() if key != option}
        try:
            check(values, f"{name} without {option}")
        except InputError as error:
            message = str(error)  # the default number of key/value heads does not fit small models
            assert f"option {option!r} is missing" in message or "key/value heads do not divide" in message


@pytest.mark.parametrize("name", COMPARED)
def test_an_export_keeps_the_options_of_its_source(name):
    values, config = PUBLISHED[name], config_from_dict(PUBLISHED[name])
    exported = config_to_dict(config, "scalar" if "ForSequence" in values["architectures"][0] else "lm")
    own = {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map", "custom_pipelines"}
    own |= {"value_head_prefix", "rope_scaling"} | FAMILIES[config.family].rewritten
    for option in values.keys() - own:
        assert exported[option] == values[option], option
    assert not exported.keys() & {
        "transformers_version",
        "_name_or_path",
        "auto_map",
        "custom_pipelines",
        "torch_dtype",
    }


@pytest.mark.parametrize("model_type", sorted(_OF))
def test_every_option_that_transformers_declares_is_known(model_type):
    values = CONFIG_MAPPING[model_type]().to_dict()
    config_from_dict(values | {"pad_token_id": 0}, strict=True)
