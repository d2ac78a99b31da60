"""Best-of-n and rejection sampling: what is kept, that the SFT step reads it back, and what is refused."""

import json
import math
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrlhf import cli, objectives
from jaxrlhf.commands import sample as module
from jaxrlhf.commands.sample import SampleConfig, sample
from jaxrlhf.commands.selection import Samples, select_samples, summarise_samples
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import DataConfig, load_data
from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained

pytestmark = pytest.mark.long

PROMPTS, N = 10, 4
SETTINGS = {"max_train_samples": PROMPTS, "max_prompt_seq_len": 32, "max_answer_seq_len": 8, "samples_per_prompt": N}
SETTINGS |= {"keep_unfinished": True, "seed": 3, "per_device_batch_size": 1}


@pytest.fixture(scope="module")
def rows(demo, tmp_path_factory):
    """The demo's prompts with a column, one of them a conversation."""
    questions = list(dict.fromkeys(row["prompt"] for row in read_jsonl(demo.train)))[:40]
    given = [{"prompt": question, "quality": "x" * i} for i, question in enumerate(questions)]
    given[0]["prompt"] = [{"role": "user", "content": given[0]["prompt"]}]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return path


@pytest.fixture(scope="module")
def options(demo, rows):
    return SETTINGS | {"model_name_or_path": demo.lm, "data_path": (str(rows),), "data_cache_dir": demo.cache}


@pytest.fixture(scope="module")
def finished(demo, options, tmp_path_factory):
    """A run with the reward model and a function: its file's rows, its figures, and every batch it went through."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "vowels.py").write_text(FUNCTION)
    batches, scored_rollouts = [], []

    def run(self, console):
        for batch in module_run(self, console):
            batches.append(batch)
            yield batch

    def score(params, rollout, **static):
        scored_rollouts.append((rollout, module_score(params, rollout, **static)))
        return scored_rollouts[-1][1]

    module_score = module.reward_model_scores
    module_run = module.Sampler.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Sampler, "run", run)
        patch.setattr(module, "reward_model_scores", score)
        settings = {"reward_functions": (f"{folder}/vowels.py:score_vowels:bonus=1",), "reward_weights": (0.5,)}
        settings |= {"reward_model_name_or_path": demo.reward, "reward_model_weight": 2.0}
        path = folder / "best.jsonl"
        summary = sample(SampleConfig.create(**(options | settings), output_file=str(path)))
    return SimpleNamespace(
        folder=folder, path=path, rows=read_jsonl(path), summary=summary, batches=batches, rollouts=scored_rollouts
    )


FUNCTION = """import re

def score_vowels(prompts, responses, quality, bonus: float = 0.0):
    assert all(isinstance(p, str) and p for p in prompts)
    return [len(re.findall("[aeiou]", r)) + len(q) / 100 + bonus for r, q in zip(responses, quality)]
