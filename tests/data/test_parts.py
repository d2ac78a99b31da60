"""Parts of several files and sources: places of bad rows, sources without a usable row, prompts that are the same."""

import json
import logging

import numpy as np
import pytest

from jaxrlhf.data import DataConfig, demo, load_data


@pytest.fixture(scope="module")
def tokenizer():
    return demo.train_tokenizer(["Human: question 12 Assistant: yes no 3"] * 20, vocab_size=300)


def pairs(n, first=0):
    return [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(first, first + n)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path):
    def make(rows=None, **options):
        if rows is not None:
            options["data_path"] = write(tmp_path / "rows.jsonl", rows)
        return DataConfig.create(data_cache_dir=str(tmp_path / "cache"), **options)

    return make


def test_a_bad_row_is_named_by_its_file_also_after_a_file_that_gives_no_rows(config, tokenizer, tmp_path):
    write(tmp_path / "data_a.jsonl", pairs(1))
    write(tmp_path / "data_b.jsonl", [{"prompt": "", "chosen": "yes", "rejected": "no"}, *pairs(38, 1)])
    seed = next(s for s in range(100) if 0 in (held := np.random.default_rng(s).permutation(40)[:2]) and 1 not in held)
    train, _ = load_data(config(data_path=str(tmp_path / "data_*.jsonl"), seed=seed), tokenizer, "dpo")
    assert [problem for problem in train.problems if "jsonl" in problem] == [
        f"{tmp_path}/data_b.jsonl line 1: 'prompt' is empty"
    ]


def test_a_source_without_a_usable_row_is_reported_beside_the_others(config, tokenizer, tmp_path, caplog):
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "", "chosen": "yes", "rejected": "no"}])
    good = write(tmp_path / "good.jsonl", pairs(20))
    held_out = write(tmp_path / "held_out.jsonl", pairs(2, 20))
    with caplog.at_level(logging.WARNING, "jaxrlhf"):
        train, _ = load_data(config(data_path=(bad, good), eval_data_path=held_out), tokenizer, "reward")
    assert (train.sources, len(train)) == (("good",), 20)
    assert [part.name for part in train.unusable] == ["bad"]
    assert f"bad: no usable row: {bad} line 1: 'prompt' is empty" in caplog.text


def test_a_prompt_as_text_and_as_a_message_is_one_prompt(config, tokenizer, caplog, tmp_path):
    as_messages = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in pairs(10)]
    held_out = write(tmp_path / "held_out.jsonl", as_messages)
    with caplog.at_level(logging.WARNING, "jaxrlhf"):
        load_data(config(pairs(20), eval_data_path=held_out), tokenizer, "ppo")
    assert "10 of 10 evaluation rows have a prompt that training rows have too" in caplog.text


def test_a_declared_data_set_may_be_a_local_folder_with_its_own_splits(config, tokenizer, tmp_path):
    (tmp_path / "tickets").mkdir()
    for split, first in (("train_open", 0), ("train_closed", 100), ("test", 200)):
        write(tmp_path / "tickets" / f"{split}.jsonl", pairs(20, first))
    registry = tmp_path / "registry.yaml"
    registry.write_text(f"- {{path: {tmp_path}/tickets, name: acme/tickets, split: train_closed, eval_split: test}}")
    settings = config(data_path="acme/tickets", dataset_registry=str(registry))
    train, evaluation = load_data(settings, tokenizer, "ppo")
    assert sorted(train.prompts(np.arange(20))) == sorted(row["prompt"] for row in pairs(20, 100))
    assert sorted(evaluation.prompts(np.arange(20))) == sorted(row["prompt"] for row in pairs(20, 200))
