"""The server with real clients: OpenAI's endpoints, streams, determinism, bad requests, cancellation, scores, votes."""

import functools
import itertools
import json
import math
import queue
import random
import re
import socket
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from serving import one_device, serving  # noqa: F401 - a fixture

from jaxrlhf.commands.chat import ChatConfig, open_session
from jaxrlhf.commands.evaluation.scoring import last_scores
from jaxrlhf.commands.serve import ServeConfig
from jaxrlhf.commands.serve.scheduler import Job, Scheduler, Stopped
from jaxrlhf.data import DataConfig, encode_conversation, encode_rows, load_data
from jaxrlhf.engine import SamplingConfig, SlotSampling
from jaxrlhf.engine.slots import slot_join, slot_step
from jaxrlhf.rewards.judges import judge, score_server

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

KEY, SLOTS, QUEUE, LENGTH = "secret-key", 4, 12, 96
HOT = [{"role": "user", "content": "What is hot?"}]


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    options = {"model": (demo.lm, demo.reward), "port": 0, "api_key": KEY, "max_slots": SLOTS, "max_queue": QUEUE}
    config = ServeConfig.create(**options, preferences=str(folder / "votes.jsonl"))
    with serving(config) as running:
        running.programs = slot_join._cache_size(), slot_step._cache_size()
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def chat(client, demo):
    def ask(messages=HOT, **options):
        extra = {name: options.pop(name) for name in ("top_k",) if name in options}
        options = {"model": demo.lm, "max_tokens": 8} | options
        return client.chat.completions.create(messages=messages, extra_body=extra, **options)

    return ask


