"""Accuracy of instruction following as `jaxrlhf eval` reports it, by hand on a few responses."""

import json

import numpy as np
import pytest

from jaxrlhf.commands.evaluation.comparison import Comparison
from jaxrlhf.commands.evaluation.following import check_instructions
from jaxrlhf.commands.evaluation.generators import Responses
from jaxrlhf.commands.evaluation.report import comparison_tables
from jaxrlhf.commands.evaluation.rows import Prompts, read_prompts
from jaxrlhf.data import DataConfig, TemplateConfig
from jaxrlhf.rewards import Rewards
from jaxrlhf.trainers.tokenizers import TokenizerConfig

COMMA, QUOTE, WORDS = "punctuation:no_comma", "startend:quotation", "length_constraints:number_words"
ROWS = [
    {"prompt": "a", "instruction_id_list": [COMMA, QUOTE], "kwargs": [{}, {}]},
    {"prompt": "b", "instruction_id_list": [WORDS], "kwargs": [{"num_words": 3, "relation": "at least"}]},
    {"prompt": "c", "instruction_id_list": [QUOTE, WORDS], "kwargs": [{}, {"num_words": 2, "relation": "less than"}]},
]
TEXTS = [['"a b"', "a, b"], ["a b c", "a b"], ['Sure:\n"a"', ""]]
STRICT = [[[1, 1], [0, 0]], [[1], [0]], [[0, 0], [0, 0]]]  # by prompt, response, instruction
LOOSE = [[[1, 1], [0, 0]], [[1], [0]], [[1, 1], [0, 0]]]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The rows, read from a file in which the kwargs of different rows have different keys."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DataConfig.create(data_path=str(folder / "rows.jsonl"), data_cache_dir=str(folder / "cache"))
    rewards = Rewards(["instructions"])
    found = read_prompts(config, rewards.columns, 0)
    rewards.check_references(found)
    return found


def responses(name, texts):
    shape = (len(texts), len(texts[0]))
    return Responses(name, ["p"] * len(texts), texts, np.ones(shape, int), np.ones(shape, bool), 1.0)


def clustered(values, groups):
    values, groups = np.array(values, float), np.array(groups)
    sums = [(values[groups == g] - values.mean()).sum() for g in np.unique(groups)]
    return values.mean(), np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / len(values)


def test_accuracies_and_their_errors_follow_from_the_verdicts(prompts):
    assert isinstance(prompts, Prompts) and len(prompts) == 3
    found = check_instructions(prompts, responses("m", TEXTS), np.ones((3, 2), bool)).summary()
    for name, verdicts in (("strict", STRICT), ("loose", LOOSE)):
        flat = [(v, i) for i, rows in enumerate(verdicts) for row in rows for v in row]
        whole = [(all(row), i) for i, rows in enumerate(verdicts) for row in rows]
        for key, values in ((f"inst_level_{name}_acc", flat), (f"prompt_level_{name}_acc", whole)):
            value, error = clustered(*zip(*values, strict=True))
            assert found[key].value == pytest.approx(value, rel=1e-12)
            assert found[key].error == pytest.approx(error, rel=1e-12)
            assert found[key].count == len(values)
    assert {kind: (value.value, value.count) for kind, value in found["by_kind"].items()} == {
        QUOTE: (0.25, 4),
        WORDS: (0.25, 4),
        COMMA: (0.5, 2),
    }


def test_a_response_whose_check_failed_does_not_count(prompts):
    scored = np.array([[True, False], [True, True], [False, False]])
    found = check_instructions(prompts, responses("m", TEXTS), scored).summary()
    assert found["prompt_level_strict_acc"][::2] == (2 / 3, 3) and found["inst_level_strict_acc"][::2] == (0.75, 4)
    nothing = check_instructions(prompts, responses("m", TEXTS), np.zeros((3, 2), bool)).summary()
    assert nothing["prompt_level_strict_acc"] == (None, None, 0) and nothing["by_kind"] == {}


def test_the_report_shows_every_model_and_kind(prompts):
    both = [responses("runs/one", TEXTS), responses("runs/two", [["x", "x"]] * 3)]
    scores = {"instructions": np.array([[[1, 0], [1, 0], [0, 0]], [[0, 0]] * 3], float)}
    following = [check_instructions(prompts, one, np.ones((3, 2), bool)) for one in both]
    found = Comparison(prompts, {}, both, scores, {"instructions": 1.0}, following)
    tables = {title: (columns, rows) for title, columns, rows in comparison_tables(found)}
    columns, rows = tables["instructions followed"]
    assert columns[:2] == ["model", "prompts, strict"] and [row[0] for row in rows] == ["one", "two"]
    assert rows[0][1] == str(found.summary["models"][0]["instructions"]["prompt_level_strict_acc"])
    columns, rows = tables["instructions by kind, strict"]
    assert columns == ["kind", "checked", "one", "two"] and {row[0]: row[1] for row in rows} == {
        QUOTE: 4,
        WORDS: 4,
        COMMA: 2,
    }


def test_a_model_without_a_chat_template_is_told_from_one_for_which_a_template_is_chosen():
    setting = TokenizerConfig(tokenizer_name_or_path="demo")
    assert setting.lacks_template("model", TemplateConfig())
    assert not setting.lacks_template("model", TemplateConfig(prompt_template="raw"))
    assert not setting.lacks_template("model", TemplateConfig(chat_template="chatml"))
