"""Prompts with further fields of their rows, for reward functions: kept in the cache, named where they are missing."""

import dataclasses
import json

import datasets
import numpy as np
import pytest

from jaxrlhf.data import DataConfig, demo, load_data
from jaxrlhf.data.tokenized import Encoding
from jaxrlhf.errors import InputError
from jaxrlhf.rewards import Rewards


@pytest.fixture(scope="module")
def tokenizer():
    return demo.train_tokenizer(["Human: How many are 3 and 4? Assistant: 7 #### 7"] * 20, vocab_size=300)


def rows(n=30):
    """Rows in the form of gsm8k's."""
    return [
        {
            "question": f"Ana has {i} plums and buys 1,000 more. How many?",
            "answer": f"{i}+1000 = <<{i}+1000={i + 1000}>>{i + 1000:,}.\n#### {i + 1000:,}",
            "tags": {"level": i % 3, "words": ["ü", None]},
        }
        for i in range(n)
    ]


@pytest.fixture
def config(tmp_path):
    def make(rows, name="rows.jsonl", **options):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"prompt_field": "question", "data_cache_dir": str(tmp_path / "cache")} | options
        return DataConfig.create(data_path=str(path), **options)

    return make


def test_prompts_keep_their_own_text_and_the_fields_that_are_asked_for_also_from_the_cache(config, tokenizer):
    for _ in range(2):
        train, evaluation = load_data(config(rows(), reward_columns=("tags",)), tokenizer, "ppo", ("answer",))
        assert train.column_names == evaluation.column_names == ("answer", "tags")
        for data in (train, evaluation):
            numbers = [data.source(i)[1] for i in range(len(data))]
            assert data.columns(range(len(data))) == {
                name: [rows()[n][name] for n in numbers] for name in ("answer", "tags")
            }
            assert data.prompts(range(len(data))) == [rows()[n]["question"] for n in numbers]
            assert data.text(0) == {"prompt": f"Human: {data.prompts([0])[0]} Assistant:"}


def test_filler_rows_have_no_values(config, tokenizer):
    train, _ = load_data(config(rows()), tokenizer, "ppo", ("answer",))
    assert train.columns(np.array([-1, 0]))["answer"] == [None, rows()[train.source(0)[1]]["answer"]]
    assert train.prompts([-1]) == [None] and train.prompt_texts([-1]) == [""]


def test_without_columns_only_prompts_are_kept_and_the_other_steps_keep_nothing(config, tokenizer):
    train, _ = load_data(config(rows()), tokenizer, "ppo")
    assert train.columns([0, 1]) == {} and train.prompts([0]) == [rows()[train.source(0)[1]]["question"]]
    sft, _ = load_data(config(rows(), chosen_field="answer", reward_columns=("absent",)), tokenizer, "sft")
    assert "kept" in train.parts[0].table.column_names and "kept" not in sft.parts[0].table.column_names


def test_gsm8k_rows_load_for_ppo_without_responses_and_for_sft_with_the_solution_as_response(config, tokenizer):
    rewards = Rewards(["number_match"])
    train, evaluation = load_data(config(rows()), tokenizer, "ppo", rewards.columns)
    for data in (train, evaluation):
        rewards.check_references(data)
    answers = train.columns(range(4))
    good = rewards.submit(train.prompt_texts(range(4)), answers["answer"], answers).result()
    assert good.scores.tolist() == [1, 1, 1, 1]
    sft, _ = load_data(config(rows(), chosen_field="answer", max_length=256), tokenizer, "sft")
    assert sft.text(0)["chosen"] == " " + rows()[sft.source(0)[1]]["answer"]


def test_a_conversation_is_kept_as_messages_and_shown_to_functions_as_it_is_rendered(config, tokenizer):
    given = [{"question": [{"role": "user", "content": f"Hi {i}"}], "answer": "1"} for i in range(20)]
    train, _ = load_data(config(given), tokenizer, "ppo", ("answer",))
    messages = given[train.source(0)[1]]["question"]
    assert train.prompts([0]) == [messages]
    assert train.prompt_texts([0]) == [f"Human: {messages[0]['content']} Assistant:"]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_functions_take_where_there_are_any_are_null_elsewhere_and_left_out_if_none_has_them(
    config, tokenizer, streaming
):
    given = rows()
    for row in given[::3]:
        del row["answer"]

    def reads(completions, answer=None, absent=None, **kwargs):
        return [0.0] * len(completions)

    rewards = Rewards([reads])
    options = {"streaming": True, "group_by_length": False} if streaming else {}
    train, evaluation = load_data(config(given, **options), tokenizer, "ppo", rewards.columns, rewards.wanted)
    assert train.column_names == evaluation.column_names == ("answer",)
    indices = range(12)
    answers = {row["question"]: row.get("answer") for row in given}
    expected = [answers[str(prompt)] for prompt in train.prompts(indices)]
    assert train.columns(indices) == {"answer": expected} and None in expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answer": ...},
            r"rows\.jsonl line 8: 'answer' is missing, and a reward function, the environment or reward_columns asks "
            r"for it; correct or delete the row, or name another column \(it has question, tags\)",
        ),
        ({"answer": None}, r"rows\.jsonl line 8: 'answer' is null"),
    ],
)
def test_a_row_without_the_field_stops_with_its_place(config, tokenizer, change, message):
    given = rows()
    given[7] = {k: v for k, v in (given[7] | change).items() if v is not ...}
    with pytest.raises(InputError, match=message):
        load_data(config(given), tokenizer, "ppo", Rewards(["number_match"]).columns)
    assert len(load_data(config(given), tokenizer, "ppo")[0]) == 28


def test_a_data_set_without_references_stops_before_training(config, tokenizer):
    given = [{"question": row["question"]} for row in rows()]
    with pytest.raises(InputError, match=r"rows\.jsonl line \d+: 'gold' is missing"):
        load_data(config(given), tokenizer, "ppo", Rewards(["exact_match:column=gold"]).columns)
    train, _ = load_data(config([{**row, "answer": "see above"} for row in given]), tokenizer, "ppo", ("answer",))
    with pytest.raises(InputError, match=r"rows\.jsonl line \d+, column 'answer': .*'see above' holds no number"):
        Rewards(["number_match"]).check_references(train)


def test_a_value_that_is_not_json_is_named(tokenizer, tmp_path):
    table = {"question": [f"How many {i}?" for i in range(20)], "answer": [b"7"] * 20}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "rows.parquet")
    config = DataConfig.create(
        data_path=str(tmp_path / "rows.parquet"), prompt_field="question", data_cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(InputError, match=r"rows\.parquet row \d+: 'answer' is not a JSON value but a bytes"):
        load_data(config, tokenizer, "ppo", ("answer",))


def test_columns_that_no_data_has_leave_the_hashes_of_older_runs_as_they_were():
    encoding = Encoding("ppo", 512, 256, "drop", columns=("answer",))
    assert "optional_columns" not in encoding.identity and encoding.identity["columns"] == ("answer",)
    assert dataclasses.replace(encoding, optional_columns=("hint",)).identity["optional_columns"] == ("hint",)
