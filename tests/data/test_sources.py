"""Reading rows from files, folders, globs, saved data sets and the hub."""

import bz2
import csv
import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from rows import pairs, prompts, write_lines

from jaxrlhf.data import load_data
from jaxrlhf.data.files import suffix_of
from jaxrlhf.data.sources import choose_splits, resolve_source
from jaxrlhf.errors import InputError

ROWS = [{"prompt": f"question {i}?", "chosen": f"yes, {i}", "rejected": 'no; "never"\nno'} for i in range(7)]
DELIMITERS = {"comma.csv": ",", "semicolon.csv": ";", "tab.csv": "\t", "rows.tsv": "\t"}


def write_plain(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".jsonl", ".ndjson"):
        write_lines(path, rows)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=DELIMITERS.get(path.name, ","))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


def compress(content, ending):
    if ending == ".zst":
        zstandard = pytest.importorskip("zstandard")
        return zstandard.compress(content)
    return {".gz": gzip.compress, ".bz2": bz2.compress}[ending](content)


def write(path, rows=ROWS):
    """Writes a file by its suffix, compressed where it says so."""
    if path.suffix in (".gz", ".bz2", ".zst"):
        plain = path.with_suffix("")
        write_plain(plain, rows)
        path.write_bytes(compress(plain.read_bytes(), path.suffix))
        plain.unlink()
    else:
        write_plain(path, rows)
    return path


@pytest.fixture
def source(tmp_path):
    """`source(name)`: the source, with its cache in the test's folder."""
    return lambda name, **options: resolve_source(str(name), tmp_path / ".cache", **options)


@pytest.fixture
def read(source):
    """`read(name, split)`: all rows of a source."""

    def rows(name, split="train", **options):
        tables = source(name, **options).tables(split)
        return [row for table in tables for row in table.rows(range(len(table.dataset))) if row is not None]

    return rows


# ---- files

NAMES = ["rows.json", "rows.jsonl", "rows.ndjson", *DELIMITERS, "rows.parquet", "rows.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, read, name):
    assert read(write(tmp_path / name)) == ROWS


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "semicolon.csv", "rows.tsv", "rows.parquet", "rows.arrow"])
def test_every_kind_of_file_may_be_compressed(tmp_path, read, name, ending):
    assert read(write(tmp_path / (name + ending))) == ROWS


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".zst"])
def test_a_text_file_is_one_document(tmp_path, read, ending):
    content = "one\ntwo\n\n  three\n"
    path = tmp_path / f"book.txt{ending}"
    path.write_bytes(compress(content.encode(), ending) if ending else content.encode())
    (row,) = read(path)
    assert row["text"].strip() == content.strip()


def test_streamed_files_give_the_same_rows(tmp_path, source):
    for name in ("rows.json", "rows.jsonl.gz", "semicolon.csv", "rows.tsv.bz2", "rows.parquet", "rows.arrow"):
        (table,) = source(write(tmp_path / name), streaming=True).tables("train")
        lines = list(table.dataset)
        assert [row for line in lines for row in table.parse({k: [v] for k, v in line.items()})] == ROWS, name
        assert table.head(3) == ROWS[:3]


def test_a_json_file_may_hold_one_object_a_line_and_a_byte_order_mark(tmp_path, read):
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    assert read(path) == ROWS
    path.write_text("\ufeff" + json.dumps(ROWS), encoding="utf-8")
    assert read(path) == ROWS


def test_a_csv_file_may_have_a_byte_order_mark_and_spaces_in_its_header(tmp_path, read):
    path = tmp_path / "rows.csv"
    path.write_text("\ufeffprompt ; chosen\na;b\n", encoding="utf-8")
    assert read(path) == [{"prompt": "a", "chosen": "b"}]


