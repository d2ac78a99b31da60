"""Rows of every format go through every trainer that they serve, to one optimizer step."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer
from rows import pairs, write_lines

from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data.formats import FORMATS
from jaxrlhf.models import save_pretrained
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.trainers.dpo import DPOConfig, train_dpo
from jaxrlhf.trainers.kto import KTOConfig, train_kto
from jaxrlhf.trainers.reward import RewardConfig, train_reward
from jaxrlhf.trainers.sft import SFTConfig, train_sft

pytestmark = pytest.mark.long

USER = {"role": "user", "content": "Is the sea blue?"}
YES = {"role": "assistant", "content": "Yes, it is."}
NO = {"role": "assistant", "content": "No."}
HUMAN = "\n\nHuman: Is the sea blue?\n\nAssistant:"
TEXT = {
    "text": {"text": "The sky is blue."},
    "prompt": {"prompt": "The sky"},
    "prompt_completion": {"prompt": "The sky", "completion": " is blue."},
    "preference": {"prompt": "The sky", "chosen": " is blue.", "rejected": " is green."},
    "preference_implicit": {"chosen": f"{HUMAN} Yes.", "rejected": f"{HUMAN} No, no."},
    "unpaired": {"prompt": "The sky", "completion": " is blue.", "label": True},
    "alpaca": {"instruction": "Is it?", "input": "The sky is blue.", "output": "Yes."},
    "ranked": {"prompt": "The sky", "responses": [" is blue.", " is green."], "scores": [2, 1]},
}
MESSAGES = {
    "messages": {"messages": [USER, YES]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]},
    "prompt": {"prompt": [USER]},
    "prompt_completion": {"prompt": [USER], "completion": [YES]},
    "preference": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "preference_implicit": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "unpaired": {"prompt": [USER], "completion": [YES], "label": True},
    "ranked": {"prompt": [USER], "responses": [[YES], [NO]], "ranks": [1, 2]},
}
ROWS = {f"{form}, text": (form, row) for form, row in TEXT.items()}
ROWS |= {f"{form}, conversational": (form, row) for form, row in MESSAGES.items()}
TRAINERS = {
    "sft": (train_sft, SFTConfig, {"packing": False}),
    "sft packed": (train_sft, SFTConfig, {"packing": True}),
    "reward": (train_reward, RewardConfig, {"packing": False}),
    "reward packed": (train_reward, RewardConfig, {"packing": True}),
    "dpo": (train_dpo, DPOConfig, {}),
    "dpo packed": (train_dpo, DPOConfig, {"packing": True}),
    "kto": (train_kto, KTOConfig, {}),
    "ppo": (train_ppo, PPOConfig, {"max_prompt_seq_len": 64, "max_answer_seq_len": 8}),
}


@pytest.fixture(scope="module")
def ground(lab, tmp_path_factory):
    """A model and its tokenizer on disk, evaluation rows, and a reward function."""
    folder = tmp_path_factory.mktemp("formats")
    tokenizer = chat_tokenizer("llama3")
    tokenizer.pad_token = tokenizer.eos_token
    options = lab.LLAMA | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = lab.tiny_model(options, scale=0.1)
    save_pretrained(model, folder / "lm", tokenizer)
    held = write_lines(folder / "held.jsonl", pairs(2))
    (folder / "rewards.py").write_text(
        "def size(prompts, responses):\n    return [float(len(text)) for text in responses]\n"
    )
    return SimpleNamespace(folder=folder, lm=str(folder / "lm"), held=held)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the report has tests of its own."""
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)


@pytest.mark.parametrize("packing", [True, False])
def test_a_reward_model_learns_the_margins_of_its_rows(packing, ground, tmp_path):
    rows = [{**TEXT["preference"], "margin": margin} for margin in (0.5, 2)]
    options = {"model_name_or_path": ground.lm, "eval_data_path": ground.held, "packing": packing, "max_steps": 1}
    options |= {"per_device_train_batch_size": 1, "max_length": 64, "eval_steps": 0, "num_train_epochs": 1}
    losses = {}
    for name, given in {"none": TEXT["preference"], "small": rows[0], "large": rows[1]}.items():
        path = write_lines(tmp_path / f"{name}.jsonl", [given])
        run = {"output_dir": str(tmp_path / name), "data_cache_dir": str(tmp_path / "cache"), "data_path": path}
        train_reward(RewardConfig.create(**options, **run))
        losses[name] = next(line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in line)
    difference = -np.log(np.expm1(losses["none"]))  # of the scores, before the step
    for name, margin in {"small": 0.5, "large": 2}.items():
        assert losses[name] == pytest.approx(np.log1p(np.exp(margin - difference)), rel=1e-5)


def test_every_format_is_there():
    assert {form for form, _ in ROWS.values()} == set(FORMATS)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_rows_of_all_formats_that_a_trainer_serves_make_one_optimizer_step(trainer, ground, tmp_path):
    step, sources = trainer.split()[0], {}
    for name, (form, row) in ROWS.items():
        if step in FORMATS[form].steps:
            other = {"completion": [NO] if "conversational" in name else " is green.", "label": False}
            rows = [row, row | other] * 2 if form == "unpaired" else [row] * 2
            name = name.replace(", ", "_")
            path = write_lines(tmp_path / f"{name}.jsonl", rows)
            sources[name] = {"path": path, "name": name, "weight": 1, "steps": [step]}
    (tmp_path / "mixture.yaml").write_text(json.dumps(list(sources.values())))
    run, config, options = TRAINERS[trainer]
    options = options | {"data_mixture": str(tmp_path / "mixture.yaml"), "eval_data_path": ground.held}
    options |= {"data_cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "run"), "max_length": 96}
    options |= {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    options |= {"per_device_eval_batch_size": 1, "eval_steps": 0, "logging_steps": 1}
    if step == "ppo":
        options |= {"actor_model_name_or_path": ground.lm, "reward_functions": (f"{ground.folder}/rewards.py:size",)}
    else:
        options |= {"model_name_or_path": ground.lm}
    run(config.create(**options))
    record = {name: x for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") for name, x in line.items()}
    assert {key.split("/")[1] for key, share in record.items() if key.endswith("/share") and share > 0} == set(sources)
    figures = {key: value for key, value in record.items() if "loss" in key or "grad_norm" in key}
    assert len(figures) >= 2 and all(np.isfinite(value) for value in figures.values())
    assert all(value > 0 for key, value in figures.items() if "grad_norm" in key)
