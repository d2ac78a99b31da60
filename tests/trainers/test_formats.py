"""A row of every format goes through every trainer that it serves, to one optimizer step."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer
from rows import pairs, write_lines

from jaxrlhf.data.formats import FORMATS
from jaxrlhf.models import load_pretrained, save_pretrained
from jaxrlhf.rl.config import PPOConfig
from jaxrlhf.rl.run import train_ppo
from jaxrlhf.trainers.dpo import DPOConfig, train_dpo
from jaxrlhf.trainers.reward import RewardConfig, train_reward
from jaxrlhf.trainers.sft import SFTConfig, train_sft

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
    "ppo": (train_ppo, PPOConfig, {"max_prompt_seq_len": 64, "max_answer_seq_len": 8}),
}
CASES = [
    (trainer, name)
    for trainer in TRAINERS
    for name, (form, _) in ROWS.items()
    if trainer.split()[0] in FORMATS[form].steps
]


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
    (folder / "rewards.py").write_text("def size(responses):\n    return [float(len(text)) for text in responses]\n")
    return SimpleNamespace(folder=folder, lm=str(folder / "lm"), held=held)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the report has tests of its own."""
    monkeypatch.setattr("jaxrlhf.runs.report.write_report", lambda folder: None)


def test_every_format_is_there():
    assert {form for form, _ in ROWS.values()} == set(FORMATS)


@pytest.mark.parametrize(("trainer", "name"), CASES, ids=[f"{a}: {b}" for a, b in CASES])
def test_a_row_of_the_format_makes_one_optimizer_step(trainer, name, ground, tmp_path):
    form, row = ROWS[name]
    other = {"completion": [NO] if "conv" in name else " is green.", "label": False}
    rows = [row, row | other] * 8 if form == "unpaired" else [row] * 16
    run, config, options = TRAINERS[trainer]
    options = options | {"data_path": write_lines(tmp_path / "rows.jsonl", rows), "eval_data_path": ground.held}
    options |= {"data_cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "run"), "max_length": 64}
    options |= {"max_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "warmup_steps": 0}
    options |= {"per_device_eval_batch_size": 1, "eval_steps": 0}
    if trainer == "ppo":
        options |= {"actor_model_name_or_path": ground.lm, "reward_functions": (f"{ground.folder}/rewards.py:size",)}
    else:
        options |= {"model_name_or_path": ground.lm}
    run(config.create(**options))
    (record,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][:1]
    losses = [value for key, value in record.items() if "loss" in key]
    assert losses and np.isfinite(losses).all()
    before = load_pretrained(ground.lm).params
    _ = jax.tree.leaves(before)
