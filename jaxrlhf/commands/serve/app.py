"""The HTTP application: OpenAI's endpoints, scores, votes, health, metrics and the chat page."""

import asyncio
import base64
import collections
import contextlib
import hashlib
import hmac
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from jaxrlhf.commands.serve.fields import MAX_BODY, ApiError, parse_body
from jaxrlhf.commands.serve.metrics import Page
from jaxrlhf.commands.serve.models import LanguageModel, RewardModel, Served
from jaxrlhf.commands.serve.replies import CallReader, Choice, Piece, Replies, total_tokens
from jaxrlhf.commands.serve.requests import (
    Chat,
    Generation,
    read_chat,
    read_completion,
    read_score,
    read_vote,
    sampling,
    token_limit,
)
from jaxrlhf.commands.serve.scheduler import Event, Job, QueueFull, Stopped
from jaxrlhf.data import encode_conversation, encode_texts_as_documents, with_variables
from jaxrlhf.errors import InputError

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
OWNER = "jaxrlhf"
DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's API


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(content, ensure_ascii=False), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return json_response(error.body(), error.status, headers)


def create_app(
    models: Mapping[str, Served], *, key: str | None = None, preferences: str | None = None, timeout: float = 600.0
) -> Starlette:
    """Creates the application.

    Args:
        models: The models by name. Their threads are started by the caller.
        key: Key that `/v1` asks for; None: none.
        preferences: JSON-lines file of the chat page's votes; None: no votes.
        timeout: Seconds until a request is given up.
    """
    server = _Server(models, key, preferences, timeout)
    posts = {
        "/v1/chat/completions": server.chat,
        "/v1/completions": server.complete,
        "/v1/score": server.score,
        "/v1/preferences": server.vote,
    }
    gets = {"/v1/models": server.list_models, "/v1/models/{name:path}": server.show_model}
    open_gets = {"/health": server.health, "/metrics": server.show_metrics, "/": server.page}
    routes = [Route(path, server.guarded(path, handler), methods=["POST"]) for path, handler in posts.items()]
    routes += [Route(path, server.guarded(path, handler), methods=["GET"]) for path, handler in gets.items()]
    routes += [Route(path, handler, methods=["GET"]) for path, handler in open_gets.items()]

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(ApiError(f"{error.detail}: see docs/serving.md", status=error.status_code))

    async def server_error(_: Request, error: Exception) -> Response:
        return error_response(ApiError(f"the server has failed ({type(error).__name__}); see its log", status=500))

    return Starlette(routes=routes, exception_handlers={HTTPException: http_error, Exception: server_error})


