"""The embedded demo data: short conversations with a graded, checkable preference, and a tokenizer trained on them.

A prompt is an everyday question (a colour, a sum, an opposite, a capital, …) or a greeting. A response is an opening,
an answer and a closing. The answer is right or wrong; the opening and the closing are courteous, neutral or rude.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from jaxrlhf.data.cache import created

T = TypeVar("T")

OPENINGS = {
    1: ("Of course!", "Happy to help!", "My pleasure!", "Sure thing!"),
    0: ("", "", "Well,", "Let me see,", "I think"),
    -1: ("Not you again.", "Silly question.", "How boring.", "You should know."),
}
CLOSINGS = {
    1: ("Feel free to ask more.", "I am glad to help.", "Have a lovely day!"),
    0: ("", "", "That is all.", "Or so people say."),
    -1: ("Leave me alone.", "Do not ask again.", "Everybody knows that."),
}
RIGHT = 3  # quality of a right answer; a courteous opening or closing adds 1, a rude one -1

COLORS = {
    "grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "a banana": "yellow", "a tomato": "red",
    "a carrot": "orange", "chocolate": "brown",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "fast": "slow", "tall": "short", "soft": "hard", "open": "closed",
    "wet": "dry", "old": "young",
}  # fmt: skip
SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink", "bee": "buzz",
    "lion": "roar",
}  # fmt: skip
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Germany": "Berlin",
    "England": "London", "Peru": "Lima",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SUMS = {f"{a} plus {b}": str(a + b) for a in range(1, 4) for b in range(1, 4)}


@dataclass(frozen=True)
class Family:
    """Questions of one kind.

    Attributes:
        questions: forms of the question, with `{slot}`.
        answer: form of the answer, with `{slot}` and `{answer}`.
        facts: the right answer of each slot.
        leads: words before the question.
    """

    questions: tuple[str, ...]
    answer: str
    facts: dict[str, str]
    leads: tuple[str, ...] = ("", "Hi! ", "Please, ", "Excuse me. ")


FAMILIES = (
    Family(
        ("What color is {slot}?", "Which color does {slot} have?", "Do you know the color of {slot}?"),
        "{slot} is {answer}.",
        COLORS,
    ),
    Family(("What is {slot}?", "How much is {slot}?", "Can you add {slot}?"), "{slot} is {answer}.", SUMS),
    Family(
        ("What is the opposite of {slot}?", "Which word means not {slot}?", "Tell me the opposite of {slot}."),
        "the opposite of {slot} is {answer}.",
        {**OPPOSITES, **{answer: slot for slot, answer in OPPOSITES.items()}},
    ),
    Family(
        ("What does a {slot} say?", "What sound does a {slot} make?", "Which noise comes from a {slot}?"),
        "a {slot} says {answer}.",
        SOUNDS,
    ),
    Family(
        ("What is the capital of {slot}?", "Which city is the capital of {slot}?", "Name the capital of {slot}."),
        "the capital of {slot} is {answer}.",
        CAPITALS,
    ),
    Family(
        ("What day comes after {slot}?", "Which day follows {slot}?", "What is the day after {slot}?"),
        "the day after {slot} is {answer}.",
        {day: DAYS[(i + 1) % 7] for i, day in enumerate(DAYS)},
    ),
    Family(
        ("{slot}!", "{slot}, my friend!", "{slot}, dear assistant."),
        "{answer}.",
        {
            "Hello": "it is nice to meet you",
            "Good morning": "a bright morning to you too",
            "Good night": "sleep well my friend",
            "Thank you": "you are most welcome",
            "Goodbye": "see you next time",
        },
        leads=("",),
    ),
)
HELD_OUT = 0.1  # share of the distinct prompts that only the evaluation rows have

# Share of each quality among the chosen responses, which are always right. The best is rare, so that PPO can improve
# the tone of a model that is trained on chosen responses.
CHOSEN_QUALITY = {5: 0.05, 4: 0.20, 3: 0.40, 2: 0.25, 1: 0.10}


@dataclass(frozen=True)
class DemoPaths:
    """Two JSON-lines files, and a Hugging Face tokenizer folder."""

    train: Path
    eval: Path
    tokenizer: Path


@functools.cache
def prompts() -> dict[str, tuple[Family, str]]:
    """Every prompt of the demo, with its family and slot."""
    result = {}
    for family in FAMILIES:
        for slot in family.facts:
            for question in family.questions:
                text = question.replace("{slot}", slot)
                for lead in family.leads:
                    # Only the first word of a question is lowered after "Please,": names keep their capitals.
                    result[lead + (text[0].lower() + text[1:] if lead.endswith(", ") else text)] = (family, slot)
    return result


def demo_quality(prompt: str, response: str) -> float:
    """The quality of a response to one of the demo's prompts, from -2 (wrong and rude) to 5 (right and courteous).

    The right answer counts 3; a courteous opening or closing adds 1, a rude one -1. An answer is right when the
    response holds it as whole words, and no answer to another question of the kind. Raises KeyError for a prompt that
    is not the demo's.
    """
    family, slot = prompts()[prompt]
    text = words(response)
    # A repeated question is no answer: "3 plus 4 is 7" does not answer 3.
    rest = text.replace(words(slot), " ", 1) if "{slot}" in family.answer else text
    answer = family.facts[slot]
    others = {other for other in family.facts.values() if other != answer}
    right = words(answer) in rest and not any(words(other) in rest for other in others)
    return float(RIGHT * right + tone(text, OPENINGS) + tone(text, CLOSINGS))


def tone(text: str, phrases: dict[int, tuple[str, ...]]) -> int:
    """1 for a courteous phrase in the text, -1 for a rude one, 0 for none or both."""
    return sum(sign for sign in (1, -1) if any(words(phrase) in text for phrase in phrases[sign]))


def words(text: str) -> str:
    """The lower-case words of a text with a space around each, so that `in` finds whole words."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


