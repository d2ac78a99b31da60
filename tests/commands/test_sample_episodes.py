"""`jaxrlhf sample` with an environment: what is kept, that the SFT step reads it back, and what is refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import scripted_environments

from jaxrlhf.commands.sample import SampleConfig, sample
from jaxrlhf.commands.sample_output import episode_row
from jaxrlhf.commands.selection import Samples
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import DataConfig, load_data, with_template
from jaxrlhf.environments import load_tool
from jaxrlhf.errors import InputError
from jaxrlhf.rl.outcomes import Outcome

SOURCE = Path(scripted_environments.__file__)
TOOL = "jaxrlhf.environments.sandbox:run_python"
CALL = {"type": "function", "function": {"name": "run_python", "arguments": {"code": "print(3)"}}}
MESSAGES = [
    {"role": "user", "content": "How much is 1 + 1?"},
    {"role": "assistant", "content": "2."},
    {"role": "user", "content": "How much is 1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "run_python", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Well done."},
]


def test_an_episode_becomes_a_row_that_sft_trains_on_with_its_tools(demo, tmp_path):
    row = episode_row(Outcome("done", messages=MESSAGES, begun=3), [load_tool(TOOL)])
    assert row["prompt"] == MESSAGES[:3] and row["chosen"] == MESSAGES[3:6]
    rows = [row | {"prompt": [{"role": "user", "content": f"Number {i}"}, *MESSAGES[1:3]]} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data_path": (str(tmp_path / "rows.jsonl"),), "data_cache_dir": str(tmp_path / "cache")}
    config = DataConfig.create(**options, chat_template="hermes", max_length=4000)
    tokenizer = with_template(copy.deepcopy(demo.tokenizer), config.template)
    train, _ = load_data(config, tokenizer, "sft")
    batch = train.batch(np.arange(1))
    ids, mask = np.asarray(batch["input_ids"][0]), np.asarray(batch["loss_mask"][0]) > 0
    shown, trained = tokenizer.decode(ids), tokenizer.decode(ids[mask])
    assert '"name": "run_python"' in shown and "<tool_response>" in shown and "Well done" not in shown
    assert '"code": "print(3)"' in trained and "It is 3." in trained and "tool_response" not in trained


def test_equal_last_turns_of_different_episodes_are_different_samples():
    episodes = [[Outcome(messages=MESSAGES[:k]) for k in (4, 6, 6)]]
    samples = Samples(None, [["a", "a", "a"]], None, episodes)
    assert len({samples.identity(0, j) for j in range(3)}) == 2
    assert len({Samples(None, [["a", "a"]], None).identity(0, j) for j in range(2)}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": "", "tools": (TOOL,)}, "nothing scores the responses"),
        (
            {"environment": "", "reward_functions": ("length:target=4",), "show": 2},
            "show=2 requires environment or tools",
        ),
        ({"generation_slots": 4}, "generation_slots=4 with an environment"),
    ],
)
def test_settings_that_episodes_do_not_take_are_refused(options, message):
    given = {"model_name_or_path": "m", "output_file": "x.jsonl", "environment": f"{SOURCE}:Counting"}
    with pytest.raises(InputError, match=message):
        SampleConfig.create(**(given | options))


@pytest.mark.long
def test_the_best_episode_of_each_prompt_is_written_and_shown(demo, tmp_path, capsys):
    rows = [{"prompt": f"This is number {i}."} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "best.jsonl"
    options = {"model_name_or_path": demo.lm, "data_path": (str(tmp_path / "rows.jsonl"),), "output_file": str(path)}
    options |= {"environment": f"{SOURCE}:Varied", "samples_per_prompt": 3, "show": 2, "data_cache_dir": demo.cache}
    options |= {"max_prompt_seq_len": 40, "max_new_tokens": 48, "max_turn_tokens": 4, "per_device_batch_size": 1}
    options |= {"reward_model_name_or_path": demo.reward, "data_split": "0,0,1"}
    summary = sample(SampleConfig.create(**options))
    kept = read_jsonl(path)
    assert len(kept) == summary["prompts"] == 2
    assert all(row["prompt"] in [[{"role": "user", "content": given["prompt"]}] for given in rows] for row in kept)
    for row in kept:
        turns = [message["content"] for message in row["chosen"] if message["role"] == "assistant"]
        letters = sum(character.isalpha() for turn in turns for character in turn)
        assert [message["role"] for message in row["chosen"]] == ["assistant", "user"] * 2 + ["assistant"]
        assert row["scores"]["environment"] == pytest.approx(2.5 + letters / 10)
        assert row["score"] == pytest.approx(sum(row["scores"].values()), rel=1e-5)
    assert summary["episodes"]["turns"].value == 3 and summary["kept_score_mean"] > summary["score_mean"]
    shown = capsys.readouterr().err
    assert shown.count("── prompt") == 2 and "user: again again" in shown and "3 turns, reward_model" in shown
    assert json.loads(path.with_suffix(".summary.json").read_text())["episodes"]["turns"]["value"] == 3


@pytest.mark.long
def test_an_episode_that_a_limit_ends_is_unfinished(demo, tmp_path):
    options = {"model_name_or_path": demo.lm, "data_path": (demo.train,), "output_file": str(tmp_path / "out.jsonl")}
    options |= {"environment": f"{SOURCE}:Counting", "samples_per_prompt": 1, "max_turns": 2, "max_train_samples": 2}
    options |= {"max_prompt_seq_len": 40, "max_new_tokens": 48, "max_turn_tokens": 4, "per_device_batch_size": 1}
    with pytest.raises(InputError, match=r"2 unfinished.*raise max_new_tokens or max_turns"):
        sample(SampleConfig.create(**options, data_cache_dir=demo.cache))
