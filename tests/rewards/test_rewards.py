"""Reward functions: what they may return, how they are named and called, what the built-in ones score, and failures."""

import math
import sys
import threading

import numpy as np
import pytest

from jaxrlhf.config import load_yaml, parse, save_yaml
from jaxrlhf.errors import InputError, SharedError
from jaxrlhf.rewards import Rewards, RewardsConfig, final_number, load_function
from jaxrlhf.rewards.functions import join_spec, split_spec
from jaxrlhf.rewards.scoring import GIVE_UP

# In the form of gsm8k's rows: calculator annotations, and the answer after ####.
GSM = (
    "Each of the 4 crates holds 6 jars, so there are 4*6 = <<4*6=24>>24 jars.\nHe sold 24/2 = <<24/2=12>>12.\n#### 12",
    "The house costs 3 * $95,000 = $<<3*95000=285000>>285,000.\n#### 285,000",
    "After the storm it was 4 - 9 = <<4-9=-5>>-5 degrees.\n#### -5",
    "There are 1,000,000 / 8 = <<1000000/8=125000>>125,000 ants.\n#### 109,200,000",
    "That is 7.5 * 0.2 = $<<7.5*.2=1.5>>1.5.\n#### 1.50",
)


def score(functions, responses, *, weights=(), say=lambda text: None, rows=None, **columns):
    rewards = Rewards([functions] if isinstance(functions, str) or callable(functions) else functions, weights, say=say)
    prompts = [f"prompt {i}" for i in range(len(responses))]
    return rewards.submit(prompts, responses, columns, rows).result()


