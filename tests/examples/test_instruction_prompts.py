"""The prompts that examples/smollm2/instruction_prompts.py makes."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jaxrlhf.rewards.instructions import CHECKS, LANGUAGE_KINDS, read_instructions

FOLDER = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture(scope="module")
def maker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setattr("importlib.util.find_spec", lambda name: True)  # as if langdetect were installed
        yield importlib.import_module("instruction_prompts")


@pytest.fixture(scope="module")
def rows(maker):
    return maker.make_rows(0, maker.TOPICS, 2000, set())


def test_prompts_are_distinct_and_have_every_kind_about_as_often_as_its_weight(maker, rows):
    assert len({row["prompt"] for row in rows}) == 2000
    counts = Counter(kind for row in rows for kind in row["instruction_id_list"])
    assert counts.keys() == CHECKS.keys() == maker.DRAWS.keys()
    total = sum(weight for weight, _ in maker.DRAWS.values())
    for kind, (weight, _) in maker.DRAWS.items():
        share = counts[kind] / counts.total()
        assert 0.4 < share / (weight / total) < 1.6, kind
    assert set(map(len, (row["kwargs"] for row in rows))) == {1, 2, 3}


def test_every_row_is_read_by_the_checks_and_says_its_arguments(rows):
    for row in rows:
        for kind, arguments in read_instructions(row["instruction_id_list"], row["kwargs"]):
            for name, value in arguments.items():
                if name in ("keyword", "end_phrase", "letter", "first_word", "prompt_to_repeat", "section_spliter"):
                    assert str(value) in row["prompt"], (kind, name)
                if name in ("keywords", "forbidden_words"):
                    assert all(word in row["prompt"] for word in value)
                if name.startswith("num_") or name.endswith("frequency"):
                    assert str(value) in row["prompt"] or str(value - 1) in row["prompt"], (kind, name)


def test_no_row_has_two_instructions_that_contradict_each_other(maker, rows):
    for row in rows:
        kinds = row["instruction_id_list"]
        assert all(maker.agree(set(kinds[:k]), kind) for k, kind in enumerate(kinds))
        if "keywords:forbidden_words" in kinds:
            assert "keywords:existence" not in kinds


def test_the_same_seed_makes_the_same_rows_and_held_out_topics_are_others(maker, rows):
    assert maker.make_rows(0, maker.TOPICS, 50, set()) == rows[:50]
    assert maker.make_rows(1, maker.TOPICS, 50, set()) != rows[:50]
    assert len(maker.TOPICS) >= 150 and len(maker.TASKS) >= 25 and not {*maker.TOPICS} & {*maker.EVAL_TOPICS}
    held_out = maker.make_rows(1, maker.EVAL_TOPICS, 100, set())
    assert not any(topic in row["prompt"] for row in held_out for topic in maker.TOPICS)


def test_the_command_writes_both_files_and_stops_at_a_prompt_like_a_given_one(rows, tmp_path):
    command = [
        sys.executable,
        FOLDER / "instruction_prompts.py",
        "--output_dir",
        tmp_path,
        "--train",
        "40",
        "--eval",
        "9",
    ]
    command += ["--leave_out", *LANGUAGE_KINDS]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(FOLDER.parents[1])})
    made = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text("utf-8").splitlines()]
    assert len(made) == 40 and len((tmp_path / "eval.jsonl").read_text("utf-8").splitlines()) == 9
    assert not {*LANGUAGE_KINDS} & {kind for row in made for kind in row["instruction_id_list"]}
    longest = max((row["prompt"] for row in made), key=len)
    (tmp_path / "others.jsonl").write_text(json.dumps({"prompt": f"Now. {longest}"}) + "\n", "utf-8")
    refused = subprocess.run(
        [*command, "--apart_from", tmp_path / "others.jsonl"],
        env={"PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1 and "is like one made here" in refused.stderr


def test_plain_tasks_are_distinct_and_half_of_them_are_given(maker):
    given = [f"How many legs has animal {i}?" for i in range(40)] * 2 + ["Two\nlines", "word " * 50]
    found = [row["prompt"] for row in maker.plain_rows(0, 60, given)]
    assert len(set(found)) == 60 and sum(prompt in given[:40] for prompt in found) == 30
    assert not {"Two\nlines", "word " * 50} & set(found)
    assert maker.plain_rows(0, 20, []) == maker.plain_rows(0, 20, [])