async def read_body(request: Request) -> dict[str, object]:
    """The JSON object of a request. Other sites' pages cannot send this type without asking, which is refused."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"Content-Type {kind or '(none)'}: send application/json", status=415)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise ApiError(f"the body is longer than {MAX_BODY} bytes", status=413)
    return parse_body(bytes(data))


class _Server:
    """The handlers of the endpoints."""

    def __init__(self, models: Mapping[str, Served], key: str | None, preferences: str | None, timeout: float) -> None:
        self.models, self.timeout = models, timeout
        self.created = int(time.time())
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._key = None if key is None else key.encode()
        self._votes = None if preferences is None else Path(preferences)
        self._vote_lock = threading.Lock()
        self._page, self._policy = load_page(votes=preferences is not None)

    def guarded(self, path: str, handler: Handler) -> Handler:
        """The handler behind the API key, with ApiErrors as responses, counted under `path`."""

        async def handle(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = error_response(error)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it
            self.requests[path, response.status_code] += 1
            return response

        return handle

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise ApiError("the API key is missing or wrong", code="invalid_api_key", status=401)

    def _model(self, name: str, kind: type[T]) -> T:
        model = self.models.get(name)
        if model is None:
            known = ", ".join(self.models)
            raise ApiError(f"the model {name!r} is not served; served: {known}", "model", "model_not_found", 404)
        if not isinstance(model, kind):
            what, use = ("language", "/v1/chat/completions") if kind is RewardModel else ("reward", "/v1/score")
            raise ApiError(f"{name!r} is a {what} model; use {use}", "model", "model_not_supported")
        return model

    # ---- generation

    async def chat(self, request: Request) -> Response:
        chat = read_chat(await read_body(request))
        model: LanguageModel = self._model(chat.wants.model, LanguageModel)
        try:
            form = model.tool_format(chat.tools) if chat.tools else None
        except InputError as error:
            raise ApiError(str(error), "tools") from error
        try:
            tokenizer = with_variables(model.tokenizer, chat.variables)
        except InputError as error:
            raise ApiError(str(error), "chat_template_kwargs") from error
        try:
            prompt = encode_conversation(tokenizer, chat.messages, chat.tools or None)
        except InputError as error:
            raise ApiError(str(error), "messages") from error
        return await self._generate(request, model, [prompt], chat.wants, chat, form)

    async def complete(self, request: Request) -> Response:
        given, wants = read_completion(await read_body(request))
        model: LanguageModel = self._model(wants.model, LanguageModel)
        prompts = []
        for prompt in given:
            # Without the EOS, which the response brings.
            ids = encode_texts_as_documents(model.tokenizer, [prompt])[0][:-1] if isinstance(prompt, str) else prompt
            outside = [i for i in ids if not 0 <= i < model.vocabulary]
            if outside:
                raise ApiError(f"token id {outside[0]} is none of 0 to {model.vocabulary - 1}", "prompt")
            if not ids:
                raise ApiError("the prompt is empty; give at least one token", "prompt")
            prompts.append(ids)
        return await self._generate(request, model, prompts, wants)

    async def _generate(
        self,
        request: Request,
        model: LanguageModel,
        prompts: list[list[int]],
        wants: Generation,
        chat: Chat | None = None,
        form: str | None = None,
    ) -> Response:
        """Generates and responds. `chat` is None for a completion; `form` is that of the tool calls, if there are any.

        Raises:
            ApiError: The prompts do not fit, or the queue does not take the samples.
        """
        name = "prompt" if chat is None else "messages"
        limits = [token_limit(model.length, len(prompt), wants.max_tokens, name) for prompt in prompts]
        if wants.max_tokens is None and chat is None:
            limits = [min(limit, DEFAULT_TOKENS) for limit in limits]
        samples = len(prompts) * wants.n
        if samples > model.max_queue:
            raise ApiError(f"{samples} samples are too many for the queue of {model.max_queue}; lower n", "n")
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: the server stops
                loop.call_soon_threadsafe(events.put_nowait, event)

        deadline = time.monotonic() + self.timeout
        jobs = [
            Job(prompt, sampling(wants, number), limit, wants.top_logprobs, deadline, deliver)
            for prompt, limit in zip(prompts, limits, strict=True)
            for number in range(wants.n)
        ]
        choices = {job: self._choice(i, model, wants, chat, form) for i, job in enumerate(jobs)}
        try:
            model.scheduler.submit(jobs)
        except QueueFull as error:
            raise ApiError("the queue is full; try again later", code="queue_full", status=429) from error
        except Stopped as error:
            raise ApiError("the server is stopping", status=503) from error
        replies = Replies.of(chat is not None, wants, model.tokenizer, total_tokens(prompts))
        pieces = self._pieces(request, model, choices, events)
        if wants.stream:
            return StreamingResponse(
                stream(replies, list(choices.values()), pieces),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        collected: list[list[Piece]] = [[] for _ in jobs]
        async with contextlib.aclosing(pieces):
            async for choice, piece in pieces:
                collected[choice.index].append(piece)
        return json_response(replies.response(list(choices.values()), collected))

    def _choice(self, i: int, model: LanguageModel, wants: Generation, chat: Chat | None, form: str | None) -> Choice:
        calls = CallReader(form, chat.parallel) if chat is not None and form is not None else None
        return Choice(i, model.tokenizer, wants.stops, chat is not None, model.scheduler.ends, calls)

    async def _pieces(
        self, request: Request, model: LanguageModel, choices: dict[Job, Choice], events: "asyncio.Queue[Event | None]"
    ) -> AsyncGenerator[tuple[Choice, Piece]]:
        """Yields what each event adds, until all choices have ended. Frees the slots when the client goes away.

        Raises:
            ApiError: The time is over, or the model has failed.
            ClientDisconnect: Nobody waits any more.
        """
        watch = asyncio.create_task(leaving(request, events))
        open_jobs = set(choices)
        try:
            while open_jobs:
                event = await events.get()
                if event is None:
                    raise ClientDisconnect
                if event.job not in open_jobs:
                    continue
                if event.finish == "timeout":
                    raise ApiError(f"the request took longer than {self.timeout:g} s", code="timeout", status=504)
                if event.finish == "error":
                    raise ApiError("the model has failed or stops", status=503)
                choice = choices[event.job]
                piece = choice.add(event)
                if choice.finish:
                    open_jobs.remove(event.job)
                    model.scheduler.cancel([event.job])
                yield choice, piece
        finally:
            watch.cancel()
            model.scheduler.cancel(open_jobs)

    # ---- scores and votes

    async def score(self, request: Request) -> Response:
        name, texts, conversations = read_score(await read_body(request))
        model: RewardModel = self._model(name, RewardModel)
        try:
            rows = model.encode_conversations(conversations) if texts is None else model.encode_texts(texts)
        except InputError as error:
            raise ApiError(str(error), "messages" if texts is None else "texts") from error
        for i, row in enumerate(rows):
            if len(row) > model.length:
                raise ApiError(
                    f"entry {i} has {len(row)} tokens; at most {model.length} can be scored",
                    "messages" if texts is None else "texts",
                    "context_length_exceeded",
                )
        scores = await run_in_threadpool(model.scores, rows)
        data = [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores)]
        tokens = total_tokens(rows)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "model": name, "data": data, "usage": usage})

    async def vote(self, request: Request) -> Response:
        row = read_vote(await read_body(request))
        if self._votes is None:
            raise ApiError("votes are not kept: start the server with --preferences FILE.jsonl", status=404)
        line = json.dumps(row | {"time": int(time.time())}, ensure_ascii=False) + "\n"
        await run_in_threadpool(self._append, self._votes, line)
        return json_response({"object": "preference", "saved": True})

    def _append(self, path: Path, line: str) -> None:
        with self._vote_lock, path.open("a", encoding="utf-8") as file:
            file.write(line)

    # ---- what the server has

    def _card(self, model: Served) -> dict[str, object]:
        kind = "score" if isinstance(model, RewardModel) else "generate"
        held = {"id": model.name, "object": "model", "created": self.created, "owned_by": OWNER}
        return held | {"max_model_len": model.length, "task": kind}

    async def list_models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._card(model) for model in self.models.values()]})

    async def show_model(self, request: Request) -> Response:
        return json_response(self._card(self._model(request.path_params["name"], Served)))

    async def health(self, _: Request) -> Response:
        failed = [name for name, m in self.models.items() if isinstance(m, LanguageModel) and m.scheduler.error]
        return json_response({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def show_metrics(self, _: Request) -> Response:
        page = Page()
        for (path, status), count in sorted(self.requests.items()):
            page.add("requests_total", "counter", "Requests", count, endpoint=path, status=str(status))
        for name, model in self.models.items():
            if isinstance(model, RewardModel):
                page.add("scored_total", "counter", "Texts scored", model.scored, model=name)
            elif isinstance(model, LanguageModel):
                add_metrics(page, model)
        return Response(page.text(), media_type="text/plain; version=0.0.4")

    async def page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": self._policy, "X-Content-Type-Options": "nosniff"}
        return Response(self._page, media_type="text/html", headers=headers | {"Referrer-Policy": "no-referrer"})


async def leaving(request: Request, events: "asyncio.Queue[Event | None]") -> None:
    """Puts None into the queue when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(None)


