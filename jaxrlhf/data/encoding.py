"""Encodes text as token ids: in batches, with the places of the tokens, and with special tokens of users as text.

A special token inside a message would open or close a turn. `hide` replaces each one by a character of private use
before the message is rendered. `encode` then takes the special tokens left in the text as the template's, and encodes
the text between them without any, the hidden ones restored.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxrlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from jaxrlhf.data.tokenizer import Tokenizer

PRIVATE = 0x100000  # the first character of Unicode's last plane, which is of private use
TEXTS = 1000  # in one call of the tokenizers library, whose result takes some 100 bytes a token


@dataclass(frozen=True)
class Text:
    """A text to encode; `hidden` maps the characters in it that stand for other texts to these."""

    text: str
    hidden: Mapping[str, str] = field(default_factory=dict)

    def restored(self, end: int | None = None) -> str:
        """The text up to character `end`, with the hidden texts in their places."""
        text = self.text[:end]
        return text.translate({ord(character): hidden for character, hidden in self.hidden.items()})

    def __getitem__(self, part: slice) -> Text:
        return Text(self.text[part], self.hidden)


@dataclass(frozen=True)
class Encoded:
    """The ids of a text; `tokens(a, b)` gives the range of the tokens that overlap characters `a` to `b` of it, where
    the text was encoded with places."""

    ids: list[int]
    tokens: Callable[[int, int], tuple[int, int]]


class SpecialTokens:
    """The special tokens of a tokenizer, found in texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        named = set(tokenizer.all_special_tokens)
        special = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special or t.content in named}
        added = [token for token in special.values() if token.content]
        longest_first = sorted(added, key=lambda token: len(token.content), reverse=True)
        names = [re.escape(token.content) for token in longest_first]
        self.names = {i: token.content for i, token in special.items()}
        self._first = {token.content[0] for token in added}
        private = f"[{chr(PRIVATE)}-{chr(0x10FFFF)}]"
        self._to_hide = re.compile("|".join([*names, private]))
        # Some tokens swallow the white space beside them.
        swallowing = [
            r"\s*" * token.lstrip + f"({re.escape(token.content)})" + r"\s*" * token.rstrip for token in longest_first
        ]
        self._to_split = re.compile("|".join(swallowing)) if swallowing else None

    def among(self, value: object) -> bool:
        """True when a text in a JSON value holds a special token."""
        if isinstance(value, str):
            return any(map(value.__contains__, self._first)) and self._to_hide.search(value) is not None
        if isinstance(value, dict):
            return any(map(self.among, value.values()))
        return isinstance(value, list | tuple) and any(map(self.among, value))

    def hide(self, value: object, hidden: dict[str, str]) -> Any:
        """The value with each special token in its texts replaced by a character, which is added to `hidden`."""
        if isinstance(value, str):
            names = {text: character for character, text in hidden.items()}

            def replace(match: re.Match) -> str:
                character = names.setdefault(match[0], chr(PRIVATE + len(names)))
                hidden[character] = match[0]
                return character

            return self._to_hide.sub(replace, value)
        if isinstance(value, dict):
            return {key: self.hide(item, hidden) for key, item in value.items()}
        return [self.hide(item, hidden) for item in value] if isinstance(value, list | tuple) else value

    def split(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Yields (start, end, special token or "") of the pieces of a text, in order."""
        last = 0
        for match in self._to_split.finditer(text) if self._to_split else ():
            if match.start() > last:
                yield last, match.start(), ""
            yield match.start(), match.end(), match[match.lastindex or 0]
            last = match.end()
        if last < len(text):
            yield last, len(text), ""


def encode(
    tokenizer: Tokenizer, texts: Sequence[Text], special: SpecialTokens | None = None, places: bool = False
) -> list[Encoded]:
    """Encodes texts in few batched calls: nothing added, nothing cut, never two BOS at the start.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts.
        special: the tokenizer's special tokens; needed for texts with hidden ones.
        places: keep the places of the tokens, for `Encoded.tokens`; they take much memory.
    """
    bos: Any = tokenizer.bos_token_id  # transformers leaves open what its ids are
    return [_without_second_bos(each, bos) for each in _encode_all(tokenizer, texts, special, places)]


def _encode_all(
    tokenizer: Tokenizer, texts: Sequence[Text], special: SpecialTokens | None, places: bool = False
) -> list[Encoded]:
    # Rows repeat texts: prompts of several pairs, and responses of several comparisons.
    once = list(dict.fromkeys(text.text for text in texts if not text.hidden))
    plain = dict(zip(once, _encode_plain(tokenizer, once, places), strict=True))
    pieces = [text for text in texts if text.hidden]
    others = iter(_encode_pieces(tokenizer, pieces, special or SpecialTokens(tokenizer)) if pieces else ())
    return [next(others) if text.hidden else plain[text.text] for text in texts]


def encode_continuations(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    heads: Sequence[tuple[Text, Encoded]],
    special: SpecialTokens,
    places: bool = False,
) -> list[Encoded]:
    """Encodes texts that begin as others, which are encoded already.

    A special token splits a text: what stands before it does not change the tokens after it. So each text is encoded
    from the last special token of its head on.
    """
    cuts = [_last_special(text, *head, special) for text, head in zip(texts, heads, strict=True)]
    tails = encode(tokenizer, [text[place:] for text, (place, _) in zip(texts, cuts, strict=True)], special, places)
    return [
        _joined(head.ids[:count], tail, place)
        for (place, count), (_, head), tail in zip(cuts, heads, tails, strict=True)
    ]


def _last_special(text: Text, head: Text, encoded: Encoded, special: SpecialTokens) -> tuple[int, int]:
    """The character where the last special token of a head begins, and the number of tokens before it; 0 and 0 when
    it has none, or the text does not begin with it."""
    if text.text.startswith(head.text) and not special.names.keys().isdisjoint(encoded.ids):
        for count in range(len(encoded.ids) - 1, 0, -1):
            if name := special.names.get(encoded.ids[count]):
                return max(head.text.rfind(name), 0), count if name in head.text else 0
    return 0, 0


def _joined(before: list[int], tail: Encoded, place: int) -> Encoded:
    """Tokens before a place in a text, and the encoded text from there on, as one."""
    if not before:
        return tail
    n = len(before)

    def tokens(a: int, b: int) -> tuple[int, int]:
        first, end = tail.tokens(max(a - place, 0), b - place)
        return n + first, n + end

    return Encoded(before + tail.ids, tokens)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], **options: Any) -> BatchEncoding:
    """Encodes many texts in one call of the tokenizer. Adds and cuts nothing."""
    options |= {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(list(texts), add_special_tokens=False, truncation=False, padding=False, **options)


def encode_stops(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token ids of each stop string, nothing added. Raises InputError for one without any.

    Generation does not find a stop string that the model writes with other tokens, such as one merged with the
    letters before it.
    """
    stops = encode_texts(tokenizer, texts)["input_ids"] if texts else []
    for text, ids in zip(texts, stops, strict=True):
        if not ids:
            raise InputError(f"stop_strings: {text!r} encodes to no tokens; use another text")
    return tuple(tuple(ids) for ids in stops)


def _without_second_bos(encoded: Encoded, bos: int | None) -> Encoded:
    if bos is None or encoded.ids[:2] != [bos, bos]:
        return encoded

    def tokens(a: int, b: int) -> tuple[int, int]:
        first, end = encoded.tokens(a, b)
        return max(first - 1, 0), max(end - 1, 0)

    return Encoded(encoded.ids[1:], tokens)


def _overlapping(offsets: Sequence[tuple[int, int]], a: int, b: int) -> tuple[int, int]:
    """The range of the tokens with a character in common with `a` to `b`."""
    return bisect_right(offsets, a, key=lambda place: place[1]), bisect_left(offsets, b, key=lambda place: place[0])


def _encode_plain(tokenizer: Tokenizer, texts: list[str], places: bool) -> list[Encoded]:
    if not texts:
        return []
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer
        # The library itself, with nothing cut or added: transformers' call builds lists that nobody reads here.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        batches = (
            backend.encode_batch(texts[start : start + TEXTS], add_special_tokens=False)
            for start in range(0, len(texts), TEXTS)
        )
        return [Encoded(e.ids, _by_offsets(e) if places else _no_places) for batch in batches for e in batch]
    ids = encode_texts(tokenizer, texts)["input_ids"]
    return [Encoded(row, _by_prefixes(tokenizer, Text(text), None)) for row, text in zip(ids, texts, strict=True)]


