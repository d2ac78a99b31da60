"""Flags of every command, by type and range, and requests to the server."""

from __future__ import annotations

import json
import math
import operator
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz_damage import ODD_VALUES

Case = tuple[str, str, Callable[[Path], tuple[str, str]]]
"""(kind, case, what runs it in a folder: verdict and detail)."""

# Words that no setting of the type may have.
NUMBERS = ("nan", "NaN", "inf", "-inf", "1e308", "-1e308", "1e400", "1e13", str(2**63), str(2**64), "9" * 5000, "abc")
NUMBERS += ("", " ", "1_000", "0x10", "1,2", "1 2", "\u0661", "1\0", "\ud800", "true", "{}", "[1]")
WORDS: dict[Any, tuple[str, ...]] = {
    int: (*NUMBERS, "1.5", "-5", "-1000000000000"),
    float: NUMBERS,
    bool: ("maybe", "2", "nan", "", "\0", "truefalse"),
    str: ("a\0b", "\ud800"),
}


def flag_cases() -> Iterator[Case]:
    """Every flag of every command with words that its type and range exclude."""
    from jaxrlhf.cli import commands
    from jaxrlhf.config.settings import sections, settings

    for command, entry in commands().items():
        kinds = [("", entry.config_class())]
        kinds += [(f"{name}.", kind) for name, kind in sections(entry.config_class()).items()]
        for prefix, cls in kinds:
            for name, setting in settings(cls).items():
                for word in words_for(setting.hint.kind):
                    if (not word and setting.hint.optional) or in_range(word, setting.hint):
                        continue  # stands for no value; or is one
                    shown = word if len(word) < 30 else f"{word[:10]}… ({len(word)} characters)"
                    yield f"flags of {command}", f"--{prefix}{name} {shown!r}", flag_case(command, prefix + name, word)


def words_for(kind: Any) -> tuple[str, ...]:
    """The words that a type excludes."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ("other", "", "\0", "1e308")
    if origin is tuple:
        inner = members[0]
        inner = typing.get_args(inner)[0] if typing.get_origin(inner) is typing.Annotated else inner
        excluded = words_for(inner if inner in WORDS or typing.get_origin(inner) else str)
        return tuple(word for word in excluded if word.strip() and "," not in word)  # nothing is an empty list
    if origin is dict:
        return ("a", "=", "a\0=1")
    return WORDS.get(kind, WORDS[str])


def in_range(word: str, hint: Any) -> bool:
    """True for a number that a setting with a range of its own may have."""
    from jaxrlhf.config.annotations import limits_of

    try:
        number = float(word) if word.isascii() and "_" not in word else math.nan
    except ValueError:
        return False
    limits = limits_of(hint)
    return bool(limits) and all(getattr(operator, compare)(number, limit) for compare, _, limit in limits)


def flag_case(command: str, name: str, word: str) -> Callable[[Path], tuple[str, str]]:
    """Parses a command line with one flag. The value must be refused with its name."""

    def run(scratch: Path) -> tuple[str, str]:
        from jaxrlhf.cli import commands
        from jaxrlhf.config import parse
        from jaxrlhf.errors import InputError

        cls = commands()[command].config_class()
        try:
            parse(cls, [f"--{name}", word], command, "")
        except InputError as error:
            own = name.rpartition(".")[2]
            named = own in str(error) and "missing required" not in str(error)
            return ("refused" if named else "swallowed"), str(error)
        return "swallowed", f"--{name} {word!r} is accepted"

    return guarded(run)


def guarded(run: Callable[[Path], tuple[str, str]]) -> Callable[[Path], tuple[str, str]]:
    """`run`, whose exceptions are defects."""

    def guard(scratch: Path) -> tuple[str, str]:
        try:
            return run(scratch)
        except Exception as error:  # nothing but InputError may come out
            return "trace", f"{type(error).__name__}: {str(error)[:300]}"

    return guard


MESSAGE = {"role": "user", "content": "hello"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [MESSAGE], "max_tokens": 3, "temperature": 1.0, "stop": ["x"]}
    | {"top_p": 1.0, "n": 1, "seed": 3, "logprobs": True, "top_logprobs": 2, "stream": False},
    "/v1/completions": {"model": "m", "prompt": "hello", "max_tokens": 3, "stream": True}
    | {"stream_options": {"include_usage": True}},
    "/v1/score": {"model": "m", "messages": [[MESSAGE, {"role": "assistant", "content": "yes"}]]},
    "/v1/preferences": {"messages": [MESSAGE], "chosen": "a", "rejected": "b", "chosen_model": "m"}
    | {"rejected_model": "n"},
}
RAW = (b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'{"a":' * 50_000)
RAW += (b'{"seed": ' + b"9" * 5000 + b"}", b'{"model": "\\ud800"}', b'"' + b"x" * 4_000_000 + b'"', b"{}" * 9)


def request_cases() -> Iterator[Case]:
    """Requests whose values are odd, or that are no JSON."""
    for path, body in BODIES.items():
        for raw in RAW:
            yield f"requests to {path}", repr(raw[:30]), request_case(path, raw)
        for place in places(body):
            for name, value in ODD_VALUES.items():
                changed = json.loads(json.dumps(body))
                inner = changed
                for key in place[:-1]:
                    inner = inner[key]
                inner[place[-1]] = value
                shown = f"{'.'.join(map(str, place))}: {name}"
                yield f"requests to {path}", shown, request_case(path, json.dumps(changed).encode())


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The paths to all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in places(inner))


def request_case(path: str, body: bytes) -> Callable[[Path], tuple[str, str]]:
    """Sends a request to a server without models: it is refused, or read and then lacks its model."""

    def run(scratch: Path) -> tuple[str, str]:
        from starlette.testclient import TestClient

        from jaxrlhf.commands.serve.app import create_app

        votes = scratch / "votes.jsonl"
        client = TestClient(create_app({}, preferences=str(votes)), raise_server_exceptions=False)
        reply = client.post(path, content=body, headers={"content-type": "application/json"})
        if reply.status_code >= 500:
            return "trace", reply.text
        error = reply.json().get("error", {})
        if reply.status_code == 200 or error.get("code") == "model_not_found":
            return "accepted", reply.text
        if votes.exists():
            return "wrote", reply.text
        return ("refused" if error.get("message") else "unnamed"), reply.text

    return guarded(run)
