"""Reading rows from files, folders and saved data sets, and splitting them over the steps."""

import csv
import json

import datasets
import numpy as np
import pytest

from jaxrlhf.data.sources import SHARES, parse_split, resolve_source, split_indices
from jaxrlhf.errors import InputError

ROWS = [{"prompt": f"question {i}?", "chosen": f"yes, {i}", "rejected": 'no "never"\nno'} for i in range(7)]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def read(path, split="train"):
    rows = resolve_source(str(path), path).rows(split)
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, suffix):
    assert read(write(tmp_path / f"rows{suffix}")) == ROWS


def test_a_json_file_may_hold_one_object_a_line_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    assert read(path) == ROWS


def test_a_csv_cell_stays_the_text_it_is(tmp_path):
    rows = [
        {"prompt": "2 + 40?", "chosen": "42", "rejected": "None"},
        {"prompt": "x", "chosen": "NA", "rejected": "nan"},
    ]
    assert read(write(tmp_path / "rows.csv", rows)) == rows


def test_a_folder_joins_its_files_and_takes_splits_from_names(tmp_path):
    write(tmp_path / "train-1.jsonl", ROWS[:2])
    write(tmp_path / "train-2.csv", ROWS[2:4])
    write(tmp_path / "validation.json", ROWS[4:6])
    write(tmp_path / "test.jsonl", ROWS[6:])
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert read(tmp_path) == ROWS[:4]
    assert read(tmp_path, "eval") == ROWS[4:6]


def test_a_folder_without_split_names_is_all_training_data(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:3])
    write(tmp_path / "b.parquet", ROWS[3:])
    assert read(tmp_path) == ROWS
    assert "eval" not in resolve_source(str(tmp_path), tmp_path).splits


def test_folders_named_for_a_split_count_as_its_files(tmp_path):
    write(tmp_path / "train" / "part.jsonl", ROWS[:5])
    write(tmp_path / "eval" / "part.jsonl", ROWS[5:])
    assert read(tmp_path) == ROWS[:5]
    assert read(tmp_path, "eval") == ROWS[5:]


def test_saved_data_sets_are_read_with_their_splits(tmp_path):
    train, test = datasets.Dataset.from_list(ROWS[:5]), datasets.Dataset.from_list(ROWS[5:])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == ROWS[:5]
    assert read(tmp_path / "both") == ROWS[:5]
    assert read(tmp_path / "both", "eval") == ROWS[5:]


def test_rows_know_the_file_and_line_they_stood_at(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:3])
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps(ROWS[3]) + "\n\n" + json.dumps(ROWS[4]))
    rows = resolve_source(str(tmp_path), tmp_path).rows("train")
    assert rows.where(2) == f"{tmp_path / 'a.jsonl'} line 3"
    assert rows.where(4) == f"{tmp_path / 'b.jsonl'} line 4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"x\.jsonl line 2: not valid JSON"),
        ("x.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', r"x\.json line 2: not valid JSON"),
        ("x.json", b'{"rows":\n [1]}', r"x\.json: holds one JSON object"),
        ("x.json", b"[]", r"x\.json: holds no rows"),
        ("x.jsonl", b"\n\n", r"x\.jsonl: holds no rows"),
        ("x.jsonl", b"", r"x\.jsonl: holds no rows"),
        ("x.jsonl", b'{"prompt": "\xff"}\n', r"x\.jsonl line 1: not UTF-8 text"),
        ("x.csv", b"prompt,chosen\na,b\nc,d\xff\n", r"x\.csv line 3: not UTF-8 text"),
        ("x.csv", b"prompt,chosen\na,b\nc,d,e\n", r"x\.csv line 3: more cells than the header"),
        ("x.csv", b'prompt,chosen\na,"b\n', r"x\.csv line \d: not valid CSV"),
        ("x.csv", b"prompt,chosen\n", r"x\.csv: holds no rows"),
        ("x.parquet", b"not parquet", r"x\.parquet: cannot be read as Parquet"),
        ("x.txt", b"hello", r"x\.txt': unknown kind of file; use one of \.json, \.jsonl"),
    ],
)
def test_bad_files_stop_with_their_name_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_missing_and_useless_places_stop_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl': no such file or folder; check the path"):
        resolve_source(str(tmp_path / "nowhere.jsonl"), tmp_path)
    with pytest.raises(InputError, match=r"the folder holds no \.json"):
        resolve_source(str(tmp_path), tmp_path)
    write(tmp_path / "test.jsonl")
    with pytest.raises(InputError, match="only evaluation files"):
        resolve_source(str(tmp_path), tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"the saved data set cannot be read"):
        resolve_source(str(tmp_path / "saved"), tmp_path)


def test_a_name_the_hub_cannot_give_stops_with_a_remedy(tmp_path, monkeypatch):
    def refuse(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"'someone/pairs': neither a file or folder here nor .*no network"):
        resolve_source("someone/pairs", tmp_path)


def test_a_hub_name_may_carry_a_configuration(tmp_path, monkeypatch):
    asked = []

    def load(name, config):
        asked.append((name, config))
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(resolve_source("someone/pairs:main", tmp_path).rows("train")) == len(ROWS)
    assert asked == [("someone/pairs", "main")]


@pytest.mark.parametrize("n", [2, 3, 10, 101, 1000])
@pytest.mark.parametrize("held_out", [0.0, 0.05])
def test_splits_are_disjoint_complete_and_the_same_for_the_same_seed(n, held_out):
    parts = [split_indices(n, step, data_split="2,4,4", held_out=held_out, seed=3) for step in ("sft", "reward", "ppo")]
    evaluation = parts[0][1]
    every = np.concatenate([evaluation, *(train for train, _ in parts)])
    assert sorted(every) == list(range(n))
    for train, held in parts:
        np.testing.assert_array_equal(held, evaluation)
        assert abs(len(train) - len(every[len(evaluation) :]) * 0.4) <= 1 or train is parts[0][0]
    together = split_indices(n, "dpo", data_split="2,4,4", held_out=held_out, seed=3)[0]
    np.testing.assert_array_equal(together, np.sort(np.concatenate([parts[1][0], parts[2][0]])))
    again = split_indices(n, "reward", data_split="2,4,4", held_out=held_out, seed=3)
    np.testing.assert_array_equal(again[0], parts[1][0])
    assert len(evaluation) == (max(1, round(n * held_out)) if held_out else 0)


def test_another_seed_gives_another_split_and_no_split_gives_all_rows_to_each_step():
    first, second = (split_indices(100, "sft", data_split="2,4,4", held_out=0, seed=seed)[0] for seed in (0, 1))
    assert set(first) != set(second)
    for step in SHARES:
        assert len(split_indices(100, step, data_split="", held_out=0.05, seed=0)[0]) == 95


@pytest.mark.parametrize("text", ["2,4", "a,b,c", "0,0,0", "-1,1,1", "1,2,3,4", "nan,1,1", "inf,1,1"])
def test_a_senseless_split_is_refused(text):
    with pytest.raises(InputError, match=r"data_split.*such as 2,4,4"):
        parse_split(text)


def test_too_few_rows_to_hold_one_out_is_said():
    with pytest.raises(InputError, match=r"pairs\.jsonl has 1 row\(s\).*eval_data_path"):
        split_indices(1, "sft", data_split="", held_out=0.05, seed=0, name="pairs.jsonl")
