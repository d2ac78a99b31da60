"""Damaged inputs end in named errors: a sample of `benchmarks/fuzz_inputs.py`, and the harness itself."""

import sys
from pathlib import Path

import pytest

from jaxrlhf.errors import InputError, StorageError

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fuzz_inputs
import fuzz_words


def test_a_sample_of_damaged_files_and_odd_requests_ends_in_named_errors():
    pytest.importorskip("torch")
    pytest.importorskip("gguf")
    pytest.importorskip("starlette")
    outcomes = list(fuzz_inputs.run_all((), values=12, seed=3, limit=100, every=97, flags=False))
    assert [outcome for outcome in outcomes if outcome.verdict not in fuzz_inputs.GOOD] == []
    verdicts = [outcome.verdict for outcome in outcomes]
    assert verdicts.count("refused") > 20 and verdicts.count("accepted") > 5


def test_a_sample_of_words_that_flags_exclude_is_refused_with_the_flags_name(tmp_path):
    cases = list(fuzz_words.flag_cases())[5::211]
    assert {kind for kind, _, _ in cases} >= {"flags of sft", "flags of ppo", "flags of serve", "flags of plan"}
    failed = [(kind, name, found) for kind, name, run in cases if (found := run(tmp_path))[0] != "refused"]
    assert failed == []


def fail(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("command", "verdict"),
    [
        (fail(InputError("rows.jsonl line 1: bad")), "refused"),
        (fail(StorageError("rows.jsonl is gone")), "refused"),
        (fail(InputError("something is bad")), "unnamed"),
        (fail(ValueError("rows.jsonl")), "trace"),
        (fail(SystemExit(1)), "trace"),
        (["sft", "--rows.jsonl", "x"], "refused"),
        (["sft", "--max_steps", "x"], "unnamed"),
        (lambda: None, "accepted"),
    ],
)
def test_the_harness_tells_named_errors_from_others(command, verdict):
    assert fuzz_inputs.run_command(command, ["rows.jsonl"])[0] == verdict
