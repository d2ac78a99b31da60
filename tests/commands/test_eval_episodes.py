"""`jaxrlhf eval` with an environment or tools: episodes, their scores, what is written, and what is refused."""

import html
import json
from pathlib import Path

import numpy as np
import pytest
import scripted_environments

from jaxrlhf.commands.eval import EvalConfig, evaluate
from jaxrlhf.commands.evaluation.episodes import environment_scores, summarise
from jaxrlhf.commands.evaluation.statistics import mean_and_error
from jaxrlhf.commands.transcripts import conversation_text, facts_of, transcript_text
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import encode_rows
from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained
from jaxrlhf.rl.outcomes import Outcome

SOURCE = Path(scripted_environments.__file__)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
MESSAGES = [
    {"role": "user", "content": "How much is 1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is\n3."},
]
OUTCOMES = [
    [Outcome("done", rewards={4: 0.5, 9: 1.0}, turns=2, calls=1, given=6, messages=MESSAGES, info={"depth": 2.0})],
    [Outcome("truncated", "turns", rewards={4: 0.25}, turns=4, calls=3, errors=2, given=10, info={"depth": 4.0})],
    [Outcome("truncated", "tokens", turns=1, given=2)],
    [Outcome("failed", "turn 1: KeyError: 'x'", rewards={4: 1.0}, turns=1)],
    [Outcome("failed", "reset: KeyError: 'x'")],
]


def test_a_transcript_shows_roles_tool_calls_observations_and_the_reward():
    lines = [
        "user: How much is 1 + 2?",
        'assistant calls add {"a": 1, "b": 2}',
        "tool add: 3",
        "assistant: It is",
        "    3.",
    ]
    assert conversation_text(MESSAGES) == "\n".join(lines)
    text = transcript_text("row 1", OUTCOMES[0][0], {"number_match": 1.0})
    assert text.splitlines() == ["── row 1: reward 1.5, 2 turns, 1 tool call, number_match 1", *lines]
    ends = [facts_of(row[0]) for row in OUTCOMES[1:]]
    assert ends == [
        "reward 0.25, 4 turns, 3 tool calls (2 errors), cut at max_turns",
        "1 turn, cut at max_new_tokens",
        "1 turn, failed: turn 1: KeyError: 'x'",
        "0 turns, failed: reset: KeyError: 'x'",
    ]


def test_estimates_of_episodes_count_ends_of_all_and_turns_of_those_that_were_played():
    found = summarise(OUTCOMES, tools=True)
    assert found["turns"] == mean_and_error(np.array([2, 4, 1, 1]))
    assert found["tool_calls"].value == 1 and found["tool_errors"].value == 0.5
    assert found["environment_tokens"].value == 4.5
    assert (found["cut_at_max_turns"].value, found["cut_at_max_new_tokens"].value) == (0.2, 0.2)
    assert found["failures"] == 2 and found["info"] == {"depth": mean_and_error(np.array([2, 4]))}
    assert "tool_calls" not in summarise(OUTCOMES, tools=False)
    np.testing.assert_array_equal(environment_scores(OUTCOMES)[:, 0], [1.5, 0.25, 0, np.nan, np.nan])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("http://host/v1",)}, "http://host/v1 is a server"),
        ({"models": (), "reward_model_name_or_path": "r", "data_path": ("x",)}, "environment=.* requires models"),
        ({"tasks": ("ifeval",)}, "tasks bring their own prompts"),
        ({"generation_slots": 4}, "generation_slots=4 with an environment"),
        ({"environment": "", "max_turns": 3}, "max_turns=3 requires environment or tools"),
        ({"environment": "", "pass_score": 0.5}, "pass_score=0.5 requires reward_functions"),
    ],
)
def test_settings_that_episodes_do_not_take_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EvalConfig.create(**({"models": ("m",), "environment": f"{SOURCE}:Counting"} | options))


# ---- runs

N = 2
PLAYED = {"max_new_tokens": 48, "max_turn_tokens": 4, "temperature": 1.0, "per_device_batch_size": 1}


@pytest.fixture(scope="module")
def options(demo, tmp_path_factory):
    rows = [{"prompt": f"This is number {i}.", "behaviour": name} for i, name in enumerate(BEHAVIOURS)]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PLAYED | {"models": (demo.lm,), "data_path": (str(path),), "data_cache_dir": demo.cache}


BEHAVIOURS = {
    "good": ("done", ""),
    "truncates": ("truncated", "turns"),
    "talks too much": ("truncated", "tokens"),
    "raises": ("failed", "KeyError: 'no such thing'"),
}


