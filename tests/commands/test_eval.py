"""`jaxrlhf eval`: models side by side, reward models on pairs, verifiable answers, and what is refused."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest

from jaxrlhf import cli, keys
from jaxrlhf.commands.eval import EvalConfig, evaluate
from jaxrlhf.commands.evaluation.generators import cut, with_stops
from jaxrlhf.commands.evaluation.prompts import BUILT_IN
from jaxrlhf.commands.evaluation.report import short_names
from jaxrlhf.commands.evaluation.rows import holds_pairs, read_prompts
from jaxrlhf.config.files import read_jsonl
from jaxrlhf.data import DataConfig, encode_prompts, encode_rows
from jaxrlhf.engine import HybridEngine, SamplingConfig
from jaxrlhf.errors import InputError
from jaxrlhf.models import load_pretrained, save_pretrained

pytestmark = pytest.mark.long

PROMPTS, N = 6, 3
SAMPLED = {"max_new_tokens": 8, "temperature": 1.0, "samples_per_prompt": N, "per_device_batch_size": 1}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def questions(demo, tmp_path_factory):
    """Prompts with a column `answer`, one of them a conversation, one of them unusable."""
    texts = list(dict.fromkeys(row["prompt"] for row in read_jsonl(demo.train)))[:PROMPTS]
    rows = [{"prompt": text, "answer": str(i)} for i, text in enumerate(texts)]
    rows[1]["prompt"] = [{"role": "user", "content": rows[1]["prompt"]}]
    rows.insert(3, {"prompt": "", "answer": "9"})
    return write_rows(tmp_path_factory.mktemp("questions") / "questions.jsonl", rows)


@pytest.fixture(scope="module")
def other(demo, lab, tmp_path_factory):
    """A second model with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    save_pretrained(lab.tiny_model(demo.options, "lm", 7, scale=0.2), folder / "other", demo.tokenizer)
    return str(folder / "other")


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """Reward functions: the number of vowels, and whether there are many."""
    path = tmp_path_factory.mktemp("functions") / "vowels.py"
    path.write_text(
        "def vowels(prompts, responses, answer):\n"
        "    assert all(isinstance(p, str) and p for p in prompts) and len(answer) == len(responses)\n"
        "    return [sum(c in 'aeiou' for c in r) for r in responses]\n\n"
        "def many(prompts, responses):\n"
        "    return [float(sum(c in 'aeiou' for c in r) > 6) for r in responses]\n"
    )
    return f"{path}:vowels", f"{path}:many"


