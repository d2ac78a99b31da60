"""The generation config of a model: in from beside config.json, through a run's ids, and out as it came."""

import json

import jax
import pytest
from end_tokenizers import shaped_tokenizer

from jaxrlhf.commands.convert import ConvertConfig, convert
from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained, read_config, save_pretrained, with_token_ids
from jaxrlhf.models.hf.generation_config import generation_values

SOURCE = {"bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 7, 9], "pad_token_id": 0, "temperature": 0.6}
SOURCE |= {"top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "transformers_version": "4.45.0"}


@pytest.fixture
def folder(lab, tmp_path):
    save_pretrained(lab.tiny_model(lab.LLAMA | {"bos_token_id": 1, "eos_token_id": 2}), tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(SOURCE))
    return tmp_path / "source"


def written(folder, name="generation_config.json"):
    return json.loads((folder / name).read_text())


def test_an_export_has_every_option_of_the_source(folder, tmp_path):
    save_pretrained(load_pretrained(folder), tmp_path / "out")
    assert written(tmp_path / "out") == SOURCE
    assert written(tmp_path / "out", "config.json") == written(folder, "config.json")


def test_a_conversion_through_a_checkpoint_has_every_option_of_the_source(folder, tmp_path):
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    convert(ConvertConfig.create(input=str(folder), output=checkpoint))
    convert(ConvertConfig.create(input=checkpoint, output=out, source="orbax", target="hf"))
    assert written(tmp_path / "out") == SOURCE


def test_a_conversion_writes_the_end_ids_that_the_user_gives(lab, tmp_path):
    tokenizer = shaped_tokenizer("llama-3.1-instruct")
    save_pretrained(lab.tiny_model(lab.LLAMA | {"vocab_size": 310}), tmp_path / "in", tokenizer)
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps({"eos_token_id": 301, "top_k": 20}))
    out = str(tmp_path / "out")
    options = {"target": "hf", "eos_token_ids": ("<|eot_id|>", 301)}
    convert(ConvertConfig.create(input=str(tmp_path / "in"), output=out, **options))
    assert written(tmp_path / "out", "config.json")["eos_token_id"] == [305, 301]
    generation = written(tmp_path / "out")
    assert (generation["eos_token_id"], generation["top_k"]) == ([305, 301], 20)


def test_the_ids_of_a_run_replace_those_of_the_source_and_nothing_else(folder):
    config = read_config(folder)
    changed = with_token_ids(config, [2, 7, 9, 11], {"bos_token_id": None, "pad_token_id": 4})
    assert generation_values(changed) == SOURCE | {"eos_token_id": [2, 7, 9, 11], "pad_token_id": 4}
    assert (changed.eos_token_id, changed.pad_token_id, changed.bos_token_id) == ((2, 7, 9, 11), 4, 1)
    same = with_token_ids(config, [9, 2, 7], {})
    assert generation_values(same) == SOURCE and same.eos_token_id == (9, 2, 7)
    assert generation_values(with_token_ids(config, [7], {})) == SOURCE | {"eos_token_id": 7}


def test_a_generation_config_that_repeats_the_config_is_not_kept(lab, tmp_path):
    model = lab.tiny_model(lab.LLAMA | {"bos_token_id": 1, "eos_token_id": [2, 3]})
    save_pretrained(model, tmp_path)
    assert written(tmp_path) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert load_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize("text", ["[]", "{", "[" * 5000])
def test_a_damaged_generation_config_is_named(folder, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config.json"):
        read_config(folder)


def test_transformers_reads_the_exported_options(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_pretrained(load_pretrained(folder), tmp_path / "out")
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.temperature, theirs.repetition_penalty) == ([2, 7, 9], 0.6, 1.05)


def test_a_config_with_a_generation_config_is_a_static_argument(folder):
    model = load_pretrained(folder)
    assert hash(model.config) == hash(read_config(folder))
    jax.jit(lambda model: model.params)(model)