def refused(*args, **options):
    with pytest.raises(InputError) as caught:
        score(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *zip(GSM, ("12", "285000", "-5", "109200000", "1.5"), strict=True),
        ("She pays $18.", "18"),
        ("It is 3 + 4 = 7, so 7 apples", "7"),
        ("The answer is 5. Then 2 days later", "5"),
        ("Answer: $1,234.50!", "1234.5"),
        ("The answer is 4, no, the answer is −6 degrees", "-6"),
        ("#### 3\nso #### 9 and 10", "9"),
        ("it is 8\n####", "8"),
        ("the answer is unknown, perhaps 11", "11"),
        ("10-4", "4"),
        ("x=-4", "-4"),
        ("-$7", "-7"),
        ("$-7", "-7"),
        ("about .75", "0.75"),
        ("1, 2", "2"),
        ("1,2345", "2345"),
        ("50%", "50"),
        (r"\boxed{\$18}", "18"),
        (r"so \boxed{72} after 3 days", "72"),
        (r"\boxed{3} no, \boxed{ \text{x} = {4}} and \boxed{5", "4"),
        (r"\boxed{72}, hence the answer is 71\n#### 70", "70"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number_is_what_a_reader_would_take_for_the_answer(text, number):
    assert final_number(text) == (None if number is None else type(final_number("1"))(number))


def test_number_match_compares_the_response_with_the_reference_of_gsm8k():
    responses = ["#### 12", "so it costs 285000.00 dollars", "5", "109200000 and 1", "The answer is 1.5"]
    assert score("number_match", responses, answer=GSM).scores.tolist() == [1, 1, 0, 0, 1]
    assert score("number_match", ["nothing"] * 5, answer=GSM).scores.tolist() == [0] * 5
    near = score("number_match:column=gold:tolerance=0.1", ["3.1", "3.2", "2.9"], gold=["3", 3, [7, 2.8]])
    assert near.scores.tolist() == [1, 0, 1]
    # As JSON holds them: no exponent may be read as a number of its own.
    floats = score("number_match", ["5", "0.00001", "20", "2.5"], answer=[1e-5, 1e-5, 1e20, 2.5])
    assert floats.scores.tolist() == [0, 1, 0, 1]


def test_exact_match_ignores_case_spaces_and_outer_punctuation_and_takes_any_of_several_references():
    responses = ["  Paris. ", "paris, France", "Let me see\n#### the  Seine", "42"]
    assert score(
        "exact_match", responses, answer=["PARIS", "Paris", "The Seine", ["forty-two", 42]]
    ).scores.tolist() == [
        1,
        0,
        1,
        1,
    ]


def test_regex_and_length_score_by_their_options():
    assert score("regex:pattern=^<a>.*</a>$", ["<a>x</a>", "<a>x", "y <a></a>"]).scores.tolist() == [1, 0, 0]
    assert score("regex:pattern=[0-9]+:whole=true", ["12", "12 "]).scores.tolist() == [1, 0]
    texts = ["", "one two", "one two three four", "a b c d e f g h i"]
    np.testing.assert_allclose(score("length:target=4", texts).scores, [0, 0.5, 1, 0])
    np.testing.assert_allclose(score("length:limit=4", texts).scores, [0, 0, 0, -1])
    np.testing.assert_allclose(score("length:limit=8:unit=characters", texts).scores, [0, 0, -1, -1])
    np.testing.assert_allclose(score("length:limit=8", texts).scores, [0, 0, 0, -1 / 8])


def test_several_functions_are_weighed_and_their_parts_kept_under_names_of_their_own():
    result = score(
        ["length:target=2", "regex:pattern=a", "regex:pattern=b", len_of], ["a b", "b"], weights=(2.0, -0.5, 0.25, 0.0)
    )
    assert list(result.parts) == ["length", "regex", "regex_2", "len_of"]
    np.testing.assert_allclose(result.scores, [2 - 0.5 + 0.25, 1 + 0.25])
    np.testing.assert_allclose(result.parts["len_of"], [3, 1])
    assert result.scores.dtype == result.parts["regex"].dtype == np.float32
    assert set(result.seconds) == set(result.parts) and not result.failures


def len_of(prompts, responses):
    return np.array([len(r) for r in responses])


@pytest.mark.parametrize(
    "values",
    [[1, 2.5], (True, np.float64(2)), np.array([1.0, 2.0]), [np.float32(1), np.int64(2)], [np.array(1.0), np.bool_(1)]],
)
def test_numbers_of_every_kind_are_scores(values):
    expected = [float(v) for v in values]
    assert score(lambda prompts, responses: values, ["a", "b"]).scores.tolist() == expected


def test_jax_arrays_are_scores_too():
    import jax.numpy as jnp

    assert score(lambda p, r: jnp.array([1.0, 2.0], jnp.bfloat16), ["a", "b"]).scores.tolist() == [1, 2]


def test_functions_get_the_columns_that_they_name_and_any_keyword_gets_all():
    seen = {}

    def picky(prompts, responses, answer, level=None, factor: float = 1.0):
        seen["picky"] = (prompts, responses, answer, level, factor)
        return [0.0] * len(prompts)

    def open_ended(prompts, responses, **columns):
        seen["open"] = columns
        return [0.0] * len(prompts)

    rewards = Rewards([picky, open_ended])
    assert rewards.columns == ("answer",)
    rewards.submit(["p"], ["r"], {"answer": ["a"], "level": [3], "other": [{"x": 1}]}).result()
    assert seen["picky"] == (["p"], ["r"], ["a"], [3], 1.0)
    assert seen["open"] == {"answer": ["a"], "level": [3], "other": [{"x": 1}]}
    with pytest.raises(InputError, match=r"picky: needs the column 'answer', and the samples have level"):
        rewards.submit(["p"], ["r"], {"level": [3]})


def test_a_function_that_spoils_its_arguments_spoils_them_for_no_other():
    def spoil(prompts, responses, answer):
        count = len(prompts)
        for texts in (prompts, responses, answer):
            texts.clear()
        return [0.0] * count

    assert score([spoil, "number_match"], ["1", "2"], answer=["1", "2"]).scores.tolist() == [1, 1]


def test_rows_that_do_not_count_are_not_seen_and_score_nothing():
    seen = []

    def remember(prompts, responses, answer):
        seen.extend(zip(prompts, responses, answer, strict=True))
        return [5.0] * len(prompts)

    result = score(remember, ["a", "b", "c"], rows=[True, False, True], answer=["x", None, "z"])
    assert result.scores.tolist() == [5, 0, 5] and seen == [("prompt 0", "a", "x"), ("prompt 2", "c", "z")]
    assert score(remember, ["a"], rows=[False], answer=["x"]).scores.tolist() == [0]


def test_a_function_that_raises_loses_only_the_samples_that_it_raises_on():
    said = []

    def divide(prompts, responses):
        return [1 / int(response) for response in responses]

    result = score([divide, len_of], ["2", "0", "x", "4"], say=said.append, weights=(1.0, 10.0))
    np.testing.assert_allclose(result.scores, [10.5, np.nan, np.nan, 10.25])
    np.testing.assert_allclose(result.parts["len_of"], [1, 1, 1, 1])
    assert [(f.function, f.sample) for f in result.failures] == [("divide", 1), ("divide", 2)]
    assert "ZeroDivisionError: division by zero (line " in result.failures[0].reason
    assert (
        "test_rewards.py)" in result.failures[1].reason and "ValueError: invalid literal" in result.failures[1].reason
    )
    assert "divide gave sample 1 no score: ZeroDivisionError" in said[0]
    assert "prompt: 'prompt 1'" in said[0] and "response: '0'" in said[0]


def test_values_that_are_no_finite_numbers_are_failures_of_their_samples():
    values = [1.0, math.nan, None, math.inf, 10**400, 1e300, 2]
    result = score(lambda prompts, responses: values, list("abcdefg"))
    np.testing.assert_array_equal(np.isnan(result.scores), [0, 1, 1, 1, 1, 1, 0])
    assert [f.sample for f in result.failures] == [1, 3, 4, 5]  # None: the function does not apply
    assert [f.reason for f in result.failures] == [f"returned {v}" for v in ("nan", "inf", "inf", "1e+300")]


def test_a_function_of_weight_0_is_watched_and_its_failures_spoil_no_score():
    result = score([lambda p, r: [math.nan, 7.0], len_of], ["a", "b"], weights=(0.0, 1.0))
    assert result.scores.tolist() == [1, 1] and len(result.failures) == 1


def test_only_the_first_failures_of_a_batch_are_shown_and_the_rest_counted():
    said = []
    result = score(lambda p, r: [1.0] + [math.nan] * 9, list("abcdefghij"), say=said.append)
    assert len(result.failures) == 9 and len(said) == 4 and "6 more" in said[-1]


def test_a_function_that_fails_on_every_sample_stops_the_run_and_says_why_and_on_what():
    def broken(prompts, responses, answer):
        raise KeyError("no such thing")

    many = ["a"] * GIVE_UP
    message = refused(broken, many, answer=many)
    assert f"broken gave none of the last {GIVE_UP} samples a score; sample 0: KeyError: 'no such thing' " in message
    assert "prompt: 'prompt 0'" in message and "response: 'a'" in message
    assert "returned nan" in refused(lambda p, r: [math.nan] * len(r), many)
    assert "SystemExit" in refused(lambda p, r: sys.exit("stop"), many)


def test_a_function_that_fails_on_a_whole_small_call_is_given_up_only_after_many_in_a_row():
    answers = iter([math.nan] * 40 + [1.0] + [math.nan] * 80)
    rewards = Rewards([lambda prompts, responses: [next(answers) for _ in responses]], say=lambda text: None)
    call = lambda size: rewards.submit([""] * size, [""] * size).result()  # noqa: E731
    for _ in range(10):
        result = call(4)
        assert np.isnan(result.scores).all() and len(result.failures) == 4
    assert call(1).scores.tolist() == [1]
    for _ in range(GIVE_UP // 4 - 1):
        call(4)
    with pytest.raises(SharedError, match=f"gave none of the last {GIVE_UP} samples a score"):
        call(4)


def test_a_function_that_fails_on_the_batch_but_on_no_sample_gets_its_single_scores_and_a_note():
    said = []

    def one_only(prompts, responses):
        (response,) = responses
        return [len(response)]

    assert score(one_only, ["a", "bb"], say=said.append).scores.tolist() == [1, 2]
    assert "ValueError" in said[0] and "on no sample alone" in said[0]


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda p, r: [1.0], "must return one number per response; it returned 1 for 2 responses"),
        (lambda p, r: [1.0] * 3, "it returned 3 for 2 responses"),
        (lambda p, r: "ab", "a list or array of 2; it returned a text"),
        (lambda p, r: ["1", "2"], "value 0 is a text: '1'"),
        (lambda p, r: [1.0, [2.0]], "value 1 is a list: [2.0]"),
        (lambda p, r: 3.0, "it returned one number"),
        (lambda p, r: None, "it returned None"),
        (lambda p, r: {0: 1.0, 1: 2.0}, "it returned a dict"),
        (lambda p, r: {1.0, 2.0}, "it returned a set"),
        (lambda p, r: np.zeros((2, 1)), "of shape (2,); it returned a ndarray of shape (2, 1)"),
        (lambda p, r: [1.0, 1j], "value 1 is a complex"),
        (lambda p, r: (x for x in (1.0, 2.0)), "it returned a generator; put the generator in list(…)"),
    ],
)
def test_a_wrong_count_or_type_is_refused_with_what_was_expected_and_found(function, found):
    message = refused(function, ["a", "b"])
    assert message.startswith("reward function <lambda>: must return one number per response") and found in message


