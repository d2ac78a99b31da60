"""The environments and tools of examples/environments."""

import json
from pathlib import Path

import pytest

from jaxrlhf.config.imports import import_object
from jaxrlhf.environments import Environments, load_tool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "environments"


@pytest.mark.parametrize(
    ("expression", "value"), [("(17 + 4) * 3", "63"), ("7 / 2", "3.5"), ("-2 * -8 // 3", "5"), ("1e400 - 1", None)]
)
def test_the_calculator_calculates(expression, value):
    calculate = load_tool(f"{EXAMPLES / 'calculator.py'}:calculate").function
    if value is not None:
        assert calculate(expression) == value
    for bad in ("__import__('os')", "2 ** 9", "a + 1", "1 +", "1" * 300, "1 / 0", "1e400"):
        with pytest.raises((ValueError, SyntaxError, ArithmeticError)):
            calculate(bad)


def test_the_game_answers_guesses_and_rewards_few_of_them():
    environments = Environments(import_object(f"{EXAMPLES / 'guess_number.py'}:GuessNumber", "environment"))
    assert environments.columns == ("secret",)
    episode = environments.episode("auto")
    episode.begin({"prompt": [], "secret": 42})
    replies = [episode.respond(text, text).observation for text in ("50", "I say 7!", "hm", "42")]
    shown = [reply.messages[0]["content"] for reply in replies[:3]]
    assert shown == ["Lower.", "Higher.", "That is no number. Answer with one number."]
    assert replies[3].done and replies[3].reward == pytest.approx(0.7) and replies[3].info == {"wrong_guesses": 3}
    assert episode.cut() == 0.0


def test_the_rows_have_right_answers(tmp_path, monkeypatch):
    main = import_object(f"{EXAMPLES / 'make_rows.py'}:main", "rows")
    main(tmp_path, 50)
    rows = [json.loads(line) for line in (tmp_path / "arithmetic.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) > 40 and all(int(row["answer"]) >= 0 for row in rows)
    games = [json.loads(line) for line in (tmp_path / "secrets.jsonl").read_text().splitlines()]
    secrets = [row["secret"] for row in games]
    assert len({row["prompt"] for row in games}) > 40  # rows of one prompt cannot be held out for evaluation
    assert len(secrets) == 50 and min(secrets) >= 1 and max(secrets) <= 100
    calculate = load_tool(f"{EXAMPLES / 'calculator.py'}:calculate").function
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert len(calls) > 40 and not {row["prompt"] for row in rows} & {row["messages"][0]["content"] for row in calls}
    for row in calls:
        _, asked, told, answer = row["messages"]
        value = calculate(**asked["tool_calls"][0]["function"]["arguments"])
        assert told["content"] == value and value in answer["content"].split()
        assert row["tools"][0]["function"]["name"] == "calculate"
    answers = [json.loads(line)["messages"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) > 40 and not {row["prompt"] for row in rows} & {asked["content"] for asked, _ in answers}
    assert all(any(word.isdigit() for word in told["content"].split()) for _, told in answers)