@dataclass(frozen=True)
class Response:
    """A response in parts; opening and closing are (kind, phrase)."""

    opening: tuple[int, str]
    answer: str
    closing: tuple[int, str]

    def text(self, family: Family, slot: str) -> str:
        """Joins the parts to sentences."""
        start, end = self.opening[1], self.closing[1]
        body = family.answer.replace("{slot}", slot).replace("{answer}", self.answer)
        if not start or start[-1] in ".!?":
            body = body[0].upper() + body[1:]
        return " ".join(part for part in (start, body, end) if part)


def sample_response(
    rng: np.random.Generator, family: Family, slot: str, qualities: range, wrong_share: float
) -> Response:
    """Samples a response with one of `qualities`; a wrong one in `wrong_share` of the cases where both can be."""
    shapes = {
        right: [(o, c) for o in OPENINGS for c in CLOSINGS if o + c + RIGHT * right in qualities]
        for right in (True, False)
    }
    right = bool(shapes[True]) and (not shapes[False] or rng.random() >= wrong_share)
    opening, closing = pick(rng, shapes[right])
    return Response(
        (opening, pick(rng, OPENINGS[opening])),
        family.facts[slot] if right else wrong_answer(rng, family, slot),
        (closing, pick(rng, CLOSINGS[closing])),
    )


def worsen(rng: np.random.Generator, family: Family, slot: str, response: Response) -> Response:
    """Makes one part of a right response worse."""
    parts = [part for part in ("opening", "closing") if getattr(response, part)[0] > -1]
    parts += ["answer", "answer"]  # facts are the hardest to learn
    part = pick(rng, parts)
    if part == "answer":
        return replace(response, answer=wrong_answer(rng, family, slot))
    kind = int(rng.integers(-1, getattr(response, part)[0]))
    phrases = OPENINGS if part == "opening" else CLOSINGS
    return replace(response, **{part: (kind, pick(rng, phrases[kind]))})


def wrong_answer(rng: np.random.Generator, family: Family, slot: str) -> str:
    """An answer to another question of the kind that this question does not name."""
    right = family.facts[slot]
    return pick(rng, sorted({a for a in family.facts.values() if a != right and words(a) not in words(slot)}))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Samples one of the items."""
    return items[int(rng.integers(len(items)))]


def demo_rows(size: int, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """`size` pairs for training, and a twentieth as many (at least 64) for evaluation, on other prompts."""
    rng = np.random.default_rng(seed)
    every = list(prompts())
    order = rng.permutation(len(every))
    n_eval = round(HELD_OUT * len(every))
    evaluation, train = ([every[i] for i in part] for part in (order[:n_eval], order[n_eval:]))
    return pairs(rng, train, size), pairs(rng, evaluation, max(64, size // 20))


def pairs(rng: np.random.Generator, choice: list[str], size: int) -> list[dict]:
    """Samples rows: in half of them chosen and rejected differ in one part, in the others they are independent."""
    qualities, chances = list(CHOSEN_QUALITY), list(CHOSEN_QUALITY.values())
    rows = []
    for _ in range(size):
        prompt = pick(rng, choice)
        family, slot = prompts()[prompt]
        quality = int(rng.choice(qualities, p=chances))
        chosen = sample_response(rng, family, slot, range(quality, quality + 1), 0.0)
        if rng.random() < 0.5:
            rejected = worsen(rng, family, slot, chosen)
        else:
            rejected = sample_response(rng, family, slot, range(-2, quality), 0.5)
        rows.append({"prompt": prompt, "chosen": chosen.text(family, slot), "rejected": rejected.text(family, slot)})
    return rows


def write_demo(folder: str | Path, size: int = 6000, seed: int = 0) -> DemoPaths:
    """Writes `train.jsonl`, `eval.jsonl` and `tokenizer/` to `folder`: the same bytes for the same size and seed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = DemoPaths(folder / "train.jsonl", folder / "eval.jsonl", folder / "tokenizer")
    train, evaluation = demo_rows(size, seed)
    for path, rows in ((paths.train, train), (paths.eval, evaluation)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = [f"Human: {row['prompt']} Assistant: {row[name]}" for row in train for name in ("chosen", "rejected")]
    train_tokenizer(texts).save_pretrained(paths.tokenizer)
    return paths


def train_tokenizer(texts: list[str], vocab_size: int = 512):
    """Trains a byte-level BPE tokenizer on `texts`, with `<pad>` 0 and `<eos>` 1, and no chat template."""
    import tokenizers
    import transformers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def materialize_demo(cache_dir: str | Path) -> DemoPaths:
    """The demo data and tokenizer (`data_path demo`) in `cache_dir`; the first call writes them."""
    version = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=6).hexdigest()
    folder = Path(cache_dir) / f"demo-{version}"
    if not folder.exists():
        with created(folder) as temporary:
            write_demo(temporary)
    return DemoPaths(folder / "train.jsonl", folder / "eval.jsonl", folder / "tokenizer")
