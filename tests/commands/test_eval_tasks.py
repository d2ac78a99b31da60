"""Our engine as a model of lm-eval: the numbers of lm-eval's own model of transformers, and its tasks and files."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from jaxrlhf.commands.eval import EvalConfig, evaluate
from jaxrlhf.commands.evaluation import tasks
from jaxrlhf.errors import InputError

pytestmark = pytest.mark.long


def test_without_lm_eval_the_message_names_the_extra(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=re.escape("pip install 'jaxrlhf[eval]'")):
        evaluate(EvalConfig.create(models=("m",), tasks=("ifeval",)))


CONTEXTS = ["Is the sky blue?", "Name a colour of the sky in one word, please:", "", "two\n\n", "a " * 150]
CHOICES = [" yes", " no", "yes", " a long answer with several words", " blue"]


@pytest.fixture(scope="module")
def models(demo):
    """Our model and lm-eval's own on the same folder."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    from jaxrlhf.commands.evaluation.harness import JaxLM

    ours = JaxLM(demo.lm, batch_size=1, device="cpu", max_batch_size=None)
    return ours, HFLM(demo.lm, device="cpu", dtype="float32", batch_size=3)


def requests(*given):
    return [SimpleNamespace(args=args, task_name="t") for args in given]


def test_log_likelihoods_are_those_of_lm_evals_own_model(models):
    ours, theirs = models
    given = requests(*((context, choice) for context in CONTEXTS for choice in CHOICES))
    found, expected = ours.loglikelihood(given), theirs.loglikelihood(given, disable_tqdm=True)
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=1e-5, atol=1e-4)
    assert [b for _, b in found] == [b for _, b in expected]


def test_log_likelihoods_are_those_of_transformers(models, demo):
    import torch
    from transformers import AutoModelForCausalLM

    ours, _ = models
    model = AutoModelForCausalLM.from_pretrained(demo.lm).eval()
    context, continuation = CONTEXTS[1], CHOICES[3]
    whole = demo.tokenizer(context + continuation)["input_ids"]
    size = len(demo.tokenizer(context)["input_ids"])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
    expected = sum(float(logprobs[t - 1, whole[t]]) for t in range(size, len(whole)))
    (found, _), (best, greedy) = ours.loglikelihood(requests((context, continuation), (context, greedy_text(ours))))
    assert found == pytest.approx(expected, rel=1e-5)
    assert greedy and best > found


def greedy_text(ours):
    """What the model writes after the context, as text that encodes to the same tokens."""
    return ours.generate_until(requests((CONTEXTS[1], {"max_gen_toks": 1})))[0]


def test_choices_that_differ_in_the_last_token_share_a_row(models, monkeypatch):
    ours, _ = models
    rows = []
    score = ours._score

    def counted(given, labels):
        rows.extend(given)
        return score(given, labels)

    monkeypatch.setattr(ours, "_score", counted)
    letters = [(None, [5, 6, 7], [last]) for last in (8, 9, 10, 11)]
    together = ours._loglikelihood_tokens(letters)
    assert len(rows) == 1
    alone = [ours._loglikelihood_tokens([letter])[0] for letter in letters]
    np.testing.assert_allclose([a for a, _ in together], [a for a, _ in alone], rtol=1e-5)
    assert sum(greedy for _, greedy in together) <= 1


def test_rolling_log_likelihoods_score_each_token_of_a_long_text_once(models):
    ours, theirs = models
    given = requests(("word and " * 120,), ("short",), ("x" * 97,))
    found, expected = ours.loglikelihood_rolling(given), theirs.loglikelihood_rolling(given, disable_tqdm=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_greedy_generation_is_that_of_lm_evals_own_model_up_to_the_stop(models):
    ours, theirs = models
    arguments = {"until": ["\n\n", "e"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    given = requests(*((context, arguments) for context in CONTEXTS if context))
    free = [(context, arguments | {"until": []}) for context in CONTEXTS if context]
    found, expected = ours.generate_until(given), theirs.generate_until(given, disable_tqdm=True)
    assert found == expected and not any("e" in text for text in found)
    assert ours.generate_until(requests(*free)) == theirs.generate_until(requests(*free), disable_tqdm=True)


def test_sampling_depends_on_the_request_alone(models):
    ours, _ = models
    arguments = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    first = ours.generate_until(requests(("one", arguments), ("two words", arguments), ("one", arguments)))
    assert first == ours.generate_until(requests(("one", arguments), ("two words", arguments), ("one", arguments)))
    assert first[0] != first[2]
    assert ours.sampling_of({"max_tokens": 5})[0].temperature == 0
    for given, message in (({"num_beams": 4}, "num_beams=4"), ({"max_gen_toks": 96}, "context of 96 tokens")):
        with pytest.raises(InputError, match=message):
            ours.sampling_of(given)


def test_the_chat_template_and_tokens_are_those_of_lm_evals_own_model(models):
    ours, theirs = models
    messages = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert (ours.prefix_token_id, ours.eot_token_id, ours.max_length) == (
        theirs.prefix_token_id,
        theirs.eot_token_id,
        theirs.max_length,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of one's own: one of choices, one of generation."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"Is {i} even?", "answer": int(i % 2)} for i in range(5)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}/rows.jsonl\ntest_split: test\n"
    (path / "choices.yaml").write_text(
        f"task: my_choices\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: answer\ndoc_to_choice: [' yes', ' no']\nmetric_list:\n  - metric: acc\n"
    )
    (path / "writing.yaml").write_text(
        f"task: my_writing\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{answer}}'\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 64\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    return path


@pytest.fixture
def own_tasks_only(monkeypatch):
    """The index of lm-eval's own tasks takes seconds to build."""
    lm_eval = pytest.importorskip("lm_eval.tasks")
    manager = lm_eval.TaskManager
    monkeypatch.setattr(lm_eval, "TaskManager", lambda **options: manager(**options, include_defaults=False))


def test_tasks_run_and_their_results_are_written_in_lm_evals_format(demo, folder, own_tasks_only, tmp_path, capsys):
    settings = {"models": (demo.lm,), "tasks": ("my_choices", "my_writing"), "include_path": (str(folder),)}
    settings |= {"limit": 3, "output_dir": str(tmp_path), "per_device_batch_size": 1}
    results = evaluate(EvalConfig.create(**settings, gen_kwargs={"max_gen_toks": 4}))
    found = results[demo.lm]
    assert set(found["results"]) == {"my_choices", "my_writing"} and found["config"]["model"] == "jaxrlhf"
    (path,) = tmp_path.glob("*/results_*.json")
    assert (
        json.loads(path.read_text())["results"]["my_choices"]["acc,none"] == found["results"]["my_choices"]["acc,none"]
    )
    (samples,) = tmp_path.glob("*/samples_my_writing_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3
    assert "my_choices" in capsys.readouterr().out


def test_a_task_that_lm_eval_lacks_is_refused_with_near_names(demo, folder, own_tasks_only):
    settings = {"models": (demo.lm,), "include_path": (str(folder),)}
    with pytest.raises(InputError, match="has no task 'my_choice'; near names: my_choices"):
        evaluate(EvalConfig.create(**settings, tasks=("my_choice",)))
    with pytest.raises(InputError, match="no such folder"):
        evaluate(EvalConfig.create(models=(demo.lm,), tasks=("x",), include_path=("nowhere",)))
    (folder / "lost.yaml").write_text("task: my_lost\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n")
    with pytest.raises(InputError, match="task 'my_lost': lm-eval cannot load it or its data"):
        evaluate(EvalConfig.create(**settings, tasks=("my_lost",)))
