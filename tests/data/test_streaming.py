"""Streaming: an order that depends on the seed and the step alone, however the run came to that step."""

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
from rows import pairs, prompts, write_lines

from jaxrlhf.data import load_data, streaming
from jaxrlhf.data.reading import HEAD
from jaxrlhf.errors import InputError

BATCH = 4


@pytest.fixture
def stream(config, tmp_path):
    """`stream(step, rows, **options)`: streamed training data, opened anew."""

    def load(step="sft", rows=None, *, tokenizer, **options):
        options = {"streaming": True, "shuffle_buffer": 16, "max_length": 48} | options
        return load_data(config(rows if rows is not None else pairs(50), **options), tokenizer, step)

    return load


def rows_of(data, steps):
    """The (prompt and first response) ids of each row that each step trains on."""
    return [
        [tuple(row["ids_0"].tolist()) for unit in data.values(data.indices(step, BATCH), ["ids_0"]) for row in unit]
        for step in steps
    ]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("step", ["sft", "reward", "dpo", "ppo"])
def test_a_step_is_the_same_after_a_fresh_start_far_into_the_stream(stream, tokenizer, step, packing):
    steps = 40  # several passes over the rows
    data, _ = stream(step, tokenizer=tokenizer, packing=packing)
    expected = [data.batch(data.indices(k, BATCH)) for k in range(steps)]
    for k in (steps - 1, 9, 23):
        fresh, _ = stream(step, tokenizer=tokenizer, packing=packing)
        found = fresh.batch(fresh.indices(k, BATCH))
        assert found.keys() == expected[k].keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[k][name])
    record = list(Path(data.streams[0].record).parent.glob("*"))
    assert bool(record) == (packing and step != "ppo")


def test_each_row_comes_once_per_pass_in_another_order(stream, tokenizer):
    data, held = stream(tokenizer=tokenizer)
    n = 50 - len(held)
    rows = [row for step in rows_of(data, range(3 * n)) for row in step]
    passes = [rows[first : first + n] for first in range(0, 3 * n, n)]
    assert len(set(passes[0])) == n
    assert set(passes[0]) == set(passes[1]) == set(passes[2])
    assert passes[0] != passes[1] != passes[2]


def test_a_packed_pass_holds_each_row_once(stream, tokenizer):
    data, held = stream(tokenizer=tokenizer, packing=True)
    rows, step = [], 0
    n = 50 - held.rows
    while len(rows) < n:
        rows += rows_of(data, [step])[0]
        step += 1
    assert len(set(rows[:n])) == n


def test_held_out_prompts_are_never_trained_on(stream, tokenizer):
    rows = [{**row, "chosen": f"{row['chosen']} {k}"} for k in range(3) for row in pairs(40)]
    data, held = stream("sft", rows, tokenizer=tokenizer, eval_fraction=0.2)
    trained = {data.text(int(unit))["prompt"] for step in range(60) for unit in data.indices(step, BATCH)}
    assert trained and set(prompts(held))
    assert not trained & set(prompts(held))
    assert trained | set(prompts(held)) == {f"Human: question {i} Assistant:" for i in range(40)}


def test_steps_of_a_split_train_on_different_prompts(stream, tokenizer):
    seen = {}
    for step in ("sft", "reward", "ppo"):
        data, held = stream(step, tokenizer=tokenizer, data_split="1,1,1", eval_fraction=0.2)
        units = {int(unit) for number in range(40) for unit in data.indices(number, BATCH)}
        seen[step] = {data.text(unit)["prompt"] for unit in units}
    assert sum(map(len, seen.values())) + len(set(prompts(held))) == 50
    assert len(set().union(*seen.values(), prompts(held))) == 50