@pytest.mark.long
def test_episodes_are_scored_summarised_and_written_and_depend_on_no_batch(options, demo, tmp_path):
    files = {name: str(tmp_path / f"out.{name}") for name in ("json", "jsonl", "html")}
    settings = options | files | {"environment": f"{SOURCE}:Varied", "samples_per_prompt": N}
    evaluate(EvalConfig.create(**settings))
    results, rows = json.loads(Path(files["json"]).read_text()), read_jsonl(files["jsonl"])
    rewards = []
    for row in rows:
        episodes = row["episodes"][demo.lm]
        for episode, reply in zip(episodes, row["responses"][demo.lm], strict=True):
            turns = [message["content"] for message in episode["messages"] if message["role"] == "assistant"]
            assert (len(turns), episode["turns"], episode["status"]) == (3, 3, "done") and turns[-1] == reply
            assert episode["messages"][0] == {"role": "user", "content": row["prompt"]}
            letters = sum(character.isalpha() for turn in turns for character in turn)
            assert episode["reward"] == pytest.approx(2.5 + letters / 10)
        rewards.append([episode["reward"] for episode in episodes])
        assert row["scores"]["environment"][demo.lm] == rewards[-1]
    means, (model,) = np.mean(rewards, axis=1), results["models"]
    assert model["scores"]["environment"]["value"] == pytest.approx(means.mean(), rel=1e-9)
    assert model["scores"]["environment"]["error"] == pytest.approx(means.std(ddof=1) / np.sqrt(len(rows)), rel=1e-9)
    assert model["tokens"]["value"] <= 12 and model["ended"]["value"] == 1
    assert model["episodes"]["turns"]["value"] == 3 and model["episodes"]["info"]["turn"]["value"] == 3
    page = html.unescape(Path(files["html"]).read_text())
    assert "user: again again" in page and "3 turns" in page
    again = str(tmp_path / "again.jsonl")
    evaluate(EvalConfig.create(**settings | {"per_device_batch_size": 2, "jsonl": again, "html": None, "json": None}))
    assert read_jsonl(again) == rows


TRANSCRIPTS = """
def messages(prompts, responses, transcript):
    assert all(t[-1]["content"] == r for t, r in zip(transcript, responses) if t[-1]["role"] == "assistant")
    return [len(t) for t in transcript]

def of_trl(prompts, completions, environments, transcript, **kwargs):
    assert all([*p, *c] == t[: len(p) + len(c)] for p, c, t in zip(prompts, completions, transcript))
    assert all(c[-1]["role"] == "assistant" for c in completions)
    return [100 * e.turn + 10 * len(p) + len(c) for p, c, e in zip(prompts, completions, environments)]
"""


@pytest.mark.long
def test_failed_episodes_have_no_score_and_others_are_scored_by_every_scorer(options, demo, tmp_path, capsys):
    (tmp_path / "score.py").write_text(TRANSCRIPTS)
    settings = options | {"environment": f"{SOURCE}:Scripted", "max_turns": 3, "jsonl": str(tmp_path / "out.jsonl")}
    functions = tuple(f"{tmp_path}/score.py:{name}" for name in ("messages", "of_trl"))
    settings |= {"reward_functions": functions, "reward_model_name_or_path": demo.reward}
    settings |= {"samples_per_prompt": 1}
    (model,) = evaluate(EvalConfig.create(**settings))["models"]
    rows = read_jsonl(tmp_path / "out.jsonl")
    found = {row["behaviour"]: (row["episodes"][demo.lm][0], row["scores"]) for row in rows}
    judge = load_pretrained(demo.reward, head="scalar", new_head=False)
    for name, (status, reason) in BEHAVIOURS.items():
        episode, scores = found[name]
        assert episode["status"] == status and reason in episode["reason"]
        assert episode["messages"][0]["content"] == f"This is {name}."
        if status == "failed":
            assert episode["reward"] is None and {scores[part][demo.lm][0] for part in scores} == {None}
            continue
        assert scores["messages"][demo.lm][0] == len(episode["messages"])
        last = max(k for k, message in enumerate(episode["messages"]) if message["role"] == "assistant")
        assert scores["of_trl"][demo.lm][0] == 100 * episode["turns"] + 10 + last
        prompt, turn = episode["messages"][:last], episode["messages"][last : last + 1]
        row = encode_rows(demo.tokenizer, [prompt], [[turn]])[0]
        tokens = np.array([[*row.prompt, *row.responses[0][0]]])
        values = judge.module.apply({"params": judge.params}, tokens, np.ones_like(tokens))
        assert scores["reward_model"][demo.lm][0] == pytest.approx(float(values[0, -1]), rel=2e-4, abs=2e-5)
    assert [found[name][1]["environment"][demo.lm][0] for name in BEHAVIOURS] == [1.0, -1.0, 0.25, None]
    assert model["scores"]["environment"]["count"] == 3 and model["episodes"]["failures"] == 1
    assert "the episode of sample" in capsys.readouterr().err
    with pytest.raises(InputError, match="'behaviour'"):
        evaluate(EvalConfig.create(**settings | {"data_path": (demo.eval,)}))


NAMED = """
class Named:
    def reset(self, behaviour, missing=None):
        self.behaviour = behaviour

    def get_reward(self):
        return len(self.behaviour)
"""


@pytest.mark.long
def test_parameters_of_reset_name_the_columns_that_a_class_of_trl_reads(options, demo, tmp_path):
    (tmp_path / "named.py").write_text(NAMED)
    settings = options | {"environment": f"{tmp_path}/named.py:Named", "jsonl": str(tmp_path / "out.jsonl")}
    (model,) = evaluate(EvalConfig.create(**settings))["models"]
    scores = [row["scores"]["environment"][demo.lm][0] for row in read_jsonl(tmp_path / "out.jsonl")]
    assert sorted(scores) == sorted(map(len, BEHAVIOURS)) and model["episodes"]["failures"] == 0
    with pytest.raises(InputError, match="'behaviour'"):
        evaluate(EvalConfig.create(**settings | {"data_path": (demo.eval,)}))


@pytest.mark.long
def test_tools_need_a_template_and_a_context_with_room(options, demo):
    tool = "jaxrlhf.environments.sandbox:run_python"
    with pytest.raises(InputError, match="does not show the tool run_python"):
        evaluate(EvalConfig.create(**options, tools=(tool,)))
    with pytest.raises(InputError, match="max_new_tokens=500 and a prompt"):
        evaluate(EvalConfig.create(**options | {"max_new_tokens": 500}, environment=f"{SOURCE}:Counting"))