@pytest.fixture(scope="module")
def compared(demo, other, questions, functions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    files = {name: str(folder / f"out.{name}") for name in ("json", "jsonl", "html")}
    settings = SAMPLED | files | {"models": (demo.lm, other), "data_path": (questions,), "data_cache_dir": demo.cache}
    settings |= {"reward_functions": functions, "reward_model_name_or_path": demo.reward}
    evaluate(EvalConfig.create(**settings))
    return json.loads((folder / "out.json").read_text()), read_jsonl(files["jsonl"]), (folder / "out.html").read_text()


def test_models_respond_to_the_same_prompts_at_the_same_keys(compared, demo, other, questions):
    results, rows, _ = compared
    assert (results["prompts"], results["samples_per_prompt"]) == (PROMPTS, N)
    assert results["left_out"] == {"'prompt' is empty": 1}
    prompts = [row["prompt"] for row in read_jsonl(questions) if row["prompt"]]
    assert [row["prompt"] for row in rows] == prompts
    ids = encode_prompts(demo.tokenizer, prompts)
    key = keys.stream(42, keys.Stream.EVALUATION)
    end = demo.tokenizer.eos_token_id
    sampling = SamplingConfig(8, eos_token_id=end, pad_token_id=end, samples_per_prompt=N)
    for name in (demo.lm, other):
        engine = HybridEngine(load_pretrained(name))
        for i, row in enumerate(rows):  # alone, and so in other batches
            mask = np.ones((8, len(ids[i])), bool)
            numbers = np.tile(np.arange(i * N, (i + 1) * N), 8)
            rollout = engine.generate([ids[i]] * 8, mask, key, sampling, sample_index=numbers)
            tokens, real = jax.device_get((rollout.tokens, rollout.response_mask))
            texts = [demo.tokenizer.decode(tokens[j][real[j]], skip_special_tokens=True) for j in range(N)]
            assert [text.removeprefix(" ") for text in texts] == row["responses"][name]


def test_scores_win_rates_and_pass_at_k_follow_from_the_rows(compared, demo, other):
    results, rows, _ = compared
    vowels = np.array([[row["scores"]["vowels"][name] for row in rows] for name in (demo.lm, other)])
    assert vowels.tolist() == [
        [[sum(c in "aeiou" for c in text) for text in row["responses"][name]] for row in rows]
        for name in (demo.lm, other)
    ]
    for m, model in enumerate(results["models"]):
        means = vowels[m].mean(axis=1)
        assert model["scores"]["vowels"]["value"] == pytest.approx(means.mean(), rel=1e-12)
        assert model["scores"]["vowels"]["error"] == pytest.approx(means.std(ddof=1) / np.sqrt(PROMPTS), rel=1e-9)
        right = (vowels[m] > 6).sum(axis=1)
        assert list(model["pass_at_k"]) == ["many"] and list(model["pass_at_k"]["many"]) == ["1", "2", "3"]
        assert model["pass_at_k"]["many"]["1"]["value"] == pytest.approx((right / N).mean(), rel=1e-12)
        two = 1 - (N - right) * (N - right - 1) / (N * (N - 1))
        assert model["pass_at_k"]["many"]["2"]["value"] == pytest.approx(two.mean(), rel=1e-12)
        assert model["pass_at_k"]["many"]["3"]["value"] == pytest.approx((right > 0).mean(), rel=1e-12)
    pair = next(p for p in results["pairs"] if p["scorer"] == "vowels")
    a, b = vowels[0][:, :, None], vowels[1][:, None, :]
    won = ((a > b) + 0.5 * (a == b)).mean(axis=(1, 2))
    assert pair["win_rate"]["value"] == pytest.approx(won.mean(), rel=1e-12)
    assert pair["win_rate"]["error"] == pytest.approx(won.std(ddof=1) / np.sqrt(PROMPTS), rel=1e-9)
    difference = vowels[0].mean(axis=1) - vowels[1].mean(axis=1)
    assert pair["score_difference"]["value"] == pytest.approx(difference.mean(), rel=1e-9)
    assert pair["score_difference"]["error"] == pytest.approx(difference.std(ddof=1) / np.sqrt(PROMPTS), rel=1e-9)
    assert [p["scorer"] for p in results["pairs"]] == ["vowels", "many", "reward_model"]


def test_the_reward_model_scores_responses_as_its_own_tokenizer_renders_them(compared, demo, other):
    _, rows, _ = compared
    model = load_pretrained(demo.reward, head="scalar", new_head=False)
    for row in rows:
        for name in (demo.lm, other):
            encoded = encode_rows(demo.tokenizer, [row["prompt"]], [row["responses"][name]])[0]
            for (ids, _), score in zip(encoded.responses, row["scores"]["reward_model"][name], strict=True):
                tokens = np.array([encoded.prompt + ids])
                values = model.module.apply({"params": model.params}, tokens, np.ones_like(tokens))
                assert score == pytest.approx(float(values[0, -1]), rel=2e-4, abs=2e-5)


def test_the_page_shows_every_prompt_and_response_and_needs_no_network(compared):
    import html

    _, rows, page = compared
    assert not re.search(r"https?://|src=|@import", page)
    text = html.unescape(page)
    for row in rows:
        for responses in row["responses"].values():
            assert all(response in text for response in responses if "�" not in response and response.isprintable())


def test_prompts_that_leave_no_room_are_left_out_of_every_model(demo, questions, tmp_path):
    rows = [*read_jsonl(questions)[:2], {"prompt": "word " * 200, "answer": "1"}]
    path = write_rows(tmp_path / "long.jsonl", rows)
    settings = {"models": (demo.lm,), "data_path": (path,), "data_cache_dir": demo.cache, "max_new_tokens": 4}
    results = evaluate(EvalConfig.create(**settings, per_device_batch_size=1))
    assert results["prompts"] == 2 and results["left_out"] == {"too long for a model": 1}
    with pytest.raises(InputError, match="no prompt leaves room for max_new_tokens=90"):
        evaluate(EvalConfig.create(**(settings | {"max_new_tokens": 90})))


def test_text_ends_before_a_stop_string_however_its_tokens_merge(demo):
    text = "one two three"
    assert cut(text, ("two", "three")) == "one " and cut(text, ("four",)) == text
    sampling = with_stops(SamplingConfig(8, eos_token_id=1), demo.tokenizer, ("\n",))
    assert demo.tokenizer("\n", add_special_tokens=False)["input_ids"][-1] in sampling.eos_ids
    for i in sampling.eos_ids[1:]:
        assert i == 1 or "\n" in demo.tokenizer.decode([i])


# ---- servers


@pytest.fixture
def server():
    """An OpenAI-compatible server that answers with the prompt, and is busy at first."""
    bodies, busy = [], [True]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def reply(self, value, status=200):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.reply({"data": [{"id": "first"}, {"id": "second"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if busy:
                busy.clear()
                return self.reply({"error": {"message": "full"}}, 429)
            if body["max_tokens"] > 100:
                return self.reply({"error": {"message": "the context has 100 tokens"}}, 400)
            bodies.append((body, self.headers.get("Authorization")))
            message = {"role": "assistant", "content": f"{body['seed']}: {body['messages'][-1]['content']}"}
            self.reply({"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 5}})

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", bodies
    running.shutdown()
    running.server_close()


def test_a_server_gets_every_prompt_with_its_own_seed_and_the_sampling(server, questions, demo, monkeypatch, tmp_path):
    address, bodies = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    settings = {"models": (f"{address}#second", address), "data_path": (questions,), "data_cache_dir": demo.cache}
    settings |= {"temperature": 0.5, "n": 2, "top_k": 5, "stop_strings": ("END",), "max_new_tokens": 9}
    settings |= {"reward_functions": ("length:target=4",), "jsonl": str(tmp_path / "rows.jsonl")}
    results = evaluate(EvalConfig.create(**settings))
    assert [model["model"] for model in results["models"]] == [f"{address}#second", address]
    assert {body["model"] for body, _ in bodies} == {"first", "second"} and len(bodies) == 2 * 2 * PROMPTS
    expected = {"max_tokens": 9, "temperature": 0.5, "top_p": 1.0, "top_k": 5, "stop": ["END"]}
    assert all(body.items() >= expected.items() and key == "Bearer secret" for body, key in bodies)
    rows = read_jsonl(tmp_path / "rows.jsonl")
    for i, row in enumerate(rows):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        assert row["responses"][address] == [f"{42 + i * 2 + j}: {prompt}" for j in range(2)]
    assert results["pairs"][0]["win_rate"]["value"] == 0.5
    assert "secret" not in json.dumps(results)
    assert short_names([f"{address}#second", address]) == ["second", address.removeprefix("http://")]


def test_a_server_that_refuses_or_is_not_there_is_named_with_its_words(server, questions, demo):
    address, _ = server
    settings = {"models": (address,), "data_path": (questions,), "data_cache_dir": demo.cache}
    with pytest.raises(InputError, match=r"chat/completions with status 400: .*the context has 100 tokens"):
        evaluate(EvalConfig.create(**settings, max_new_tokens=200))
    with pytest.raises(InputError, match="has no model 'third'; it has first, second"):
        evaluate(EvalConfig.create(**(settings | {"models": (f"{address}#third",)})))
    with pytest.raises(InputError, match=r"no usable answer from http://127.0.0.1:9/v1/models"):
        evaluate(EvalConfig.create(**(settings | {"models": ("http://127.0.0.1:9",)})))


# ---- reward models


@pytest.fixture(scope="module")
def pairs(demo, tmp_path_factory):
    """Pairs with a subset each; two of them of one prompt."""
    rows = [
        {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "kind": "ab"[i % 2]}
        for i, row in enumerate(read_jsonl(demo.train)[:11])
    ]
    rows[4]["prompt"] = rows[3]["prompt"]
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def measured(demo, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    files = {name: str(folder / f"out.{name}") for name in ("json", "jsonl", "html")}
    settings = files | {"reward_model_name_or_path": demo.reward, "data_path": (pairs,), "data_cache_dir": demo.cache}
    settings |= {"subset_field": "kind", "max_length": 64, "per_device_batch_size": 1}
    results = evaluate(EvalConfig.create(**settings))
    return results, read_jsonl(files["jsonl"]), (folder / "out.html").read_text()


def test_every_pair_is_scored_as_training_renders_it(measured, demo, pairs):
    results, rows, _ = measured
    given = read_jsonl(pairs)
    assert len(rows) == len(given) == results["measures"]["all"]["pairs"]
    model = load_pretrained(demo.reward, head="scalar", new_head=False)
    for row, source in zip(rows, given, strict=True):
        encoded = encode_rows(demo.tokenizer, [source["prompt"]], [(source["chosen"], source["rejected"])])[0]
        for (ids, _), side in zip(encoded.responses, ("chosen", "rejected"), strict=True):
            tokens = np.array([encoded.prompt + ids])
            values = model.module.apply({"params": model.params}, tokens, np.ones_like(tokens))
            assert row[f"{side}_score"] == pytest.approx(float(values[0, -1]), rel=2e-4, abs=2e-5)
        assert row["subset"] == source["kind"] and row["place"].startswith(pairs)


def test_measures_of_pairs_follow_from_the_scores(measured, demo, pairs):
    results, rows, page = measured
    margin = np.array([row["chosen_score"] - row["rejected_score"] for row in rows])
    every = results["measures"]["all"]
    assert every["accuracy"]["value"] == pytest.approx((margin > 0).mean(), rel=1e-12)
    assert every["margin"]["value"] == pytest.approx(margin.mean(), rel=1e-9)
    groups = np.array([0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 10])
    sums = np.array([(margin - margin.mean())[groups == g].sum() for g in np.unique(groups)])
    error = np.sqrt(10 / 9 * (sums**2).sum()) / len(rows)
    assert every["margin"]["error"] == pytest.approx(error, rel=1e-9)
    kinds = np.array([row["subset"] for row in rows])
    accuracies = []
    for kind in "ab":
        accuracies.append((margin[kinds == kind] > 0).mean())
        assert results["measures"][f"subset {kind}"]["accuracy"]["value"] == pytest.approx(accuracies[-1], rel=1e-12)
    assert results["mean_of_subsets"]["value"] == pytest.approx(np.mean(accuracies), rel=1e-12)
    given = read_jsonl(pairs)
    lengths = [
        [len(ids) for ids, _ in encode_rows(demo.tokenizer, [r["prompt"]], [(r["chosen"], r["rejected"])])[0].responses]
        for r in given
    ]
    long, short = np.array(lengths).T
    assert every["length_baseline"]["value"] == pytest.approx(np.mean((long > short) + 0.5 * (long == short)))
    assert results["measures"]["chosen longer"]["pairs"] == (long > short).sum()
    assert sum(results["margins"]["counts"]) == len(rows)
    assert "Margins" in page and "<svg" in page and not re.search(r"https?://|src=", page)


def test_accuracy_and_length_baseline_equal_those_of_training(measured, demo, pairs):
    from jaxrlhf.data import eval_batches, load_data
    from jaxrlhf.trainers.reward import RewardLoss, reward_metrics, reward_sums

    config = DataConfig(data_path=(demo.train,), eval_data_path=(pairs,), data_cache_dir=demo.cache, max_length=64)
    _, evaluation = load_data(config, demo.tokenizer, "reward")
    model = load_pretrained(demo.reward, head="scalar", new_head=False)
    totals = {}
    for batch in eval_batches(evaluation, 11):
        totals = reward_sums(RewardLoss(), model.module, model.params, batch)
    metrics = reward_metrics({name: float(value) for name, value in totals.items()})
    every = measured[0]["measures"]["all"]
    assert every["accuracy"]["value"] == pytest.approx(metrics["accuracy"], rel=1e-6)
    assert every["length_baseline"]["value"] == pytest.approx(metrics["length_baseline"], rel=1e-6)
    assert measured[0]["calibration"]["log_loss"]["value"] == pytest.approx(metrics["loss"], rel=1e-4)


def test_texts_without_a_rejected_side_are_scored_alone(demo, pairs, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in read_jsonl(pairs)[:5]]
    path = write_rows(tmp_path / "texts.jsonl", rows)
    config = DataConfig(data_path=(path,), data_cache_dir=demo.cache)
    assert not holds_pairs(config) and holds_pairs(config.replace(data_path=(pairs,)))
    settings = {"reward_model_name_or_path": demo.reward, "data_path": (path,), "data_cache_dir": demo.cache}
    settings |= {"max_length": 64, "per_device_batch_size": 1, "jsonl": str(tmp_path / "scores.jsonl")}
    results = evaluate(EvalConfig.create(**settings, html=str(tmp_path / "page.html")))
    scored = read_jsonl(tmp_path / "scores.jsonl")
    model = load_pretrained(demo.reward, head="scalar", new_head=False)
    for row, source in zip(scored, rows, strict=True):
        encoded = encode_rows(demo.tokenizer, [source["prompt"]], [(source["completion"],)])[0]
        tokens = np.array([encoded.prompt + encoded.responses[0][0]])
        values = model.module.apply({"params": model.params}, tokens, np.ones_like(tokens))
        assert row["score"] == pytest.approx(float(values[0, -1]), rel=2e-4, abs=2e-5)
    scores = [row["score"] for row in scored]
    assert results["texts"] == 5 and results["mean_score"]["all"]["value"] == pytest.approx(np.mean(scores))
    assert results["scores"]["quartiles"] == pytest.approx(np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]))


def test_a_source_with_its_own_evaluation_split_is_read_there(demo):
    config = DataConfig(data_path=("demo",), data_cache_dir=demo.cache)
    with_all = read_prompts(config, (), 0)
    limited = read_prompts(config, (), 3)
    assert len(limited) == 3 and set(limited.places) < set(with_all.places)
    assert all("eval" in place for place in with_all.places)


def test_models_are_compared_on_built_in_prompts_or_those_of_the_command_line(demo, other, tmp_path, capsys):
    flags = ["eval", "--model", demo.lm, other, "--max_new_tokens", "4", "--jsonl", str(tmp_path / "out.jsonl")]
    flags += ["--data_cache_dir", demo.cache]
    assert cli.main(flags) == 0
    shown = capsys.readouterr()
    assert f"no data given: the {len(BUILT_IN)} built-in prompts" in shown.err
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == list(BUILT_IN)
    assert all(set(row["responses"]) == {demo.lm, other} for row in rows)
    assert all(prompt.split()[0] in shown.out for prompt in BUILT_IN)  # all of them, not the first four of data
    assert cli.main([*flags, "--limit", "2"]) == 0 and len(read_jsonl(tmp_path / "out.jsonl")) == 2
    capsys.readouterr()
    own = ["What is a tree?", "Name a fish."]
    assert cli.main([*flags, "--prompts", *own, "--reward_functions", "length:target=10"]) == 0
    assert "built-in" not in capsys.readouterr().err
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == own and set(rows[0]["scores"]) == {"length"}
    data = write_rows(tmp_path / "own.jsonl", [{"prompt": text} for text in own])
    assert cli.main([*flags, "--data_path", data]) == 0  # the same prompts in a file
    assert [row["responses"] for row in read_jsonl(tmp_path / "out.jsonl")] == [row["responses"] for row in rows]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to evaluate: give models"),
        ({"reward_model": "r"}, "data_path: no data given"),
        ({"reward_model": "r", "prompts": ("a",)}, "requires models"),
        ({"models": ("m",), "prompts": ("a",), "data_path": ("x",)}, "prompts and data exclude each other"),
        ({"models": ("m",), "prompts": ("a",), "tasks": ("ifeval",)}, "take no prompts"),
        ({"reward_model": "r", "tasks": ("ifeval",)}, "tasks need a language model"),
        ({"models": ("m",), "tasks": ("ifeval",), "data_path": ("x",)}, "tasks bring their own data and scores"),
        ({"models": ("http://a",), "tasks": ("ifeval",)}, "http://a is a server"),
        ({"models": ("m",), "data_path": ("x",), "num_fewshot": 1}, "num_fewshot=1 requires tasks"),
        ({"models": ("m",), "data_path": ("x",), "subset_field": "s"}, "leave models out"),
        ({"models": ("m",), "data_path": ("x",), "n": 4}, "temperature=0 with samples_per_prompt=4"),
        ({"models": ("m",), "data_path": ("x",), "pass_score": 2.0}, "pass_score=2.0 requires reward_functions"),
        ({"models": ("m", "m"), "data_path": ("x",)}, "one is named twice"),
        ({"reward_model": "r", "data_path": ("x",), "reward_functions": ("length:limit=3",)}, "requires models"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    names = {"reward_model": "reward_model_name_or_path", "n": "samples_per_prompt"}
    with pytest.raises(InputError, match=re.escape(message)):
        EvalConfig.create(**{names.get(name, name): value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("Hello", " ")}, "'prompts' is empty at place 2"),
        ({"reward_functions": ("number_match:column=answer",)}, "asks for the column 'answer'"),
        ({"reward_columns": ("origin",)}, "asks for the column 'origin'"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_before_a_model_is_read(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate(EvalConfig.create(models=("no-such-folder", "nor-this"), **changes))


def test_a_missing_column_of_subsets_and_a_language_model_as_reward_model_are_named(demo, pairs, tmp_path):
    settings = {"reward_model_name_or_path": demo.reward, "data_path": (pairs,), "data_cache_dir": demo.cache}
    settings |= {"max_length": 64}
    message = r"subset_field 'topic': .*pairs.jsonl line 1 has no such value \(its columns: prompt, chosen, rejected, k"
    with pytest.raises(InputError, match=message):
        evaluate(EvalConfig.create(**settings, subset_field="topic"))
    with pytest.raises(InputError, match="has no scalar head"):
        evaluate(EvalConfig.create(**(settings | {"reward_model_name_or_path": demo.lm})))
    with pytest.raises(InputError, match="is a folder; name a file"):
        evaluate(EvalConfig.create(**settings, json=str(tmp_path)))


def test_the_command_prints_tables_or_json_alone(demo, pairs, capsys):
    flags = ["--reward_model", demo.reward, "--data_path", pairs, "--data_cache_dir", demo.cache]
    flags += ["--max_length", "64", "--subset_field", "kind"]
    assert cli.main(["eval", *flags]) == 0
    shown = capsys.readouterr().out
    for text in ("accuracy", "longer is better", "subset a", "mean of the subsets", "ECE", "margins:"):
        assert text in shown
    as_rw_eval = ["--model_name_or_path", demo.reward, *flags[2:-2], "--json", "-"]
    assert cli.main(["eval", *as_rw_eval]) == 0
    assert json.loads(capsys.readouterr().out)["measures"]["all"]["pairs"] == 11
    assert cli.main(["eval", *flags, "--tasks", "ifeval"]) == 2
    assert "tasks need a language model" in capsys.readouterr().err