def test_a_stream_of_several_sources_keeps_their_shares(stream, tokenizer, config, tmp_path):
    entries = [
        {"path": write_lines(tmp_path / "a.jsonl", pairs(30)), "weight": 3},
        {"path": write_lines(tmp_path / "b.jsonl", pairs(200, 50)), "weight": 1},
    ]
    (tmp_path / "mix.yaml").write_text(json.dumps(entries))
    options = {"data_mixture": str(tmp_path / "mix.yaml"), "streaming": True, "shuffle_buffer": 8}
    data, _ = load_data(config(**options), tokenizer, "sft")
    numbers = [int(data.text(int(u))["prompt"].split()[2]) for k in range(10) for u in data.indices(k, BATCH)]
    assert sum(number < 50 for number in numbers) == 30
    assert data.progress(10, BATCH) == {"data/a/share": 0.75, "data/b/share": 0.25}


def test_unusable_rows_are_left_out_of_the_stream(stream, tokenizer):
    rows = pairs(50)
    rows[7]["chosen"] = None
    rows[9] = "text"
    data, held = stream("sft", rows, tokenizer=tokenizer)
    seen = {row for step in rows_of(data, range(40)) for row in step}
    assert len(seen) == 48 - len(held)


def test_processes_read_their_share_of_a_batch(stream, tokenizer):
    data, _ = stream(tokenizer=tokenizer, packing=True)
    indices = data.indices(3, BATCH)
    whole = data.batch(indices)
    parts = [data.batch(indices, held=np.arange(BATCH) == k) for k in range(BATCH)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.stack([parts[k][name][k] for k in range(BATCH)]), array)


@pytest.fixture
def four_processes(monkeypatch):
    """`four_processes(work)`: the results of `work(process)` on four processes, played by threads."""
    own, met, given = threading.local(), threading.Barrier(4, timeout=60), [None] * 4

    def gather(what, value):
        given[own.process] = what, value
        met.wait()
        found = list(given)
        met.wait()
        assert len({name for name, _ in found}) == 1
        return [each for _, each in found]

    def run(work):
        def play(process):
            own.process = process
            return work(process)

        with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
            patch.setattr(streaming, "gather", gather)
            patch.setattr(jax, "process_index", lambda: own.process)
            patch.setattr(jax, "process_count", lambda: 4)
            return list(pool.map(play, range(4)))

    return run


@pytest.mark.parametrize("step", ["sft", "reward"])
def test_four_processes_share_the_tokenising_of_packed_rows(
    config, tokenizer, monkeypatch, four_processes, tmp_path, step
):
    rows, steps = pairs(150), [0, 1, 15, 29, 3]  # another pass, and back
    rows[3]["chosen"] = None
    rows[8]["prompt"] = "question " * 60  # too long
    counts, real = [0] * 4, streaming.tokenise

    def counted(rows, *args):
        counts[jax.process_index()] += len(rows)
        return real(rows, *args)

    path = write_lines(tmp_path / "rows.jsonl", rows)
    settings = config(
        data_path=path, streaming=True, packing=True, long_prompts="drop", shuffle_buffer=64, max_length=48
    )

    def load():  # a tokenizer serves one thread at a time
        return load_data(settings, copy.deepcopy(tokenizer), step)[0]

    whole, streams = load(), [load() for _ in range(4)]
    monkeypatch.setattr(streaming, "tokenise", counted)
    expected = [whole.batch(whole.indices(k, BATCH)) for k in steps]
    alone, counts[0] = counts[0], 0
    streams[2] = load()  # one process has the record of an earlier run
    assert streams[2].streams[0].units and not streams[1].streams[0].units

    def work(process):
        data, held = streams[process], np.arange(BATCH) == process
        return [data.batch(data.indices(k, BATCH), held=held) for k in steps]

    parts = four_processes(work)
    for k, batch in enumerate(expected):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.stack([parts[i][k][name][i] for i in range(4)]), array)
    assert max(counts) < 0.6 * alone


