"""From files to tokenised rows: fields, blending, splits, lengths, and the cache on disk."""

import logging

import datasets
import numpy as np
import pytest
from rows import encoded, pairs, prompts, write_lines

from jaxrlhf.data import DataConfig, EncodedRow, demo, load_data, tokenized
from jaxrlhf.data.selection import SHARES, parse_split, split_groups
from jaxrlhf.errors import InputError


def write(path, rows):
    return write_lines(path, rows)


def test_rows_come_out_as_they_went_in(config, tokenizer):
    train, evaluation = load_data(config(pairs(40)), tokenizer, "reward")
    assert (len(train), len(evaluation)) == (38, 2)
    for data in (train, evaluation):
        for i in range(len(data)):
            name, row = data.source(i)
            assert name == "rows"
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
    paths = [write(tmp_path / f"{k}.jsonl", pairs(20, first)) for k, first in (("a", 0), ("b", 100))]
    names = ["a", "b"]
    train, evaluation = load_data(config(data_path=paths, data_split="1,1,0"), tokenizer, "sft")
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
    extra = config(pairs(2), "extra.jsonl").data_path
    train, _ = load_data(config(rows, eval_data_path=extra), tokenizer, "reward")
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
        ({"chosen": [{"role": "assistant", "content": " "}]}, r"'chosen' message 1 \(assistant\) is empty"),
        ({"chosen": ["yes"]}, "'chosen' is a list, but not of messages"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "'prompt' ends with an assistant message"),
        ({"prompt": []}, "'prompt' is empty"),
    ],
)
def test_what_is_wrong_with_a_field_is_said_when_no_row_is_left(config, tokenizer, bad, message):
    with pytest.raises(
        InputError, match=rf"sft (train|eval) data: no usable row is left of \d+ .*{message}.*names of its columns"
    ):
        load_data(config([{**row, **bad} for row in pairs(20)]), tokenizer, "sft")


def test_an_absent_field_stops_with_the_flag_that_names_it(config, tokenizer):
    with pytest.raises(
        InputError,
        match=r"prompt only rows \(prompt\), which sft cannot use; it needs.*--chosen_field.*Found: prompt",
    ):
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


# ---- splits


