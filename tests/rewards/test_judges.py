"""Reward functions behind servers, with a local one: scores, grades, pairs; failures, rate, cache, bad options."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from jaxrlhf.errors import InputError
from jaxrlhf.rewards import Limits, Rewards, load_function
from jaxrlhf.rewards.http import FIRST_WAIT, LONGEST_WAIT, Client, ClientOptions, RequestFailed, Unreadable
from jaxrlhf.rewards.judges import fill, grade, judge, judge_pairs, score_server, verdict


class Fake:
    """A server whose answers a test sets: a function of path and body, or a list of replies (status, body, headers)."""

    def __init__(self):
        self.requests, self.headers, self.answer, self.lock = [], [], lambda path, body: {}, threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append(body)
                    fake.headers.append(dict(self.headers))
                    answer = fake.answer
                    reply = answer.pop(0) if isinstance(answer, list) else answer(self.path, body)
                status, content, headers = reply if isinstance(reply, tuple) else (200, reply, {})
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def fake():
    fake = Fake()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def says(text):
    return {"choices": [{"message": {"content": text}}]}


def chat(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def answers(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_scores_come_in_order_from_requests_of_several_conversations(fake):
    def lengths(path, body):
        assert path == "/v1/score" and body["model"] == "rm"
        rows = [{"index": i, "score": len(m[-1]["content"])} for i, m in enumerate(body["messages"])]
        return {"data": rows[::-1]}

    fake.answer = lengths
    options = {"url": fake.url, "model": "rm", "batch": 2}
    assert score_server(answers("a", "bb", "ccc"), chat("x", "y", "z"), **options) == [1, 2, 3]
    assert sorted(len(body["messages"]) for body in fake.requests) == [1, 2]
    assert [m["role"] for m in fake.requests[0]["messages"][0]] == ["user", "assistant"]


@pytest.mark.parametrize(
    "answer", [{}, {"data": [{"index": 0}]}, {"data": [{"index": 1, "score": 2}]}, [], b"not JSON"]
)
def test_an_answer_without_the_scores_costs_those_of_its_request(fake, answer, capsys):
    fake.answer = lambda path, body: answer
    assert np.isnan(score_server(answers("a", "b"), chat("x", "y"), url=fake.url, tries=1)).all()
    assert "2 responses without a score: " in capsys.readouterr().out


def test_grades_are_from_0_to_1_and_an_answer_without_one_is_counted_and_has_no_score(fake, capsys):
    def judged(path, body):
        assert path == "/v1/chat/completions" and body["temperature"] == 0 and body["model"] == "m"
        text = body["messages"][0]["content"]
        assert "system: Be {response}." in text and "user: Why?" in text
        for response, said in (("good", "Fine.\nScore: 5"), ("bad", "**Score**: 1"), ("odd", "no idea"), ("big", "9")):
            if f"[Answer]\n{response}\n" in text:
                return says(said)
        raise AssertionError(text)

    fake.answer = judged
    prompt = [{"role": "system", "content": "Be {response}."}, {"role": "user", "content": "Why?"}]
    seen = {}
    options = {"url": fake.url, "model": "m", "scale": 5, "log_metric": seen.__setitem__}
    scores = judge(answers("good", "bad", "odd", "big"), [prompt] * 4, **options)
    np.testing.assert_array_equal(scores, [1, 0, math.nan, math.nan])
    assert seen == {"unreadable": 0.5}
    assert "2 answers of the judge without a judgement, such as: no grade in 'no idea'" in capsys.readouterr().out


def test_pairs_are_judged_in_both_orders(fake):
    def prefers(path, body):
        text = body["messages"][0]["content"]
        first, second = (text.index(f"[Answer {side}]") for side in "AB")
        if "nothing" in text:
            return says("I cannot say")
        if "always first" in text:
            return says("[[A]]")
        if "half" in text and text.index("half") > second:
            return says("?")
        return says("At first [[B]], but in the end [[A]]" if first < text.index("gold") < second else "[[B]]")

    fake.answer = prefers
    responses = ["gold", "worse", "always first", "nothing", "half gold"]
    references = ["worse", "gold", "x", "y", answers("worse")[0]]
    scores = judge_pairs(answers(*responses), chat(*"abcde"), references, url=fake.url, model="m")
    np.testing.assert_array_equal(scores, [1, 0, 0.5, math.nan, 1])


def test_grades_and_verdicts_are_the_last_ones():
    assert (
        grade("Score: 3. No: score = 4/5", 5) == 0.75 and grade(" 5\n", 5) == 1 and grade("Rating: [[2.5]]", 4) == 0.5
    )
    assert [verdict(f"[[A]] no [[{v}]]") for v in "ABC"] == [1, 0, 0.5]
    for read in (lambda: grade("12 good points", 5), lambda: grade("Score: 0", 5), lambda: verdict("[A]")):
        with pytest.raises(Unreadable):
            read()
    assert fill("{a} {b} {c}", a="{b}", b="{a}") == "{b} {a} {c}"


def test_busy_servers_are_asked_again_after_growing_waits_and_others_are_not(fake):
    waits = []
    client = Client(ClientOptions(fake.url, tries=4), wait=waits.append)
    fake.answer = [(503, {}, {}), (429, {}, {"Retry-After": "7"}), (500, {}, {"Retry-After": "Mon, 1 Jan"}), {"ok": 1}]
    assert client.call("x", {}) == {"ok": 1} and client.sent == 4
    assert FIRST_WAIT <= waits[0] <= 2 * FIRST_WAIT and waits[1] == 7 and waits[2] >= 4 * FIRST_WAIT
    fake.answer = lambda path, body: (429, {"error": "busy"}, {"Retry-After": "1e9"})
    with pytest.raises(RequestFailed, match=r"refused x with status 429: \{\"error\": \"busy\"\}"):
        client.call("x", {})
    assert client.sent == 8 and waits[-1] == LONGEST_WAIT
    fake.answer = lambda path, body: (404, b"no such model", {})
    with pytest.raises(RequestFailed, match="status 404: no such model") as caught:
        client.call("x", {})
    assert caught.value.status == 404 and client.sent == 9


def test_a_server_that_is_not_there_or_hangs_is_an_expected_failure():
    client = Client(ClientOptions("http://127.0.0.1:9", tries=2), wait=lambda seconds: None)
    with pytest.raises(RequestFailed, match=r"no usable answer from http://127.0.0.1:9/v1/x \("):
        client.call("x", {})
    assert client.sent == 1
    client.answered = True  # it was there before
    with pytest.raises(RequestFailed):
        client.call("x", {})
    assert client.sent == 3


def test_the_rate_spaces_requests_evenly(fake, monkeypatch):
    now, waits = [100.0], []

    def wait(seconds):
        waits.append(seconds)

    monkeypatch.setattr("jaxrlhf.rewards.http.time.monotonic", lambda: now[0])
    client = Client(ClientOptions(fake.url, rate=30), wait=wait)
    for _ in range(3):
        client.call("x", {})
    now[0] += 60
    client.call("x", {})
    assert waits == [2, 4]


def test_answers_are_kept_on_disk_unless_they_say_nothing(fake, tmp_path):
    fake.answer = [says("Score: 3"), says("no idea"), says("Score: 5")]
    options = {"url": fake.url, "model": "m", "scale": 5, "cache": str(tmp_path / "kept"), "parallel": 1}
    assert judge(answers("a"), chat("x"), **options) == judge(answers("a"), chat("x"), **options) == [0.5]
    assert np.isnan(judge(answers("b"), chat("x"), **options)).all() and judge(answers("b"), chat("x"), **options) == [
        1
    ]
    assert len(fake.requests) == 3
    kept = sorted((tmp_path / "kept").glob("*/*.json"))
    assert len(kept) == 2
    for path in kept:
        path.write_text('{"half')
    fake.answer = [says("Score: 2")]
    assert judge(answers("a"), chat("x"), **options) == [0.25]
    (tmp_path / "file").touch()
    fake.answer = [says("Score: 2")]
    with pytest.raises(InputError, match=r"cache=.*file: cannot be written to"):
        judge(answers("c"), chat("x"), **options | {"cache": str(tmp_path / "file")})


def test_a_key_comes_from_the_environment_and_is_never_shown(fake, monkeypatch):
    monkeypatch.setenv("MY_KEY", "very-secret-value")
    fake.answer = lambda path, body: (401, b"wrong key very-secret-value", {})
    client = Client(ClientOptions(fake.url, key="MY_KEY"))
    with pytest.raises(RequestFailed, match="status 401: wrong key") as caught:
        client.call("x", {})
    assert fake.headers[-1]["Authorization"] == "Bearer very-secret-value" and "secret" not in str(caught.value)


def test_they_run_by_name_in_processes_of_their_own_within_the_time_limit(fake):
    fake.answer = lambda path, body: says("Score: 4")
    spec = f"judge:url={fake.url}:model=m:scale=5"
    rewards = Rewards([spec], say=lambda text: None, limits=Limits(30.0))
    result = rewards.submit(["p", "q"], ["r", "s"]).result()
    assert result.scores.tolist() == [0.75, 0.75] and result.numbers == {"judge/unreadable": [0.0]}
    assert rewards.columns == () and "[Conversation]\np\n" in "".join(
        b["messages"][0]["content"] for b in fake.requests
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("judge", "needs the option url, as in judge:url=…"),
        ("judge:url=http://h/v1", "needs the option model, as in judge:model=…"),
        ("judge:url=h.example:model=m", "must begin with http:// or https:// and name a host"),
        ("score_server:url=http://h/v1:tries=0", "tries=0 must be at least 1"),
        ("score_server:url=http://h/v1:batch=0", "batch=0 must be at least 1"),
        ("score_server:url=http://h/v1:timeout=0", "timeout=0.0 must be above 0"),
        ("judge:url=http://h/v1:model=m:scale=1", "scale=1 must be at least 2"),
        ("judge:url=http://h/v1:model=m:template=absent.txt", "template=absent.txt: cannot be read"),
        (
            "judge_pairs:url=http://h/v1:model=m:template=one.txt",
            "has no {second}; it needs {prompt}, {first}, {second}",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_settings(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("{prompt} {first}")
    with pytest.raises(InputError) as caught:
        load_function(spec)
    assert message in str(caught.value)
