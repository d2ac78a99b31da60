"""The body of a request and its parameters one by one, and errors in OpenAI's form."""

import json
import math
from collections.abc import Mapping
from typing import Any

from jaxrlhf.config.files import parse_json

MAX_BODY = 4 * 1024 * 1024

# Parameters of OpenAI's API that change nothing here, whatever their value.
INERT = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
# Parameters that are not supported, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """An error in the shape that OpenAI's clients read.

    Args:
        message: What is wrong, with the value found, and the remedy.
        param: The parameter.
        code: Such as model_not_found.
        status: The HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, object]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def parse_body(data: bytes) -> dict[str, object]:
    """The JSON object of a body. Raises ApiError for anything else, also for text that is no Unicode."""
    try:
        body = parse_json(data.decode("utf-8"))
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, not {shown(body)}")
    return body


def shown(value: object) -> str:
    """A value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


class Fields:
    """Takes the parameters of a body one by one; null counts as not given."""

    def __init__(self, body: Mapping[str, object]) -> None:
        self.left: dict[str, Any] = {name: value for name, value in body.items() if value is not None}

    def bad(self, name: str, value: object, must: str) -> ApiError:
        return ApiError(f"{name}={shown(value)} must be {must}", name)

    def number(self, name: str, default: float, low: float, high: float = math.inf) -> float:
        value = self.left.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.bad(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
        value = self.left.pop(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(name, value, f"a whole number from {low} to {high}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.left.pop(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, value, "true or false")
        return value

    def text(self, name: str) -> str:
        if name not in self.left:
            raise ApiError(f"{name} is missing; give a text", name)
        value = self.left.pop(name)
        if not isinstance(value, str):
            raise self.bad(name, value, "a text")
        return value

    def end(self) -> None:
        """Refuses what is left."""
        for name in INERT:
            self.left.pop(name, None)
        for name, value in self.left.items():
            if name not in NEUTRAL:
                raise ApiError(f"{name} is no parameter of this request; remove it", name, "unknown_parameter")
            if not any(
                value == other and isinstance(value, bool) == isinstance(other, bool) for other in NEUTRAL[name]
            ):
                raise ApiError(f"{name} is not supported; remove it", name, "unsupported_parameter")