def test_a_csv_cell_stays_the_text_it_is(tmp_path, read):
    rows = [
        {"prompt": "2 + 40?", "chosen": "42", "rejected": "None"},
        {"prompt": "x", "chosen": "NA", "rejected": "nan"},
        {"prompt": "007", "chosen": "1.0", "rejected": "true"},
    ]
    assert read(write(tmp_path / "rows.csv", rows)) == rows


def test_rows_of_json_lines_may_differ_in_fields_and_types(tmp_path, read):
    rows = [{"a": 1}, {"a": "x", "b": [1, {"c": None}]}, {"b": {"d": {}}}, {"a": None}]
    assert read(write(tmp_path / "rows.jsonl", rows)) == rows
    assert read(write(tmp_path / "rows.json", rows)) == rows


def test_a_line_separator_inside_a_json_line_does_not_end_it(tmp_path, read):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a\u2028b\x85c\x0bd\re"}, {"prompt": "f"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8", newline="")
    assert read(path) == rows


def test_rows_know_the_file_and_line_they_stood_at(tmp_path, source):
    write(tmp_path / "a.jsonl", ROWS[:3])
    (tmp_path / "b.jsonl").write_text("\n" + json.dumps(ROWS[3]) + "\n\n" + json.dumps(ROWS[4]))
    write(tmp_path / "c.json", ROWS[:2])
    write(tmp_path / "d.parquet", ROWS[:2])
    first, second, third, fourth = source(tmp_path).tables("train")
    assert first.where(2) == f"{tmp_path / 'a.jsonl'} line 3"
    assert second.rows([1, 3]) == ROWS[3:5]
    assert second.where(3) == f"{tmp_path / 'b.jsonl'} line 4"
    assert third.where(1) == f"{tmp_path / 'c.json'} item 2"
    assert fourth.where(1) == f"{tmp_path / 'd.parquet'} row 2"


BAD = [
    ("x.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"x\.jsonl line 2: not valid JSON"),
    ("x.jsonl", b'{"prompt": "a"}\n' + b"[" * 100_000 + b"\n", r"x\.jsonl line 2: not valid JSON"),
    ("x.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", r"x\.jsonl line 1: not valid JSON"),
    ("x.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', r"x\.json line 2: not valid JSON"),
    ("x.json", b"[" * 100_000, r"x\.json: not usable JSON"),
    ("x.json", b'{"rows":\n [1], "n": 1}', r"x\.json: holds one JSON object \(fields: rows, n\).* the list 'rows'"),
    ("x.json", b"[]", r"x\.json: holds no rows"),
    ("x.jsonl", b"\n\n", r"x\.jsonl: holds no rows"),
    ("x.jsonl", b"", r"x\.jsonl: holds no rows"),
    ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"x\.jsonl line 2: not UTF-8 text"),
    ("x.csv", b"prompt,chosen\na,b\nc,d\xff\n", r"x\.csv line 3: not UTF-8 text"),
    ("x.csv", b"prompt,chosen\nc,d,e\n", r"x\.csv line 2: more cells than the header"),
    ("x.csv", b"prompt,chosen\na,b\nc,d,e\n", r"x\.csv.*[Ll]ine 3"),
    ("x.csv", b"prompt,chosen\n", r"x\.csv: holds no rows"),
    ("x.csv", b"", r"x\.csv: holds no rows"),
    ("x.csv", b"prompt,chosen,prompt\na,b,c\n", r"x\.csv: its header has the column 'prompt' twice"),
    ("x.parquet", b"not parquet", r"x\.parquet: cannot be read as Parquet"),
    ("x.arrow", b"not arrow", r"x\.arrow: cannot be read as Arrow"),
    ("x.jsonl.gz", b"not gzip", r"x\.jsonl\.gz: cannot be read"),
    ("x.jsonl.zst", b"not zstd", r"x\.jsonl\.zst: cannot be read"),
    ("x.pdf", b"hello", r"x\.pdf': unknown kind of file; use one of \.json, \.jsonl.*\.gz"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=range(len(BAD)))
def test_bad_files_stop_with_their_name_and_line(tmp_path, read, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "comma.csv", "rows.parquet"])
@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst"])
def test_a_compressed_file_that_is_cut_off_says_so(tmp_path, read, name, ending):
    path = write(tmp_path / (name + ending), [{**row, "more": str(hash(str(row)))} for row in ROWS] * 300)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=rf"{path.name}.*(is cut off|cannot be read).*again"):
        read(path)


