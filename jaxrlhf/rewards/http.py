"""Requests to HTTP servers with JSON: repeated with growing waits, at a limited rate, with answers kept on disk."""

import hashlib
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jaxrlhf.config.files import write_text_atomic
from jaxrlhf.config.secrets import redacted
from jaxrlhf.errors import InputError

T = TypeVar("T")

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Statuses after which a request is sent again."""
FIRST_WAIT = 0.25
LONGEST_WAIT = 30.0
SHOWN = 300


class RequestFailed(Exception):
    """No usable answer; `status` is the last HTTP status, None without any; `after` its Retry-After."""

    def __init__(self, message: str, status: int | None = None, after: str = "") -> None:
        super().__init__(message)
        self.status, self.after = status, after


class Unreadable(Exception):
    """An answer of the right form whose content says nothing, such as a judgement without a number."""


@dataclass(frozen=True)
class ClientOptions:
    """Settings of a client."""

    url: str
    """Base of the addresses; `/v1` is added where it has no path."""
    tries: int = 5
    """Attempts of a request."""
    timeout: float = 60.0
    """Seconds of one attempt."""
    rate: float = 0.0
    """Most requests per minute; 0: any."""
    parallel: int = 8
    """Requests at a time."""
    cache: str = ""
    """Folder that keeps answers; empty: none."""
    key: str = "OPENAI_API_KEY"
    """Environment variable with the key."""

    def check(self, label: str) -> None:
        """Raises InputError for a value that cannot work."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"{label}: url={redacted(self.url)!r} must begin with http:// or https:// and name a host")
        for name, low in (("tries", 1), ("parallel", 1), ("rate", 0)):
            if not getattr(self, name) >= low:
                raise InputError(f"{label}: {name}={getattr(self, name)} must be at least {low}")
        if not self.timeout > 0:
            raise InputError(f"{label}: timeout={self.timeout} must be above 0")


class Client:
    """Sends JSON to one server, from several threads at a time."""

    def __init__(self, options: ClientOptions, wait: Callable[[float], object] = time.sleep) -> None:
        self.options, self._wait = options, wait
        self.base = options.url.rstrip("/") + ("" if urlsplit(options.url).path.strip("/") else "/v1")
        self.sent = 0
        """Attempts so far."""
        self.answered = False
        """True once the server has answered anything."""
        self._lock = threading.Lock()
        self._next = 0.0

    def call(self, path: str, body: Mapping[str, object] | None = None) -> Any:
        """The JSON of an answer; without a body by GET. Raises RequestFailed.

        A server that has not answered yet is tried once: its address is more likely wrong than the network bad.
        """
        last = RequestFailed("not sent")
        for tried in range(self.options.tries):
            if tried:
                self._wait(self._pause(tried, last))
            try:
                return self._once(path, body)
            except RequestFailed as error:
                last = error
                again = self.answered if error.status is None else error.status in AGAIN
                if not again:
                    break
        raise last

    def ask(self, path: str, body: Mapping[str, object], read: Callable[[Any], T]) -> T:
        """Returns `read(answer)`. The answer is kept on disk unless `read` raises.

        Raises RequestFailed, and the Unreadable of `read`.
        """
        place = self._place(path, body)
        if place is not None and place.is_file():
            try:
                return read(json.loads(place.read_text(encoding="utf-8")))
            except (OSError, ValueError, Unreadable):  # half a file of a full disk, or of another reader
                pass
        answer = self.call(path, body)
        found = read(answer)
        if place is not None:
            try:
                write_text_atomic(place, json.dumps(answer))
            except OSError as error:
                raise InputError(
                    f"cache={self.options.cache}: cannot be written to ({error}); name another folder"
                ) from error
        return found

    def each(self, work: Callable[[int], T], count: int) -> list[T | Exception]:
        """Results of `work(0)` … `work(count - 1)`, done in parallel; an expected failure is in its place."""

        def safe(i: int) -> T | Exception:
            try:
                return work(i)
            except (RequestFailed, Unreadable) as error:
                return error

        with ThreadPoolExecutor(self.options.parallel) as pool:
            return list(pool.map(safe, range(count)))

    def _once(self, path: str, body: Mapping[str, object] | None) -> object:
        self._take_turn()
        headers = {"Content-Type": "application/json", "User-Agent": "jaxrlhf"}
        if key := os.environ.get(self.options.key):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout) as reply:
                self.answered = True
                return json.load(reply)
        except urllib.error.HTTPError as error:
            self.answered = True
            with error:
                said = error.read(4 * SHOWN).decode("utf-8", "replace")[:SHOWN]
            message = redacted(f"the server refused {path} with status {error.code}: {said}")
            raise RequestFailed(message, error.code, error.headers.get("Retry-After", "")) from error
        except (OSError, ValueError) as error:  # no connection, a timeout, half an answer, or one that is not JSON
            reason = getattr(error, "reason", error)
            raise RequestFailed(
                redacted(f"no usable answer from {self.base}/{path} ({reason})"[: 2 * SHOWN])
            ) from error

    def _take_turn(self) -> None:
        """Waits until the rate allows one more request."""
        with self._lock:
            self.sent += 1
            if not self.options.rate:
                return
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60.0 / self.options.rate
        if turn > now:
            self._wait(turn - now)

    def _pause(self, tried: int, last: RequestFailed) -> float:
        """Seconds before the next attempt: what the server asks for, or twice as many as before, with some chance."""
        try:
            asked = float(last.after or 0)
        except ValueError:  # a date
            asked = 0.0
        grown = FIRST_WAIT * 2**tried * (0.5 + random.random() / 2)
        return min(LONGEST_WAIT, max(asked, grown))

    def _place(self, path: str, body: Mapping[str, object]) -> Path | None:
        if not self.options.cache:
            return None
        text = json.dumps([self.base, path, body], sort_keys=True)
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return Path(self.options.cache) / name[:2] / f"{name}.json"