GROUPS = {n: np.random.default_rng(n).integers(0, max(2, n // 3), n) for n in (8, 30, 101, 1000)}


@pytest.mark.parametrize("n", GROUPS)
@pytest.mark.parametrize("held_out", [0.0, 0.1])
def test_splits_are_disjoint_complete_and_keep_the_rows_of_a_prompt_together(n, held_out):
    groups = GROUPS[n]
    parts = {step: split_groups(groups, step, data_split="2,4,4", held_out=held_out, seed=3) for step in SHARES}
    evaluation = parts["sft"][1]
    apart = [evaluation, *(parts[step][0] for step in ("sft", "reward", "ppo"))]
    assert sorted(np.concatenate(apart)) == list(range(n))
    seen = [set(groups[rows]) for rows in apart]
    assert sum(map(len, seen)) == len(set(groups)), "no prompt is in two parts"
    for train, held in parts.values():
        np.testing.assert_array_equal(held, evaluation)
        assert (np.diff(train) > 0).all()
    both = np.sort(np.concatenate([parts["reward"][0], parts["ppo"][0]]))
    np.testing.assert_array_equal(parts["dpo"][0], both)
    count = len(set(groups)) - len(seen[0])
    assert len(seen[0]) == (max(1, round(len(set(groups)) * held_out)) if held_out else 0)
    for rows, share in zip(seen[1:], (0.2, 0.4, 0.4), strict=True):
        assert abs(len(rows) - share * count) <= 1
    again = split_groups(groups, "reward", data_split="2,4,4", held_out=held_out, seed=3)[0]
    np.testing.assert_array_equal(again, parts["reward"][0])


def test_blank_lines_are_in_no_part_and_another_seed_gives_another_split():
    groups = np.arange(100)
    groups[::10] = -1
    splits = [split_groups(groups, "sft", data_split="1,1,0", held_out=0.1, seed=seed) for seed in (0, 1)]
    assert not {*splits[0][0], *splits[0][1]} & set(range(0, 100, 10))
    assert set(splits[0][0]) != set(splits[1][0])
    for step in SHARES:
        assert len(split_groups(groups, step, data_split="", held_out=0.1, seed=0)[0]) == 81


@pytest.mark.parametrize("text", ["2,4", "a,b,c", "0,0,0", "-1,1,1", "1,2,3,4", "nan,1,1", "inf,1,1"])
def test_a_senseless_split_is_refused(text):
    with pytest.raises(InputError, match=r"data_split.*such as 2,4,4"):
        parse_split(text)


def test_too_few_prompts_to_hold_one_out_is_said():
    with pytest.raises(InputError, match=r"pairs\.jsonl has 1 prompt\(s\).*eval_data_path"):
        split_groups(np.zeros(5, int), "sft", data_split="", held_out=0.05, seed=0, name="pairs.jsonl")


def test_comparisons_of_one_prompt_never_straddle_train_evaluation_or_steps(config, tokenizer):
    rows = [
        {"prompt": f"question {i % 25}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(100)
    ]  # four comparisons per prompt, far apart
    settings = config(rows, data_split="2,4,4", eval_fraction=0.2)
    loaded = {step: load_data(settings, tokenizer, step) for step in SHARES}
    apart = [prompts(loaded["sft"][1]), *(prompts(loaded[step][0]) for step in ("sft", "reward", "ppo"))]
    assert [len(part) for part in apart] == [20, 16, 32, 32]
    assert sum(len(set(part)) for part in apart) == 25
    assert sorted(prompts(loaded["dpo"][0])) == sorted(apart[2] + apart[3])


def test_evaluation_prompts_that_stand_in_training_are_warned_of_with_their_count(config, tokenizer, tmp_path, caplog):
    extra = write(tmp_path / "extra.jsonl", [{**row, "chosen": "other"} for row in pairs(10, 15)])
    load_data(config(pairs(20), eval_data_path=extra), tokenizer, "reward")
    assert any("5 of 10 evaluation rows have a prompt that training rows have too" in m for m in caplog.messages)
    caplog.clear()
    load_data(config(pairs(15), eval_data_path=extra), tokenizer, "reward")
    assert not any("training rows have too" in m for m in caplog.messages)


# ---- lengths


def long_rows():
    short = {"prompt": "question", "chosen": "yes", "rejected": "no"}
    return [short] * 20 + [{**short, "prompt": "a b " * 40 + "tail"}] * 3 + [{**short, "chosen": "c d " * 60}] * 2


def whole(config, tokenizer, step, tmp_path, **options):
    """All of `long_rows` as training data: the data, and (prompt length, ids and masks) by row."""
    extra = write(tmp_path / "extra.jsonl", pairs(1))
    data = load_data(config(long_rows(), eval_data_path=extra, **options), tokenizer, step)[0]
    return data, {data.source(i)[1]: row for i, (row,) in enumerate(encoded(data))}


def test_long_prompts_lose_their_beginning_and_are_counted(config, tokenizer, tmp_path):
    data, rows = whole(config, tokenizer, "ppo", tmp_path, max_prompt_seq_len=24)
    assert data.counts["truncated_prompts"] == 3
    assert max(len(ids) for _, ids, _ in rows.values()) == 24
    _, full = whole(config, tokenizer, "ppo", tmp_path, max_prompt_seq_len=512)
    assert rows[21][1] == full[21][1][-24:]


def test_long_rows_keep_the_response_unless_it_alone_is_too_long(config, tokenizer, tmp_path):
    data, rows = whole(config, tokenizer, "reward", tmp_path, max_length=64)
    assert data.counts["truncated_prompts"] == 5
    assert data.counts["truncated_responses"] == 2
    eos = tokenizer.eos_token_id
    length, chosen, mask, _, _ = rows[21]
    assert chosen[-1] == eos and len(chosen) == 64 and sum(mask) == 64 - length
    length, chosen, mask, rejected, _ = rows[24]
    assert (length, len(chosen), sum(mask)) == (1, 64, 63) and eos not in chosen
    assert rejected[-1] == eos


@pytest.mark.parametrize(("step", "kept"), [("sft", 20), ("ppo", 22)])
def test_long_rows_are_dropped_on_request_and_counted(config, tokenizer, tmp_path, step, kept):
    data, _ = whole(config, tokenizer, step, tmp_path, max_length=64, max_prompt_seq_len=40, long_prompts="drop")
    assert len(data) == kept
    assert data.counts["dropped_too_long"] == 25 - kept
    assert data.counts["truncated_prompts"] == data.counts["truncated_responses"] == 0


def test_dropping_every_row_stops_with_the_flag_to_raise(config, tokenizer):
    with pytest.raises(InputError, match=r"\d rows are longer than max_prompt_seq_len 2: .*long_prompts"):
        load_data(config(pairs(20), max_prompt_seq_len=2, long_prompts="drop"), tokenizer, "ppo")


def test_a_cut_prompt_keeps_its_bos():
    encoding = tokenized.Encoding("ppo", 512, 4, "truncate")
    row = EncodedRow([9, 1, 2, 3, 4, 5], [0, 0, 1, 1, 0, 1], [])
    (length, ((ids, mask),)), cut = tokenized.fit(row, encoding, 9)
    assert (length, ids, mask, cut) == (4, [9, 3, 4, 5], [0, 1, 0, 1], tokenized.CUT_PROMPT)
    assert tokenized.fit(row, encoding, None)[0] == (4, [([2, 3, 4, 5], [0, 1, 0, 1])])


def test_a_long_text_is_cut_into_pieces_and_nothing_is_lost(config, tokenizer):
    rows = [{"text": " ".join(map(str, range(60)))}, {"text": "question"}, {"text": "yes"}] * 2
    settings = config(rows, max_length=16, eval_fraction=0.3)
    train, held = load_data(settings, tokenizer, "sft")
    pieces = [row for data in (train, held) for (row,) in encoded(data)]
    ids = sorted(token for _, piece, _ in pieces for token in piece)
    expected = [t for row in rows for t in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
    assert ids == sorted(expected)
    assert all(len(piece) <= 16 and mask == [0, *[1] * (len(piece) - 1)] for _, piece, mask in pieces)


# ---- the cache


@pytest.fixture
def tokenised(monkeypatch):
    """The rows that are tokenised."""
    seen = []
    real = tokenized.encode_rows

    def count(tokenizer, texts, *others, **options):
        seen.extend(texts)
        return real(tokenizer, texts, *others, **options)

    monkeypatch.setattr(tokenized, "encode_rows", count)
    return seen


def test_a_second_load_does_not_tokenise_or_read_rows(config, tokenizer, tokenised, monkeypatch):
    first, held = load_data(config(pairs(30)), tokenizer, "reward")
    assert len(tokenised) == 30
    monkeypatch.setattr("jaxrlhf.data.reading.run_pass", lambda *_, **__: pytest.fail("a pass over the rows"))
    second, again = load_data(config(pairs(30)), tokenizer, "reward")
    assert len(tokenised) == 30
    assert encoded(first) == encoded(second) and encoded(held) == encoded(again)
    assert (first.counts, first.problems, first.key) == (second.counts, second.problems, second.key)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"prompt_template": "raw"},
        {"max_length": 20},
        {"data_split": "1,1,1"},
        {"chosen_field": "rejected", "rejected_field": "chosen"},
        {"max_train_samples": 5},
        {"system_prompt": "Be kind."},
        {"chat_template": "chatml"},
        {"pair_margin": 0.5},
        {"long_prompts": "drop"},
        {"special_tokens_in_data": True},
    ],
)
def test_whatever_changes_the_tokens_is_tokenised_anew(config, tokenizer, tokenised, change):
    first, _ = load_data(config(pairs(30)), tokenizer, "reward")
    before = len(tokenised)
    second, _ = load_data(config(pairs(30), **change), tokenizer, "reward")
    assert len(tokenised) > before
    assert first.key != second.key


def test_changed_rows_or_tokenizer_are_tokenised_anew(config, tokenizer, tokenised):
    load_data(config(pairs(30)), tokenizer, "ppo")
    train, _ = load_data(config(pairs(30, first=1)), tokenizer, "ppo")
    assert len(tokenised) == 60
    assert not any(prompt == "Human: question 0 Assistant:" for prompt in prompts(train))
    other = demo.train_tokenizer(["Human: question Assistant"] * 9, vocab_size=270)
    load_data(config(pairs(30, first=1)), other, "ppo")
    assert len(tokenised) == 90


@pytest.mark.parametrize("folder", ["rows", "tokens"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_cached_file_is_made_again_with_a_warning(config, tokenizer, tmp_path, caplog, folder, size):
    first, _ = load_data(config(pairs(30)), tokenizer, "sft")
    expected = encoded(first), first.counts
    paths = list((tmp_path / "cache" / folder).glob("*.arrow"))
    del first
    for path in paths:
        path.write_bytes(path.read_bytes()[:size])
    again, _ = load_data(config(pairs(30)), tokenizer, "sft")
    damaged = [message for message in caplog.messages if "is damaged" in message and "made again" in message]
    assert len(damaged) == len(paths) > 0
    assert (encoded(again), again.counts) == expected


def test_a_stopped_tokenisation_leaves_nothing_behind_and_goes_on_later(config, tokenizer, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenized, "encode_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            load_data(config(pairs(30)), tokenizer, "sft")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []
    assert len(load_data(config(pairs(30)), tokenizer, "sft")[0]) == 28


def test_several_processes_give_the_rows_of_one(config, tokenizer, tmp_path):
    rows = pairs(1100)
    one, _ = load_data(config(rows), tokenizer, "reward")
    two, _ = load_data(config(rows, dataset_num_proc=2, data_cache_dir=str(tmp_path / "two")), tokenizer, "reward")
    units = range(0, len(one), 50)
    assert encoded(one, units) == encoded(two, units) and one.key == two.key


def test_a_cache_folder_that_cannot_be_written_is_named(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "rows.jsonl", pairs(20))
    with pytest.raises(InputError, match=r"data_cache_dir '.*file.*cannot be written.*choose another folder"):
        load_data(DataConfig(data_path=path, data_cache_dir=str(tmp_path / "file")), tokenizer, "sft")


def test_the_environment_may_name_the_cache_folder(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXRLHF_CACHE", str(tmp_path / "elsewhere"))
    load_data(DataConfig(data_path=write(tmp_path / "rows.jsonl", pairs(20))), tokenizer, "sft")
    assert len(list((tmp_path / "elsewhere" / "tokens").glob("*.arrow"))) == 2


def test_a_row_that_the_chat_template_refuses_or_loses_is_left_out_and_named(config):
    tokenizer = demo.train_tokenizer(["question"], vocab_size=260)
    tokenizer.chat_template = (
        "{% if messages[0].content == 'question 7' %}{{ raise_exception('no') }}{% endif %}"
        "{% for message in messages if message.content != 'question 9' %}{{ message.content }}{% endfor %}"
    )
    train, held_out = load_data(config(pairs(20)), tokenizer, "sft")
    assert train.counts["skipped"] + held_out.counts["skipped"] == 2
    problems = " ".join([*train.problems, *held_out.problems])
    assert "rows.jsonl line 8: the chat template refuses" in problems
    assert "rows.jsonl line 10: the chat template loses the content of message 1 (user)" in problems


def test_a_template_that_loses_all_content_stops(config):
    tokenizer = demo.train_tokenizer(["question"], vocab_size=260)
    tokenizer.chat_template = "{% for message in messages %}x{% endfor %}"
    with pytest.raises(InputError, match="the chat template loses the content"):
        load_data(config(pairs(20)), tokenizer, "ppo")
