"""A language model behind `jaxrlhf serve`: start, first token, tokens per second of 1 and 8 clients, and a random load.

    python benchmarks/serve_load.py --model DIR [--requests 500] [--json FILE]

The server runs in a process of its own. The random load has prompts and responses of many lengths, plain and streamed,
with tools, clients that leave, and bodies that are refused. A request is lost when it gets no response, and mixed up
when its text is not the one that the same request gets alone.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from typing import Any

from jaxrlhf.bench.record import say, write
from jaxrlhf.errors import InputError

WORDS = ("sea", "wind", "stone", "light", "river", "bread", "winter", "music", "letter", "road", "garden", "child")
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}
BAD = [
    {"max_tokens": -1},
    {"temperature": "hot"},
    {"messages": []},
    {"max_tokens": 10**6},
    {"model": "nobody"},
    {"top_p": 2},
    {"colour": "red"},
]
"""Changes that make a request wrong."""
TIMEOUT = 600.0
Body = dict[str, Any]


class Server:
    """`jaxrlhf serve` in a process of its own, until `close`."""

    def __init__(self, model: str, flags: list[str]) -> None:
        command = [sys.executable, "-m", "jaxrlhf", "serve", "--model", model, "--port", "0", *flags]
        begin = time.perf_counter()
        self.model = model
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        lines = []
        for line in self.process.stderr or ():
            lines.append(line)
            if found := re.search(r"^serving .* at (http\S+)", line):
                self.url = found[1]
                break
        else:
            raise InputError("the server ended at its start:\n" + "".join(lines[-5:]))
        self.start_seconds = time.perf_counter() - begin
        spans = {name: re.search(rf"^{name} .* ([\d.]+)s", "".join(lines), re.M) for name in ("loading", "compiling")}
        self.spans = {name: float(span[1]) for name, span in spans.items() if span}

    def cpu_seconds(self) -> float:
        """CPU seconds of the process so far."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Resident memory."""
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    def open(self, body: Body) -> HTTPResponse:
        """Sends a chat request. Raises HTTPError for a refusal."""
        data = json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=TIMEOUT)

    def busy(self) -> int:
        """Slots in use and samples that wait."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=TIMEOUT) as response:
            text = response.read().decode()
        return sum(int(float(n)) for n in re.findall(r"^\S*(?:busy_slots|queue_samples)\S* ([\d.]+)$", text, re.M))

    def close(self) -> None:
        """Ends the server."""
        self.process.terminate()
        self.process.wait(60)


def chunks(response: HTTPResponse) -> Any:
    """The events of a stream."""
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def answer(server: Server, body: Body, leaves: bool = False) -> tuple[str, int]:
    """Text and tokens of a response; with `leaves`, what came until the client left a stream."""
    with server.open(body) as response:
        if not body.get("stream"):
            found = json.load(response)
            message = found["choices"][0]["message"]
            return text_of(message), found["usage"]["completion_tokens"]
        text, tokens = "", 0
        for chunk in chunks(response):
            tokens += 1
            for choice in chunk["choices"]:
                text += text_of(choice["delta"])
            if leaves and tokens > 2:
                break
        return text, tokens


def text_of(message: Body) -> str:
    """The content of a message or of a part of it, and the calls of tools."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return (message.get("content") or "") + "".join(json.dumps(call, sort_keys=True) for call in calls)


def asked(rng: random.Random, words: int) -> list[Body]:
    return [{"role": "user", "content": "Tell me of " + " ".join(rng.choices(WORDS, k=words)) + "."}]


def first_tokens(server: Server, repeats: int) -> list[float]:
    """Seconds until the first token of a stream, one request at a time."""
    rng, found = random.Random(1), []
    for _ in range(repeats):
        begin = time.perf_counter()
        body = {"messages": asked(rng, 12), "max_tokens": 4, "stream": True}
        with server.open(body) as response:
            next(chunk for chunk in chunks(response) if text_of(chunk["choices"][0]["delta"]))
            found.append(time.perf_counter() - begin)
    return found