# ---- folders, globs and names


def test_a_folder_joins_its_files_and_takes_splits_from_names(tmp_path, read):
    write(tmp_path / "train-1.jsonl", ROWS[:2])
    write(tmp_path / "train-2.csv.gz", ROWS[2:4])
    write(tmp_path / "validation.json", ROWS[4:6])
    write(tmp_path / "test.jsonl", ROWS[6:])
    (tmp_path / "README.md").write_text("notes")
    assert read(tmp_path) == ROWS[:4]
    assert read(tmp_path, "eval") == ROWS[4:6]


def test_a_folder_without_split_names_is_all_training_data(tmp_path, read, source):
    write(tmp_path / "a.jsonl", ROWS[:3])
    write(tmp_path / "b.parquet", ROWS[3:])
    write(tmp_path / ".hidden" / "c.jsonl", ROWS)
    assert read(tmp_path) == ROWS
    assert "eval" not in source(tmp_path).splits


def test_folders_named_for_a_split_count_as_its_files(tmp_path, read):
    write(tmp_path / "train" / "part.jsonl", ROWS[:5])
    write(tmp_path / "eval" / "part.jsonl", ROWS[5:])
    assert read(tmp_path) == ROWS[:5]
    assert read(tmp_path, "eval") == ROWS[5:]


def test_shards_of_the_hub_are_one_split(tmp_path, read):
    for k in range(3):
        write(tmp_path / "data" / f"train-0000{k}-of-00003-0123456789abcdef.parquet", ROWS[k * 2 : k * 2 + 2])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[6:])
    assert read(tmp_path) == ROWS[:6]
    assert read(tmp_path, "eval") == ROWS[6:]


@pytest.fixture
def several(tmp_path):
    """A folder with the names of UltraFeedback's repository."""
    folder = tmp_path / "several"
    for k, name in enumerate(("train_prefs", "train_sft", "train_gen")):
        write(folder / "data" / f"{name}-00000-of-00001.parquet", ROWS[k : k + 1])
        write(folder / "data" / f"{name.replace('train', 'test')}-00000-of-00001.parquet", ROWS[k + 3 : k + 4])
    return folder


def test_several_training_splits_are_refused_with_the_list_and_choosable(several, source, read):
    with pytest.raises(
        InputError,
        match=r"has several splits to train on: train_gen, train_prefs, train_sft; choose one with .*@train_gen",
    ):
        source(several)
    for k, name in enumerate(("train_prefs", "train_sft", "train_gen")):
        assert read(f"{several}@{name}") == ROWS[k : k + 1]
        assert read(f"{several}@{name}", "eval") == ROWS[k + 3 : k + 4]
    with pytest.raises(InputError, match=r"has no split 'train'; it has .*train_gen"):
        source(f"{several}@train")


def test_saved_data_sets_are_read_with_their_splits(tmp_path, read, source):
    train, test = datasets.Dataset.from_list(ROWS[:5]), datasets.Dataset.from_list(ROWS[5:])
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == ROWS[:5]
    assert read(tmp_path / "both") == ROWS[:5]
    assert read(tmp_path / "both", "eval") == ROWS[5:]
    named = datasets.DatasetDict(train_sft=train, train_gen=test, test_sft=test)
    named.save_to_disk(tmp_path / "named")
    with pytest.raises(InputError, match="several splits to train on: train_sft, train_gen"):
        source(tmp_path / "named")
    assert read(f"{tmp_path / 'named'}@train_sft") == ROWS[:5]
    assert read(f"{tmp_path / 'named'}@train_sft", "eval") == ROWS[5:]


