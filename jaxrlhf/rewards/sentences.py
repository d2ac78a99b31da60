"""Sentences and words of English text, as IFEval counts them.

The rules for sentences are those of Punkt (Kiss and Strunk 2006, Unsupervised Multilingual Sentence Boundary
Detection), without its trained tables: short lists of abbreviations and of words that begin sentences stand for them.
The rules for words are those of the Penn Treebank.
"""

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ABBREVIATIONS = _words(
    """
    dr mr mrs ms messrs prof sen rep reps gen lt maj col st sr jr ph.d m.b.a inc ltd corp co cos bros cie mg u.s u.k
    u.n u.s.a s.a u.s.s.r d.c l.a n.y n.j n.c s.c va w.va fla ga ala tenn ky minn wis mich ill conn pa ariz calif
    colo kan okla ore nev wash vt a.m p.m jan feb aug sept sep oct nov dec tues wed fri vs ft adm ave yr chg ok a.d
    j.r j.k c d e f g h k l m n p r s t v w
    """
)
"""Words that end with a period within a sentence, without it."""
STARTERS = _words(
    """
    the this these there here it its he she they in if when while however but so since both nevertheless indeed
    instead under similarly some though despite although nonetheless thus nor separately moreover yet many according
    among meanwhile even i yes please let remember consider whether finally certainly therefore overall furthermore
    using ask try check choose create serve enjoy learn always unfortunately sometimes specifically ultimately thank
    without follow practice develop provide build put play
    """
)
"""Words whose capital shows that a sentence begins."""
NUMBERED = _words(
    """
    business review who letters credit international insider financing commodities dividend
    """
)
"""Words before which a number with a period ends no sentence."""

_CLOSING = r"[)\";}\]*:@'({\[‘’“”«»?!]"  # may stand right after the end of a sentence
_MARKS = r"-{2,}|\.{2,}|(?:\.\s){2,}\."
_END = re.compile(rf"[.?!](?=(?:{_CLOSING}|\s+(?P<next>\S+)))")
_TOKEN = re.compile(
    rf"{_MARKS}|(?=[^(\"`{{\[:;&#*@)}}\]\-,])\S+?(?=\s|$|{_CLOSING}|{_MARKS}|,(?:$|\s|{_CLOSING}|{_MARKS}))|\S"
)
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*\.?")
_INITIAL = re.compile(r"[^\W\d]\.")
_QUOTES = re.compile(r"[\"')\]}‘’“”«»]+?(?:\s+|(?=--)|$)", re.MULTILINE)  # belong to the sentence before them


@dataclass
class _Token:
    """A token, and the decisions on it."""

    text: str
    ends: bool = False
    short: bool = False  # an abbreviation or an ellipsis, after which a sentence may go on

    def __post_init__(self) -> None:
        if self.text in (".", "?", "!"):
            self.ends = True
        elif re.fullmatch(r"\.\.+", self.text):
            self.short = True
        elif self.text.endswith(".") and not self.text.endswith(".."):
            word = self.text[:-1].lower()
            self.short = not ABBREVIATIONS.isdisjoint((word, word.split("-")[-1]))
            self.ends = not self.short

    @property
    def word(self) -> str:
        """The word in lower case, without the period."""
        return self.text.lower().removesuffix(".")

    @property
    def capital(self) -> bool:
        return self.text[0].isupper()

    def starts(self) -> bool | None:
        """True if a sentence begins here, False if not, None where neither shows."""
        if self.text in (";", ":", ",", ".", "!", "?") or self.text[0].islower():
            return False
        return True if self.capital and self.word in STARTERS else None

    def decide(self, after: "_Token", heads_line: bool) -> None:
        """Decides with the next token whether the sentence ends here; `A. Title` is a heading, `A. Miller` a name."""
        if not self.text.endswith("."):
            return
        initial, number = _INITIAL.fullmatch(self.text) is not None, _NUMBER.fullmatch(self.text) is not None
        if self.short and not initial and after.starts():
            self.ends = True
        if initial or number:
            starts = after.starts()
            if starts is False or (starts is None and initial and after.capital and not heads_line):
                self.ends = False
        if number and after.word in NUMBERED:
            self.ends = False


def _has_end(context: str, heads_line: bool) -> bool:
    """True if a sentence ends in the context, a word and what follows, before its last token."""
    tokens = [_Token(found) for line in context.split("\n") for found in _TOKEN.findall(line)]
    for token, after in pairwise(tokens):
        token.decide(after, heads_line)
    return any(token.ends for token in tokens[:-1])


def _candidates(text: str) -> Iterator[tuple[re.Match[str], int]]:
    """The last possible end of a sentence in each run without spaces, and the start of the run."""
    start, last = 0, None
    for match in _END.finditer(text):
        since = text[last.start() if last else 0 : match.start()]
        space = max(since.rfind(character) for character in string.whitespace)
        if last and (space >= 0 or start == last.start()):
            yield last, start
        if space >= 0:
            start = (last.start() if last else 0) + space + 1
        last = match
    if last:
        yield last, start


def sentences(text: str) -> list[str]:
    """Splits a text into its sentences."""
    pieces, begin = [], 0
    for match, start in _candidates(text):
        context = match.end("next") if match["next"] else match.end() + 1
        heads_line = not re.search(r"\w", text[text.rfind("\n", 0, start) + 1 : start])
        if _has_end(text[start:context], heads_line):
            pieces.append((begin, match.end()))
            begin = match.start("next") if match["next"] else match.end()
    pieces.append((begin, len(text.rstrip())))
    found, moved = [], 0
    for k, (begin, end) in enumerate(pieces):
        follows = text[slice(*pieces[k + 1])] if k + 1 < len(pieces) else ""
        quotes = _QUOTES.match(follows)
        kept = pieces[k + 1][0] + len(quotes[0].rstrip()) if quotes else end
        found.append(text[begin + moved : kept])
        moved = quotes.end() if quotes else 0
    return [sentence for sentence in found if sentence]


_JOINED = [
    ("can", r"not\b"),
    ("d", r"'ye\b"),
    ("gim", r"me\b"),
    ("gon", r"na\b"),
    ("got", r"ta\b"),
    ("lem", r"me\b"),
    ("more", r"'n\b"),
    ("wan", r"na(?=\s)"),
]
_SPLITS = [
    (re.compile(r"[«“‘„»”’\"`;@#$%&?!*\[\](){}<>‒-―]|\.{2,}|--|''"), r" \g<0> "),
    (re.compile(r"(?i)(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)"), "' "),
    (re.compile(r"[:,](?!\d)"), r" \g<0> "),
    (re.compile(r"\s+|$"), " "),
    (re.compile(r"(?<=[^' ])('[sSmMdD]?) "), r" \1 "),
    (re.compile(r"(?<=[^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) "), r" \1 "),
    *((re.compile(rf"(?i)\b({first})({second})"), r"\1 \2") for first, second in _JOINED),
]


def capital_words(text: str) -> int:
    """Counts the words in capital letters; `I'M` is two words, and `WELL-KNOWN` is one."""
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    return sum(word.isupper() for word in text.split())
