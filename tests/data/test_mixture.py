"""The mixture: sources with weights, limits, steps and templates, in an order that depends on nothing but the seed."""

import json

import numpy as np
import pytest
from rows import encoded, pairs, prompts, write_lines

from jaxrlhf.config import load_yaml, save_yaml
from jaxrlhf.data import load_data
from jaxrlhf.data.formats import STEPS
from jaxrlhf.data.mixture import parse_mixture, read_inline
from jaxrlhf.data.order import Schedule
from jaxrlhf.data.selection import split_among
from jaxrlhf.errors import InputError
from jaxrlhf.trainers.sft import SFTConfig

WEIGHTS = [(1, 1), (2, 1), (0.7, 0.2, 0.1), (np.pi, np.e, 1, 0.013), (1,) * 7, (1000, 1, 1), (0.5, 0.25, 0.125, 0.125)]


def sources_of(schedule, n):
    return schedule.take(np.arange(n))[0]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_after_every_position_each_source_is_within_one_unit_of_its_share(weights):
    n = 4000
    source, number = Schedule(weights).take(np.arange(n))
    given = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    due = np.arange(1, n + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(given - due).max() < 1
    for k in range(len(weights)):
        np.testing.assert_array_equal(number[source == k], np.arange(given[-1, k]))


def test_the_shares_hold_again_among_those_left_when_a_source_has_ended():
    weights, limits = np.array([0.5, 0.3, 0.2]), [100, None, 150]
    source = sources_of(Schedule(weights, limits), 5000)
    ends = [int(np.flatnonzero(source == k)[-1]) for k in (0, 2)]
    assert [(source == k).sum() for k in (0, 2)] == [100, 150]
    start, open_sources = 0, [0, 1, 2]
    for end, closed in ((ends[0], 0), (ends[1], 2)):
        part = source[start : end + 1]
        share = weights[open_sources] / weights[open_sources].sum()
        given = np.cumsum(part[:, None] == np.array(open_sources), axis=0)
        assert np.abs(given - np.arange(1, len(part) + 1)[:, None] * share).max() < 1
        start = end + 1
        open_sources.remove(closed)
    assert set(source[start:]) == {1}


def test_when_all_sources_have_ended_all_begin_again():
    schedule = Schedule([2, 1], [10, 20])
    source, number = schedule.take(np.arange(60))
    for first in (0, 30):
        assert [(source[first : first + 30] == k).sum() for k in (0, 1)] == [10, 20]
    np.testing.assert_array_equal(source[:30], source[30:])
    assert number.max() == 39


def test_any_position_can_be_asked_first():
    whole = sources_of(Schedule([0.6, 0.3, 0.1], [50, None, None]), 1000)
    fresh = Schedule([0.6, 0.3, 0.1], [50, None, None])
    np.testing.assert_array_equal(fresh.take(np.arange(700, 720))[0], whole[700:720])
    np.testing.assert_array_equal(fresh.counts(333), np.bincount(whole[:333], minlength=3))


# ---- loading


@pytest.fixture
def mixed(config, tmp_path):
    """`mixed({name: (rows, entry)}, **options)`: settings with a mixture file of these sources."""

    def make(sources, **options):
        entries = [
            {"path": write_lines(tmp_path / f"{name}.jsonl", rows), **entry} for name, (rows, entry) in sources.items()
        ]
        path = tmp_path / "mixture.yaml"
        path.write_text(json.dumps({"sources": entries}))
        return config(data_mixture=str(path), **options)

    return make


def shares(data, steps, batch):
    units = np.concatenate([data.indices(step, batch) for step in range(steps)])
    names = [data.source(int(unit))[0] for unit in units]
    return {name: names.count(name) / len(names) for name in data.sources}


def test_rows_come_at_the_rate_of_the_weights_and_small_sources_repeat(mixed, tokenizer):
    settings = mixed({"a": (pairs(10), {"weight": 3}), "b": (pairs(200, 50), {"weight": 1})})
    train, held = load_data(settings, tokenizer, "sft")
    assert shares(train, 25, 8) == {"a": 0.75, "b": 0.25}
    assert train.progress(25, 8) | {"epoch": 0} == {"epoch": 0, "data/a/share": 0.75, "data/b/share": 0.25}
    units = np.concatenate([train.indices(step, 8) for step in range(25)])
    own = [unit for unit in units if train.source(int(unit))[0] == "a"]
    sizes = train.rows_by_source()["a"].size
    for first in range(0, len(own) - sizes, sizes):
        assert len(set(own[first : first + sizes])) == sizes, "each row once, then all again"
    assert set(held.sources) == {"a", "b"}


def test_without_weights_each_source_is_as_large_as_it_is(mixed, tokenizer):
    settings = mixed({"a": (pairs(20), {}), "b": (pairs(60, 50), {})}, eval_fraction=0.1)
    train, _ = load_data(settings, tokenizer, "sft")
    assert len(train) == 72
    units = np.concatenate([train.indices(step, 8) for step in range(9)])
    assert sorted(units) == list(range(72)), "one epoch is every row once"


def test_the_epochs_limit_ends_a_source(mixed, tokenizer):
    sources = {"a": (pairs(10), {"weight": 1, "epochs": 2, "evaluation": "none"}), "b": (pairs(100, 50), {"weight": 1})}
    train, held = load_data(mixed(sources), tokenizer, "sft")
    units = np.concatenate([train.indices(step, 10) for step in range(20)])
    names = [train.source(int(unit))[0] for unit in units]
    assert names.count("a") == 20 and "a" not in names[41:]
    assert held.sources == ("b",)


def test_limits_steps_fields_and_evaluation_of_a_source(mixed, tokenizer, tmp_path):
    other = write_lines(tmp_path / "other.jsonl", [{"q": "test", "a": "yes"}] * 3)
    sources = {
        "a": ([{"q": f"x{i}", "a": "yes"} for i in range(40)], {"fields": {"prompt": "q", "completion": "a"}}),
        "b": (pairs(30, 50), {"limit": 5}),
    }
    sources["a"][1].update(limit=7, steps=["sft"], evaluation=other)
    settings = mixed(sources)
    train, held = load_data(settings, tokenizer, "sft")
    assert [len(part) for part in train.parts] == [7, 5]
    assert sorted(len(part) for part in held.parts) == [2, 3]
    for step in ("reward", "ppo", "dpo"):
        assert load_data(settings, tokenizer, step)[0].sources == ("b",)


def test_a_source_has_the_template_that_it_names(mixed, tokenizer):
    sources = {"a": (pairs(5), {"template": "Q: {prompt} A: {response}"}), "b": (pairs(5, 50), {})}
    train, _ = load_data(mixed(sources), tokenizer, "sft")
    begins = {train.source(i)[0]: train.text(i)["prompt"].split()[0] for i in range(len(train))}
    assert begins == {"a": "Q:", "b": "Human:"}


@pytest.mark.parametrize("packing", [False, True])
def test_the_order_is_that_of_one_process_on_four_and_after_a_resume(mixed, tokenizer, packing):
    def load():
        sources = {"a": (pairs(30), {"weight": 2, "epochs": 1.5}), "b": (pairs(50, 50), {"weight": 1})}
        return load_data(mixed(sources, packing=packing, max_length=64), tokenizer, "sft")[0]

    data = load()
    batches = [data.batch(data.indices(step, 8)) for step in range(12)]
    resumed = load()
    for step in (11, 3, 7):
        indices = resumed.indices(step, 8)
        whole = batches[step]
        parts = [resumed.batch(indices, held=np.arange(8) // 2 == process) for process in range(4)]
        for name, array in whole.items():
            np.testing.assert_array_equal(resumed.batch(indices)[name], array)
            np.testing.assert_array_equal(
                np.concatenate([p[name][2 * k : 2 * k + 2] for k, p in enumerate(parts)]), array
            )


def test_the_rows_of_a_source_do_not_depend_on_the_others(mixed, tokenizer):
    alone, _ = load_data(mixed({"a": (pairs(30), {"weight": 1})}, data_split="1,1,1"), tokenizer, "reward")
    both, _ = load_data(
        mixed({"a": (pairs(30), {"weight": 1}), "b": (pairs(10, 50), {"weight": 1})}, data_split="1,1,1"),
        tokenizer,
        "reward",
    )
    assert encoded(alone) == encoded(both, both.rows_by_source()["a"])
    assert len(prompts(both)) == len(alone) + 3


# ---- bad mixtures


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"path": "a", "weight": 0}], r"source 1: .*weight.*0"),
        ([{"path": "a", "weight": -2}], r"source 1: .*weight.*-2"),
        ([{"path": "a", "weight": "much"}], r"source 1: .*weight.*much"),
        ([{"path": "a", "weight": 1}, {"weight": 2}], r"source 2: a source of data_mixture has no path"),
        ([{"path": "a"}, 7], r"source 2 is not a mapping with a path, but int"),
        (
            [{"path": "a", "prompt_field": "q"}],
            r"unknown setting prompt_field; there are path, name, .*fields",
        ),
        (
            [{"path": "a", "name": "n"}, {"path": "b", "name": "n"}],
            r"two sources have the name 'n'; give one of them another `name`",
        ),
        ([{"path": "a", "weight": 1}, {"path": "b"}], r"source 'b' has no weight, but others have"),
        ([{"path": "a", "wieght": 1}], r"source 1: .*wieght"),
        (
            [{"path": "a", "steps": ["sft", "rl"]}],
            r"source 1: steps 'rl' of a: must be one of sft, reward, ppo, dpo, kto",
        ),
        ([{"path": "a", "format": "chat"}], r"source 1: format 'chat' of a: must be one of"),
        ([{"path": "a", "epochs": -1}], r"source 1: .*epochs.*-1"),
        ([], r"names no sources"),
        ({"source": []}, r"unknown key 'source'; the file holds a list `sources`"),
        ("text", r"must hold a list of sources, each with a path"),
    ],
)
def test_a_mixture_that_makes_no_sense_names_the_source_and_the_field(tmp_path, entries, message):
    path = tmp_path / "mixture.yaml"
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=message):
        parse_mixture([str(path)])


