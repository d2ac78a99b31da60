"""Ways to damage a file: its bytes, its place in the file system, and single values of the JSON or YAML in it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Change = Callable[[Path], None]
"""Damages the file at a path."""

UNDAMAGED = "undamaged"
"""Name of the case that must be accepted."""
HUGE = 10**30
ODD_VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "text": "text",
    "empty text": "",
    "minus one": -1,
    "zero": 0,
    "fraction": 2.5,
    "2^40": 2**40,
    "10^30": HUGE,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "list": [1],
    "object": {"a": 1},
    "list of lists": [[[]]],
    "surrogate": "\ud800",
    "NUL": "a\0b",
    "parent path": "../../elsewhere",
    "long text": "a" * 5000,
    "python tag": "!!python/object/apply:os.system",
    "nested 60": json.loads("[" * 60 + "]" * 60),
}
"""Values that hardly any setting can have, by name."""


class Damage(NamedTuple):
    """One way to damage a file."""

    name: str
    change: Change
    harmless: bool = True
    """False: a reader that accepts the file has not looked at it."""


def byte_damages(rng: random.Random, flips: int = 12) -> Iterator[Damage]:
    """Truncated, flipped and foreign bytes, whatever the format."""
    for part in (0.1, 0.5, 0.9):
        yield Damage(f"cut at {part:.0%}", _bytes(lambda data, p=part: data[: int(len(data) * p)]))
    yield Damage("last byte gone", _bytes(lambda data: data[:-1]))
    for i in range(flips):
        place, bit = rng.random(), 1 << rng.randrange(8)
        yield Damage(f"flipped bit {i}", _bytes(lambda data, p=place, b=bit: _flipped(data, p, b)))
    yield Damage("empty", _bytes(lambda data: b""))
    yield Damage("white space", _bytes(lambda data: b" \n\t\n"), False)
    yield Damage("NUL bytes", _bytes(lambda data: b"\0" * 64), False)
    yield Damage("NUL inside", _bytes(lambda data: data[: len(data) // 2] + b"\0" + data[len(data) // 2 :]))
    noise = rng.randbytes(4096)
    yield Damage("noise", _bytes(lambda data: noise), False)
    yield Damage("not UTF-8", _bytes(lambda data: data.replace(b"e", b"\xe9")))
    yield Damage("UTF-16", _bytes(lambda data: data.decode("utf-8", "replace").encode("utf-16")))
    yield Damage("doubled", _bytes(lambda data: data + data))
    yield Damage("a line of 10 MB", _bytes(lambda data: b'"' + b"x" * 10_000_000 + b'"'))
    yield Damage("10 MB of brackets", _bytes(lambda data: b"[" * 10_000_000), False)


def place_damages() -> Iterator[Damage]:
    """Something else than a file stands in its place."""
    yield Damage("a folder", _replaced(lambda path: path.mkdir()), False)
    yield Damage("a dangling link", _replaced(lambda path: path.symlink_to(path.parent / "gone")))
    yield Damage("a link to itself", _replaced(lambda path: path.symlink_to(path)))
    yield Damage("a link to a device", _replaced(lambda path: path.symlink_to("/dev/zero")), False)
    yield Damage("a named pipe", _replaced(lambda path: os.mkfifo(path)), False)
    if os.geteuid():
        yield Damage("no permission", lambda path: path.chmod(0), False)


def json_damages() -> Iterator[Damage]:
    """Another JSON value than the file should hold, and values that parsers stumble over."""
    for text in ("[]", "[1]", '"text"', "3", "null", "true", "{}"):
        yield Damage(f"holds {text}", _text(text))
    yield Damage("nested 5,000 deep", _text('{"a":' * 5000 + "1" + "}" * 5000), False)
    yield Damage("nested list", _text("[" * 100_000 + "]" * 100_000), False)
    yield Damage("integer of 5,000 digits", _text('{"a": ' + "9" * 5000 + "}"), False)
    yield Damage("a comment", _text('{"a": 1 // one\n}'), False)
    yield Damage("trailing comma", _text('{"a": 1,}'), False)


def value_damages(content: Any, rng: random.Random, count: int) -> Iterator[Damage]:
    """Single values of a JSON file replaced or removed: `count` of all that are possible."""
    places = list(_places(content))
    chosen = [(place, name) for place in places for name in [*ODD_VALUES, "removed"]]
    rng.shuffle(chosen)
    for place, name in chosen[:count]:
        shown = ".".join(map(str, place))
        yield Damage(f"{shown}: {name}", lambda path, p=place, n=name: _change_json(path, p, n))


def text_damage(name: str, text: str, harmless: bool = True) -> Damage:
    """The file holds this text."""
    return Damage(name, _text(text), harmless)


def _places(value: Any, depth: int = 4) -> Iterator[tuple[Any, ...]]:
    """The paths to the values in a JSON value; of a long list or object only the first ones."""
    if not depth or not isinstance(value, dict | list):
        return
    keys = list(value)[:40] if isinstance(value, dict) else range(min(len(value), 2))
    for key in keys:
        yield (key,)
        yield from ((key, *rest) for rest in _places(value[key], depth - 1))


def _change_json(path: Path, place: tuple[Any, ...], name: str) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if name == "removed":
        del inner[place[-1]]
    else:
        inner[place[-1]] = ODD_VALUES[name]
    path.write_text(json.dumps(content), encoding="utf-8")


def _bytes(change: Callable[[bytes], bytes]) -> Change:
    return lambda path: _write(path, change(path.read_bytes()))


def _text(text: str) -> Change:
    return lambda path: _write(path, text.encode("utf-8", "surrogatepass"))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _flipped(data: bytes, place: float, bit: int) -> bytes:
    changed = bytearray(data)
    changed[int(place * len(data))] ^= bit
    return bytes(changed)


def _replaced(make: Change) -> Change:
    def change(path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        make(path)

    return change