def test_scoring_goes_on_beside_the_caller_and_calls_of_one_function_never_overlap():
    go, running, most = threading.Event(), [], []

    def wait(prompts, responses):
        running.append(1)
        most.append(len(running))
        assert go.wait(60)
        running.pop()
        return [float(len(r)) for r in responses]

    rewards = Rewards([wait])
    handles = [rewards.submit(["p"], ["x" * n]) for n in (1, 2, 3)]
    go.set()  # reached while the first call waits: submit did not
    assert [float(handle.result().scores[0]) for handle in handles] == [1, 2, 3]
    assert handles[0].result() is handles[0].result() and most == [1, 1, 1]


def test_what_a_function_prints_is_told_when_its_result_is_asked_for_and_not_in_between(capsys):
    said, streams = [], (sys.stdout, sys.stderr)

    def chatty(prompts, responses):
        print("hello")
        print("careful", file=sys.stderr)
        for i in range(30):
            print(i)
        return [0.0] * len(prompts)

    rewards = Rewards([chatty], say=said.append)
    handle = rewards.submit(["p"], ["r"])
    print("ours")
    handle.result()
    assert said[:3] == ["chatty: hello", "chatty: careful", "chatty: 0"] and said[-1] == "chatty: … and 12 more lines"
    assert capsys.readouterr() == ("ours\n", "")
    assert (sys.stdout, sys.stderr) == streams


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A working directory with a module of reward functions that imports one beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper_of_my_rewards.py").write_text("FACTOR = 2\n")
    (tmp_path / "my_rewards.py").write_text(
        "from helper_of_my_rewards import FACTOR\n"
        "NUMBER = 3\n"
        "def scaled(prompts, responses, by: float = 1.0, name='x', on=True):\n"
        "    assert isinstance(by, float) and isinstance(name, str) and isinstance(on, bool)\n"
        "    return [FACTOR * by * len(r) for r in responses]\n"
        "def alone(prompts):\n    return []\n"
        "class Group:\n    @staticmethod\n    def inner(prompts, responses):\n        return [1.0] * len(prompts)\n"
    )
    yield tmp_path
    for name in [name for name in sys.modules if "my_rewards" in name]:
        del sys.modules[name]


