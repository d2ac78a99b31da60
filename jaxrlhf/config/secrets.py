"""Secrets in settings and messages, replaced before they are written or printed."""

import os
import re
from typing import Any, TypeVar, cast

T = TypeVar("T")

HIDDEN = "***"
MIN_LENGTH = 8
"""Length below which the value of an environment variable is too common to be looked for."""

_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CONNECTION_STRING)$")
_SETTING = re.compile(r"(^|_)(api_key|secret|password)$")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_QUERY_OF_URL = re.compile(
    r"([?&;](?:[\w.-]*(?:token|key|secret|password|signature|credential)[\w.-]*|sig)=)[^&;#\s'\"]+", re.IGNORECASE
)
_KNOWN_FORMS = re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|AKIA|ASIA|AIza)[\w-]{16,}")
_IN_TEXT = re.compile(r"((?:AccountKey|SharedAccessSignature|Authorization: *Bearer)[ =]*)[^\s;'\"]+", re.IGNORECASE)


def redacted(value: T) -> T:
    """Replaces secrets in texts, also those inside dicts, lists and tuples, by `***`.

    Secrets are the values of environment variables such as WANDB_API_KEY or HF_TOKEN, user names and passwords in
    URLs, tokens in the query of a URL, connection strings, tokens of a known form (`hf_…`), and settings named like
    `api_key`.
    """
    return cast(T, _redacted(value, _secrets()))


def _redacted(value: object, secrets: list[str]) -> object:
    if isinstance(value, str):
        return _redacted_text(value, secrets)
    if isinstance(value, dict):
        return {
            key: HIDDEN if inner and isinstance(key, str) and _SETTING.search(key) else _redacted(inner, secrets)
            for key, inner in value.items()
        }
    if type(value) in (list, tuple):
        items: Any = value
        return type(items)(_redacted(item, secrets) for item in items)
    return value


def _redacted_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _USER_IN_URL.sub(HIDDEN, text)
    text = _QUERY_OF_URL.sub(rf"\g<1>{HIDDEN}", text)
    text = _IN_TEXT.sub(rf"\g<1>{HIDDEN}", text)
    return _KNOWN_FORMS.sub(rf"\g<1>{HIDDEN}", text)


def shown_setting(name: str, value: object, longest: int = 200) -> str:
    """The value of a setting as an error message shows it: not a secret one, and not all of a long one."""
    text = HIDDEN if _SETTING.search(name) else repr(value)
    return text if len(text) <= longest else f"{text[:100]}… ({len(text)} characters)"


def _secrets() -> list[str]:
    """Values of the environment variables that are named like secrets, the longest first."""
    found = {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= MIN_LENGTH}
    return sorted(found, key=len, reverse=True)
