"""From files to tokenised rows: fields, blending, splits, lengths, and the cache on disk."""

import json
import logging

import datasets
import numpy as np
import pytest

from jaxrlhf.data import DataConfig, demo, load_data, tokenized
from jaxrlhf.errors import InputError


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


def prompts(data):
    return [data.text(i)["prompt"] for i in range(len(data))]


def test_rows_come_out_as_they_went_in(config, tokenizer):
    train, evaluation = load_data(config(pairs(40)), tokenizer, "reward")
    assert (len(train), len(evaluation)) == (38, 2)
    for data in (train, evaluation):
        for i in range(len(data)):
            name, row = data.source(i)
            assert name.endswith("rows.jsonl")
            assert data.text(i) == {
                "prompt": f"Human: question {row} Assistant:",
                "chosen": f" yes {row}",
                "rejected": f" no {row}",
            }


def test_no_row_is_trained_on_twice_or_trained_on_and_evaluated(config, tokenizer):
    settings = config(pairs(50), data_split="2,4,4")
    parts = {step: load_data(settings, tokenizer, step) for step in ("sft", "reward", "ppo")}
    train = [prompt for data, _ in parts.values() for prompt in prompts(data)]
    held_out = prompts(parts["sft"][1])
    assert len(train) == 48
    assert len(set(train)) == len(train)
    assert len(set(train + held_out)) == 50
    for _, evaluation in parts.values():
        assert prompts(evaluation) == held_out


def test_bad_rows_do_not_move_others_between_steps(config, tokenizer):
    rows = pairs(50)
    for row in rows[::5]:
        row["rejected"] = None  # harms the reward step only
    settings = config(rows, data_split="2,4,4", eval_fraction=0.2)
    train = [prompt for step in ("sft", "reward", "ppo") for prompt in prompts(load_data(settings, tokenizer, step)[0])]
    assert len(set(train)) == len(train)


def test_sources_are_joined_and_keep_their_names(config, tokenizer, tmp_path):
    names = [write(tmp_path / f"{k}.jsonl", pairs(20, first)) for k, first in (("a", 0), ("b", 100))]
    train, evaluation = load_data(config(data_path=names, data_split="1,1,0"), tokenizer, "sft")
    assert {train.source(i)[0] for i in range(len(train))} == set(names)
    assert (len(train), len(evaluation)) == (20, 2)
    assert {evaluation.source(i)[0] for i in range(2)} == set(names)
    for i in range(len(train)):
        name, row = train.source(i)
        assert train.text(i)["chosen"] == f" yes {row + 100 * names.index(name)}"


def test_evaluation_rows_are_those_given(config, tokenizer, tmp_path):
    extra = write(tmp_path / "extra.jsonl", pairs(7, 500))
    train, evaluation = load_data(config(pairs(20), eval_data_path=extra), tokenizer, "ppo")
    assert (len(train), len(evaluation)) == (20, 7)
    assert prompts(evaluation) == [f"Human: question {i} Assistant:" for i in range(500, 507)]


def test_a_saved_data_set_with_a_test_split_is_used_whole(config, tokenizer, tmp_path):
    parts = {"train": datasets.Dataset.from_list(pairs(12)), "test": datasets.Dataset.from_list(pairs(5, 50))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    train, evaluation = load_data(config(data_path=str(tmp_path / "saved")), tokenizer, "sft")
    assert (len(train), len(evaluation)) == (12, 5)
    with pytest.raises(InputError, match="is also training data"):
        datasets.Dataset.from_list(pairs(12)).save_to_disk(tmp_path / "one")
        one = str(tmp_path / "one")
        load_data(config(data_path=one, eval_data_path=one), tokenizer, "sft")


def test_training_data_given_for_evaluation_is_refused(config, tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"eval_data_path '.*rows\.jsonl': is also training data"):
        load_data(config(pairs(20), eval_data_path=str(tmp_path / "rows.jsonl")), tokenizer, "sft")


def test_sample_limits_take_a_random_part_of_the_split(config, tokenizer):
    settings = config(pairs(100), max_train_samples=10, max_eval_samples=2)
    train, evaluation = load_data(settings, tokenizer, "ppo")
    everything, _ = load_data(config(pairs(100)), tokenizer, "ppo")
    assert (len(train), len(evaluation)) == (10, 2)
    assert set(prompts(train)) < set(prompts(everything))
    assert prompts(train) != prompts(everything)[:10]


def test_conversations_are_rendered_and_may_hold_the_prompt(config, tokenizer):
    user, yes, no = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))
    rows = [
        {"prompt": [user], "chosen": [yes], "rejected": [no]},
        {"prompt": "q", "chosen": [user, yes], "rejected": "no"},
        {"chosen": [user, yes], "rejected": [user, no]},
        {"prompt": [user, no, user], "chosen": "yes", "rejected": "no"},
    ] * 2
    train, _ = load_data(config(rows), tokenizer, "reward")
    expected = {"prompt": "Human: q Assistant:", "chosen": " yes", "rejected": " no"}
    texts = {train.source(i)[1] % 4: train.text(i) for i in range(len(train))}
    assert texts[0] == texts[1] == texts[2] == expected
    assert texts[3] == {**expected, "prompt": "Human: q Assistant: no Human: q Assistant:"}