def _by_offsets(encoding: Any) -> Callable[[int, int], tuple[int, int]]:
    """The ranges of tokens by the places that the tokenizers library found."""
    return lambda a, b: _overlapping(encoding.offsets, a, b)


def _no_places(a: int, b: int) -> tuple[int, int]:
    raise ValueError("places: the text was encoded without the places of its tokens")


def _by_prefixes(
    tokenizer: Tokenizer, text: Text, special: SpecialTokens | None
) -> Callable[[int, int], tuple[int, int]]:
    """The ranges of tokens for a tokenizer without offsets: as many tokens as the text before the place has."""

    def tokens(a: int, b: int) -> tuple[int, int]:
        first, end = (len(e.ids) for e in _encode_all(tokenizer, [text[:a], text[:b]], special))
        return first, end

    return tokens


def _encode_pieces(tokenizer: Tokenizer, texts: list[Text], special: SpecialTokens) -> list[Encoded]:
    """Encodes texts piece by piece: special tokens by their ids, the text between them without any."""
    pieces = [list(special.split(text.text)) for text in texts]
    between = [
        Text(text.text[a:b], text.hidden).restored()
        for text, row in zip(texts, pieces, strict=True)
        for a, b, token in row
        if not token
    ]
    encoded = iter(_encode_inner(tokenizer, between))
    result = []
    for text, row in zip(texts, pieces, strict=True):
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for a, b, token in row:
            start = len(text.restored(a))
            if token:
                one: Any = tokenizer.convert_tokens_to_ids(token)
                ids.append(one)
                offsets.append((start, len(text.restored(b))))
            else:
                inner, places = next(encoded)
                ids += inner
                offsets += [(start + x, start + y) for x, y in places]
        if tokenizer.is_fast:
            result.append(Encoded(ids, _restored_ranges(text, offsets)))
        else:
            result.append(Encoded(ids, _by_prefixes(tokenizer, text, special)))
    return result


def _restored_ranges(text: Text, offsets: list[tuple[int, int]]) -> Callable[[int, int], tuple[int, int]]:
    return lambda a, b: _overlapping(offsets, len(text.restored(a)), len(text.restored(b)))


def _encode_inner(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Yields ids and offsets (fast tokenizers) of texts that follow a special token, in which none is recognised.

    Some tokenizers put a space before the first word of a text, but not of one that follows a special token. For
    these a line break is encoded in front, and removed again.
    """
    mark: Any = tokenizer.eos_token or ""
    lone, after, line_break = encode_texts(tokenizer, ["a", mark + "a", "\n"])["input_ids"]
    front = "" if after[1:] == lone else "\n"
    for text in texts:
        batch: Any = encode_texts(tokenizer, [front + text, text], split_special_tokens=True)
        joined = batch["input_ids"][0][: len(line_break)] != line_break
        which, skip, shift = (1, 0, 0) if not front or joined else (0, len(line_break), 1)
        places = batch.encodings[which].offsets if tokenizer.is_fast else []
        yield batch["input_ids"][which][skip:], [(max(x - shift, 0), y - shift) for x, y in places[skip:]]