def rate(server: Server, clients: int, requests: int, tokens: int) -> float:
    """Tokens per second of `clients` that each ask again as soon as they have their response."""
    rng = random.Random(2)
    bodies = [{"messages": asked(rng, 12), "max_tokens": tokens, "seed": i} for i in range(requests)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(count for _, count in pool.map(lambda body: answer(server, body), bodies))
    return total / (time.perf_counter() - begin)


def takes_tools(server: Server) -> bool:
    """True if the model's chat template shows tools; the server refuses them otherwise."""
    try:
        answer(server, {"messages": asked(random.Random(0), 3), "max_tokens": 1, "tools": [TOOL]})
    except urllib.error.HTTPError as error:
        if error.code != 400:
            raise
        return False
    return True


def random_load(server: Server, requests: int, clients: int, words: int) -> Body:
    """The random load, with prompts of up to `words` words: what became of each request, and the server's memory."""
    rng, tools = random.Random(3), takes_tools(server)
    sizes = [size for size in (3, 10, 40, 150) if size <= words]
    jobs: list[tuple[Body, str]] = []
    for i in range(requests):
        body = {"messages": asked(rng, rng.choice(sizes)), "seed": rng.randrange(5)}
        body |= {"max_tokens": rng.randint(1, 40), "stream": rng.random() < 0.5}
        if tools and rng.random() < 0.2:
            body |= {"tools": [TOOL]}
        kind = rng.choices(("whole", "leaves", "bad"), (70, 15, 15))[0]
        if kind == "leaves":
            body["stream"] = True
        jobs.append((body | BAD[i % len(BAD)] if kind == "bad" else body, kind))

    def run(job: tuple[Body, str]) -> str | int:
        try:
            return answer(server, job[0], job[1] == "leaves")[0]
        except urllib.error.HTTPError as error:
            shape = json.load(error)["error"]
            return error.code if {"message", "type", "param", "code"} <= set(shape) else -error.code

    memory, begin, done = [server.memory_mib()], time.perf_counter(), []
    with ThreadPoolExecutor(clients) as pool:
        for i, outcome in enumerate(pool.map(run, jobs), 1):
            done.append(outcome)
            if i % max(requests // 5, 1) == 0:
                memory.append(server.memory_mib())
                say(f"{i} requests, {memory[-1]:.0f} MiB")
    seconds = time.perf_counter() - begin
    counts: Body = dict.fromkeys(("whole", "left", "refused", "lost", "mixed up"), 0)
    alone = rng.sample([i for i, (_, kind) in enumerate(jobs) if kind == "whole"], min(60, requests // 5))
    for (_, kind), outcome in zip(jobs, done, strict=True):
        refused = isinstance(outcome, int)
        if refused != (kind == "bad") or (isinstance(outcome, int) and not 400 <= outcome < 500):
            counts["lost"] += 1
        else:
            counts[{"whole": "whole", "leaves": "left", "bad": "refused"}[kind]] += 1
    for i in alone:
        counts["mixed up"] += answer(server, jobs[i][0])[0] != done[i]
    return (
        counts
        | {"compared": len(alone), "tools": tools, "seconds": round(seconds, 1), "busy_afterwards": server.busy()}
        | {"memory_mib": [round(m) for m in memory]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--requests", type=int, default=500, help="of the random load")
    parser.add_argument("--words", type=int, default=150, help="of the longest prompt of the random load, at least 3")
    parser.add_argument("--tokens", type=int, default=48, help="of a response when rates are measured")
    parser.add_argument("--flags", default="", help="further flags of the server, in one word")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    server = Server(args.model, args.flags.split())
    try:
        start = {
            "seconds": server.start_seconds,
            "cpu_seconds": server.cpu_seconds(),
            "memory_mib": server.memory_mib(),
        }
        start |= server.spans
        say(f"start {start}")
        first = first_tokens(server, 10)
        say(f"first token {min(first):.2f} to {max(first):.2f} s")
        rates = {1: [], 8: []}
        for _ in range(3):
            for clients, found in rates.items():
                found.append(rate(server, clients, 2 * clients, args.tokens))
        ratio = statistics.median(rates[8]) / statistics.median(rates[1])
        say(f"tokens per second {rates}, × {ratio:.1f}")
        load = random_load(server, args.requests, 16, args.words)
        say(f"random load {load}")
    finally:
        server.close()
    found = {"start": {name: round(x, 1) for name, x in start.items()}, "load": load, "ratio": round(ratio, 2)}
    found["first_token_seconds"] = [round(x, 3) for x in first]
    found["tokens_per_second"] = {str(n): [round(x, 1) for x in values] for n, values in rates.items()}
    write(args.json, found)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
