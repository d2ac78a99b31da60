"""The benchmark of tokenizing compares the same work."""

import argparse
import importlib
import json
from pathlib import Path

import pytest

from jaxrlhf.data import DataConfig, load_data, load_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("tokenizing")


def test_the_peer_makes_the_tokens_that_ours_makes(tmp_path, benchmark):
    rows = [{"prompt": f"p{i} ?", "chosen": f"yes {i}", "rejected": "no, " * (i + 1)} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer("demo")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    made = benchmark.by_map(columns, tokenizer, 64)
    config = DataConfig(
        data_path=(str(path),), eval_data_path=("demo",), data_cache_dir=str(tmp_path / "cache"), max_length=64
    )
    (part,) = load_data(config, tokenizer, "dpo")[0].parts
    ours = part.fetch(range(len(rows)), list(made))
    # The built-in template writes nothing behind the end token, so the peer's ids end where ours do.
    assert {name: [list(map(int, ids)) for ids in values] for name, values in ours.items()} == made


def test_every_side_counts_rows_tokens_and_seconds(tmp_path, benchmark):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = argparse.Namespace(data_path=str(path), tokenizer_name_or_path="demo", processes=1, max_length=64)
    found = {side: benchmark.run(side, given, tmp_path / side) for side in ("ours", "map", "map by row")}
    assert found["map"]["rows"] == found["map by row"]["rows"] == 6
    assert found["ours"]["rows"] == 5, "one prompt is held out"
    assert found["map"]["tokens"] == found["map by row"]["tokens"] > found["ours"]["tokens"] > 0
    assert all(each["wall"] > 0 and each["cpu"] > 0 for each in found.values())