"""


def test_the_best_of_each_prompt_is_written_with_its_score_its_parts_and_the_columns(finished, rows):
    given = {json.dumps(row["prompt"]): row["quality"] for row in read_jsonl(rows)}
    assert len(finished.rows) == PROMPTS == len({json.dumps(row["prompt"]) for row in finished.rows})
    best = {}
    for batch in finished.batches:
        for k, index in enumerate(np.repeat(batch["indices"], N)):
            if index >= 0:
                best[int(index)] = max(best.get(int(index), (-math.inf, "")), (batch["scores"][k], batch["texts"][k]))
    assert [row["chosen"] for row in finished.rows] == [best[i][1] for i in range(PROMPTS)]
    for i, row in enumerate(finished.rows):
        assert row["quality"] == given[json.dumps(row["prompt"])]
        vowels = len(re.findall("[aeiou]", row["chosen"])) + len(row["quality"]) / 100 + 1
        assert row["scores"]["score_vowels"] == pytest.approx(vowels, rel=1e-6)
        assert row["score"] == pytest.approx(2 * row["scores"]["reward_model"] + 0.5 * vowels, rel=1e-5)
        assert row["score"] == pytest.approx(float(best[i][0]), rel=1e-6)


def test_the_reward_model_scores_the_last_token_of_prompt_and_response(finished, demo):
    model = load_pretrained(demo.reward, head="scalar", new_head=False)
    for rollout, scores in finished.rollouts:
        rows = jax.device_get(rollout.compact())
        values = model.module.apply({"params": model.params}, rows.tokens, rows.mask)
        last = rows.mask.sum(axis=1) - 1
        np.testing.assert_allclose(scores, np.asarray(values)[np.arange(len(last)), last], rtol=2e-4, atol=2e-5)
    scores = np.concatenate([np.asarray(scores) for _, scores in finished.rollouts])
    np.testing.assert_array_equal(
        scores, np.concatenate([batch["parts"]["reward_model"] for batch in finished.batches])
    )


def test_the_figures_beside_the_file_hold_the_curve_of_the_best_of_k(finished):
    summary = json.loads((finished.folder / "best.summary.json").read_text())
    assert summary == json.loads(json.dumps(finished.summary))
    scores = np.concatenate([b["scores"].reshape(-1, N)[b["indices"] >= 0] for b in finished.batches])
    curve = summary["expected_best_of_k"]
    assert [point["k"] for point in curve] == [1, 2, 3, 4]
    assert curve[0]["score"] == pytest.approx(scores.mean(), rel=1e-5)
    assert curve[-1]["score"] == pytest.approx(scores.max(axis=1).mean(), rel=1e-5)
    assert summary["kept_score_mean"] == pytest.approx(scores.max(axis=1).mean(), rel=1e-5)
    assert curve[-1]["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    assert (summary["prompts"], summary["samples_per_prompt"], summary["kept"]) == (PROMPTS, N, PROMPTS)
    assert summary["settings"]["select"] == "best" and summary["parts"].keys() == {"score_vowels", "reward_model"}


def test_what_is_written_reads_back_as_sft_data_and_renders_as_it_was_sampled(finished, demo, tmp_path):
    config = DataConfig(data_path=(str(finished.path),), data_cache_dir=str(tmp_path), eval_fraction=0.1, packing=False)
    train, evaluation = load_data(config, demo.tokenizer, "sft")
    assert len(train) + len(evaluation) == PROMPTS
    written = {}
    for batch in finished.batches:
        written |= dict.fromkeys(batch["texts"])
    for data in (train, evaluation):
        for i in range(len(data)):
            row = finished.rows[data.source(i)[1]]
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
            assert data.text(i) == {"prompt": f"Human: {prompt} Assistant:", "chosen": " " + row["chosen"]}
            assert row["chosen"] in written


def test_samples_depend_on_neither_the_batch_nor_the_slots(finished, demo, options, tmp_path):
    settings = options | {"per_device_batch_size": 2, "generation_slots": 16, "mesh_fsdp": 4, "mesh_data": 2}
    settings |= {"reward_model_name_or_path": demo.reward, "select": "threshold", "min_score": -100.0}
    sample(SampleConfig.create(**settings, output_file=str(tmp_path / "all.jsonl")))
    every = read_jsonl(tmp_path / "all.jsonl")
    texts = {text for b in finished.batches for k, text in enumerate(b["texts"]) if b["indices"][k // N] >= 0}
    assert {row["chosen"] for row in every} == {text for text in texts if text.strip()}
    assert all(set(row) == {"prompt", "chosen", "score"} for row in every)


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("must be refused first")

    monkeypatch.setattr(module, "load_pretrained", refuse)


def scored(options, folder, **changes):
    return SampleConfig.create(
        **(options | {"reward_functions": ("length:limit=3",), "output_file": str(folder / "new.jsonl")} | changes)
    )


def test_a_file_that_exists_is_kept_unless_it_may_be_replaced(options, finished, tmp_path, nothing_runs):
    before = finished.path.read_bytes()
    with pytest.raises(InputError, match=r"best\.jsonl exists; name another file, or replace it with --overwrite"):
        sample(scored(options, finished.folder, output_file=str(finished.path)))
    (tmp_path / "new.summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"new\.summary\.json exists"):
        sample(scored(options, tmp_path))
    (tmp_path / "file").write_text("")
    for place in ("file/new.jsonl", "new.csv"):
        with pytest.raises(InputError, match=place):
            sample(scored(options, tmp_path, output_file=str(tmp_path / place)))
    assert finished.path.read_bytes() == before


def test_an_interrupt_and_a_failure_leave_the_old_files_as_they_were(options, tmp_path, monkeypatch):
    for name in ("new.jsonl", "new.summary.json"):
        (tmp_path / name).write_text("old")
    calls = []

    def stop(self, indices):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return start(self, indices)

    start = module.Sampler.start
    with monkeypatch.context() as patch:
        patch.setattr(module.Sampler, "start", stop)
        with pytest.raises(KeyboardInterrupt):
            sample(scored(options, tmp_path, overwrite=True))
    with pytest.raises(InputError, match=r"no sample is left to write .*lower min_score=1.0 \(the highest score was"):
        sample(scored(options, tmp_path, overwrite=True, min_score=1.0))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("new.jsonl", "new.summary.json"), "old"
    )
    sample(scored(options, tmp_path, overwrite=True))
    assert len(read_jsonl(tmp_path / "new.jsonl")) == PROMPTS and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_functions": ()}, "nothing scores the responses: give reward_model_name_or_path, reward_functions"),
        ({"reward_model_name_or_path": "x", "reward_model_weight": 0.0}, "reward_model_weight=0 "),
        ({"select": "threshold"}, "select=threshold requires min_score"),
        ({"min_score": math.nan}, "min_score=nan must be finite"),
        ({"top_fraction": 0.0}, "top_fraction=0.0 must be above 0 and at most 1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0 must be at least 1"),
        ({"per_device_batch_size": 0}, "per_device_batch_size=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0 with samples_per_prompt=4"),
        ({"generation_slots": -1}, "generation_slots=-1 must be at least 0"),
        ({"top_p": 2.0}, "top_p=2.0 must be above 0 and at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, tmp_path, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        scored(options, tmp_path, **changes)


def test_a_missing_reference_and_a_column_that_would_be_overwritten_stop_before_a_model_is_loaded(
    options, tmp_path, nothing_runs
):
    with pytest.raises(InputError, match=r"rows\.jsonl line \d+: 'answer' is missing"):
        sample(scored(options, tmp_path, reward_functions=("number_match",)))
    with pytest.raises(InputError, match="column 'score': output_file has a field of that name"):
        sample(scored(options, tmp_path, reward_columns=("score",)))


def test_a_reward_model_that_is_none_is_named(options, demo, tmp_path):
    with pytest.raises(InputError, match="has no scalar head"):
        sample(scored(options, tmp_path, reward_model_name_or_path=demo.lm))


def test_the_command_takes_flags_and_prints_the_curve(options, demo, rows, tmp_path, capsys):
    flags = {**SETTINGS, "model_name_or_path": demo.lm, "data_path": rows, "data_cache_dir": demo.cache}
    flags |= {"output_file": tmp_path / "a.jsonl", "reward_functions": "length:target=4"}
    argv = [
        word
        for name, value in flags.items()
        for word in (f"--{name}", str(value).lower() if value is True else str(value))
    ]
    assert cli.main(["sample", *argv]) == 0
    shown = capsys.readouterr().err
    assert "expected best of k" in shown and f"kept {PROMPTS} of mean score" in shown
    assert cli.main(["sample", *argv]) == 2
    assert "exists; name another file" in capsys.readouterr().err


# ---- selection


SCORES = np.array([[1, 5, 5, 2], [np.nan, 3, 9, 4], [0, -1, -2, np.nan]], np.float32)
TEXTS = [["a", "b", "c", "a"], ["d", "e", " ", "f"], ["g", "h", "i", "j"]]
ENDED = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], bool)
SAMPLES = Samples(SCORES, TEXTS, ENDED)


def select(**options):
    defaults = {"best": True, "min_score": None, "top_fraction": 1.0, "keep_unfinished": False}
    kept, left_out = select_samples(SAMPLES, **(defaults | options))
    assert len(kept) + sum(left_out.values()) == SCORES.size
    return kept, {name: count for name, count in left_out.items() if count}


def test_best_of_n_keeps_the_first_highest_usable_sample_of_each_prompt():
    kept, left_out = select()
    assert kept == [(0, 1), (1, 3), (2, 1)]
    assert left_out == {"failed": 2, "empty": 1, "unfinished": 1, "repeated": 1, "not_best": 4}
    assert select(keep_unfinished=True)[0] == [(0, 1), (1, 3), (2, 0)]
    assert select(min_score=0)[0] == [(0, 1), (1, 3)]


def test_rejection_sampling_keeps_every_distinct_sample_that_reaches_the_score():
    kept, left_out = select(best=False, min_score=3)
    assert kept == [(0, 1), (0, 2), (1, 1), (1, 3)]
    assert left_out == {"failed": 2, "empty": 1, "unfinished": 1, "below_min_score": 4}
    assert select(best=False, min_score=4)[0] == [(0, 1), (0, 2), (1, 3)]


@pytest.mark.parametrize(("fraction", "number"), [(1.0, 4), (0.75, 3), (0.51, 3), (0.5, 2), (0.1, 1)])
def test_the_top_fraction_keeps_the_highest_scores_in_the_order_of_the_data(fraction, number):
    kept, left_out = select(best=False, min_score=3, top_fraction=fraction)
    assert kept == sorted([(0, 1), (0, 2), (1, 3), (1, 1)][:number])
    assert left_out.get("below_top_fraction", 0) == 4 - number


def test_the_figures_leave_out_prompts_with_failed_samples_where_the_whole_prompt_counts():
    result = summarise_samples(SAMPLES, [(0, 1), (1, 3)])
    assert result["expected_best_prompts"] == 1 and result["kept"] == result["kept_prompts"] == 2
    expected = np.asarray(objectives.expected_best(SCORES[:1]))
    np.testing.assert_allclose([point["score"] for point in result["expected_best_of_k"]], expected, rtol=1e-6)
    assert result["score_mean"] == pytest.approx(np.nanmean(SCORES)) and result["kept_score_mean"] == 4.5
    nothing = summarise_samples(Samples(np.full((1, 2), np.nan, np.float32), [["", ""]], np.ones((1, 2), bool)), [])
    assert nothing["expected_best_of_k"][1]["score"] is None and nothing["score_mean"] is None
