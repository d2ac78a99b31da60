"""Formats: recognised by their columns, and read as a prompt with scored completions."""

import itertools
import json

import pytest
from rows import assistant, pairs, prompts, system, user

from jaxrlhf.data import load_data
from jaxrlhf.data.columns import Columns
from jaxrlhf.data.formats import FORMATS, STEPS, Reader
from jaxrlhf.data.messages import BadRow
from jaxrlhf.data.recognition import describe, recognise
from jaxrlhf.data.settings import DataConfig, FieldsConfig
from jaxrlhf.errors import InputError

COLUMNS = Columns(FieldsConfig().names)
Q, A, B = user("q"), assistant("a"), assistant("b")
HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: and?\n\nAssistant:"

EXAMPLES = {
    ("text", "text"): ({"text": "one two"}, "", [("one two", 1.0)]),
    ("messages", "conversational"): ({"messages": [system("s"), Q, A]}, [system("s"), Q], [("a", 1.0)]),
    ("prompt", "text"): ({"prompt": "q"}, "q", []),
    ("prompt", "conversational"): ({"prompt": [Q]}, [Q], []),
    ("prompt_completion", "text"): ({"prompt": "q", "completion": "a"}, "q", [("a", 1.0)]),
    ("prompt_completion", "conversational"): ({"prompt": [Q], "completion": [A]}, [Q], [("a", 1.0)]),
    ("preference", "text"): ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", [("a", 1.0), ("b", 0.0)]),
    ("preference", "conversational"): (
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        [Q],
        [("a", 1.0), ("b", 0.0)],
    ),
    ("preference_implicit", "text"): (
        {"chosen": "why? because", "rejected": "why? no idea"},
        "why?",
        [(" because", 1.0), (" no idea", 0.0)],
    ),
    ("preference_implicit", "conversational"): (
        {"chosen": [Q, A], "rejected": [Q, B]},
        [Q],
        [("a", 1.0), ("b", 0.0)],
    ),
    ("unpaired", "text"): ({"prompt": "q", "completion": "a", "label": False}, "q", [("a", 0.0)]),
    ("unpaired", "conversational"): ({"prompt": [Q], "completion": [A], "label": 1}, [Q], [("a", 1.0)]),
    ("sharegpt", "conversational"): (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [Q],
        [("a", 1.0)],
    ),
    ("alpaca", "text"): ({"instruction": "q", "input": "x", "output": "a"}, "q\n\nx", [("a", 1.0)]),
    ("ranked", "text"): (
        {"prompt": "q", "responses": ["a", "b"], "scores": [0.5, 2]},
        "q",
        [("a", 0.5), ("b", 2.0)],
    ),
}


def read(row, form=None, **columns):
    names = Columns(COLUMNS.names | columns)
    return Reader(form or recognise([row], names, "x"), names)(row)


@pytest.mark.parametrize(("form", "words"), EXAMPLES)
def test_each_format_is_recognised_described_and_read(form, words):
    row, prompt, completions = EXAMPLES[form, words]
    assert recognise([row], COLUMNS, "rows.jsonl") == form
    assert describe(form, row, COLUMNS) == f"{FORMATS[form].title}, {words}"
    scored = read(row)
    assert scored.prompt == prompt
    assert list(scored.completions) == completions
    assert scored.document == (form == "text")


def test_every_format_is_tried():
    assert {form for form, _ in EXAMPLES} == set(FORMATS)


@pytest.mark.parametrize(("form", "words"), EXAMPLES)
def test_each_format_serves_its_steps_and_names_the_others(config, tokenizer, form, words):
    row, prompt, completions = EXAMPLES[form, words]
    rows = [row]
    if form == "unpaired":
        completions = [("good", 1.0)]
        rows = [{**row, "completion": "good", "label": True}, {**row, "label": False}]
    extra = config(pairs(2), "extra.jsonl").data_path
    for step in STEPS:
        settings = config(rows, eval_data_path=extra)
        if step not in FORMATS[form].steps:
            with pytest.raises(InputError, match=rf"rows\.jsonl: holds {FORMATS[form].title} rows .*{step} cannot use"):
                load_data(settings, tokenizer, step)
            continue
        train, _ = load_data(settings, tokenizer, step)
        text = train.text(0)
        if step == "kto":
            assert text["completion"].strip() in {words.strip() for words, _ in completions}
        elif step != "ppo":
            best = max(completions, key=lambda item: item[1])[0]
            assert text["chosen"].strip() == best.strip()
        if step in ("reward", "dpo"):
            assert text["rejected"].strip() not in ("", text["chosen"].strip())
        ending = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        assert ending in text["prompt"]


