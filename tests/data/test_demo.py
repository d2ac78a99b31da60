"""The embedded demo data: the same for everyone, with a preference that a plain function can check."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrlhf.data import DataConfig, demo_quality, encode_rows, load_data, load_tokenizer, materialize_demo, write_demo
from jaxrlhf.data.demo import demo_rows, prompts


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return materialize_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def rows(demo):
    return {
        name: [json.loads(line) for line in open(path)] for name, path in (("train", demo.train), ("eval", demo.eval))
    }


def qualities(rows, name):
    return np.array([demo_quality(row["prompt"], row[name]) for row in rows])


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name in "ab":
        write_demo(tmp_path / name, size=300, seed=4)
    for name in ("train.jsonl", "eval.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert demo_rows(300, seed=5) != demo_rows(300, seed=4)


def test_chosen_is_always_better_and_itself_graded(rows):
    for part in rows.values():
        chosen, rejected = qualities(part, "chosen"), qualities(part, "rejected")
        assert (chosen - rejected >= 1).all()
        assert set(chosen) == {1, 2, 3, 4, 5}
    chosen = qualities(rows["train"], "chosen")
    assert 5 - chosen.mean() > 1.5 * chosen.std()  # what PPO can gain
    assert (qualities(rows["train"], "rejected") >= 3).mean() > 0.05  # a good response may be the rejected one


def test_length_does_not_tell_which_response_is_better(rows):
    difference = np.array([len(row["chosen"]) - len(row["rejected"]) for row in rows["train"]])
    assert 0.4 < (difference > 0).sum() / (difference != 0).sum() < 0.6


def test_evaluation_prompts_are_not_trained_on(rows):
    train, evaluation = ({row["prompt"] for row in part} for part in (rows["train"], rows["eval"]))
    assert not train & evaluation
    assert len(rows["train"]) == 6000 and len(rows["eval"]) == 300


@pytest.mark.parametrize(
    ("prompt", "response", "quality"),
    [
        ("What color is grass?", "Of course! Grass is green. Have a lovely day!", 5),
        ("What color is grass?", "Grass is green.", 3),
        ("What color is grass?", "GREEN", 3),
        ("What color is grass?", "Grass is green and blue.", 0),
        ("What color is grass?", "Grass is greenish.", 0),
        ("What color is grass?", "How boring. Grass is red. Leave me alone.", -2),
        ("What color is grass?", "Happy to help! Happy to help! I am glad to help.", 2),
        ("What color is grass?", "", 0),
        ("What is 2 plus 2?", "2 plus 2 is 4.", 3),
        ("What is 2 plus 2?", "2 plus 2 is 2.", 0),
        ("What is 2 plus 3?", "2 plus 3 is 3.", 0),
        ("What does a dog say?", "My pleasure! A dog says woof. Do not ask again.", 3),
    ],
)
def test_quality_reads_answer_and_tone(prompt, response, quality):
    assert demo_quality(prompt, response) == quality


def test_everything_fits_the_demo_lengths_and_survives_decoding(demo, rows):
    tokenizer = load_tokenizer(demo.tokenizer)
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.eos_token) == (512, "<pad>", "<eos>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for row in rows["train"] + rows["eval"]:
        (encoded,) = encode_rows(tokenizer, [row["prompt"]], [(row["chosen"], row["rejected"])])
        for (response, _), name in zip(encoded.responses, ("chosen", "rejected"), strict=True):
            assert len(encoded.prompt) <= 24 and len(response) <= 32
            assert tokenizer.decode(response, skip_special_tokens=True) == f" {row[name]}"
    assert len(prompts()) > 600


def test_data_path_demo_means_this_data(tmp_path, rows):
    config = DataConfig(data_path="demo", data_split="2,4,4", max_length=64, data_cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(materialize_demo(tmp_path).tokenizer)
    assert len(load_data(config, tokenizer, "reward")[1]) == config.max_eval_samples == 256
    config = dataclasses.replace(config, max_eval_samples=0)
    train, evaluation = load_data(config, tokenizer, "reward")
    assert len(evaluation) == 300
    assert abs(len(train) - 2400) < 100, "the split is one of prompts, which have several rows"
    assert evaluation.text(0)["chosen"] == f" {rows['eval'][0]['chosen']}"
    assert train.counts["truncated_prompts"] == train.counts["skipped"] == 0
