"""Bounds on chat templates, which are programs from strangers: how much they may compute, and how much text they make.

Transformers renders templates in jinja's sandbox, which keeps them from Python's objects, but lets them loop for ever
and fill the memory. `limit_templates` adds bounds: every loop and macro counts its steps, and every operation that can
make a long text, a list or a number is checked before it runs.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import TemplateRuntimeError

if TYPE_CHECKING:
    from jinja2.runtime import Context

T = TypeVar("T")

MAX_STEPS = 1_000_000
"""Passes through loops and macros in one rendering, which take a few seconds."""
MAX_LENGTH = 2**26
"""Characters and items of lists that one rendering may make, also on the way to its text."""
MAX_NUMBER = 10**6
"""Largest number that a function takes as a width or a count."""
MAX_BITS = 2**15
"""Most bits of a whole number that a template computes."""

_TOO_LONG = f"it makes more than {MAX_LENGTH:,} characters"
_WIDE = re.compile(r"\d{7}|%[-+ #0]*\*|\.\*")
"""Widths in format strings: of seven digits, or taken from the arguments."""


class TemplateLimit(TemplateRuntimeError):
    """A chat template computes or writes more than it may."""


class _Used(threading.local):
    """Steps and text that a rendering has used so far; each thread renders one template at a time."""

    steps = 0
    length = 0


class _Bounds:
    """Methods of a jinja environment that count."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    used: _Used

    @property
    def step(self) -> None:
        """Counts a pass through a loop or macro: reading an attribute is the cheapest statement of jinja."""
        self.used.steps += 1
        if self.used.steps > MAX_STEPS:
            raise TemplateLimit(f"it takes more than {MAX_STEPS:,} steps; it may never end")

    def made(self, value: T) -> T:
        """Counts the length of a value that an operation made."""
        used = self.used
        used.length += len(value) if type(value) is str else _size(value)
        if used.length > MAX_LENGTH:
            raise TemplateLimit(_TOO_LONG)
        return value

    def check(self, length: int) -> None:
        """Raises TemplateLimit when a value of this length would be too much."""
        if self.used.length + length > MAX_LENGTH:
            raise TemplateLimit(_TOO_LONG)

    def concat(self, parts: Iterable[str]) -> str:
        return self.made("".join(parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            return self.made(left + right)
        if operator == "*":
            self.check(max(_repeated(left, right), _repeated(right, left)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str | bytes):
            _check_widths(left, ())
        return self.made(super().call_binop(context, operator, left, right))  # type: ignore[misc]

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # of str.format, which the sandbox wraps
        subject, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(subject, str | bytes):
            __self.check(_growth(name, subject, [*args, *kwargs.values()]))
        else:
            _check_numbers([*args, *kwargs.values()])
        return __self.made(super().call(__context, __obj, *args, **kwargs))  # type: ignore[misc]


def limit_templates() -> None:
    """Makes transformers render every chat template within the bounds."""
    from transformers.utils import chat_template_utils

    original: Any = chat_template_utils._compile_jinja_template
    if not hasattr(original, "bounded"):
        chat_template_utils._compile_jinja_template = _bounded_compiler(original)


def _bounded_compiler(compile_template: Callable[[str], Template]) -> Callable[[str], Template]:
    @functools.lru_cache(maxsize=64)
    def compile_bounded(text: str) -> Template:
        environment = bounded(compile_template("").environment)  # compiling a text would evaluate its constants
        template = environment.from_string(_counted(environment.parse(text)))
        start, used = template.root_render_func, environment.used  # type: ignore[attr-defined]

        def render(context: Context) -> Iterator[str]:
            used.steps = used.length = 0
            for part in start(context):
                yield environment.made(part)  # type: ignore[attr-defined]

        template.root_render_func = render
        return template

    compile_bounded.bounded = True  # type: ignore[attr-defined]
    return compile_bounded


def bounded(environment: Environment) -> Environment:
    """A copy of a jinja environment whose templates have bounds."""
    copy: Any = environment.overlay()
    copy.__class__ = type("BoundedEnvironment", (_Bounds, type(environment)), {})
    copy.used = _Used()
    copy.filters = {name: _checked(copy, name, function) for name, function in environment.filters.items()}
    return copy


def _checked(environment: _Bounds, name: str, function: Callable[..., T]) -> Callable[..., T]:
    """A filter that checks how much it makes."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> T:
        subject = args[first] if len(args) > first else ""
        if name == "join" and not isinstance(subject, Sized):
            args = (*args[:first], subject := list(subject), *args[first + 1 :])
        environment.check(_growth(name, subject, [*args[first + 1 :], *kwargs.values()]))
        return environment.made(function(*args, **kwargs))

    return checked


def _growth(name: str, subject: object, args: list[object]) -> int:
    """Characters that a method or filter makes of its subject, at most."""
    texts = [arg for arg in args if isinstance(arg, str | bytes)]
    if name == "join":
        method = isinstance(subject, str | bytes)
        items, between = (args[0] if args else (), subject) if method else (subject, texts[0] if texts else "")
        if isinstance(items, Sized):
            lengths = sum(map(_size, items)) if isinstance(items, Iterable) else 0
            return lengths + len(between) * len(items)
        return 0
    if name == "replace" and len(texts) >= 2 and isinstance(subject, str | bytes):
        return len(subject) + (subject.count(texts[0]) + 1) * len(texts[1])  # type: ignore[arg-type]
    if name in ("format", "format_map"):
        _check_widths(subject, args)
        return 0
    _check_numbers(args)
    if name == "tojson" and any(isinstance(arg, int) and arg > 100 for arg in args):
        raise TemplateLimit("it indents JSON by more than 100 characters")
    if name in ("indent", "wordwrap", "expandtabs", "translate"):
        return _size(subject) * (1 + max((arg if isinstance(arg, int) else _size(arg) for arg in args), default=4))
    return 0


def _check_numbers(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
            raise TemplateLimit(f"it gives a function a number above {MAX_NUMBER:,}")


def _check_widths(text: object, args: Iterable[object]) -> None:
    shown = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    if _WIDE.search(shown):
        raise TemplateLimit("it pads text to a width of millions of characters, or one that it computes")
    if "{" in shown.replace("{{", "") and re.search(r"\{[^{}]*\{", shown):  # a width in braces of its own
        _check_numbers(args)


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateLimit("it computes with a number of thousands of digits")


def _repeated(value: object, times: object) -> int:
    if isinstance(value, int) and isinstance(times, int):
        _check_bits(value.bit_length() + times.bit_length())
        return 0
    return _size(value) * times if isinstance(times, int) else 0


def _size(value: object) -> int:
    """Characters of a text, items of a list."""
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _counted(template: nodes.Template) -> nodes.Template:
    """The template with a step in the body of each loop and macro, and its joined texts counted."""
    for node in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)):
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("step")))  # type: ignore[attr-defined]
    for parent in list(template.find_all(nodes.Node)):
        for field, value in parent.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(parent, field, _counted_text(value))
            elif isinstance(value, list):
                value[:] = [_counted_text(item) if isinstance(item, nodes.Concat) else item for item in value]
    return template


def _counted_text(node: nodes.Concat) -> nodes.Call:
    """A call of `made` with the text that `~` joins."""
    return nodes.Call(nodes.EnvironmentAttribute("made"), [node], [], None, None)