def test_splits_with_other_names_are_chosen_by_name(tmp_path, read, source):
    parts = datasets.DatasetDict(
        harmless=datasets.Dataset.from_list(ROWS[:3]), helpful=datasets.Dataset.from_list(ROWS[3:])
    )
    parts.save_to_disk(tmp_path / "parts")
    with pytest.raises(InputError, match=r"several splits to train on: harmless, helpful; choose one with .*@harmless"):
        source(tmp_path / "parts")
    assert read(f"{tmp_path / 'parts'}@helpful") == ROWS[3:]
    assert "eval" not in source(f"{tmp_path / 'parts'}@helpful").splits


def test_a_glob_joins_the_files_that_match(tmp_path, read, source):
    for k in range(3):
        write(tmp_path / f"part-{k}.jsonl", ROWS[k : k + 1])
    write(tmp_path / "other.jsonl", ROWS[5:])
    assert read(tmp_path / "part-*.jsonl") == ROWS[:3]
    assert read(tmp_path / "part-[02].jsonl") == [ROWS[0], ROWS[2]]
    with pytest.raises(InputError, match=r"'.*nothing-\*': holds no \.json"):
        source(tmp_path / "nothing-*")


def test_a_file_whose_name_has_signs_of_a_glob_or_a_split_is_that_file(tmp_path, read):
    for name in ("rows[1].jsonl", "me@home.jsonl"):
        assert read(write(tmp_path / name)) == ROWS


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, read, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl")
    assert read("~/rows.jsonl") == ROWS


def test_missing_and_useless_places_stop_with_a_remedy(tmp_path, source):
    with pytest.raises(InputError, match=r"nowhere\.jsonl': no such file or folder; check the path"):
        source(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty': holds no \.json, .*; put the data there"):
        source(tmp_path / "empty")
    (tmp_path / "saved").mkdir()
    for name, content in (("state.json", "{}"), ("state.json", "[]"), ("dataset_dict.json", "{"), ("state.json", "3")):
        (tmp_path / "saved" / name).write_text(content)
        with pytest.raises(InputError, match=r"the saved data set cannot be read"):
            source(tmp_path / "saved").tables("train")
        (tmp_path / "saved" / name).unlink()


@pytest.mark.parametrize("name", ["../rows.arrow", "/etc/passwd", "..", "", 3, None])
def test_a_saved_data_set_that_names_files_elsewhere_is_refused(tmp_path, source, name):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    state = tmp_path / "saved" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match=r"state\.json: _data_files names .*, which is not in this folder"):
        source(tmp_path / "saved")


def test_arrow_data_whose_offsets_are_wrong_is_refused(tmp_path, source):
    table = pa.table({"prompt": ["one", "two", "three"], "response": ["a", "b", "c"]})
    path = tmp_path / "rows.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    offsets = np.array([0, 3, 6, 11], "<i4").tobytes()
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, np.array([0, 3, 2**30, 11], "<i4").tobytes()))
    with pytest.raises(InputError, match=r"rows\.arrow: cannot be read as Arrow"):
        source(path).tables("train")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_a_compressed_file_that_grows_beyond_measure_is_refused(tmp_path, source, suffix, monkeypatch):
    monkeypatch.setattr("jaxrlhf.data.files.SMALL", 10**5)
    path = tmp_path / f"rows.jsonl{suffix}"
    zeros = b"0" * 10**6
    compress = {".gz": gzip.compress, ".bz2": bz2.compress}
    if suffix == ".zst":
        compress[suffix] = pytest.importorskip("zstandard").compress
    path.write_bytes(compress[suffix](zeros))
    with pytest.raises(InputError, match=r"grows to more than 200 times its size"):
        source(path).tables("train")


