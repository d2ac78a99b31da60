"""Checks of instructions in the form of IFEval: a response is scored by the instructions that it follows.

Source: Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models (arXiv 2311.07911). A row of the
data has `instruction_id_list`, the kinds of its instructions, and `kwargs`, the arguments of each. The verdicts are
those of lm-eval's task `ifeval`; where that task draws an argument at random, the row is refused instead.
"""

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jaxrlhf.errors import InputError
from jaxrlhf.rewards.sentences import capital_words, sentences

if TYPE_CHECKING:
    from langdetect.detector_factory import DetectorFactory  # pyright: ignore[reportMissingImports]

RELATIONS = ("less than", "at least")
LANGUAGE_KINDS = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
"""Kinds that need to know the language of a response."""
_FENCES = ("```json", "```Json", "```JSON", "```")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

Arguments = dict[str, Any]


def instructions(
    prompts: Sequence[str],
    responses: Sequence[str],
    instruction_id_list: Sequence[object],
    kwargs: Sequence[object],
    *,
    score: str = "all",
    loose: bool = False,
) -> list[float]:
    """Scores responses by the instructions that they follow. An empty response follows none.

    Args:
        prompts: not used.
        responses: the responses.
        instruction_id_list: the kinds of each row's instructions.
        kwargs: the arguments of each instruction; nulls do not count.
        score: "all": 1 for a response that follows all of them, else 0; "share": the share that it follows.
        loose: accept an instruction that the response follows without its first line, its last line, both, or its
            asterisks.
    """
    if score not in ("all", "share"):
        raise InputError(f"reward function instructions: score={score!r} must be all or share")
    scores = []
    for response, ids, arguments in zip(responses, instruction_id_list, kwargs, strict=True):
        verdicts = followed(response, read_instructions(ids, arguments), loose=loose)
        scores.append(float(all(verdicts)) if score == "all" else sum(verdicts) / len(verdicts))
    return scores


def followed(response: str, given: Sequence[tuple[str, Arguments]], *, loose: bool = False) -> list[bool]:
    """The verdict on each of the instructions, as `read_instructions` returns them."""
    texts = [text for text in (variants(response) if loose else [response]) if text.strip()]
    return [any(CHECKS[kind](text, **arguments) for text in texts) for kind, arguments in given]


