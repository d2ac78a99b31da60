"""End ids in whole runs: rollouts stop at all of them, and exports keep them with the source's generation config."""

import json

import numpy as np
import pytest
from end_tokenizers import shaped_tokenizer

from jaxrlhf.commands.chat import ChatConfig, open_session
from jaxrlhf.commands.sample import SampleConfig, Sampler
from jaxrlhf.data import end_ids
from jaxrlhf.errors import InputError
from jaxrlhf.models import config_from_dict, save_pretrained
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.models import RLHFEngine
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.rl.trainer import PPOTrainer
from jaxrlhf.runs.console import Console
from jaxrlhf.trainers.sft import SFTConfig, train_sft
from jaxrlhf.trainers.tokenizers import TokenizerConfig, with_model_ends

pytest.importorskip("transformers")

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
END, EOM, EOT = 301, 304, 305


@pytest.fixture(scope="module")
def paths(lab, tmp_path_factory):
    """A model and a reward model in the shape of Llama-3.1-Instruct, with embeddings padded to different sizes."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = shaped_tokenizer("llama-3.1-instruct")
    options = lab.LLAMA | {"eos_token_id": [END, EOM, EOT], "bos_token_id": 300}
    for name, head, rows in (("lm", "lm", 320), ("reward", "scalar", 400)):
        save_pretrained(lab.tiny_model(options | {"vocab_size": rows}, head), folder / name, tokenizer)
    values = {"bos_token_id": 300, "eos_token_id": [END, EOM, EOT], **SAMPLED}
    (folder / "lm" / "generation_config.json").write_text(json.dumps(values))
    lines = [json.dumps({"prompt": f"What is {i}?", "chosen": "The sun is hot!"}) + "\n" for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


def settings(paths, **more):
    common = {"data_path": (str(paths / "rows.jsonl"),), "data_cache_dir": str(paths / "cache"), "max_steps": 1}
    common |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "eval_fraction": 0.25}
    return common | more


def rl_settings(paths, **more):
    models = {"actor_model_name_or_path": str(paths / "lm"), "reward_model_name_or_path": str(paths / "reward")}
    return PPOConfig.create(**settings(paths, max_prompt_seq_len=32, max_new_tokens=16) | models | more)


def files(folder):
    return [json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")]


@pytest.fixture
def engine(paths):
    config = rl_settings(paths)
    tokenizer = config.models.tokenizer.load(str(paths / "lm"), config.data.template)
    return RLHFEngine(str(paths / "lm"), str(paths / "reward"), tokenizer, 1, config)


def test_rollouts_end_at_each_of_the_ids_and_are_counted_as_ended(engine):
    trainer = PPOTrainer(engine)
    assert set(trainer.sampling.eos_ids) == {END, EOM, EOT}
    prompts = {"prompt_ids": np.full((64, 4), 40, np.int32), "prompt_mask": np.ones((64, 4), bool)}
    experience = trainer.generate_experience(prompts)
    tokens, mask, ended = (np.asarray(x) for x in (experience.tokens, experience.response_mask, experience.ended))
    last = {int(row[real][-1]) for row, real, end in zip(tokens, mask, ended, strict=True) if end}
    assert {END, EOM, EOT} >= last and len(last) > 1
    for row, real, end in zip(tokens, mask, ended, strict=True):
        response = row[real]
        assert end == (response[-1] in (END, EOM, EOT))
        assert not np.isin(response[:-1], (END, EOM, EOT)).any()
        assert end or len(response) == 16
    records = trainer.records(experience)
    assert [record["ended"] for record in records] == ended.astype(bool).tolist()


@pytest.mark.long
@pytest.mark.parametrize(("given", "ends"), [((), [END, EOM, EOT]), (("<|eot_id|>", END), [EOT, END])])
def test_sft_and_ppo_exports_keep_all_ids_and_the_generation_options(paths, tmp_path, no_report, given, ends):
    sft = settings(paths, model_name_or_path=str(paths / "lm"), max_length=64, eos_token_ids=given)
    train_sft(SFTConfig.create(**sft, output_dir=str(tmp_path / "sft")))
    train_ppo(rl_settings(paths, eos_token_ids=given, output_dir=str(tmp_path / "ppo")))
    for name in ("sft", "ppo"):
        config, generation = files(tmp_path / name)
        assert config["eos_token_id"] == generation["eos_token_id"] == ends
        assert generation == {"bos_token_id": 300, "pad_token_id": 0, "eos_token_id": ends, **SAMPLED}


def test_chat_and_sample_end_at_the_same_ids(paths, tmp_path):
    session = open_session(ChatConfig.create(model=str(paths / "lm")))
    options = {"model_name_or_path": str(paths / "lm"), "reward_model_name_or_path": str(paths / "reward")}
    options |= {"output_file": str(tmp_path / "out.jsonl"), "max_new_tokens": 8, "max_prompt_seq_len": 32}
    options |= {"data_path": (str(paths / "rows.jsonl"),), "data_cache_dir": str(paths / "cache")}
    sampler = Sampler(SampleConfig.create(**options), Console(quiet=True))
    assert set(session.sampling.eos_ids) == set(sampler.sampling.eos_ids) == {END, EOM, EOT}
    session = open_session(ChatConfig.create(model=str(paths / "lm"), eos_token_ids=("<|eot_id|>",)))
    assert session.sampling.eos_ids == (EOT,)


def test_a_generation_config_of_another_model_is_refused_before_anything_is_trained(paths, lab, tmp_path):
    save_pretrained(lab.tiny_model(lab.LLAMA | {"vocab_size": 320}), tmp_path / "lm", shaped_tokenizer("vicuna"))
    (tmp_path / "lm" / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001, 128009]}))
    run, model = str(tmp_path / "run"), str(tmp_path / "lm")
    message = r"generation_config.json of .*=128001 is outside .* belongs to another model"
    with pytest.raises(InputError, match=message):
        train_sft(SFTConfig.create(**settings(paths, output_dir=run, model_name_or_path=model)))
    with pytest.raises(InputError, match=message):
        train_ppo(rl_settings(paths, output_dir=run, actor_model_name_or_path=model))


def test_a_tokenizer_from_elsewhere_keeps_the_ids_of_the_model_that_it_knows(paths):
    other = TokenizerConfig(str(paths / "reward")).load(str(paths / "lm"), rl_settings(paths).data.template)
    own = TokenizerConfig().load(str(paths / "lm"), rl_settings(paths).data.template)
    assert set(other.end_ids_of_model) == set(own.end_ids_of_model) == {END, EOM, EOT}


def test_the_family_s_default_id_of_a_smaller_model_is_no_end_id_and_no_error(lab):
    config = config_from_dict(lab.GPT2 | {"vocab_size": 310, "eos_token_id": 50256})
    assert config.eos_token_id == 50256
    tokenizer = shaped_tokenizer("vicuna")
    assert end_ids(with_model_ends(tokenizer, config)) == (tokenizer.eos_token_id,)
    with pytest.raises(InputError, match=r"config.json: eos_token_id=400 is outside the tokenizer's vocabulary"):
        with_model_ends(tokenizer, config.replace(eos_token_id=400))