def test_sources_whose_files_have_one_name_are_called_by_their_folders():
    paths = ["x/train.jsonl", "y/train.jsonl", "y/train.csv"]
    entries = [json.dumps({"path": path, "weight": 1}) for path in paths]
    named = json.dumps({"path": "z.jsonl", "weight": 1, "name": "y_train"})
    assert [source.short_name for source in parse_mixture(entries)] == ["train", "y_train", "train_2"]
    assert [source.short_name for source in parse_mixture([*entries[:2], named])] == ["train", "train_2", "y_train"]


def test_a_mixture_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data_mixture '.*nowhere.yaml': cannot be read .*check the path"):
        parse_mixture([str(tmp_path / "nowhere.yaml")])
    (tmp_path / "bad.yaml").write_text("- [")
    with pytest.raises(InputError, match=r"data_mixture '.*bad.yaml': not valid YAML"):
        parse_mixture([str(tmp_path / "bad.yaml")])


def test_a_mixture_may_stand_in_the_yaml_of_the_run():
    values = read_inline([{"path": "a", "weight": "2.5", "steps": ["sft"]}, {"path": "b", "weight": "1"}])
    first, second = parse_mixture(values)
    assert (first.path, first.weight, first.steps) == ("a", 2.5, ("sft",))
    assert second.weight == 1