@pytest.mark.parametrize("place", ["my_rewards", "my_rewards.py", "./my_rewards.py"])
def test_functions_are_found_by_module_and_by_file_with_options_of_their_own_types(module, place):
    assert score(f"{place}:scaled", ["ab"]).scores.tolist() == [4]
    assert score(f"{place}:scaled:by=3:name=5:on=false", ["ab"]).scores.tolist() == [12]
    assert score(f"{place}:Group.inner", ["ab"]).scores.tolist() == [1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_rewards:absent", "my_rewards has no 'absent'; its functions and classes: scaled, alone, Group"),
        ("my_rewards:NUMBER", "must be a function, found an object of type int"),
        ("my_rewards:scaled:size=3", "has no option 'size' (it has by, name, on)"),
        ("my_rewards:scaled:by=much", "option by: expected a number, got 'much'"),
        ("my_rewards:scaled:by=1:by=2", "the option by is given twice"),
        ("my_rewards:alone", "must take (prompts, responses, **columns), or completions by name, but takes (prompts)"),
        ("my_rewardz:scaled", "there is no module my_rewardz"),
        ("absent/file.py:scaled", "absent/file.py: no such file in"),
        ("broken.py:scaled", "importing broken.py failed: ZeroDivisionError: division by zero (line 2 of broken.py)"),
        (
            "open.py:scaled",
            "importing open.py failed: SyntaxError: '(' was never closed (line 2 of open.py)",
        ),
        ("needs.py:scaled", "there is no module of_nobody, which needs.py imports"),
        (":scaled", "must be package.module:name or path/to/file.py:name"),
    ],
)
def test_functions_that_cannot_be_found_or_called_are_refused(module, spec, message):
    (module / "broken.py").write_text("x = 1\ny = x / 0\n")
    (module / "open.py").write_text("x = 1\ny = (x\n")
    (module / "needs.py").write_text("import of_nobody\n")
    with pytest.raises(InputError) as caught:
        load_function(spec)
    assert message in str(caught.value) and spec.split(":")[0] in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "nomber_match",
            "no built-in one is named 'nomber_match' (exact_match, number_match, math_verify, regex, length, instruct",
        ),
        ("3}", "a comma separates functions"),
        ("regex", "needs the option pattern, as in regex:pattern=…"),
        ("regex:pattern=(", "pattern='(' is no regular expression"),
        ("regex:pattern=a:tail=b", "has no option 'tail' (it has pattern, whole); within a value"),
        ("length", "give one of target and limit"),
        ("length:target=3:limit=4", "give one of target and limit"),
        ("length:target=0", "target must be at least 1"),
        ("length:target=many", "option target: expected a whole number or none, got 'many'"),
        ("length:limit=3:unit=tokens", "unit='tokens' must be words or characters"),
        ("number_match:tolerance=-1", "tolerance=-1.0 must be 0 or more"),
        ("number_match:references=x", "has no option 'references' (it has tolerance, column)"),
    ],
)
def test_built_in_functions_and_their_options_are_checked_with_the_settings(spec, message):
    with pytest.raises(InputError) as caught:
        RewardsConfig(reward_functions=(spec,))
    assert message in str(caught.value)


