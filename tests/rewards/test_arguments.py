"""Arguments of reward functions by name: functions of TRL's form, async ones, what they log, and where none applies."""

import asyncio
import importlib.util
import math
import sys

import numpy as np
import pytest

from jaxrlhf.errors import InputError, SharedError
from jaxrlhf.rewards import Limits, Rewards, load_function
from jaxrlhf.rewards.scoring import GIVE_UP

PROMPTS = ["2 + 3?", "4 + 4?"]
RESPONSES = ["5", "nine"]
CHAT = [[{"role": "system", "content": "Add."}, {"role": "user", "content": prompt}] for prompt in PROMPTS]
IDS = [[7, 1], [8, 9, 1]]


def scored(functions, responses=RESPONSES, *, chat=False, columns=None, say=lambda text: None, **options):
    functions = functions if isinstance(functions, list) else [functions]
    rewards = Rewards(functions, options.pop("weights", ()), say=say, limits=options.pop("limits", Limits()))
    conversations = CHAT * (len(responses) // 2) if chat else None
    prompts = PROMPTS * (len(responses) // 2)
    return rewards.submit(prompts, responses, columns, conversations=conversations, **options).result()


@pytest.mark.parametrize("chat", [False, True])
def test_functions_of_trls_form_get_what_their_parameters_name(chat):
    seen = {}

    def plain(completions, prompts=None, answer=None, **kwargs):
        seen["plain"] = (completions, prompts, answer, kwargs)
        return [0.0, 1.0]

    def ids(completion_ids, **kwargs):
        return [float(len(row)) for row in completion_ids]

    def everything(**kwargs):
        seen["everything"] = kwargs
        return [float(len(c)) for c in kwargs["completions"]]

    def ours(responses, answer, prompts):
        seen["ours"] = (responses, answer, prompts)
        return [2.0, 3.0]

    columns = {"answer": ["5", "8"], "level": [1, 2], "prompt": ["a", "b"]}
    progress = {"global_step": 3, "max_steps": 9, "epoch": 0.5}
    result = scored([plain, ids, everything, ours], chat=chat, columns=columns, completion_ids=IDS, progress=progress)
    assert result.parts["plain"].tolist() == [0, 1] and result.parts["ids"].tolist() == [2, 3]
    completions, prompts, answer, kwargs = seen["plain"]
    if chat:
        assert completions == [[{"role": "assistant", "content": text}] for text in RESPONSES] and prompts == CHAT
    else:
        assert completions == RESPONSES and prompts == PROMPTS
    assert answer == ["5", "8"] and kwargs["level"] == [1, 2] and kwargs["completion_ids"] == IDS
    assert kwargs["trainer_state"].global_step == 3 and kwargs["trainer_state"].max_steps == 9
    logged = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    assert set(seen["everything"]) == {*logged, "answer", "level"}
    assert seen["ours"] == (RESPONSES, ["5", "8"], PROMPTS)  # our own names hold texts, in any order


def test_an_annotation_that_asks_for_messages_gets_them_for_text_too():
    def messages(completions: list[list[dict[str, str]]], prompts, **kwargs) -> list[float]:
        assert prompts == [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        return [float(len(completion[0]["content"])) for completion in completions]

    assert scored(messages).scores.tolist() == [1, 4]


def test_a_function_of_our_own_form_may_take_more_by_name():
    def later(prompts, responses, trainer_state, log_metric, **columns):
        assert set(columns) == {"answer"}
        log_metric("half", 0.5)
        return [float(trainer_state.global_step)] * len(responses)

    result = scored(later, columns={"answer": ["5", "8"]}, progress={"global_step": 4})
    assert result.scores.tolist() == [4, 4] and result.numbers == {"later/half": [0.5]}


def test_columns_that_a_function_reads_from_its_keywords_are_asked_of_the_data():
    def reads(completions, level=1, **kwargs):
        return [float(kwargs["answer"][0] == kwargs.get("gold", kwargs.pop("other", 0)))] * len(completions)

    class Callable:
        def __call__(self, completions, solution, log_extra=None, **kwargs):
            return [float(len(kwargs["tags"]))] * len(completions)

    rewards = Rewards([reads, Callable()])
    assert rewards.columns == ("solution",)
    assert sorted(rewards.wanted) == ["answer", "gold", "level", "other", "tags"]
    assert list(rewards.functions) == ["reads", "Callable"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, gold: [], r"needs the column 'gold', and the samples have answer, level"),
        (lambda completion_ids: [], "takes completion_ids, and the token ids of these responses are not known"),
        (lambda prompts: [], r"must take \(prompts, responses, \*\*columns\), or completions by name, but takes"),
        (lambda solution_str, answer: [], r"scores one response, as for verl; .* def scores\(prompts, responses,"),
        (lambda answer, /, completions: [], "takes answer by position only; remove the /"),
    ],
)
def test_a_parameter_that_nothing_fills_is_refused_before_any_function_runs(function, message):
    with pytest.raises(InputError, match=message):
        scored(function, columns={"answer": ["5", "8"], "level": [1, 2]})


def test_a_column_that_is_missing_from_the_keywords_is_named_with_those_that_there_are():
    def reads(completions, **kwargs):
        return [float(x) for x in kwargs["gold"]]

    said = []
    scored(reads, columns={"answer": ["5", "8"]}, say=said.append)
    assert "KeyError: 'gold' (line " in said[0]
    assert "the columns are answer: name 'gold' in reward_columns" in said[0]


def test_none_says_that_a_function_does_not_apply_and_rows_without_any_have_no_score():
    def math_only(completions, task, **kwargs):
        return [1.0 if kind == "math" else None for kind in task]

    def code_only(completions, task, **kwargs):
        return [None if kind != "code" else 5.0 for kind in task]

    columns = {"task": ["math", "code", "chat", "math"]}
    result = scored([math_only, code_only], RESPONSES * 2, columns=columns, weights=(2.0, 1.0))
    np.testing.assert_array_equal(result.scores, [2, 5, np.nan, 2])
    np.testing.assert_array_equal(result.parts["code_only"], [np.nan, 5, np.nan, np.nan])
    assert not result.failures and result.passed_over == {"math_only": 2, "code_only": 3}
    np.testing.assert_array_equal(result.beside(np.full(4, 0.5)), [2.5, 5.5, 0.5, 2.5])  # a model scores every row
    unweighted = scored([math_only, code_only], RESPONSES * 2, columns=columns, weights=(1.0, 0.0)).scores
    np.testing.assert_array_equal(unweighted, [1, np.nan, np.nan, 1])


def test_a_function_that_never_applies_is_not_given_up_and_one_that_fails_where_it_applies_is():
    many = RESPONSES * GIVE_UP

    def never(completions):
        return [None] * len(completions)

    def fails(completions):
        return [None, math.nan] * (len(completions) // 2)

    assert np.isnan(scored(never, many).scores).all()
    with pytest.raises(SharedError, match=rf"fails gave none of the last {GIVE_UP} samples a score; sample 1"):
        scored(fails, many)


def test_what_functions_log_is_kept_by_name_and_by_sample():
    def logs(completions, log_extra, log_metric, **kwargs):
        log_metric("length", len(completions[0]))
        log_extra("parsed", [complex(1, 2) if c == "bad" else c.upper() for c in completions])
        return [1 / (c != "bad") for c in completions]

    result = scored(logs, ["a", "bad", "c", "d"])
    assert result.extras == {"parsed": ["A", None, "C", "D"]}  # alone, the second one raised after its log
    assert result.numbers == {"logs/length": [1.0, 1.0, 1.0]}
    assert [f.sample for f in result.failures] == [1]

    def wrong(completions, log_extra):
        log_extra("parsed", ["one"])
        return [0.0] * len(completions)

    said = []
    scored(wrong, say=said.append)
    assert "on no sample alone" in said[-1]


async def slow(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


class Keeps:
    """Keeps a lock from call to call, which belongs to one event loop."""

    def __init__(self):
        self.lock = None

    async def __call__(self, prompts, responses):
        self.lock = self.lock or asyncio.Lock()
        async with self.lock:
            await asyncio.gather(self.lock_free(), self.lock_free())
        return [float(len(r)) for r in responses]

    async def lock_free(self):
        await asyncio.sleep(0)


def test_async_functions_are_awaited_in_one_event_loop():
    rewards = Rewards([slow, Keeps()])
    for _ in range(2):
        assert rewards.submit(PROMPTS, RESPONSES).result().scores.tolist() == [2, 8]


MODULE = """
import asyncio, time
class Judge:
    def __init__(self, url, factor: float = 1.0):
        self.factor = factor
    def __call__(self, completions, **kwargs):
        return [self.factor * len(c[0]["content"] if isinstance(c, list) else c) for c in completions]
def make(size: int, bonus=0.0):
    def made(completion_ids, log_metric, **kwargs):
        log_metric("seen", len(completion_ids))
        return [float(len(ids) > size) + bonus for ids in completion_ids]
    return made
async def hangs(completions, log_metric, **kwargs):
    log_metric("calls", 1)
    if "bad" in completions:
        await asyncio.sleep(1e6)
    return [None if c == "c" else float(len(c)) for c in completions]
def number(size: int, bonus=0.0):
    return 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(MODULE)


def test_classes_and_functions_that_make_a_function_are_called_with_the_options(module):
    result = scored(["mine.py:Judge:url=x:factor=2", "mine.py:make:size=2:bonus=0.5"], chat=True, completion_ids=IDS)
    assert result.parts["Judge"].tolist() == [2, 8] and result.parts["made"].tolist() == [0.5, 1.5]
    assert result.numbers == {"made/seen": [2.0]}
    for spec, message in (
        ("mine.py:Judge", "needs the option url (its options: url, factor)"),
        ("mine.py:Judge:url=x:other=2", "has no option 'other' (its options: url, factor)"),
        ("mine.py:number:size=2", "must make a function, made an object of type int"),
        ("mine.py:make:size=big", "option size: expected a whole number, got 'big'"),
    ):
        with pytest.raises(InputError) as caught:
            load_function(spec)
        assert message in str(caught.value)


def test_an_async_function_that_hangs_is_killed_and_its_other_samples_keep_scores_and_logs(module):
    result = scored("mine.py:hangs", ["aa", "bad", "c", "dddd"], limits=Limits(4.0))
    np.testing.assert_array_equal(result.scores, [2, np.nan, np.nan, 4])
    assert [f.sample for f in result.failures] == [1] and "it took longer than 0.5 s" in result.failures[0].reason
    assert result.numbers == {"hangs/calls": [1.0] * 3} and result.passed_over == {"hangs": 1}


THINK = ["<think>\nYes.\n</think>\nThe answer is $\\boxed{\\frac{1}{3}}$.", "<think>no end. $\\boxed{\\frac{1}{2}}$"]
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")


@needs_trl
@pytest.mark.parametrize("chat", [False, True])
def test_trls_own_functions_run_as_they_are(chat):
    names = [
        "trl.rewards:think_format_reward",
        "trl.rewards:get_soft_overlong_punishment:max_completion_len=3:soft_punish_cache=2",
        "trl.rewards:get_repetition_penalty_reward:ngram_size=1",
    ]
    result = scored(names, THINK, chat=chat, completion_ids=[[5, 5], [5, 6, 7, 8]])
    assert {name: part.tolist() for name, part in result.parts.items()} == {
        "think_format_reward": [1, 0],
        "soft_overlong_punishment_reward": [-0.5, -1],
        "repetition_penalty_reward": [-0.5, 0],
    }


@needs_trl
@needs_math
def test_trls_accuracy_rewards_run_as_they_are():
    names = ["accuracy_reward", "reasoning_accuracy_reward", "get_cosine_scaled_reward:max_len=4"]
    columns = {"solution": [r"\frac{1}{3}", r"\frac{1}{3}"]}
    functions = [f"trl.rewards:{name}" for name in names]
    result = scored(functions, THINK, columns=columns, completion_ids=[[5, 5], [5, 6]])
    assert {name: part.tolist() for name, part in result.parts.items()} == {
        "accuracy_reward": [1, 0],
        "reasoning_accuracy_reward": [1, 0],
        "cosine_scaled_reward": [0.75, -0.75],
    }
    assert result.extras["solution"] == columns["solution"]
    unreadable = scored(functions[0], THINK, columns={"solution": ["", r"\frac{1}{2}"]})
    np.testing.assert_array_equal(unreadable.scores, [np.nan, 1])
    assert unreadable.passed_over == {"accuracy_reward": 1} and not unreadable.failures


@needs_math
def test_math_verify_compares_results_as_mathematics():
    responses = [
        r"Hence \boxed{\frac{2}{6}}, after 3 steps",
        "it is 0.5",
        "so #### 285000",
        r"$x = \{1, 2\}$",
        r"\boxed{(x+1)^2}",
        "no idea",
        r"\boxed{7}",
        "3",
    ]
    answer = [r"\frac{1}{3}", "1/2", "$95,000 each\n#### 285,000", r"$\{2,1\}$", "x^2+2x+1", "4", [6, 7], "  …  "]
    prompts = [""] * len(responses)
    result = Rewards(["math_verify"], say=lambda text: None).submit(prompts, responses, {"answer": answer}).result()
    np.testing.assert_array_equal(result.scores, [1, 1, 1, 1, 1, 0, 1, np.nan])
    assert result.passed_over == {"math_verify": 1}
    with pytest.raises(InputError, match=r"math_verify: seconds=0 must be at least 1"):
        load_function("math_verify:seconds=0")
