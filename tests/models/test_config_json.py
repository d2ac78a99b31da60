"""config.json in and out: inert options, spellings of one option, refusals by name, and what transformers 4 reads."""

import json
import logging
import math

import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.models import config_from_dict, config_to_dict
from jaxrlhf.models.families import FAMILIES
from jaxrlhf.models.hf import config_json

LLAMA = {"model_type": "llama", "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 8, "max_position_embeddings": 64}
NEOX = LLAMA | {"model_type": "gpt_neox"}
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
NEO = {"model_type": "gpt_neo", "vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
NEO |= {"attention_types": [[["global"], 2]]}
OPT = {"model_type": "opt", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT |= {"ffn_dim": 32, "max_position_embeddings": 16}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2}
GPTJ = GPT2 | {"model_type": "gptj", "rotary_dim": 4}
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


def test_inert_options_are_logged_once_and_written_back(caplog):
    config_json._log_once.cache_clear()
    inert = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    inert |= {"max_sequence_length": 2048, "mean": [0.5, {"deep": None}], "unsloth_version": "2025.1"}
    silent = {"use_cache": False, "id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}}
    unwanted = {"auto_map": {"AutoModel": "x.Y"}, "custom_pipelines": {}, "_name_or_path": "/home/me/llama"}
    unwanted |= {"transformers_version": "4.31.0", "torch_dtype": "float16"}
    with caplog.at_level(logging.INFO, logger="jaxrlhf"):
        for _ in range(3):
            config = config_from_dict(LLAMA | inert | silent | unwanted, "folder/config.json")
    (line,) = [record.message for record in caplog.records]
    names = ", ".join(sorted({*inert, "auto_map", "custom_pipelines"}))
    assert line == f"folder/config.json: options without effect: {names}"
    exported = json.loads(json.dumps(config_to_dict(config, dtype="bfloat16")))
    assert {name: exported[name] for name in inert | silent} == inert | silent
    assert not exported.keys() & {"auto_map", "custom_pipelines", "_name_or_path", "transformers_version"}
    assert exported["dtype"] == exported["torch_dtype"] == "bfloat16"
    again = config_to_dict(config_from_dict(exported))
    assert {name: again[name] for name in inert | silent} == inert | silent


def test_inert_options_do_not_make_another_configuration():
    plain, config = config_from_dict(LLAMA), config_from_dict(LLAMA | {"is_llama_config": True})
    assert (plain == config, hash(plain) == hash(config)) == (True, True)
    assert json.loads(config.replace(vocab_size=40).source)["is_llama_config"]


def test_labels_of_the_source_do_not_reach_a_reward_model():
    labels = {"id2label": {"0": "A", "1": "B"}, "label2id": {"A": 0, "B": 1}, "num_labels": 2}
    labels |= {"problem_type": "single_label_classification", "pad_token_id": 0}
    exported = config_to_dict(config_from_dict(LLAMA | labels), "scalar")
    assert (exported["id2label"], exported["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    assert not exported.keys() & {"num_labels", "problem_type"}


@pytest.mark.parametrize("values", [MISTRAL | {"attention_bias": True}, LLAMA | {"sliding_window": 4}])
def test_options_that_another_family_declares_are_inert(values):
    assert config_from_dict(values) == config_from_dict({name: values[name] for name in MISTRAL if name in values})


def test_options_that_a_user_typed_must_be_known():
    with pytest.raises(InputError, match="options this family does not know: num_layer=3; correct or remove"):
        config_from_dict(LLAMA | {"num_layer": 3}, strict=True)
    with pytest.raises(InputError, match="does not know: rope parameter fraction"):
        config_from_dict(LLAMA | {"rope_scaling": LINEAR | {"fraction": 2}}, strict=True)


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("quantization_config", {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "quantised"),
        ("score_dim", 3, "several scores"),
        ("score_type", "cost", "several scores"),
        ("normalizer_type", "RunningMeanStd", "several scores"),
        ("gating_temperature", 10, "a gate"),
        ("num_objectives", 19, "several scores"),
        ("rope_interleaved", True, "another order"),
        ("pruned_heads", {"0": [1]}, "same shape"),
    ],
)
def test_options_that_change_results_are_refused_by_name(option, value, why):
    with pytest.raises(InputError, match=f"option {option}=.* is not supported: .*{why}"):
        config_from_dict(LLAMA | {option: value})
    nothing = type(value)() if not isinstance(value, str) else None
    assert config_from_dict(LLAMA | {option: nothing}) == config_from_dict(LLAMA)


@pytest.mark.parametrize("option", ["rotary", "rotary_dim"])
def test_the_first_form_of_gptj_is_no_gpt_neo(option):
    with pytest.raises(InputError, match=f"option {option}=.*GPT-J in its first form"):
        config_from_dict(NEO | {option: 64})


@pytest.mark.parametrize(
    ("values", "named", "accepted"),
    [
        (LLAMA, ["LlamaForCausalLM"], True),
        (LLAMA, ["LlamaForSequenceClassification"], True),
        (LLAMA, ["LlamaModel"], True),
        (LLAMA, ["LLaMAForCausalLM"], True),
        (LLAMA, ["LLMForSequenceRegression"], True),
        (LLAMA, "LlamaForCausalLM", True),
        (LLAMA, [], True),
        (LLAMA, None, True),
        (GPT2, ["GPT2LMHeadModel"], True),
        (LLAMA, ["LlamaForTokenClassification"], False),
        (LLAMA, ["LlamaForRewardModelWithGating"], False),
        (LLAMA, ["MistralForCausalLM"], False),
        (LLAMA, ["LlamaForCausalLM", "MyModel"], False),
        (LLAMA, [7], False),
        (QWEN2, ["Qwen2ForProcessRewardModel"], False),
        (GPT2, ["GPT2DoubleHeadsModel"], False),
    ],
)
def test_architectures_of_other_models_are_refused(values, named, accepted):
    if accepted:
        assert config_from_dict(values | {"architectures": named}) == config_from_dict(values)
        return
    with pytest.raises(InputError, match=r"architectures=.* is not supported: the weights belong to another class"):
        config_from_dict(values | {"architectures": named})


@pytest.mark.parametrize(
    ("values", "alias", "name"),
    [
        (GPT2, "hidden_size", "n_embd"),
        (GPT2, "num_hidden_layers", "n_layer"),
        (GPTJ, "num_attention_heads", "n_head"),
        (GPTJ, "max_position_embeddings", "n_positions"),
        (NEO, "num_attention_heads", "num_heads"),
        (NEO, "num_hidden_layers", "num_layers"),
    ],
)
def test_second_names_of_options(values, alias, name):
    renamed = {option: value for option, value in values.items() if option != name} | {alias: values[name]}
    assert config_from_dict(renamed) == config_from_dict(values) == config_from_dict(values | renamed)
    with pytest.raises(InputError, match=f"options {name}={values[name]} and {alias}=9 contradict each other"):
        config_from_dict(values | {alias: 9})


BASE = 5e5
_SPELLINGS = {
    "plain": [
        {"rope_theta": BASE},
        {"rope_theta": BASE, "rope_scaling": None, "rope_parameters": None},
        {"rope_parameters": {"rope_theta": BASE}},
        {"rope_parameters": {"rope_theta": BASE, "rope_type": "default"}},
        {"rope_theta": 500000, "rope_parameters": {"rope_type": "default", "rope_theta": BASE}},
        {"rope_theta": BASE, "partial_rotary_factor": 1.0, "rope_scaling": {"type": "default"}},
    ],
    "linear": [
        {"rope_theta": BASE, "rope_scaling": LINEAR},
        {"rope_theta": BASE, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_theta": BASE, "rope_scaling": LINEAR | {"rope_type": "linear"}},
        {"rope_parameters": LINEAR | {"rope_theta": BASE}},
        {"rope_theta": BASE, "rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": BASE}},
        {"rope_scaling": LINEAR | {"rope_theta": BASE, "finetuned": True}, "original_max_position_embeddings": 7},
    ],
    "llama3": [
        {"rope_theta": BASE, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": BASE}},
        {"rope_theta": BASE, "rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {
            "rope_theta": BASE,
            "rope_scaling": LLAMA3 | {"original_max_position_embeddings": None},
            "original_max_position_embeddings": 16,
        },
    ],
}


@pytest.mark.parametrize("family", [LLAMA, MISTRAL, QWEN2])
@pytest.mark.parametrize("kind", _SPELLINGS)
def test_every_spelling_of_rope_options_means_the_same(family, kind):
    first, *others = (config_from_dict(family | spelling) for spelling in _SPELLINGS[kind])
    assert first.rotary_base == BASE
    assert dict(first.rope_scaling or ()).get("rope_type", "plain") == kind
    for other in others:
        assert other == first
    assert config_from_dict(config_to_dict(first)) == first


@pytest.mark.parametrize(
    "options",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 500},
        {"rotary_pct": 0.5, "rotary_emb_base": 500, "partial_rotary_factor": 0.5, "rope_theta": 500},
        {"rotary_pct": 0.5, "rotary_emb_base": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
        {"rotary_emb_base": 500, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500.0}, "rope_theta": 500},
        {"rotary_pct": 0.5, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500.0}},
    ],
)
def test_every_mixture_of_neox_rope_options(options):
    config = config_from_dict(NEOX | options)
    assert (config.rotary_dim, config.rotary_base, config.rope_scaling) == (16, 500.0, None)
    exported = config_to_dict(config)
    assert (exported["rotary_pct"], exported["rotary_emb_base"], exported["rope_scaling"]) == (0.5, 500.0, None)
    assert config_from_dict(exported) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "rope_theta=10000.0 and .*500000.0 contra",
        ),
        (LLAMA | {"rope_scaling": LINEAR | {"rope_type": "dynamic"}}, "'dynamic' and type='linear', which contradict"),
        (
            LLAMA | {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 2.0}},
            "factor is 4.0 by rope_scaling",
        ),
        (
            LLAMA | {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 1e4}},
            "rope_type is 'linear' by rope_scaling",
        ),
        (LLAMA | {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 3.0}}, "rope_theta is 10000.0 by"),
        (
            LLAMA | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
            "original_max_position_embeddings=32",
        ),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported: .*all features"),
        (NEOX | {"rope_theta": 500.0}, "rope_theta=500.0 and rotary_emb_base=10000.0 contradict"),
        (NEOX | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 and rotary_pct=0.25 contradict"),
        (NEOX | {"rotary_pct": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary_pct=0.25 and .*=0.5"),
        (QWEN2 | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "by kind of layer .full_attention."),
    ],
)
def test_values_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        config_from_dict(values)


def test_exports_have_the_rope_options_of_transformers_4():
    exported = config_to_dict(
        config_from_dict(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2}})
    )
    assert exported["rope_theta"] == 5e5
    assert exported["rope_scaling"] == {"type": "dynamic", "factor": 2.0}  # and no more: 4.41 refuses a third entry
    assert isinstance(exported["rope_scaling"]["factor"], float)  # or an integer
    assert exported["rope_parameters"] == {"rope_type": "dynamic", "factor": 2, "rope_theta": 5e5}
    assert config_to_dict(config_from_dict(LLAMA | {"rope_scaling": LLAMA3}))["rope_scaling"] == LLAMA3