def test_bad_rows_are_counted_and_named(config, tokenizer, caplog):
    rows = pairs(30)
    for i, bad in enumerate(
        ({"chosen": ""}, {"chosen": None}, {"chosen": 5}, {"prompt": [1]}, {"prompt": "  "}), start=4
    ):
        rows[i].update(bad)
    del rows[20]["chosen"]
    rows[21] = "text"
    settings = config(rows, eval_fraction=0.01, chosen_field="chosen")
    with caplog.at_level(logging.INFO):
        train, evaluation = load_data(settings, tokenizer, "sft")
    counts = [train.counts[name] + evaluation.counts[name] for name in ("rows", "kept", "skipped")]
    assert counts == [30, 23, 7]
    assert any("rows.jsonl line 5: 'chosen' is empty" in problem for problem in train.problems)
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("sft train data"))
    assert "7 skipped" in line and "line 5: 'chosen' is empty" in line


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chosen": None}, "'chosen' is null"),
        ({"chosen": 1.5}, "'chosen' is not text but a number"),
        ({"chosen": {"a": 1}}, "'chosen' is not text but an object"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "'chosen' is empty"),
        ({"chosen": ["yes"]}, "'chosen' is a list, but not of messages"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "'prompt' ends with an assistant message"),
        ({"prompt": []}, "'prompt' is empty"),
    ],
)
def test_what_is_wrong_with_a_field_is_said_when_no_row_is_left(config, tokenizer, bad, message):
    with pytest.raises(InputError, match=rf"sft train data: no usable row is left of 19 \(19 × {message}.*field names"):
        load_data(config([{**row, **bad} for row in pairs(20)]), tokenizer, "sft")


def test_an_absent_field_stops_with_the_flag_that_names_it(config, tokenizer):
    with pytest.raises(InputError, match=r"'answer' is missing.*line \d+.*chosen_field 'answer'"):
        load_data(config(pairs(20), chosen_field="answer"), tokenizer, "sft")


def test_a_step_without_a_share_stops(config, tokenizer):
    with pytest.raises(
        InputError, match=r"ppo train data: no row is left for this step; raise its share in data_split"
    ):
        load_data(config(pairs(20), data_split="1,1,0"), tokenizer, "ppo")
    with pytest.raises(InputError, match="data_path: no data given"):
        load_data(config(), tokenizer, "ppo")


@pytest.mark.parametrize(
    "bad",
    [
        {"eval_fraction": 0.0},
        {"eval_fraction": 1.0},
        {"data_split": "1,2"},
        {"prompt_template": "{prompt}"},
        {"max_length": 1},
        {"max_prompt_seq_len": 0},
        {"max_train_samples": -1},
        {"long_prompts": "wrap"},
        {"seed": -1},
    ],
)
def test_bad_settings_name_field_and_value(bad):
    ((name, value),) = bad.items()
    with pytest.raises(InputError, match=name) as error:
        DataConfig.create(**bad)
    assert str(value) in str(error.value)


# ---- lengths


def long_rows():
    short = {"prompt": "question", "chosen": "yes", "rejected": "no"}
    return [short] * 20 + [{**short, "prompt": "a b " * 40 + "tail"}] * 3 + [{**short, "chosen": "c d " * 60}] * 2


def whole(config, tokenizer, step, tmp_path, **options):
    """All of `long_rows` as training data."""
    extra = write(tmp_path / "extra.jsonl", pairs(1))
    return load_data(config(long_rows(), eval_data_path=extra, **options), tokenizer, step)[0]


def test_long_prompts_lose_their_beginning_and_are_counted(config, tokenizer, tmp_path):
    data = whole(config, tokenizer, "ppo", tmp_path, max_prompt_seq_len=24)
    assert data.counts["truncated_prompts"] == 3
    assert data.ragged.lengths(0).max() == 24
    full = whole(config, tokenizer, "ppo", tmp_path, max_prompt_seq_len=512)
    np.testing.assert_array_equal(data.ragged.part(21, 0), full.ragged.part(21, 0)[-24:])


def test_long_rows_keep_the_response_unless_it_alone_is_too_long(config, tokenizer, tmp_path):
    data = whole(config, tokenizer, "reward", tmp_path, max_length=64)
    assert data.counts["truncated_prompts"] == 5
    assert data.counts["truncated_responses"] == 2
    eos = tokenizer.eos_token_id
    assert data.ragged.part(21, 1)[-1] == eos and len(data.ragged.part(21, 0)) + len(data.ragged.part(21, 1)) == 64
    assert eos not in data.ragged.part(24, 1)
    assert [len(data.ragged.part(24, j)) for j in (0, 1)] == [1, 63]
    assert data.ragged.part(24, 2)[-1] == eos


@pytest.mark.parametrize(("step", "kept"), [("sft", 20), ("ppo", 22)])
def test_long_rows_are_dropped_on_request_and_counted(config, tokenizer, tmp_path, step, kept):
    data = whole(config, tokenizer, step, tmp_path, max_length=64, max_prompt_seq_len=40, long_prompts="drop")
    assert len(data) == kept
    assert data.counts["dropped_too_long"] == 25 - kept
    assert data.counts["truncated_prompts"] == data.counts["truncated_responses"] == 0