def test_a_value_may_hold_colons_and_equal_signs():
    for options in ({"pattern": "a:b"}, {"pattern": "(?:x=1):y"}, {"pattern": "x=1:", "whole": "true"}):
        assert split_spec(join_spec("regex", options)) == ("regex", options)
    assert split_spec("rewards/mine.py:brief:limit=2") == ("rewards/mine.py:brief", {"limit": "2"})
    assert score(r"regex:pattern=(?\:x=1)", ["x=1", "y"]).scores.tolist() == [1, 0]


YAML = r"""
reward_functions:
  - number_match
  - regex: {pattern: '\d{1,3},(?:k=v)', whole: true}
  - length:
      target: 200
reward_weights: [1, 0.5, 2]
"""
IN_WORDS = ("number_match", r"regex:pattern=\d{1,3},(?\:k=v):whole=true", "length:target=200")


def test_yaml_flags_and_dicts_say_the_same_and_what_is_saved_reads_back(tmp_path):
    (tmp_path / "a.yaml").write_text(YAML)
    config = load_yaml(RewardsConfig, tmp_path / "a.yaml")
    assert config.reward_functions == IN_WORDS and config.reward_weights == (1.0, 0.5, 2.0)
    save_yaml(config, tmp_path / "b.yaml")
    assert load_yaml(RewardsConfig, tmp_path / "b.yaml") == config
    (tmp_path / "c.yaml").write_text("reward_functions: {number_match: , length: {target: 200}}\n")
    argv = ["--reward_functions", "number_match", "length:target=200"]
    given = parse(RewardsConfig, argv, "jaxrlhf ppo", "PPO.")
    assert given == load_yaml(RewardsConfig, tmp_path / "c.yaml")
    assert given == RewardsConfig.create(reward_functions=["number_match", {"length": {"target": 200}}])
    assert config.rewards().weights == {"number_match": 1.0, "regex": 0.5, "length": 2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_functions": ("number_match",), "reward_weights": (1.0, 2.0)}, "2 weights for 1 reward_functions"),
        ({"reward_weights": (1.0,)}, "1 weights for 0 reward_functions"),
        (
            {"reward_functions": ("number_match",), "reward_weights": (math.inf,)},
            "reward_weights=inf must be finite",
        ),
        ({"reward_model_weight": 0.0}, "nothing scores the responses"),
        (
            {"reward_functions": ("number_match",), "reward_weights": (0.0,), "reward_model_weight": 0.0},
            "nothing scores",
        ),
    ],
)
def test_weights_that_contradict_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RewardsConfig(**options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward_functions: [{regex: {pattern: x}, length: {target: 1}}]", "must be one function and its options"),
        ("reward_functions: [{regex: [x]}]", r"the options of regex must be a mapping, found \['x'\]"),
    ],
)
def test_mappings_of_another_shape_are_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_yaml(RewardsConfig, tmp_path / "a.yaml")


def test_references_that_nothing_could_match_are_named_with_their_place_before_any_training():
    class Rows:
        def __init__(self, values):
            self.values = values

        def __len__(self):
            return len(self.values)

        def columns(self, indices):
            return {"answer": [self.values[i] for i in indices]}

        def where(self, i):
            return f"gsm.jsonl row {11 + i}"

    rewards = Rewards(["number_match", "exact_match", "length:limit=5"])
    rewards.check_references(Rows(list(GSM) * 300), chunk=64)
    for bad, message in (
        (
            "none here",
            r"gsm.jsonl row 12, column 'answer': the reference 'none here' holds no number .*number_match.; correct",
        ),
        ({"a": 1}, "must be text, a number or a list of these"),
        (" ", "is empty"),
        ([], "is an empty list"),
    ):
        with pytest.raises(InputError, match=message):
            rewards.check_references(Rows(["1", bad, *GSM]))
    for bad in ("...", "So it is 4.\n#### "):
        with pytest.raises(InputError, match=r"row 12, column 'answer': .* leaves nothing to compare.* exact_match"):
            Rewards(["exact_match"]).check_references(Rows(["1", bad]))
    Rewards(["length:limit=5"]).check_references(None)