def test_a_folder_of_too_many_files_is_refused(tmp_path, source, monkeypatch):
    monkeypatch.setattr("jaxrlhf.data.sources.MAX_FILES", 3)
    for i in range(4):
        write(tmp_path / f"{i}.jsonl")
    with pytest.raises(InputError, match=r"holds more than 3 files; name a smaller one"):
        source(tmp_path)


def test_a_folder_with_evaluation_data_alone_does_not_train(tmp_path, config, tokenizer):
    write_lines(tmp_path / "only" / "test.jsonl", pairs(5))
    with pytest.raises(InputError, match=r"has only evaluation data; add training data, or give it as eval_data_path"):
        load_data(config(data_path=str(tmp_path / "only")), tokenizer, "sft")
    train, held = load_data(config(pairs(4, 10), eval_data_path=str(tmp_path / "only")), tokenizer, "sft")
    assert (len(train), len(held)) == (4, 5)


def test_suffixes_are_read_in_any_case_and_under_a_compression():
    assert [suffix_of(name) for name in ("A.JSONL.GZ", "b.Parquet", "c.csv.zst", "d.tar", "e.gz", ".json")] == [
        ".jsonl",
        ".parquet",
        ".csv",
        "",
        "",
        ".json",
    ]


def test_the_evaluation_split_is_the_partner_of_the_training_split():
    names = ("train_sft", "test_sft", "train_gen", "validation", "test_gen")
    groups = {name: name for name in names}
    assert choose_splits("x", groups, "train_gen") == {"train": "train_gen", "eval": "test_gen"}
    assert choose_splits("x", groups, "validation") == {"train": "validation"}
    assert choose_splits("x", groups, "train_sft", "validation") == {"train": "train_sft", "eval": "validation"}
    assert choose_splits("x", {"train": 1, "test": 2, "dev": 3}) == {"train": 1, "eval": 3}
    assert choose_splits("x", {"test": 2}) == {"eval": 2}


# ---- the hub


@pytest.fixture
def hub(monkeypatch):
    """The calls that reach the hub, which gives every name the splits train_a, train_b and test_a."""
    calls = []

    def load(*names, **options):
        calls.append((*names, options))
        splits = {"train_a": pairs(6), "train_b": pairs(5, 50), "test_a": pairs(4, 100)}
        return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_a_hub_name_carries_configuration_and_split(hub, config, tokenizer):
    train, held = load_data(config(data_path="someone/pairs:main@train_a"), tokenizer, "reward")
    assert {call[:2] for call in hub} == {("someone/pairs", "main")}
    assert sorted(prompts(train)) == [f"Human: question {i} Assistant:" for i in range(6)]
    assert sorted(prompts(held)) == [f"Human: question {i} Assistant:" for i in range(100, 104)]
    hub.clear()
    train, held = load_data(config(data_path="someone/pairs@train_b"), tokenizer, "reward")
    assert {call[:2] for call in hub} == {("someone/pairs", None)}
    assert sorted(prompts(train) + prompts(held)) == [f"Human: question {i} Assistant:" for i in range(50, 55)]


def test_hub_splits_are_refused_with_the_list(hub, config, tokenizer):
    with pytest.raises(InputError, match="several splits to train on: train_a, train_b; choose one with someone/pai"):
        load_data(config(data_path="someone/pairs"), tokenizer, "reward")
    with pytest.raises(InputError, match="has no split 'train_c'; it has train_a, train_b, test_a"):
        load_data(config(data_path="someone/pairs@train_c"), tokenizer, "reward")


def test_a_name_the_hub_cannot_give_stops_with_a_remedy(source, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"'someone/pairs': neither a file or folder here nor .*no network.*or give"):
        source("someone/pairs")


def test_without_network_the_real_hub_client_says_so(source, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'someone/pairs-that-nobody-has': neither a file or folder here"):
        source("someone/pairs-that-nobody-has")