def post(server, path, body, headers=None):
    """Status and JSON of a request without the client."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | (headers or {})
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def get(server, path):
    with urllib.request.urlopen(server.url + path, timeout=60) as response:
        return response.read().decode()


def metrics(server):
    lines = re.findall(r"^(\w+)(\{.*\})? (\S+)$", get(server, "/metrics"), re.MULTILINE)
    return {name + labels: float(value) for name, labels, value in lines}


def busy(server, demo):
    return metrics(server)[f'jaxrlhf_busy_slots{{model="{demo.lm}"}}']


# ---- generation


def test_greedy_text_is_that_of_generate(chat, demo):
    session = open_session(ChatConfig.create(model=demo.lm))
    for text in ("What is hot?", "Tell me of the sea and of the wind and of the sun. " * 2):
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
        reply = chat(messages, temperature=0, max_tokens=20, logprobs=True)
        ids = np.array([encode_conversation(session.tokenizer, messages)])
        sampling = SamplingConfig(20, temperature=0, eos_token_id=session.sampling.eos_ids)
        rollout = jax.device_get(session.engine.generate(ids, np.ones_like(ids), jax.random.key(0), sampling))
        response = rollout.tokens[rollout.response_mask].tolist()
        assert reply.choices[0].message.content == session.tokenizer.decode(response, skip_special_tokens=True).lstrip()
        assert reply.usage.prompt_tokens == ids.shape[1]
        assert reply.usage.completion_tokens == len(response)
        expected = rollout.logprobs[rollout.response_mask][: len(reply.choices[0].logprobs.content)]
        got = [entry.logprob for entry in reply.choices[0].logprobs.content]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_a_stream_gives_the_same_text_as_a_plain_request_and_its_usage(chat):
    options = {"n": 2, "seed": 5, "max_tokens": 16}
    plain, texts, finish, usage = chat(**options), ["", ""], [None, None], None
    for chunk in chat(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert choice.finish_reason or not (choice.delta.content or "").endswith("\ufffd")
            texts[choice.index] += choice.delta.content or ""
            finish[choice.index] = choice.finish_reason or finish[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in plain.choices]
    assert finish == [choice.finish_reason for choice in plain.choices]
    assert usage == plain.usage


def test_several_choices_differ_and_each_is_what_its_number_gives(chat):
    four = [choice.message.content for choice in chat(n=4, seed=3, temperature=1.5).choices]
    assert len(set(four)) == 4
    assert [choice.message.content for choice in chat(n=2, seed=3, temperature=1.5).choices] == four[:2]


def test_the_same_seed_gives_the_same_text_alone_and_in_a_full_batch(chat):
    requests = [{"seed": seed, "top_p": 0.9, "top_k": 50, "max_tokens": 6 + 7 * (seed % 3)} for seed in range(10)]

    def text(options):
        return chat(**options).choices[0].message.content

    alone = [text(options) for options in requests]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(text, requests)) == alone
    assert len(set(alone)) > 5


def test_a_text_ends_before_a_stop_in_the_middle_of_tokens_and_never_shows_a_part_of_it(chat):
    whole = chat(seed=1, max_tokens=40).choices[0].message.content
    for stop in (whole[5:7], whole[9:14]):
        reply = chat(seed=1, max_tokens=40, stop=[stop, "never said"], logprobs=True).choices[0]
        assert reply.message.content == whole[: whole.index(stop)]
        assert reply.finish_reason == "stop"
        shown = ""
        for chunk in chat(seed=1, max_tokens=40, stop=stop, stream=True):
            shown += chunk.choices[0].delta.content or ""
            assert whole[: whole.index(stop)].startswith(shown)
        assert shown == reply.message.content
        assert sum(len(entry.token) for entry in reply.logprobs.content) >= len(shown)


def test_completions_take_texts_and_token_ids_several_at_a_time(client, demo):
    ids = demo.tokenizer("The sun is")["input_ids"]
    options = {"model": demo.lm, "max_tokens": 6, "seed": 2, "logprobs": 3, "n": 2}
    texts = client.completions.create(prompt=["The sun is", "The sea"], **options)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    of_ids = client.completions.create(prompt=ids, **options)
    assert [c.text for c in of_ids.choices] == [c.text for c in texts.choices[:2]]
    first = of_ids.choices[0].logprobs
    assert "".join(first.tokens) == of_ids.choices[0].text
    assert all(len(top) <= 3 for top in first.top_logprobs) and first.text_offset[0] == 0
    streamed = client.completions.create(prompt="The sun is", **(options | {"n": 1}), stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == of_ids.choices[0].text


def test_top_logprobs_begin_with_the_greedy_token(chat):
    content = chat(temperature=0, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    for entry in content:
        best = entry.top_logprobs
        assert len(best) == 4 and best[0].token == entry.token
        assert [top.logprob for top in best] == sorted((top.logprob for top in best), reverse=True)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_what_the_client_echoes_of_an_answer_is_accepted(chat):
    reply = chat(seed=4)
    again = chat([*HOT, reply.choices[0].message.model_dump(), {"role": "user", "content": "and?"}], user="me")
    assert again.choices[0].message.role == "assistant"


def test_models_are_listed_and_shown(client, demo):
    assert [model.id for model in client.models.list()] == [demo.lm, demo.reward]
    assert client.models.retrieve(demo.lm).id == demo.lm
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# ---- what is refused


def bad_bodies(lm, reward):
    """(path, body, status) of requests that are wrong in one place."""
    chat, text = "/v1/chat/completions", "/v1/completions"
    good = {"model": lm, "messages": HOT}
    values = [None, True, "x", -1, 1.5, [], {}, [1], {"a": 1}, 1e308, -(10**30)]
    fine = {"temperature": (None, 1.5), "top_p": (None,), "n": (None,), "seed": (None, -1), "max_tokens": (None,)}
    fine |= {"top_k": (None, -1), "stop": (None, "x", []), "stream": (None, True), "logprobs": (None, True)}
    fine |= {"top_logprobs": (None,), "stream_options": (None,), "max_completion_tokens": (None,)}
    for name, accepted in fine.items():
        for value in values:
            if not any(value is x or (value == x and type(value) is type(x)) for x in accepted):
                yield chat, good | {name: value}, 400
    messages = [None, [], "x", {}, [1], [{}], [{"role": "user"}], [{"role": "x", "content": "y"}]]
    messages += [[{"role": "user", "content": 3}], [{"role": "user", "content": [{"type": "image_url"}]}]]
    messages += [[*HOT, {"role": "assistant", "content": "y"}], [{"role": "user", "content": "y", "tool_calls": [1]}]]
    messages += [[{"role": "user", "content": "hot " * 200}], [{"role": "user", "content": "\ud83d"}]]
    for value in messages:
        yield chat, {"model": lm, "messages": value}, 400
    for name in ("tools", "functions", "logit_bias", "presence_penalty", "response_format", "audio", "nonsense"):
        yield chat, good | {name: [{"type": "function"}]}, 400
    yield chat, good | {"model": "other"}, 404
    yield chat, good | {"model": reward}, 400
    yield chat, good | {"n": QUEUE + 1}, 400
    yield chat, good | {"max_tokens": LENGTH}, 400
    yield chat, good | {"max_tokens": 3, "max_completion_tokens": 4}, 400
    for prompt in (None, [], {}, 3, [[]], [1.5], ["a", 1], [10**6], [-1], "hot " * 200, [True]):
        yield text, {"model": lm, "prompt": prompt}, 400
    for wrong in ({"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"logprobs": 21}, {"messages": HOT}):
        yield text, {"model": lm, "prompt": "x"} | wrong, 400
    for body in ({}, {"texts": []}, {"texts": [1]}, {"texts": "x", "messages": HOT}, {"messages": HOT}):
        yield "/v1/score", {"model": reward} | body, 400
    yield "/v1/score", {"model": reward, "texts": ["hot " * 200]}, 400
    yield "/v1/score", {"model": lm, "texts": ["x"]}, 400
    for body in ({}, {"messages": HOT}, {"messages": HOT, "chosen": "a", "rejected": "a"}):
        yield "/v1/preferences", body, 400
    for raw in (b"", b"{", b"[]", b"3", b'{"a": NaN}', b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"):
        yield chat, raw, 400
    yield chat, b" " * (5 * 1024 * 1024), 413


def test_bad_requests_get_an_error_of_their_own_and_never_500(server, demo):
    cases = list(bad_bodies(demo.lm, demo.reward))
    assert len(cases) >= 120
    for path, body, status in cases:
        got, answer = post(server, path, body)
        assert got == status, (path, str(body)[:100], answer)
        assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]


def test_an_overflow_of_the_context_names_the_numbers(server, demo, chat):
    with pytest.raises(openai.BadRequestError, match=rf"context is {LENGTH} tokens; .* has \d+ tokens and max_tokens"):
        chat(max_tokens=LENGTH)
    _, answer = post(server, "/v1/chat/completions", {"model": demo.lm, "messages": HOT, "max_tokens": LENGTH})
    assert answer["error"]["code"] == "context_length_exceeded"


def test_wrong_keys_paths_methods_and_content_types_are_refused(server, demo):
    body = {"model": demo.lm, "messages": HOT}
    for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}, {"Authorization": "Bearer \xe9"}):
        status, answer = post(server, "/v1/chat/completions", body, headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert post(server, "/v1/chat/completions", body, {"Content-Type": "text/plain"})[0] == 415
    assert post(server, "/v1/nothing", body)[0] == 404
    assert post(server, "/v1/models", body)[0] == 405
    assert KEY not in repr(server.config) and KEY not in server.said.getvalue()


def test_a_full_queue_is_429_and_what_was_taken_is_answered(server, demo, chat):
    release = threading.Event()
    scheduler = server.models[demo.lm].scheduler
    step = scheduler.batch.step

    def waiting_step():
        release.wait(60)
        return step()

    scheduler.batch.step = waiting_step
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(chat, n=SLOTS, seed=1)
            while len(scheduler.running) < SLOTS:
                pass
            second = pool.submit(chat, n=QUEUE, seed=2)
            while len(scheduler.waiting) < QUEUE:
                pass
            with pytest.raises(openai.RateLimitError, match="queue is full"):
                chat()
            release.set()
            assert len(first.result().choices) == SLOTS and len(second.result().choices) == QUEUE
    finally:
        release.set()
        scheduler.batch.step = step


# ---- clients that leave, and time


def wait_for(condition):
    for _ in itertools.count():
        if condition():
            return


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(server, demo, chat, stream):
    scheduler = server.models[demo.lm].scheduler
    entered, release, step = threading.Event(), threading.Event(), scheduler.batch.step

    def held_step():
        entered.set()
        release.wait(60)
        return step()

    scheduler.batch.step = held_step
    try:
        body = {"model": demo.lm, "messages": HOT, "n": 3, "stream": stream}
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(head.encode() + data)
            assert entered.wait(60)
            jobs = list(scheduler.running.values())
            assert len(jobs) == 3
        wait_for(lambda: all(job.done for job in jobs))
        release.set()
        wait_for(lambda: busy(server, demo) == 0)
        assert all(job.received < 20 for job in jobs)
    finally:
        release.set()
        scheduler.batch.step = step
    assert chat().choices[0].finish_reason


def test_a_request_that_takes_too_long_is_given_up(demo):
    config = ServeConfig.create(model=(demo.lm,), port=0, max_slots=SLOTS, request_timeout=1e-9)
    with serving(config) as running:
        status, answer = post(running, "/v1/chat/completions", {"model": demo.lm, "messages": HOT})
        assert (status, answer["error"]["code"]) == (504, "timeout")
        events = post_text(running, {"model": demo.lm, "messages": HOT, "stream": True})
        assert '"code": "timeout"' in events and "[DONE]" in events


def post_text(server, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def test_random_requests_and_cancellations_lose_and_mix_up_nothing(server, demo, chat):
    rng = random.Random(0)
    texts = ["What is hot?", "Who are you?", "Tell me of the sea and of the wind."]
    requests = [
        {"messages": [{"role": "user", "content": rng.choice(texts)}], "seed": rng.randrange(4)}
        | {"max_tokens": rng.randint(1, 10), "stream": rng.random() < 0.6}
        for _ in range(60)
    ]
    leaving = [request["stream"] and rng.random() < 0.4 for request in requests]

    def text(request, leaves=False):
        if not request["stream"]:
            return chat(**request).choices[0].message.content
        shown = ""
        with chat(**request) as chunks:
            for chunk in chunks:
                shown += chunk.choices[0].delta.content or ""
                if leaves and shown:
                    break
        return shown

    alone = functools.cache(lambda name: text(json.loads(name)))
    expected = [alone(json.dumps(request | {"stream": False})) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(text, requests, leaving))
    for answer, right, left in zip(got, expected, leaving, strict=True):
        assert right.startswith(answer) if left else answer == right
    wait_for(lambda: busy(server, demo) == 0)


def test_a_model_that_fails_ends_its_requests_and_takes_no_more():
    class Broken:
        slots = 2

        def join(self, prompt, samples):
            raise MemoryError("no room")

    events, failed = queue.Queue(), threading.Event()
    scheduler = Scheduler(Broken(), (1,), 4, lambda event, seconds: None)
    jobs = [Job([5, 6], SlotSampling(0), 8, 0, math.inf, events.put) for _ in range(3)]
    scheduler.submit(jobs)
    scheduler.start(failed.set)
    assert failed.wait(60)
    assert {events.get(timeout=60).finish for _ in jobs} == {"error"}
    with pytest.raises(Stopped):
        scheduler.submit(jobs[:1])
    scheduler.close()
    assert isinstance(scheduler.error, MemoryError)


# ---- scores, votes, metrics, the page


def test_scores_are_those_of_the_scoring_program(server, demo):
    model = server.models[demo.reward]
    answers = ["The sun is hot.", "no", "The sea is cold and the wind is kind."] * 4
    conversations = [[*HOT, {"role": "assistant", "content": text}] for text in answers]
    status, answer = post(server, "/v1/score", {"model": demo.reward, "messages": conversations})
    assert status == 200
    got = [entry["score"] for entry in answer["data"]]
    for text, score in zip(answers[:3], got[:3], strict=True):
        (row,) = encode_rows(model.tokenizer, [HOT], [[text]])
        ids = np.array([[*row.prompt, *row.responses[0][0]]], np.int32)
        mask = np.ones(ids.shape, bool)
        alone = last_scores(model.model.params, ids, mask, module=model.model.module, mesh=model.mesh)
        np.testing.assert_allclose(score, alone[0], rtol=0, atol=1e-4)
    assert got[3:6] == got[:3] and len(set(got)) == 3
    status, answer = post(server, "/v1/score", {"model": demo.reward, "texts": ["The sun", "The sea"]})
    assert status == 200 and answer["usage"]["prompt_tokens"] == sum(
        map(len, model.encode_texts(["The sun", "The sea"]))
    )


def test_reward_functions_ask_the_server_for_scores_and_judgements(server, demo, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    conversations = [[{"role": "user", "content": text}] for text in ("What is hot?", "Hi!")]
    completions = [[{"role": "assistant", "content": text}] for text in ("The sun.", "Hello!")]
    options = {"url": f"{server.url}/v1", "key": "SERVER_KEY"}
    body = {"model": demo.reward, "messages": [[*p, *c] for p, c in zip(conversations, completions, strict=True)]}
    status, reply = post(server, "/v1/score", body)
    assert status == 200
    found = score_server(completions, conversations, model=demo.reward, **options)
    assert found == [row["score"] for row in reply["data"]]
    seen = {}
    # A model of toy size answers nonsense, if the question fits its context at all.
    grades = judge(completions, conversations, model=demo.lm, max_tokens=8, log_metric=seen.__setitem__, **options)
    assert np.isnan(grades).all() and set(seen) == {"unreadable"}


def test_votes_become_rows_that_reward_reads(server, demo, tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, *HOT]
    for i in range(3):
        body = {"messages": messages, "chosen": f"The sun {i}.", "rejected": "日本 </s>\n"}
        status, answer = post(server, "/v1/preferences", body | {"chosen_model": "a", "rejected_model": "b"})
        assert (status, answer["saved"]) == (200, True)
    options = {"data_path": (server.config.preferences,), "eval_data_path": (demo.eval,)}
    config = DataConfig.create(**options, data_cache_dir=str(tmp_path))
    pairs, _ = load_data(config, demo.tokenizer, "reward")
    assert len(pairs) == 3
    batch = pairs.batch([0])
    text = demo.tokenizer.decode(batch["chosen_ids"][0])
    assert "Be kind." in text and "What is hot?" in text and "The sun" in text


def test_metrics_are_prometheus_text_that_counts(server, demo, chat):
    label = f'{{model="{demo.lm}"}}'
    before = metrics(server)
    used = chat(n=2).usage
    after = metrics(server)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown[f"jaxrlhf_generated_tokens_total{label}"] == used.completion_tokens
    assert grown[f"jaxrlhf_time_to_first_token_seconds_count{label}"] == 2
    assert grown['jaxrlhf_requests_total{endpoint="/v1/chat/completions",status="200"}'] == 1
    assert after[f"jaxrlhf_slots{label}"] == SLOTS and after[f"jaxrlhf_queue_samples{label}"] == 0
    assert all(
        re.fullmatch(r"# (HELP|TYPE) \w+ .+|\w+(\{.*\})? \S+", line) for line in get(server, "/metrics").splitlines()
    )


def test_the_page_is_one_file_that_runs_only_its_own_script(server):
    page = get(server, "/")
    assert not re.findall(r"https?://|//cdn|src=|@import|url\(", page)
    assert page.count("<script>") == 1 and "innerHTML" not in page and 'data-votes="true"' in page
    with urllib.request.urlopen(server.url + "/") as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert json.loads(get(server, "/health")) == {"status": "ok"}


def test_nothing_was_compiled_after_the_warm_up(server):
    assert (slot_join._cache_size(), slot_step._cache_size()) == server.programs