def test_dropping_every_row_stops_with_the_flag_to_raise(config, tokenizer):
    with pytest.raises(InputError, match=r"19 × longer than max_prompt_seq_len 2: .*long_prompts"):
        load_data(config(pairs(20), max_prompt_seq_len=2, long_prompts="drop"), tokenizer, "ppo")


def test_a_cut_prompt_keeps_its_bos():
    encoding = tokenized.Encoding("ppo", (), "raw", 512, 4, "truncate")
    counts = {"truncated_prompts": 0}
    assert tokenized.fit([[9, 1, 2, 3, 4, 5]], encoding, 9, counts) == [[9, 3, 4, 5]]
    assert tokenized.fit([[9, 1, 2, 3, 4, 5]], encoding, None, counts) == [[2, 3, 4, 5]]
    assert counts == {"truncated_prompts": 2}


# ---- the cache


@pytest.fixture
def tokenised(monkeypatch):
    """Counts the texts that are tokenised as rows."""
    seen = []
    real = tokenized.encode_rows

    def count(tokenizer, texts, *others, **options):
        seen.extend(texts)
        return real(tokenizer, texts, *others, **options)

    monkeypatch.setattr(tokenized, "encode_rows", count)
    return seen


def test_a_second_load_does_not_tokenise(config, tokenizer, tokenised):
    first, _ = load_data(config(pairs(30)), tokenizer, "reward")
    assert len(tokenised) == 30
    second, _ = load_data(config(pairs(30)), tokenizer, "reward")
    assert len(tokenised) == 30
    np.testing.assert_array_equal(first.ragged.tokens, second.ragged.tokens)
    assert first.counts == second.counts
    assert isinstance(second.ragged.tokens, np.memmap)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"prompt_template": "raw"},
        {"max_length": 20},
        {"data_split": "1,1,1"},
        {"rejected_field": "chosen"},
        {"max_train_samples": 5},
    ],
)
def test_whatever_changes_the_tokens_is_tokenised_anew(config, tokenizer, tokenised, change):
    load_data(config(pairs(30)), tokenizer, "reward")
    before = len(tokenised)
    load_data(config(pairs(30), **change), tokenizer, "reward")
    assert len(tokenised) > before


def test_changed_rows_or_tokenizer_are_tokenised_anew(config, tokenizer, tokenised):
    load_data(config(pairs(30)), tokenizer, "ppo")
    train, _ = load_data(config(pairs(30, first=1)), tokenizer, "ppo")
    assert len(tokenised) == 60
    assert not any(prompt == "Human: question 0 Assistant:" for prompt in prompts(train))
    other = demo.train_tokenizer(["Human: question Assistant"] * 9, vocab_size=270)
    load_data(config(pairs(30, first=1)), other, "ppo")
    assert len(tokenised) == 90


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "meta.json", "rows.npy"])
def test_a_damaged_cache_is_rebuilt_with_a_message(config, tokenizer, tmp_path, caplog, damage, name):
    first, _ = load_data(config(pairs(30)), tokenizer, "sft")
    expected = np.array(first.ragged.tokens), np.array(first.ragged.rows), first.counts
    (folder,) = (tmp_path / "cache" / "tokens").glob("sft-train-*")
    damage(folder / name)
    again, _ = load_data(config(pairs(30)), tokenizer, "sft")
    assert any("are damaged" in record.getMessage() for record in caplog.records)
    np.testing.assert_array_equal(again.ragged.tokens, expected[0])
    np.testing.assert_array_equal(again.ragged.rows, expected[1])
    assert again.counts == expected[2]


def test_a_stopped_tokenisation_leaves_nothing_behind(config, tokenizer, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenized, "encode_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        load_data(config(pairs(30)), tokenizer, "sft")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_is_named(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "rows.jsonl", pairs(20))
    with pytest.raises(InputError, match=r"data_cache_dir '.*file.*cannot be written.*choose another folder"):
        load_data(DataConfig(data_path=path, data_cache_dir=str(tmp_path / "file")), tokenizer, "sft")


def test_the_environment_may_name_the_cache_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXRLHF_CACHE", str(tmp_path / "elsewhere"))
    load_data(DataConfig(data_path=write(tmp_path / "rows.jsonl", pairs(20))), tokenizer, "sft")
    assert len(list((tmp_path / "elsewhere" / "tokens").iterdir())) == 2


def test_a_row_that_the_chat_template_refuses_is_left_out_and_named(config):
    tokenizer = demo.train_tokenizer(["question"], vocab_size=260)
    tokenizer.chat_template = (
        "{% if messages[0].content == 'question 7' %}{{ raise_exception('no') }}{% endif %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    train, held_out = load_data(config(pairs(20)), tokenizer, "sft")
    assert train.counts["skipped"] + held_out.counts["skipped"] == 1
    assert "rows.jsonl line 8: the chat template refuses" in " ".join([*train.problems, *held_out.problems])
