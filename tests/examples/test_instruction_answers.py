"""The answers that examples/smollm2/instruction_answers.py edits so that they follow instructions."""

import importlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jaxrlhf.rewards.instructions import LANGUAGE_KINDS, instructions

FOLDER = Path(__file__).parents[2] / "examples" / "smollm2"
ANSWER = """Dear aunt, the first **snow** has come to our village, and the children are happy.
1. They build a snowman, with a carrot for its nose.
2. They skate.
The lake is not frozen yet. We drink hot tea by the window. Will you visit us soon? I hope so!"""


@pytest.fixture(scope="module")
def maker():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("instruction_answers")


@pytest.fixture(scope="module")
def source():
    return [{"prompt": f"Write letter {i} to my aunt", "chosen": ANSWER, "rejected": "No."} for i in range(300)]


@pytest.fixture(scope="module")
def rows(maker, source):
    return maker.make_answers(source, 4, 0, {*LANGUAGE_KINDS})


def test_every_kind_is_made_and_most_answers_can_be_edited(maker, rows):
    assert len(rows) > 0.8 * 1200
    counts = Counter(kind for row in rows for kind in row["kinds"])
    assert counts.keys() == maker.EDITS.keys() - {*LANGUAGE_KINDS}
    assert min(counts.values()) >= 5
    assert all(row["prompt"].count("Write letter") >= 1 and "aunt." in row["prompt"] for row in rows)


def test_answers_are_shortened_to_whole_sentences(maker):
    cut = ANSWER + " And then we w"
    found = {maker.shortened(cut, 100, maker.random.Random(seed)) for seed in range(40)}
    assert all(cut.startswith(text) and text[-1] in ".!?" for text in found) and ANSWER in found and len(found) > 3
    assert all(len(maker.shortened(cut, 20, maker.random.Random(seed)).split()) <= 20 for seed in range(10))
    assert maker.shortened("No end to", 100, maker.random.Random(0)) == "No end to"


def test_the_edits_are_what_a_person_would_do(maker):
    edit = lambda kind, **given: maker.EDITS[kind](ANSWER, given, maker.random.Random(0))  # noqa: E731
    assert edit("change_case:english_lowercase") == ANSWER.lower()
    quoted = edit("startend:quotation")
    assert quoted[0] == quoted[-1] == '"' and quoted.count('"') == 2
    assert edit("detectable_format:number_bullet_lists", num_bullets=2).splitlines()[1].endswith("They skate.")
    assert len(edit("detectable_format:number_bullet_lists", num_bullets=4).splitlines()) == 4
    assert json.loads(edit("detectable_format:json_format").removeprefix("```json").removesuffix("```"))
    assert edit("combination:repeat_prompt", prompt_to_repeat="Say it.") == f"Say it.\n\n{ANSWER}"
    assert edit("combination:two_responses", other="No.") == f"{ANSWER}\n******\nNo."
    assert edit("detectable_format:title").startswith("<<Dear Aunt The")
    assert edit("keywords:forbidden_words", forbidden_words=["tea", "carrot"]) == (
        "Dear aunt, the first **snow** has come to our village, and the children are happy.\n"
        "2. They skate.\n"
        "The lake is not frozen yet. Will you visit us soon? I hope so!"
    )
    short = edit("length_constraints:number_words", num_words=20, relation="less than")
    assert short == ANSWER.splitlines()[0]
    assert edit("length_constraints:number_words", num_words=20, relation="at least") == ANSWER
    assert edit("detectable_format:number_highlighted_sections", num_highlights=9).count("*") == 14
    upper = edit("change_case:capital_word_frequency", capital_relation="at least", capital_frequency=2)
    assert 2 <= sum(word.isupper() for word in upper.split() if len(word) > 3) <= 4


def test_an_answer_that_no_edit_can_mend_is_left_out(maker):
    row = {
        "prompt": "Write at least 500 words.",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"num_words": 500, "relation": "at least"}],
    }
    assert maker.edited(ANSWER, "", row, maker.random.Random(0)) is None
    row["kwargs"][0]["num_words"] = 20
    text = maker.edited(ANSWER, "", row, maker.random.Random(0))
    assert text is not None and instructions([""], [text], [row["instruction_id_list"]], [row["kwargs"]]) == [1.0]


def test_the_command_leaves_out_what_does_not_suit_and_what_is_like_a_benchmark(maker, source, tmp_path):
    code = {"prompt": "Say it in code", "completion": "```python\n" + "print('it')\n" * 20 + "```"}
    like = {"prompt": "what are the nine most famous towers of the whole wide world", "completion": ANSWER}
    data, benchmark = tmp_path / "data.jsonl", tmp_path / "benchmark.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*source[:30], code, like]), "utf-8")
    benchmark.write_text(json.dumps({"prompt": like["prompt"] + "? No commas."}), "utf-8")
    run = [sys.executable, FOLDER / "instruction_answers.py", "--data_path", data, "--no_langdetect"]
    output = tmp_path / "out" / "followed.jsonl"
    shown = subprocess.run(
        [*run, "--output", output, "--apart_from", benchmark, "--rows", "40"],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(FOLDER.parents[1])},
    ).stdout
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert "left out 1 prompts" in shown and "40 rows, from 30 of 32 answers" in shown
    assert len(rows) == 40 and rows[0].keys() == {"prompt", "completion", "kinds"}
    assert not any("towers" in row["prompt"] or "in code" in row["prompt"] for row in rows)