def test_the_format_is_reported(config, tokenizer, caplog):
    caplog.set_level("INFO")
    load_data(
        config([{"chosen": [user(f"q{i}"), A], "rejected": [user(f"q{i}"), B]} for i in range(5)]), tokenizer, "dpo"
    )
    assert any("rows, preference, implicit prompt, conversational: 4 of 4 rows" in m for m in caplog.messages)


def test_ranks_count_from_the_best():
    scored = read({"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]})
    best = sorted(scored.completions, key=lambda item: -item[1])
    assert [text for text, _ in best] == ["b", "a", "c"]


def test_an_alpaca_row_without_input_is_its_instruction():
    for extra in ({}, {"input": ""}, {"input": None}):
        assert read({"instruction": "q", "output": "a", **extra}).prompt == "q"


def test_an_alpaca_row_may_have_earlier_turns_and_a_system_message():
    row = {"instruction": "q", "input": "x", "output": "a", "history": [["first", "one"]], "system": "be kind"}
    scored = read(row)
    assert scored.prompt == [
        system("be kind"),
        user("first"),
        {"role": "assistant", "content": "one"},
        user("q\n\nx"),
    ]
    assert scored.completions == (("a", 1.0),)
    with pytest.raises(BadRow, match="'history' is not a list of pairs of a question and an answer"):
        read({**row, "history": ["first", "one"]})


def test_a_pair_may_have_its_prompt_as_sharegpt_or_alpaca_has_it():
    sides = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    scored = read({"conversations": [{"from": "human", "value": "q"}], **sides})
    assert (scored.prompt, scored.completions) == ([Q], (("a", 1.0), ("b", 0.0)))
    scored = read({"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"})
    assert (scored.prompt, scored.completions) == ("q\n\nx", (("a", 1.0), ("b", 0.0)))


def test_a_function_call_of_sharegpt_is_a_tool_call_of_the_assistant():
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [("human", "q"), ("function_call", json.dumps(call)), ("observation", "1"), ("gpt", "a")]
    scored = read({"conversations": [{"from": name, "value": value} for name, value in turns]})
    assert scored.prompt[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    assert scored.prompt[2]["role"] == "tool" and scored.completions == (("a", 1.0),)
    turns[1] = ("function_call", "f(1)")
    with pytest.raises(BadRow, match=r"message 2 \(function_call\) is not the JSON of calls"):
        read({"conversations": [{"from": name, "value": value} for name, value in turns]})


# ---- pairs of scored responses


@pytest.mark.parametrize("step", ["reward", "dpo", "kto"])
def test_a_pair_of_equal_responses_is_skipped_and_counted(config, tokenizer, step):
    rows = pairs(12)
    rows[4]["rejected"] = rows[4]["chosen"]
    held_out = config(pairs(2, 20), "e.jsonl").data_path
    train, _ = load_data(config(rows, eval_data_path=held_out), tokenizer, step)
    assert train.counts["skipped"] == 1
    (problem,) = train.problems
    assert "rows.jsonl line 5: 'rejected' is the same as the better response" in problem
    prompts = load_data(config(rows, eval_data_path=held_out), tokenizer, "ppo")[0]
    assert prompts.counts["kept"] == 12


def test_scored_responses_that_repeat_make_no_pair_of_equals():
    reader = Reader("ranked", Columns(COLUMNS.names), "all")
    scored = read({"prompt": "q", "responses": ["a", "a", "b"], "scores": [3, 2, 1]})
    assert reader.examples(scored, "dpo") == [("a", "b"), ("a", "b")]


@pytest.mark.parametrize(
    ("rule", "margin", "expected"),
    [
        ("best_worst", 0, [("b", "a")]),
        ("adjacent", 0, [("b", "d"), ("c", "a")]),
        ("all", 0, [("b", "d"), ("b", "c"), ("b", "a"), ("d", "a"), ("c", "a")]),
        ("all", 2, [("b", "d"), ("b", "c"), ("b", "a")]),
        ("best_worst", 4, []),
    ],
)
def test_the_pair_rule_makes_pairs_whose_scores_differ_enough(rule, margin, expected):
    row = {"prompt": "q", "responses": list("abcd"), "scores": [1, 4, 2, 2]}
    reader = Reader("ranked", COLUMNS, rule, margin)
    if not expected:
        with pytest.raises(BadRow, match="'scores' gives no pair whose scores differ enough"):
            reader.examples(reader(row), "dpo")
        return
    found = reader.examples(reader(row), "dpo")
    assert sorted(found) == sorted(expected) or sorted(found) == sorted(
        [tuple({"c": "d", "d": "c"}.get(x, x) for x in pair) for pair in expected]
    )
    assert reader.examples(reader(row), "sft") == [("b",)]


def test_all_pairs_of_a_row_become_rows_and_stay_in_one_split(config, tokenizer):
    rows = [{"prompt": f"q {i}", "responses": list("abc"), "scores": [3, 2, 1]} for i in range(10)]
    train, held = load_data(config(rows, pair_rule="all", eval_fraction=0.3), tokenizer, "reward")
    assert (len(train), len(held)) == (21, 9)
    assert not set(prompts(train)) & set(prompts(held))
    assert {(train.text(i)["chosen"], train.text(i)["rejected"]) for i in range(21)} == {
        (f" {a}", f" {b}") for a, b in itertools.combinations("abc", 2)
    }


# ---- conversations beside a prompt, and in place of one


def test_a_text_prompt_beside_whole_conversations_is_not_put_before_the_last_answer():
    turns = [Q, A, user("more"), assistant("good")]
    other = [*turns[:3], assistant("bad")]
    scored = read({"prompt": "q", "chosen": turns, "rejected": other})
    assert scored.prompt == turns[:3]
    assert [text for text, _ in scored.completions] == ["good", "bad"]
    scored = read({"prompt": "q", "completion": turns})
    assert (scored.prompt, scored.completions) == (turns[:3], (("good", 1.0),))


def test_sft_on_a_column_of_messages_named_as_chosen_reads_the_whole_conversation(config, tokenizer):
    rows = [{"prompt": f"q{i}", "messages": [user(f"q{i}"), A, user("more"), assistant("good")]} for i in range(5)]
    train, _ = load_data(config(rows, chosen_field="messages", data_format="prompt_completion"), tokenizer, "sft")
    text = train.text(0)
    assert text["prompt"].startswith("Human: q") and text["prompt"].endswith("Assistant: a Human: more Assistant:")
    assert text["chosen"] == " good"


def test_the_common_beginning_of_two_conversations_is_the_prompt_wherever_they_branch():
    chosen = [Q, A, user("x"), assistant("good")]
    rejected = [Q, B, user("y"), assistant("bad")]
    scored = read({"chosen": chosen, "rejected": rejected})
    assert scored.prompt == [Q]
    assert [completion for completion, _ in scored.completions] == [chosen[1:], rejected[1:]]


def test_conversations_without_a_common_beginning_are_skipped_and_counted(config, tokenizer):
    rows = [{"chosen": [user(f"q{i}"), A], "rejected": [user(f"q{i}"), B]} for i in range(10)]
    rows[3]["rejected"] = [user("something else"), B]
    train, held = load_data(config(rows, eval_fraction=0.1), tokenizer, "dpo")
    assert train.counts["skipped"] + held.counts["skipped"] == 1
    assert "rows.jsonl line 4: 'rejected' shares no beginning with 'chosen'" in " ".join(train.problems + held.problems)


def test_a_system_message_alone_is_no_common_beginning():
    with pytest.raises(BadRow, match="shares no beginning"):
        read({"chosen": [system("s"), user("a"), A], "rejected": [system("s"), user("b"), B]})


def test_dialogues_as_text_are_read_as_the_turns_that_they_are():
    scored = read({"chosen": f"{HH} fine", "rejected": f"{HH} bad"})
    assert scored.prompt == [user("hello"), assistant("hi"), user("and?")]
    assert [text for text, _ in scored.completions] == ["fine", "bad"]


def test_common_text_ends_at_a_word_and_leaves_the_space_to_the_next():
    scored = read({"chosen": "the answer is blueish", "rejected": "the answer is blue"})
    assert scored.prompt == "the answer is"
    assert [text for text, _ in scored.completions] == [" blueish", " blue"]


def test_a_prompt_that_is_not_in_the_conversation_beside_it_is_refused():
    with pytest.raises(BadRow, match="'prompt' is text that does not stand in the conversation beside it"):
        read({"prompt": "other", "chosen": [Q, A], "rejected": [Q, B]})
    with pytest.raises(BadRow, match="'prompt' is not the beginning of the conversation beside it"):
        read({"prompt": [user("other")], "chosen": [Q, A], "rejected": [Q, B]})


# ---- forms of messages


def test_names_of_roles_are_those_of_templates():
    turns = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "r"), ("bard", "b")]
    scored = read({"conversations": [{"from": role, "value": text} for role, text in turns]})
    assert scored.prompt == [system("s"), Q, A, {"role": "tool", "content": "r"}]
    assert scored.completions == (("b", 1.0),)
    assert read({"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}).prompt == [Q]


def test_content_may_be_text_parts():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert read({"messages": [user(parts), assistant(parts)]}).completions == (("one two", 1.0),)
    assert read({"messages": [user(["one ", "two"]), assistant(["a"])]}).prompt == [user("one two")]
    with pytest.raises(BadRow, match=r"'messages' message 1 \(user\) holds parts of the type image"):
        read({"messages": [user([{"type": "image", "url": "x"}]), A]})


def test_labels_may_be_cells_of_a_csv_file():
    for label, score in (("True", 1.0), ("1", 1.0), ("false", 0.0), ("0", 0.0)):
        assert read({"prompt": "q", "completion": "a", "label": label}).completions == (("a", score),)


def test_messages_may_be_stored_as_columns():
    scored = read({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}})
    assert (scored.prompt, scored.completions) == ([Q], (("a", 1.0),))


def test_a_cell_with_json_messages_is_a_conversation():
    row = {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"role": "assistant", "content": "a"}]'}
    assert read(row).prompt == [Q]
    assert read(row).completions == (("a", 1.0),)
    assert read({"prompt": "[1, 2] what is next?", "completion": "3"}).prompt == "[1, 2] what is next?"


def test_tool_calls_may_have_null_content_and_tools_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "1", "tool_call_id": "7"}
    scored = read({"messages": [Q, call, result, A], "tools": '[{"name": "f"}]'})
    assert scored.prompt == [Q, {**call, "content": ""}, result]
    assert scored.tools == [{"name": "f"}]
    scored = read({"messages": [Q, call]})
    assert scored.completions == (([{**call, "content": ""}], 1.0),)


