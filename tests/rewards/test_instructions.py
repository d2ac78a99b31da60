"""The reward function `instructions`: its verdicts beside those of lm-eval, what it refuses, and its scores."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.rewards import Rewards
from jaxrlhf.rewards.instructions import CHECKS, LANGUAGE_KINDS, followed, read_instructions
from jaxrlhf.rewards.sentences import capital_words, sentences

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERDICTS = json.loads((FIXTURES / "instruction_verdicts.json").read_text("utf-8"))
HAS_LANGDETECT = importlib.util.find_spec("langdetect") is not None


def compare(rows):
    """The verdicts that differ from ours among those on which lm-eval is of one mind, and the number of these."""
    wrong, count = [], 0
    for row in rows:
        if row["kind"] in LANGUAGE_KINDS and not HAS_LANGDETECT:
            continue
        given = read_instructions([row["kind"]], [row["kwargs"]])
        for form in ("strict", "loose"):
            for response, verdict in zip(VERDICTS["responses"], row[form], strict=True):
                (ours,) = followed(response, given, loose=form == "loose")
                count += verdict != "?"
                if verdict not in ("?", str(int(ours))):
                    wrong.append((row["kind"], form, response[:80], verdict))
    return wrong, count


def test_verdicts_equal_those_of_lm_eval():
    wrong, count = compare(VERDICTS["rows"])
    assert not wrong and count > 5000
    kinds = {row["kind"] for row in VERDICTS["rows"] if {"0", "1"} <= set(row["strict"])}
    assert kinds == set(CHECKS), "each check says yes and no in the fixture"


def test_verdicts_equal_those_of_the_installed_lm_eval(monkeypatch):
    nltk = pytest.importorskip("nltk", reason="needs lm-eval[ifeval]")
    pytest.importorskip("langdetect", reason="needs lm-eval[ifeval]")
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm-eval[ifeval]")
    try:  # lm-eval would download it
        nltk.data.find("tokenizers/punkt_tab/english/abbrev_types.txt")
    except LookupError:
        pytest.skip("needs nltk's punkt_tab: python -m nltk.downloader punkt_tab")
    monkeypatch.syspath_prepend(FIXTURES)
    maker = importlib.import_module("make_instruction_verdicts")
    assert VERDICTS["responses"] == maker.RESPONSES
    rows = [
        {"kind": kind, "kwargs": kwargs, "strict": maker.verdicts(kind, kwargs, False)} for kind, kwargs in maker.ROWS
    ]
    wrong, count = compare([{**row, "loose": "?" * len(row["strict"])} for row in rows])
    assert not wrong and count > 3000
    sys.modules.pop("make_instruction_verdicts")


@pytest.mark.parametrize("response", ["", " \n", "\u00a0"])
@pytest.mark.parametrize("loose", [False, True])
def test_an_empty_response_follows_nothing(response, loose):
    given = read_instructions(["punctuation:no_comma"], [{}])
    assert followed(response, given, loose=loose) == [False]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Smith met Mr. J. Jones at 5 p.m. on Monday. He left.", 2),
        ("It ends at 5 p.m. The rest follows.", 2),
        ("1. Apples\n2. Pears", 3),
        ("Wait... What? “Yes.” (Really.) Fine", 4),
        ("He said “No.” Then he left!!", 3),
        ("version 3.5 of e.g. this", 2),
        ("no end", 1),
        ("", 0),
    ],
)
def test_sentences_end_where_punkt_ends_them(text, expected):
    assert len(sentences(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'M SURE", 3),
        ("WANNA GO? GIMME!", 5),
        ("YOU CANNOT, DON'T", 5),
        ("WELL-KNOWN U.S. 'NEWS'", 3),
        ('A/B (C) *D* "E" f', 4),
        ("2X É 3", 2),
    ],
)
def test_words_in_capitals_are_those_of_the_penn_treebank(text, expected):
    assert capital_words(text) == expected


class Rows:
    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def columns(self, indices):
        return {name: [self.rows[i][k] for i in indices] for k, name in enumerate(("instruction_id_list", "kwargs"))}

    def where(self, i):
        return f"prompts.jsonl line {i + 1}"


WORDS = "length_constraints:number_words"


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (["keywords:rhyme"], [{}], "no check is known for the instruction 'keywords:rhyme' .*punctuation:no_comma"),
        ([7], [{}], "no check is known for the instruction 7"),
        ([WORDS], [{"num_words": 9}], f"{WORDS} lacks 'relation' .it takes num_words, relation"),
        ([WORDS], [{"num_words": 9, "relation": None}], "lacks 'relation'"),
        (
            [WORDS],
            [{"num_words": "9", "relation": "at least"}],
            "num_words of .* whole number of at least 1, found '9'",
        ),
        ([WORDS], [{"num_words": 0, "relation": "at least"}], "whole number of at least 1, found 0"),
        ([WORDS], [{"num_words": float("nan"), "relation": "at least"}], "whole number"),
        ([WORDS], [{"num_words": 9, "relation": "at most"}], "must be 'less than' or 'at least', found 'at most'"),
        (["punctuation:no_comma"], [{"num_words": 9}], "has no argument 'num_words' .it takes none"),
        (["punctuation:no_comma"], ["x"], "must be an object, found 'x'"),
        (["punctuation:no_comma"], [], "must be a list of 1 objects, one for each instruction, found 0"),
        (["punctuation:no_comma"], "{}", "must be a list of 1 objects"),
        ([], [], "at least one instruction"),
        ("punctuation:no_comma", [{}], "must be a list"),
        (["keywords:existence"], [{"keywords": []}], "a list of at least one word"),
        (["keywords:existence"], [{"keywords": ["c("]}], "regular expression"),
        (["keywords:letter_frequency"], [{"letter": "ab", "let_frequency": 1, "let_relation": "at least"}], "one char"),
        (
            ["length_constraints:nth_paragraph_first_word"],
            [{"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}],
            "beyond num_paragraphs=2",
        ),
    ],
)
def test_rows_that_no_check_can_read_are_named_before_any_response(ids, kwargs, message):
    good = (["punctuation:no_comma", WORDS], [None, {"num_words": 9.0, "relation": "at least", "keywords": None}])
    rewards = Rewards(["instructions"])
    rewards.check_references(Rows(good, good))
    place = "prompts.jsonl line 2, columns 'instruction_id_list', 'kwargs': "
    with pytest.raises(InputError, match=f"{place}.*{message}.*reward function instructions.; correct the data$"):
        rewards.check_references(Rows(good, (ids, kwargs)))


def test_kinds_about_language_name_the_package_that_they_need(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"english_lowercase needs the package langdetect; pip install 'jaxrlhf\[instr"
    ):
        read_instructions(["change_case:english_lowercase"], [{}])


def test_scores_are_all_or_the_share_and_loose_forgives_an_introduction():
    ids, kwargs = (
        ["startend:quotation", "punctuation:no_comma", WORDS],
        [{}, {}, {"num_words": 3, "relation": "at least"}],
    )
    responses = ['"a b c"', '"a, b c"', 'Sure:\n"a b c"', ""]
    columns = {"instruction_id_list": [ids] * 4, "kwargs": [kwargs] * 4}
    rewards = Rewards(["instructions", "instructions:score=share", "instructions:loose=true"])
    parts = rewards.submit(["p"] * 4, responses, columns).result().parts
    assert parts["instructions"].tolist() == [1, 0, 0, 0]
    assert parts["instructions_2"].tolist() == pytest.approx([1, 2 / 3, 2 / 3, 0])
    assert parts["instructions_3"].tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("instructions:score=half", "score='half' must be all or share"),
        ("instructions:column=answer", "has no option 'column' .it has score, loose"),
        ("instructions:loose=perhaps", "expected true or false"),
    ],
)
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        Rewards([spec])