async def stream(
    replies: Replies, choices: list[Choice], pieces: AsyncGenerator[tuple[Choice, Piece]]
) -> AsyncIterator[str]:
    """Yields the server-sent events of a streamed response."""

    def event(content: object) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        if replies.chat:
            for choice in choices:
                yield event(replies.opening(choice.index))
        async for choice, piece in pieces:
            if piece.text or piece.finish or (piece.entries and replies.wants.logprobs):
                yield event(replies.chunk(choice.index, piece))
        if replies.wants.include_usage:
            yield event(replies.last(choices))
    except ApiError as error:
        yield event(error.body())
    except ClientDisconnect:
        return
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


def add_metrics(page: Page, model: LanguageModel) -> None:
    """Adds the metrics of a language model."""
    scheduler, own = model.scheduler, model.metrics
    label = {"model": model.name}
    page.add("prompt_tokens_total", "counter", "Tokens of prompts that began", own.prompt_tokens, **label)
    page.add("generated_tokens_total", "counter", "Tokens generated", own.generated, **label)
    page.add("generated_tokens_per_second", "gauge", "Over the last 10 seconds", own.rate.value(), **label)
    page.add("queue_samples", "gauge", "Samples that wait for a slot", len(scheduler.waiting), **label)
    page.add("busy_slots", "gauge", "Slots that are taken", len(scheduler.running), **label)
    page.add("slots", "gauge", "Slots", scheduler.batch.slots, **label)
    page.histogram(
        "time_to_first_token_seconds", "From the request to a sample's first token", own.first_token, **label
    )


def load_page(votes: bool) -> tuple[str, str]:
    """The chat page, and a content security policy that allows its own script and style alone."""
    page = (files("jaxrlhf.commands.serve") / "page.html").read_text(encoding="utf-8")
    page = page.replace('data-votes="false"', f'data-votes="{str(votes).lower()}"')

    def digest(tag: str) -> str:
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    rules += ["frame-ancestors 'none'", f"script-src {digest('script')}", f"style-src {digest('style')}"]
    return page, "; ".join(rules)