def test_a_conversation_that_ends_with_the_user_trains_on_the_last_answer():
    assert read({"messages": [Q, A, user("bye")]}).completions == (("a", 1.0),)


def test_a_column_may_hold_the_system_message(config, tokenizer):
    rows = [{"prompt": f"q{i}", "completion": "a", "rules": "be kind"} for i in range(5)]
    assert read(rows[0], system="rules").prompt == [system("be kind"), user("q0")]
    assert read({**rows[0], "rules": None}, system="rules").prompt == "q0"
    for step in ("sft", "ppo"):
        train, _ = load_data(config(rows, system_field="rules"), tokenizer, step)
        assert "be kind" in train.text(0)["prompt"]


def test_special_tokens_that_a_user_types_stay_text(config, tokenizer):
    rows = [{"prompt": f"{i} {tokenizer.eos_token} x", "completion": "a"} for i in range(5)]
    for step in ("sft", "ppo"):
        for kept in (False, True):
            train, _ = load_data(config(rows, special_tokens_in_data=kept), tokenizer, step)
            (row,) = train.values([0], ["ids_0", "prompt_length"])[0]
            assert (tokenizer.eos_token_id in row["ids_0"][: row["prompt_length"]]) == kept


# ---- rows that cannot be used


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [A, Q, A]}, "'messages' starts with the assistant; a conversation starts with the user"),
        ({"messages": [Q, Q, A]}, r"'messages' has two user messages in a row \(roles: user, user, assistant\)"),
        ({"messages": [system("s"), Q]}, r"'messages' has no assistant message \(roles: system, user\)"),
        ({"messages": [A]}, "'messages' starts with the assistant"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": None}, "'messages' is null"),
        ({"messages": "hello"}, "'messages' is not a list of messages but text"),
        ({"messages": [{"speaker": "x", "words": "y"}]}, "not of messages .* an object of speaker, words"),
        ({"messages": [Q, assistant(None)]}, r"'messages' message 2 \(assistant\) has null as content, not text"),
        ({"messages": [Q, assistant(3)]}, r"message 2 \(assistant\) has a number as content"),
        ({"messages": [user(" "), A]}, r"'messages' message 1 \(user\) is empty"),
        ({"messages": [user([{"type": "text", "text": None}]), A]}, r"message 1 \(user\) holds a part without text"),
        ({"messages": [Q, A | {"tool_calls": 5}]}, r"message 2 \(assistant\) has a number as tool_calls, not a list"),
        (
            {"messages": {"role": ["user", "assistant"], "content": ["q"]}},
            r"'messages' holds messages as columns of unlike lengths \(role, content\)",
        ),
        ({"text": "  "}, "'text' is empty"),
        ({"text": None}, "'text' is null"),
        ({"text": [Q, A]}, "'text' is not text but messages"),
        ({"text": "a\ud800b"}, "'text' holds half of a surrogate pair at character 1"),
        ({"prompt": 5}, "'prompt' is not text but a number"),
        ({"prompt": [Q, A]}, "'prompt' ends with an assistant message"),
        ({"prompt": [A, Q]}, "'prompt' starts with the assistant"),
        ({"prompt": "q", "completion": ""}, "'completion' is empty"),
        ({"prompt": "q", "chosen": {"a": 1}, "rejected": "b"}, "'chosen' is not text but an object"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "'label' is 'good'; it must be true or false"),
        ({"prompt": "q", "completion": "a", "label": None}, "'label' is null; it must be true or false"),
        ({"prompt": "q", "responses": "a", "scores": [1]}, "'responses' is not a list of responses"),
        ({"prompt": "q", "responses": ["a"], "scores": [1, 2]}, "'scores' has 2 values for 1 responses"),
        ({"prompt": "q", "responses": ["a"], "scores": ["x"]}, "'scores' holds text where a number must be"),
        ({"chosen": [Q, A, user("x")], "rejected": [Q, B]}, "'chosen' ends with a user message"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"},
            "'margin' is 'big'; the margin of a pair",
        ),
        ({"chosen": [Q, A], "rejected": [Q, B], "margin": float("nan")}, "'margin' is nan; the margin of a pair"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, message):
    with pytest.raises(BadRow, match=message):
        read(row)


@pytest.mark.parametrize(("form", "label"), [("prompt_completion", {}), ("unpaired", {"label": True})])
def test_a_row_without_its_response_lacks_completion(form, label):
    with pytest.raises(BadRow, match="'completion' is missing"):
        read({"prompt": "q"} | label, form)
    assert read({"prompt": "q", "chosen": "a"} | label, form).completions[0][0] == "a"


def test_unusable_rows_are_counted_with_their_line(config, tokenizer):
    rows = [{"messages": [user(f"q{i}"), A]} for i in range(12)]
    rows[2] = {"messages": [A, Q, A]}
    rows[5] = {"messages": [Q, Q, A]}
    rows[7] = {"messages": [Q]}
    train, _ = load_data(config(rows, eval_data_path=config(pairs(2), "e.jsonl").data_path), tokenizer, "sft")
    assert train.counts["skipped"] == 3 and len(train) == 9
    text = "; ".join(train.problems)
    for line in ("line 3: 'messages' starts with", "line 6: 'messages' has two user", "line 8: 'messages' has no assi"):
        assert f"rows.jsonl {line}" in text


def test_columns_of_no_format_are_listed_with_the_nearest(config, tokenizer):
    rows = [{"prompt": "q", "chosen": "a", "score": 3}, {"prompt": "q"}]
    with pytest.raises(InputError) as error:
        load_data(config([{"question": "q", "rejected": "a", "chosen_answer": "b"}] * 3), tokenizer, "dpo")
    message = str(error.value)
    assert (
        "rows.jsonl: its columns fit no format. Found: question (text), rejected (text), chosen_answer (text)"
        in message
    )
    assert "The nearest is preference, implicit prompt (data_format preference_implicit), which lacks chosen" in message
    assert "--chosen_field" in message
    with pytest.raises(InputError, match=r"Found: a \(a number\)\. Formats have the columns: .*messages"):
        load_data(config([{"a": 1}] * 3), tokenizer, "sft")
    with pytest.raises(InputError, match=r"nearest is preference, explicit prompt.*lacks rejected"):
        load_data(config(rows, data_format="preference"), tokenizer, "dpo")


def test_one_object_around_the_rows_and_nested_columns_are_named(config, tokenizer):
    with pytest.raises(
        InputError, match=r"Found: data \(a list\)\. The rows stand inside 'data': write them as a list"
    ):
        load_data(config([{"data": [{"prompt": "q", "completion": "a"}]}]), tokenizer, "sft")
    with pytest.raises(InputError, match=r"Found: row \(an object of question, answer\).*--prompt_field question"):
        load_data(config([{"row": {"question": "q", "answer": "a"}}] * 9), tokenizer, "sft")
    with pytest.raises(InputError, match=r"Found: context \(a list\)\. Formats have the columns"):
        load_data(config([{"context": [Q]}] * 9), tokenizer, "ppo")


def test_two_formats_in_one_file_are_named_with_their_rows(config, tokenizer):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)] + [{"messages": [Q, A]}]
    with pytest.raises(InputError) as error:
        load_data(config(rows), tokenizer, "sft")
    assert "rows.jsonl: holds rows of two formats: row 1 is preference, explicit prompt" in str(error.value)
    assert "row 4 is language modelling (messages)" in str(error.value)
    train, held = load_data(config([*rows, *pairs(4)], data_format="preference", eval_fraction=0.4), tokenizer, "sft")
    assert train.counts["skipped"] + held.counts["skipped"] == 1