def test_the_exported_share_of_rotated_features_gives_their_number():
    for heads, size in ((1, 100), (2, 22), (3, 30)):
        for rotated in range(2, size + 1, 2):
            values = NEOX | {
                "hidden_size": heads * size,
                "num_attention_heads": heads,
                "rotary_pct": rotated / size + 1e-9,
            }
            config = config_from_dict(values)
            assert config_from_dict(config_to_dict(config)).rotary_dim == config.rotary_dim == rotated


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": ["llama"]}, r"model type \['llama'\] is not supported"),
        ({"model_type": {}}, "model type {} is not supported"),
        ([LLAMA], "must hold options by name, found list"),
        (LLAMA | {"rope_parameters": "linear"}, "rope_parameters='linear' must be an object"),
        (LLAMA | {"rope_scaling": [4.0]}, r"rope_scaling=\[4.0\] must be an object"),
        (LLAMA | {"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type \['linear'\] is not supported"),
        (LLAMA | {"rope_scaling": LINEAR | {"factor": "4"}}, "rope_parameters.factor='4' must be a positive number"),
        (LLAMA | {"rope_scaling": LINEAR | {"factor": 0}}, "rope_parameters.factor=0 must be a positive"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0 .*above low_freq_factor"),
        (LLAMA | {"rope_theta": -1.0}, "rope_theta=-1.0 must be a positive number"),
        (LLAMA | {"rope_theta": 10**400}, "rope_theta=1000.* must be a finite number"),
        (LLAMA | {"rope_theta": True}, "rope_theta=True must be of type float"),
        (LLAMA | {"rope_parameters": {"rope_theta": math.inf}}, "rope_theta=inf must be a positive number"),
        (LLAMA | {"head_dim": 15}, "head_dim=15 must be even"),
        (LLAMA | {"hidden_size": 30}, "head_dim=15 must be even"),
        (LLAMA | {"hidden_size": 63}, "hidden_size=63 is not a multiple of num_attention_heads=2"),
        (LLAMA | {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' needs more than 2"),
        (LLAMA | {"rms_norm_eps": math.nan}, "rms_norm_eps=nan must be a finite number"),
        (LLAMA | {"rms_norm_eps": math.inf}, "rms_norm_eps=inf must be a finite number"),
        (LLAMA | {"rms_norm_eps": 0}, "rms_norm_eps=0 must be a positive number"),
        (NEOX | {"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05 must be a positive"),
        (GPT2 | {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon=0.0 must be a positive"),
        (GPT2 | {"resid_pdrop": 1.0}, "resid_pdrop=1.0 must be 0 or more, and below 1"),
        (OPT | {"dropout": -0.1}, "dropout=-0.1 must be 0 or more"),
        (LLAMA | {"initializer_range": math.nan}, "initializer_range=nan must be a finite number"),
        (LLAMA | {"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 is too large: at most 10000"),
        (MISTRAL | {"num_hidden_layers": 10**8}, "num_hidden_layers=100000000 is too large"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window=0 must be a positive integer"),
        (MISTRAL | {"sliding_window": "4"}, "sliding_window='4' must be a positive integer"),
        (LLAMA | {"hidden_size": 2**40}, "hidden_size=1099511627776 is too large"),
        (LLAMA | {"vocab_size": 32.0}, "vocab_size=32.0 must be a positive integer"),
        (LLAMA | {"vocab_size": True}, "vocab_size=True must be a positive integer"),
        (NEO | {"attention_types": [[["global"], 10**12]]}, "attention_types=.*must name 2 layers"),
        (NEO | {"attention_types": [["global", 2]]}, "attention_types=.*must name 2 layers"),
        (NEO | {"attention_types": "global"}, "attention_types='global' must be of type list"),
        (QWEN2 | {"layer_types": [[], {}]}, "layer_types=.*must name 2 layers"),
        (QWEN2 | {"layer_types": 3}, "layer_types=3 .*must name 2 layers"),
        (LLAMA | {"eos_token_id": "2"}, "eos_token_id='2' must be a token id or a list"),
        (LLAMA | {"eos_token_id": [2, None]}, r"eos_token_id=\[2, None\] must be a token id or a list"),
        (LLAMA | {"pad_token_id": True}, "pad_token_id=True must be a token id"),
        (LLAMA | {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] must be of type str"),
    ],
)
def test_nonsense_is_refused_by_name(values, message):
    with pytest.raises(InputError, match=message):
        config_from_dict(values)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_list_of_supported_families_is_in_the_refusal(family):
    with pytest.raises(InputError, match=f"model type 'baichuan' is not supported; supported are .*'{family}'"):
        config_from_dict({"model_type": "baichuan"})
