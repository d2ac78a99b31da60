"""Responses of a model behind an OpenAI-compatible server, by the standard library's HTTP client."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxrlhf.commands.evaluation.generators import Responses
from jaxrlhf.commands.evaluation.rows import Prompts
from jaxrlhf.commands.evaluation.settings import EvalConfig
from jaxrlhf.data.messages import as_messages
from jaxrlhf.engine import SamplingConfig
from jaxrlhf.environments import as_hermes
from jaxrlhf.errors import InputError
from jaxrlhf.rewards.http import Client, ClientOptions, RequestFailed
from jaxrlhf.runs.console import Console

TIMEOUT = 600.0  # seconds of one request
TRIES = 6


class ServerModel:
    """A model behind a server: `http://host:port/v1`, or `…#NAME` for one of several.

    Raises InputError when the server does not answer or has no such model.
    """

    def __init__(self, name: str, config: EvalConfig) -> None:
        self.name, self.config = name, config
        address, _, self.model = name.partition("#")
        self.client = Client(ClientOptions(address, TRIES, TIMEOUT))
        served = [entry.get("id", "") for entry in self.call("models").get("data", [])]
        if not self.model and served:
            self.model = served[0]
        elif served and self.model not in served:
            raise InputError(f"{name}: the server has no model {self.model!r}; it has {', '.join(served)}")

    def fits(self, prompts: Prompts) -> np.ndarray:
        """bool `[P]`: all; the server refuses what does not fit."""
        return np.ones(len(prompts), bool)

    def respond(self, prompts: Prompts, console: Console) -> Responses:
        """Requests n responses to each prompt, each with a seed of its own."""
        n, begin = self.config.sampling.samples_per_prompt, time.monotonic()
        jobs = [(i, j) for i in range(len(prompts)) for j in range(n)]
        with (
            ThreadPoolExecutor(self.config.server_requests) as pool,
            console.progress(len(jobs), description=self.name, unit="response") as bar,
        ):
            answers = list(bar.over(pool.map(lambda job: self.answer(prompts, job[0], job[0] * n + job[1]), jobs)))
        texts, lengths, ended = zip(*answers, strict=True)
        return Responses(
            model=self.name,
            prompts=["\n\n".join(str(m["content"]) for m in as_messages(prompt)) for prompt in prompts.prompts],
            texts=[list(texts[i * n : (i + 1) * n]) for i in range(len(prompts))],
            lengths=np.array(lengths).reshape(-1, n),
            ended=np.array(ended).reshape(-1, n),
            seconds=time.monotonic() - begin,
        )

    def answer(self, prompts: Prompts, i: int, number: int) -> tuple[str, int, bool]:
        """One response to prompt `i`: its text, its tokens, and whether it ended by itself."""
        body: dict[str, object] = {"model": self.model, "messages": as_messages(prompts.prompts[i])}
        body |= request_options(self.config.sampling, self.config.data.seed + number)
        if prompts.tools[i]:
            body["tools"] = prompts.tools[i]
        if prompts.variables[i]:
            body["chat_template_kwargs"] = prompts.variables[i]
        reply = self.call("chat/completions", body)
        try:
            choice = reply["choices"][0]
            text = text_of(choice["message"])
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(f"{self.name}: the server's answer holds no message: {str(reply)[:200]}") from error
        tokens = (reply.get("usage") or {}).get("completion_tokens") or 0
        return text, int(tokens), choice.get("finish_reason") != "length"

    def call(self, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
        """A request, sent again while the server is busy. Raises InputError with the server's own words."""
        try:
            answer = self.client.call(path, body)
        except RequestFailed as error:
            check = "" if error.status else "; check the address and that the server runs"
            raise InputError(f"{self.name}: {error}{check}") from error
        if not isinstance(answer, dict):
            raise InputError(f"{self.name}: the server's answer to {path} is no JSON object: {str(answer)[:200]}")
        return answer


def text_of(message: Mapping[str, Any]) -> str:
    """A reply as text. The server has taken the tool calls out of it: they are written as Hermes writes them."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    return as_hermes(message.get("content") or "", [(call["name"], call["arguments"]) for call in calls])


def request_options(sampling: SamplingConfig, seed: int) -> dict[str, object]:
    """The sampling as a request's fields; those that OpenAI's API lacks are sent only where they were changed."""
    options: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
    }
    if sampling.stop_strings:
        options["stop"] = list(sampling.stop_strings)
    further = {"top_k": (sampling.top_k, 0), "repetition_penalty": (sampling.repetition_penalty, 1.0)}
    further |= {"min_tokens": (sampling.min_new_tokens, 0)}
    return options | {name: value for name, (value, default) in further.items() if value != default}