def test_data_format_overrules_and_must_exist(config, tokenizer):
    train, _ = load_data(config(pairs(10), data_format="prompt"), tokenizer, "ppo")
    assert train.parts[0].described == "prompt only, text"
    with pytest.raises(InputError, match="data_format 'dialogue': must be one of preference, sharegpt"):
        DataConfig(data_format="dialogue")


def test_columns_are_reached_by_dotted_paths(config, tokenizer):
    rows = [
        {"question": {"full_text": f"q{i}"}, "answers": [{"text": "first"}, {"text": "other"}], "a.b": "plain"}
        for i in range(5)
    ]
    names = {"prompt_field": "question.full_text", "completion_field": "answers.0.text"}
    train, _ = load_data(config(rows, **names), tokenizer, "sft")
    assert train.text(0) == {"prompt": f"Human: q{train.source(0)[1]} Assistant:", "chosen": " first"}
    train, _ = load_data(config(rows, **names | {"completion_field": "a.b"}), tokenizer, "sft")
    assert train.text(0)["chosen"] == " plain"


# ---- unpaired preferences


def test_unpaired_rows_give_pairs_where_a_prompt_has_both(config, tokenizer):
    rows = [{"prompt": f"q{i}", "completion": f"good {i}", "label": True} for i in range(6)]
    rows += [{"prompt": f"q{i}", "completion": f"bad {i}", "label": False} for i in range(2, 8)]
    settings = config(rows, eval_data_path=config(pairs(2), "e.jsonl").data_path)
    train, _ = load_data(settings, tokenizer, "reward")
    assert sorted(tuple(train.text(i).values()) for i in range(len(train))) == [
        (f"Human: q{i} Assistant:", f" good {i}", f" bad {i}") for i in range(2, 6)
    ]
    sft, _ = load_data(settings, tokenizer, "sft")
    assert sorted(sft.text(i)["chosen"] for i in range(len(sft))) == [f" good {i}" for i in range(6)]
    with pytest.raises(InputError, match="no prompt has a good and a bad completion"):
        load_data(config(rows[:6], "good.jsonl"), tokenizer, "dpo")