def test_a_mixture_in_yaml_keeps_every_key_of_its_sources(tmp_path):
    text = "data_mixture:\n  - {path: 'a,b', steps: [sft], weight: 2}\n  - {path: c, weight: 1}\n"
    (tmp_path / "run.yaml").write_text(text)
    config = load_yaml(SFTConfig, tmp_path / "run.yaml")
    assert [(s.path, s.steps, s.weight) for s in config.data.sources] == [("a,b", ("sft",), 2.0), ("c", STEPS, 1.0)]
    save_yaml(config, tmp_path / "again.yaml")
    assert load_yaml(SFTConfig, tmp_path / "again.yaml") == config


def test_a_source_for_one_step_gives_it_all_rows_whatever_the_split(mixed, tokenizer, tmp_path):
    sources = {
        "a": (pairs(40), {"steps": ["sft"]}),
        "b": (pairs(40, 50), {}),
        "c": (pairs(40, 100), {"steps": ["sft", "ppo"]}),
    }
    evaluation = write_lines(tmp_path / "other.jsonl", pairs(3, 200))
    train, _ = load_data(mixed(sources, data_split="1,2,1", eval_data_path=(evaluation,)), tokenizer, "sft")
    assert [len(part) for part in train.parts] == [40, 10, 20]
    assert split_among(("sft",), "0,1,1") == "1.0,0.0,0.0"


def test_paths_and_a_mixture_exclude_each_other_and_a_step_needs_a_source(config, mixed, tokenizer):
    with pytest.raises(InputError, match="data_path and data_mixture exclude each other"):
        config(data_path="a", data_mixture="b.yaml")
    with pytest.raises(InputError, match="no source serves the step ppo"):
        load_data(mixed({"a": (pairs(9), {"steps": "sft"})}), tokenizer, "ppo")


@pytest.mark.parametrize("text", ["{bad", '{"path": "a"', '{"a": "[["}', '{"path":' + "[" * 2000 + "}"])
def test_a_source_on_the_command_line_that_is_no_json_is_refused(text):
    with pytest.raises(InputError, match=r"(?s)data_mixture: .* is not valid JSON .*write the sources to a YAML file"):
        parse_mixture((text,))