@pytest.mark.parametrize(("most", "count"), [(6, 6), (0, 400)])
def test_only_the_needed_rows_of_a_data_sets_evaluation_split_are_read(config, tokenizer, monkeypatch, most, count):
    read = []

    def rows(split, first):
        for row in pairs(400, first):
            read.append(split)
            yield row

    def load(*_, streaming=False):
        assert streaming, "all splits would be downloaded"
        splits = {"train": 0, "test": 1000}
        return {
            name: datasets.IterableDataset.from_generator(rows, gen_kwargs={"split": name, "first": first})
            for name, first in splits.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = {"streaming": True, "shuffle_buffer": 16, "max_eval_samples": most}
    data, held = load_data(config(data_path="someone/pairs", **options), tokenizer, "reward")
    assert sorted(int(prompt.split()[2]) for prompt in prompts(held)) == list(range(1000, 1000 + count))
    looked_at = read.count("test") - count
    assert max(looked_at, read.count("train")) < HEAD + 16, "the first rows tell the format"
    assert all(int(data.text(int(unit))["prompt"].split()[2]) < 400 for unit in data.indices(0, BATCH))


def test_the_number_of_rows_of_a_stream_is_not_known(stream, tokenizer):
    data, _ = stream(tokenizer=tokenizer)
    assert data.size is None and "epoch" not in data.progress(3, BATCH)
    with pytest.raises(InputError, match="streaming requires max_steps"):
        len(data)


def test_what_cannot_stream_is_refused(stream, tokenizer):
    unpaired = [{"prompt": f"q{i // 2}", "completion": "a", "label": bool(i % 2)} for i in range(20)]
    with pytest.raises(InputError, match="unpaired preferences, whose pairs span rows; reward cannot stream them"):
        stream("reward", unpaired, tokenizer=tokenizer)
    assert stream("sft", unpaired, tokenizer=tokenizer, eval_fraction=0.3)
    bad = [{"prompt": "q", "completion": None}] * 20
    with pytest.raises(InputError, match=r"no usable row (in the stream|is held out)"):
        data, _ = stream("sft", bad, tokenizer=tokenizer)
        data.indices(0, BATCH)
        data.batch(data.indices(0, BATCH))


def test_packed_rows_of_another_length_are_counted_anew(stream, tokenizer):
    options = {"packing": True, "eval_fraction": 0.1, "tokenizer": tokenizer}
    stream(max_length=24, **options)[0].indices(0, BATCH)
    first, _ = stream(max_length=24, **options)
    first.batch(first.indices(6, BATCH))
    wide, _ = stream(max_length=96, **options)
    batch = wide.batch(wide.indices(6, BATCH))
    assert wide.streams[0].record != first.streams[0].record
    assert batch["input_ids"].shape == (BATCH, 96) and batch["segment_ids"].max() > 4


def test_a_row_that_is_too_long_gives_its_place_to_the_next_one(stream, tokenizer):
    rows = pairs(30)
    rows[4]["prompt"] = "question " * 60
    data, _ = stream("reward", rows, tokenizer=tokenizer, long_prompts="drop", eval_fraction=0.1)
    for k in range(12):
        batch = data.batch(data.indices(k, BATCH))
        assert (batch["chosen_loss_mask"].sum(1) > 0).all() and batch["row_mask"].all()


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        ({"limit": 3}, {}, "takes no limit"),
        ({"epochs": 2}, {}, "takes no epochs"),
        ({}, {}, "give each one a weight"),
        ({"weight": 1}, {"max_train_samples": 5}, "takes no max_train_samples"),
        ({"weight": 1}, {"pair_rule": "all"}, "pair_rule=all"),
    ],
)
def test_settings_that_need_the_size_of_a_stream_are_refused(tmp_path, config, tokenizer, entry, options, message):
    weight = {"weight": 1} if "weight" in entry else {}
    entries = [
        {"path": write_lines(tmp_path / "a.jsonl", pairs(30)), **entry},
        {"path": write_lines(tmp_path / "b.jsonl", pairs(30, 50)), **weight},
    ]
    (tmp_path / "mix.yaml").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=message):
        load_data(config(data_mixture=str(tmp_path / "mix.yaml"), streaming=True, **options), tokenizer, "reward")
