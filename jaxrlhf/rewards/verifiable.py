"""Built-in reward functions: exact match, numbers, mathematics, regular expression, length; and the table of all.

Each has the form of a user's function: prompts and responses, then the columns of the data that it reads, then its
options by name. It returns one number per response, and raises InputError for a wrong option.
"""

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from jaxrlhf.errors import InputError
from jaxrlhf.rewards.instructions import instructions, read_instructions
from jaxrlhf.rewards.judges import judge, judge_pairs, score_server

MARK = "####"  # stands before the answer in gsm8k's solutions
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-−])?"  # a minus that is not between two operands
    r"(?:\\?[$€£¥]-?)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_BOXED = re.compile(r"\\boxed\s*\{")
_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[|(?<![\\A-Za-z])[A-Za-z]{4,}")
"""Text that holds formulas, rather than being one: marks of formulas, or words."""
_ANNOUNCED = re.compile(r"answer\s*(?:is|was|[:=])", re.IGNORECASE)
_OUTER = " \t\n\r.,;:!?\"'`*()[]{}«»“”‘’"


def numbers_in(text: str) -> list[Decimal]:
    """The numbers in a text, in order: `-$1,234.50` is one, and so is `.5`; `3-5` holds 3 and 5."""
    found = []
    for match in _NUMBER.finditer(text):
        digits = re.sub(r"[^0-9.]", "", match.group())
        negative = "-" in match.group() or "−" in match.group()
        found.append(Decimal(("-" if negative else "") + digits))
    return found


def boxed_text(text: str) -> str | None:
    """The content of the last `\\boxed{…}` that is closed, or None."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for i in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if not depth:
                return text[match.end() : i]
    return None


def final_number(text: str) -> Decimal | None:
    """The number that a solution gives as its answer, or None when the text holds no number.

    The first number after the last `####`; else the last one in the last `\\boxed{…}`; else the first after the last
    "answer is" or "answer:"; else the last one.
    """
    _, mark, rest = text.rpartition(MARK)
    if mark and (numbers := numbers_in(rest)):
        return numbers[0]
    if (boxed := boxed_text(text)) is not None and (numbers := numbers_in(boxed)):
        return numbers[-1]
    announced = [match.end() for match in _ANNOUNCED.finditer(text)]
    if announced and (numbers := numbers_in(text[announced[-1] :])):
        return numbers[0]
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def normalised(text: str) -> str:
    """The text after the last `####` (or all of it), in lower case, with single spaces, without outer punctuation."""
    text = unicodedata.normalize("NFKC", text).rpartition(MARK)[2]
    return " ".join(text.casefold().split()).strip(_OUTER)


def accepted(reference: object) -> list[str]:
    """The references of a row as texts; a list holds several.

    Raises ValueError for a reference that is neither text nor number, and for an empty one, which any response or none
    would match.
    """
    several = reference if isinstance(reference, list) else [reference]
    if not several:
        raise ValueError("the reference is an empty list")
    for one in several:
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise ValueError(f"the reference must be text, a number or a list of these, found {one!r}"[:200])
        if isinstance(one, str) and not one.strip():
            raise ValueError("the reference is empty")
    return [format(Decimal(repr(one)), "f") if isinstance(one, float) else str(one) for one in several]


def reference_numbers(reference: object) -> list[Decimal]:
    """The `final_number` of each reference of a row. Raises ValueError for a reference without a number."""
    numbers = []
    for text in accepted(reference):
        number = final_number(text)
        if number is None:
            raise ValueError(f"the reference {text[-100:]!r} holds no number")
        numbers.append(number)
    return numbers


def reference_texts(reference: object) -> list[str]:
    """The references of a row, `normalised`. Raises ValueError when nothing is left of one."""
    texts = {text: normalised(text) for text in accepted(reference)}
    empty = [text for text, left in texts.items() if not left]
    if empty:
        raise ValueError(
            f"the reference {empty[0][-100:]!r} leaves nothing to compare without punctuation and text before {MARK}"
        )
    return list(texts.values())


def exact_match(prompts: Sequence[str], responses: Sequence[str], references: Sequence[object]) -> list[float]:
    """1 where the response equals the reference, or one of several, both `normalised`; 0 elsewhere."""
    return [
        float(normalised(response) in reference_texts(reference))
        for response, reference in zip(responses, references, strict=True)
    ]


def number_match(
    prompts: Sequence[str], responses: Sequence[str], references: Sequence[object], *, tolerance: float = 0.0
) -> list[float]:
    """1 where the response's `final_number` differs by at most `tolerance` from the reference's, 0 elsewhere."""
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"reward function number_match: tolerance={tolerance} must be 0 or more")
    scores = []
    for response, reference in zip(responses, references, strict=True):
        number = final_number(response)
        gaps = [] if number is None else [abs(number - wanted) for wanted in reference_numbers(reference)]
        scores.append(float(any(gap <= Decimal(str(tolerance)) for gap in gaps)))
    return scores


def math_verify(
    prompts: Sequence[str], responses: Sequence[str], references: Sequence[object], *, seconds: int = 5
) -> list[float | None]:
    """1 where the response's result equals the reference's as mathematics, 0 elsewhere, by the package math-verify.

    Args:
        prompts: Not used.
        responses: The responses; with `####`, the text after the last one counts.
        references: Formulas in LaTeX, with or without marks around them, or numbers; or lists of accepted ones.
        seconds: Limit of reading and of comparing one response; beyond it, the score is 0.

    Returns:
        The scores; None where no reference can be read.
    """
    if seconds < 1:
        raise InputError(f"reward function math_verify: seconds={seconds} must be at least 1")
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("reward function math_verify: needs the package math-verify; pip install 'jaxrlhf[math]'")
    if not responses:  # a check of the options, which need not wait for a computer algebra
        return []
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    def read(text: str, *forms: str) -> list[Any]:
        text = text.rpartition(MARK)[2]
        for form in forms:
            # Without the fallback, which gives text that is no formula back as text.
            if found := parse(form.format(text), fallback_mode="no_fallback", parsing_timeout=seconds):
                return found
        return []

    scores: list[float | None] = []
    for response, reference in zip(responses, references, strict=True):
        golds = [
            read(text, *(("{}",) if _DELIMITED.search(text.rpartition(MARK)[2]) else ("${}$", "{}")))
            for text in accepted(reference)
        ]
        golds = [gold for gold in golds if gold]
        found = read(response, "{}") if golds else []
        right = any(verify(gold, found, timeout_seconds=seconds) for gold in golds)
        scores.append(float(right) if golds else None)
    return scores


def regex(prompts: Sequence[str], responses: Sequence[str], *, pattern: str, whole: bool = False) -> list[float]:
    """1 where `pattern` is found in the response (with `whole`: matches all of it), 0 elsewhere."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"reward function regex: pattern={pattern!r} is no regular expression ({error})") from error
    found = compiled.fullmatch if whole else compiled.search
    return [float(found(response) is not None) for response in responses]


def length(
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    target: int | None = None,
    limit: int | None = None,
    unit: str = "words",
) -> list[float]:
    """Scores the response's length n in words or characters.

    Args:
        prompts: not used.
        responses: the responses.
        target: the score is 1 - |n - target| / target, at least 0.
        limit: the score is 0 up to this length, then -(n - limit) / limit, at least -1.
        unit: "words" or "characters".
    """
    if (target is None) == (limit is None):
        raise InputError("reward function length: give one of target and limit, as in length:target=200")
    bound = target or limit or 0
    if bound < 1:
        raise InputError(f"reward function length: {'limit' if target is None else 'target'} must be at least 1")
    if unit not in ("words", "characters"):
        raise InputError(f"reward function length: unit={unit!r} must be words or characters")
    sizes = [len(response.split()) if unit == "words" else len(response) for response in responses]
    if limit is None:
        return [max(0.0, 1.0 - abs(n - bound) / bound) for n in sizes]
    return [0.0 - min(1.0, max(0.0, (n - bound) / bound)) for n in sizes]


BUILT_IN = {
    "exact_match": exact_match,
    "number_match": number_match,
    "math_verify": math_verify,
    "regex": regex,
    "length": length,
    "instructions": instructions,
    "score_server": score_server,
    "judge": judge,
    "judge_pairs": judge_pairs,
}
REFERENCE_CHECKS = {
    "exact_match": reference_texts,
    "number_match": reference_numbers,
    "math_verify": accepted,
    "instructions": read_instructions,
}
"""Functions of a row's columns that raise ValueError where no response can be scored."""
OWN_PROCESS = frozenset({"regex", "instructions", "math_verify", "score_server", "judge", "judge_pairs"})
"""Built-in functions that may take forever: the user's regular expressions, a computer algebra, servers."""