def variants(response: str) -> list[str]:
    """The response; without its first line, its last line and both; and each of these without asterisks."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [text.replace("*", "") for text in cut]


def read_instructions(ids: object, kwargs: object) -> list[tuple[str, Arguments]]:
    """The instructions of a row, each as its kind and its arguments.

    Raises ValueError for a kind without a check, and for an argument that is missing, unknown or wrong; InputError
    where the package that tells languages is missing.
    """
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"instruction_id_list must be a list of at least one instruction, found {ids!r}"[:200])
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        found = f"{len(kwargs)}" if isinstance(kwargs, list) else repr(kwargs)[:100]
        raise ValueError(f"kwargs must be a list of {len(ids)} objects, one for each instruction, found {found}")
    return [(kind, _arguments(kind, given)) for kind, given in zip(ids, kwargs, strict=True)]


def _arguments(kind: object, given: object) -> Arguments:
    """The arguments of one instruction, without nulls and in their types."""
    check = CHECKS.get(kind) if isinstance(kind, str) else None
    if check is None:
        raise ValueError(f"no check is known for the instruction {kind!r} (known: {', '.join(CHECKS)})")
    if not isinstance(given, Mapping | None):
        raise ValueError(f"kwargs of {kind} must be an object, found {given!r}"[:200])
    if kind in LANGUAGE_KINDS and importlib.util.find_spec("langdetect") is None:
        raise InputError(
            f"reward function instructions: {kind} needs the package langdetect; pip install 'jaxrlhf[instructions]', "
            "or leave out the rows with it"
        )
    values = {name: value for name, value in (given or {}).items() if value is not None}
    names = list(inspect.signature(check).parameters)[1:]
    unknown = [name for name in values if name not in names]
    missing = [name for name in names if name not in values]
    if unknown or missing:
        fault = f"lacks {missing[0]!r}" if missing else f"has no argument {unknown[0]!r}"
        raise ValueError(f"kwargs: {kind} {fault} (it takes {', '.join(names) or 'none'})")
    read = {}
    for name, value in values.items():
        try:
            read[name] = READERS[name](value)
        except ValueError as error:
            raise ValueError(f"kwargs: {name} of {kind} must be {error}, found {value!r}"[:300]) from error
    if read.get("nth_paragraph", 0) > read.get("num_paragraphs", 0):
        raise ValueError(f"kwargs: nth_paragraph of {kind} is beyond num_paragraphs={read['num_paragraphs']}")
    return read


def _count(value: object) -> int:
    """A count. It may be a float: pandas makes floats of integers beside nulls."""
    if isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer() and value >= 1:
        return int(value)
    raise ValueError("a whole number of at least 1")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text")
    return value


def _pattern(value: object) -> str:
    """Keywords are regular expressions, as in lm-eval."""
    try:
        re.compile(_text(value))
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from error
    return _text(value)


def _patterns(value: object) -> list[str]:
    if not isinstance(value, list) or not value:
        raise ValueError("a list of at least one word")
    return [_pattern(one) for one in value]


def _relation(value: object) -> str:
    if value not in RELATIONS:
        raise ValueError(f"{RELATIONS[0]!r} or {RELATIONS[1]!r}")
    return str(value)


def _letter(value: object) -> str:
    if len(_text(value)) != 1:
        raise ValueError("one character")
    return _text(value).lower()


READERS: dict[str, Callable[[object], Any]] = {
    **dict.fromkeys(("num_words", "num_sentences", "num_paragraphs", "nth_paragraph", "num_bullets"), _count),
    **dict.fromkeys(("num_highlights", "num_sections", "num_placeholders", "frequency", "let_frequency"), _count),
    **dict.fromkeys(("relation", "let_relation", "capital_relation"), _relation),
    **dict.fromkeys(("keywords", "forbidden_words"), _patterns),
    **dict.fromkeys(("keyword", "section_spliter", "postscript_marker"), _pattern),
    **dict.fromkeys(("first_word", "end_phrase", "prompt_to_repeat", "language"), _text),
    "capital_frequency": _count,
    "letter": _letter,
}
"""Reads each argument, or raises ValueError with the words for its type."""


def holds(count: int, relation: str, bound: int) -> bool:
    """True if the count is "less than" or "at least" the bound."""
    return count < bound if relation == RELATIONS[0] else count >= bound


def number_words(text: str, num_words: int, relation: str) -> bool:
    return holds(len(re.findall(r"\w+", text)), relation, num_words)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return holds(len(sentences(text)), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are separated by `***`; only the first and the last may be empty."""
    first, *rest = (part.strip() for part in re.split(r"\s?\*\*\*\s?", text))
    inner, last = rest[:-1], rest[-1:]
    return all(inner) and sum(map(bool, (first, *inner, *last))) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are separated by an empty line."""
    paragraphs = text.split("\n\n")
    count = sum(1 for paragraph in paragraphs if paragraph.strip())
    if count != num_paragraphs or not (words := paragraphs[nth_paragraph - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return "".join(map(str.lower, word)) == first_word.lower()


def keywords_existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return holds(len(re.findall(keyword.strip(), text, re.IGNORECASE)), relation, frequency)


def forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return holds(text.lower().count(letter), let_relation, let_frequency)


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, marker.lower()), text.lower()) is not None


def number_bullets(text: str, num_bullets: int) -> bool:
    """Bullets begin with a hyphen, or with one asterisk."""
    asterisks = re.findall(r"^\s*\*[^*].*$", text, re.MULTILINE)
    return len(asterisks) + len(re.findall(r"^\s*-.*$", text, re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    return any(option in text for option in _CONSTRAINED)


def number_highlights(text: str, num_highlights: int) -> bool:
    """Counts `*highlights*` and `**highlights**` that are not blank."""
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) > num_sections


def json_format(text: str) -> bool:
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    return any(part.lstrip("<").rstrip(">").strip() for part in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str) -> bool:
    """Two different responses with `******` between them, and perhaps before and after them."""
    first, *rest = (part.strip() for part in text.split("******"))
    if not all(rest[:-1]):
        return False
    parts = [part for part in (first, *rest) if part]
    return len(parts) == 2 and parts[0] != parts[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_phrase(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return holds(capital_words(text), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    return text.isupper() and has_language(text, "en")


def english_lowercase(text: str) -> bool:
    return text.islower() and has_language(text, "en")


def no_comma(text: str) -> bool:
    return "," not in text


def has_language(text: str, language: str) -> bool:
    """True if langdetect finds that language, or nothing to tell a language by."""
    factory, failure = _detectors()
    detector = factory.create()
    detector.seed = 0  # langdetect draws at random otherwise
    detector.append(text)
    try:
        return detector.detect() == language
    except failure:
        return True


@lru_cache(maxsize=1)
def _detectors() -> tuple["DetectorFactory", type[Exception]]:
    """langdetect's factory with its profiles, and its exception."""
    from langdetect import LangDetectException, detector_factory  # pyright: ignore[reportMissingImports]

    detector_factory.init_factory()
    return detector_factory._factory, LangDetectException


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": has_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlights,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_phrase,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""The check of each kind: a function of a response that is not empty, and of the instruction's arguments by name."""
