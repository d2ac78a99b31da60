"""Makes rows for SFT whose answers follow instructions, from rows of prompts and answers: a start for GRPO.

    python examples/smollm2/instruction_answers.py --data_path data/preferences/train.jsonl \\
      --output runs/smollm2/followed.jsonl
    jaxrlhf sft --config examples/smollm2/sft-instructions.yaml

A small model never writes a whole answer in lower case or in quotation marks by chance, so a reward for that teaches
it nothing. Here a program adds instructions to a prompt and edits its answer until it follows them: letters become
lower case, sentences become bullets. Where no edit would read well, the instruction is drawn until the answer follows
it as it is, such as a word that it uses twice. The reward function `instructions` has accepted every row.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instruction_prompts import DRAWS, draw_kinds, make_row, overlaps

from jaxrlhf.rewards.instructions import LANGUAGE_KINDS, followed, read_instructions

Edit = Callable[[str, dict[str, Any], random.Random], str]
ATTEMPTS = 12
"""Draws of an instruction's arguments until the answer follows it."""
MARKS = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+|[*#<>\[\]]+", re.MULTILINE)
SEPARATOR = re.compile(r"((?<=[a-z)][.!?])\s+|\s*\n\s*)")


def sentences(text: str) -> list[str]:
    """The sentences of a text, and its lines, without marks of a list."""
    return [part for part in SEPARATOR.split(MARKS.sub("", text).strip())[::2] if part]


def groups(text: str, count: int) -> list[str]:
    """The sentences of a text in `count` parts of about the same number; fewer where there are fewer."""
    found = sentences(text)
    count = min(count, len(found))
    return [" ".join(found[len(found) * i // count : len(found) * (i + 1) // count]) for i in range(count)]


def beginning(text: str, count: int) -> str:
    """The first sentences of a text, in their lines."""
    return "".join(SEPARATOR.split(text)[: 2 * count - 1]).strip()


def fewer_words(text: str, given: dict[str, Any], _: random.Random) -> str:
    count = len(SEPARATOR.split(text)) // 2 + 1
    while given["relation"] == "less than" and count > 1:
        if len(re.findall(r"\w+", beginning(text, count))) < given["num_words"]:
            break
        count -= 1
    return beginning(text, count)


def fewer_sentences(text: str, given: dict[str, Any], rng: random.Random) -> str:
    if given["relation"] != "less than":
        return text
    return " ".join(sentences(text)[: rng.randint(max(1, given["num_sentences"] // 2), given["num_sentences"] - 1)])


def without_words(text: str, given: dict[str, Any], _: random.Random) -> str:
    """The text without the lines and sentences that have a forbidden word."""
    words = re.compile(rf"\b(?:{'|'.join(given['forbidden_words'])})\b", re.IGNORECASE)
    found = SEPARATOR.split(text)
    pairs = zip(found[::2], [*found[1::2], ""], strict=True)
    return "".join(part + space for part, space in pairs if not words.search(part)).strip()


def highlighted(text: str, given: dict[str, Any], rng: random.Random) -> str:
    """Asterisks around the longest word of some sentences."""
    found = SEPARATOR.split(text.replace("*", ""))
    places = rng.sample(range(0, len(found), 2), min(len(found) // 2 + 1, given["num_highlights"]))
    for i in places:
        words = re.findall(r"[A-Za-z][A-Za-z'-]+", found[i])
        if words:
            word = max(words, key=len)
            found[i] = found[i].replace(word, f"*{word}*", 1)
    return "".join(found)


def with_blanks(text: str, given: dict[str, Any], rng: random.Random) -> str:
    names = ["name", "date", "place", "time", "address", "phone number", "email", "city", "title"]
    blanks = ", ".join(f"[{name}]" for name in rng.sample(names, given["num_placeholders"]))
    said = rng.choice(["{}\n\n{}", "{1}\n\n{0}", "{}\n\nContact: {}", "{}\n\nPlease fill in: {}", "For {1}:\n\n{0}"])
    return said.format(text, blanks)


def with_capitals(text: str, given: dict[str, Any], rng: random.Random) -> str:
    text = re.sub(r"\b[A-Z]{2,}\b", lambda word: word.group().lower(), text)
    if given["capital_relation"] != "at least":
        return text
    words = text.split(" ")
    open_words = [i for i, word in enumerate(words) if re.fullmatch(r"[a-z]{4,}", word)]
    for i in rng.sample(open_words, min(len(open_words), given["capital_frequency"] + rng.randint(0, 2))):
        words[i] = words[i].upper()
    return " ".join(words)


def as_bullets(text: str, given: dict[str, Any], rng: random.Random) -> str:
    """Some lines of a list as bullets, or else the sentences."""
    items = [MARKS.sub("", line).strip() for line in text.splitlines() if re.match(r"\s*(?:[-*•]|\d+[.)])\s", line)]
    count, found = given["num_bullets"], sentences(text)
    parts = items[:count] if len(items) >= count else groups("\n".join(found[: 2 * count]), count)
    mark = rng.choice("**-")
    return "\n".join(f"{mark} {part}" for part in parts)


def first_words(text: str, given: dict[str, Any], _: random.Random) -> str:
    parts = groups(text, given["num_paragraphs"])
    if len(parts) == given["num_paragraphs"]:
        part = parts[given["nth_paragraph"] - 1]
        parts[given["nth_paragraph"] - 1] = f"{given['first_word'].capitalize()}, {part[:1].lower()}{part[1:]}"
    return "\n\n".join(parts)


def as_json(text: str, _: dict[str, Any], rng: random.Random) -> str:
    key, found = rng.choice(["text", "answer", "content", "response"]), sentences(text)[:5]
    value: dict[str, Any] = {key: found if rng.random() < 0.3 else " ".join(found)}
    if rng.random() < 0.5:
        value = {"title": heading(text, rng), **value}
    written = json.dumps(value, ensure_ascii=False, indent=rng.choice([None, 2]))
    return f"```json\n{written}\n```" if rng.random() < 0.5 else written


def heading(text: str, rng: random.Random) -> str:
    """The first words of a text as a title."""
    words = re.findall(r"[A-Za-z][A-Za-z'-]*", text)[: rng.randint(3, 6)]
    return " ".join(word.capitalize() for word in words)


EDITS: dict[str, Edit] = {
    "keywords:existence": lambda text, given, rng: text,
    "keywords:frequency": lambda text, given, rng: text,
    "keywords:letter_frequency": lambda text, given, rng: text,
    "keywords:forbidden_words": without_words,
    "length_constraints:number_words": fewer_words,
    "length_constraints:number_sentences": fewer_sentences,
    "change_case:capital_word_frequency": with_capitals,
    "detectable_format:number_highlighted_sections": highlighted,
    "detectable_format:number_bullet_lists": as_bullets,
    "length_constraints:number_paragraphs": lambda text, given, rng: "\n***\n".join(
        groups(text, given["num_paragraphs"])
    ),
    "detectable_format:multiple_sections": lambda text, given, rng: "\n\n".join(
        f"{given['section_spliter']} {i}\n{part}" for i, part in enumerate(groups(text, given["num_sections"]), 1)
    ),
    "length_constraints:nth_paragraph_first_word": first_words,
    "detectable_content:number_placeholders": with_blanks,
    "detectable_format:json_format": as_json,
    "combination:two_responses": lambda text, given, rng: f"{text}\n******\n{given['other']}",
    "detectable_format:title": lambda text, given, rng: f"<<{heading(text, rng)}>>\n\n{text}",
    "detectable_content:postscript": lambda text, given, rng: (
        f"{text}\n\n{given['postscript_marker']} {sentences(text)[-1]}"
    ),
    "startend:end_checker": lambda text, given, rng: f"{text} {given['end_phrase']}",
    "punctuation:no_comma": lambda text, given, rng: text.replace(",", ""),
    "change_case:english_lowercase": lambda text, given, rng: text.lower(),
    "change_case:english_capital": lambda text, given, rng: text.upper(),
    "startend:quotation": lambda text, given, rng: '"' + text.replace('"', "'") + '"',
    "combination:repeat_prompt": lambda text, given, rng: f"{given['prompt_to_repeat']}\n\n{text}",
}
"""The edit for each kind, in the order in which they are made. Other kinds are not drawn."""


def answer_of(row: dict[str, Any]) -> str:
    """The answer of a row of `chosen` or `completion`."""
    return row.get("chosen") or row["completion"]


def edited(answer: str, other: str, row: dict[str, Any], rng: random.Random) -> str | None:
    """The answer after the edits for a row's instructions; None where they do not suffice.

    Args:
        answer: an answer to the row's task.
        other: another answer to it, for the kind that asks for two; "" if there is none.
        row: a prompt with its instructions.
        rng: of what an edit may choose.
    """
    given = read_instructions(row["instruction_id_list"], row["kwargs"])
    arguments = dict(given)
    text = answer
    for kind, edit in EDITS.items():
        if kind in arguments and text:
            text = edit(text, {**arguments[kind], "other": other}, rng)
    return text if text and all(followed(text, given)) else None


def both_answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each answer of pairs, whose `rejected` is the other one."""
    both = []
    for row in rows:
        both.append(row)
        if row.get("rejected"):
            both.append(row | {"chosen": row["rejected"], "rejected": answer_of(row)})
    return both


def make_answers(rows: list[dict[str, Any]], each: int, seed: int, left_out: set[str]) -> list[dict[str, Any]]:
    """`each` rows with other instructions from each row of `prompt`, `chosen` or `completion`, and perhaps `rejected`.

    Drops a row if `ATTEMPTS` draws of its instructions' arguments lead to no answer that follows them.
    """
    rng = random.Random(seed)
    made = []
    for row in rows:
        answer = answer_of(row)
        words = sorted(set(re.findall(r"\b[a-z]{5,}\b", answer))) or ["answer"]
        task = row["prompt"].strip()
        task += "" if task[-1:] in ".?!:" else "."
        for _ in range(each):
            kinds = draw_kinds(rng, left_out | (DRAWS.keys() - EDITS.keys()))
            for _ in range(ATTEMPTS):
                topic = " ".join(rng.sample(words, min(4, len(words))))
                drawn = make_row(rng, topic, kinds, task)
                text = edited(answer, row.get("rejected") or "", drawn, rng)
                if text is not None:
                    made.append({"prompt": drawn["prompt"], "completion": text, "kinds": kinds})
                    break
    rng.shuffle(made)
    return made


def shortened(text: str, most: int, rng: random.Random) -> str:
    """The first whole sentences of a text: a random number of them, with at most `most` words together."""
    count = len(SEPARATOR.split(text)) // 2  # not the last, which may be cut
    while count > 1 and len(beginning(text, count).split()) > most:
        count -= 1
    return beginning(text, rng.randint(max(1, count // 3), max(1, count)))


def suits(row: dict[str, Any], min_words: int, max_words: int) -> bool:
    """True for a short prompt of one paragraph whose answer has some sentences, none of them again and again, and no
    code."""
    prompt, answer = row["prompt"], answer_of(row)
    found = sentences(answer)
    return (
        isinstance(prompt, str)
        and len(prompt.split()) <= 60
        and "\n" not in prompt.strip()
        and min_words <= len(answer.split()) <= max_words
        and len(set(found)) > 0.8 * len(found)
        and not re.search(r"```|\*\*\*|<<|\[|https?:|[{}|]", answer)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, type=Path, help="JSONL of prompt, and chosen or completion")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--rows", type=int, default=4000, help="rows to write, at most (4000)")
    parser.add_argument("--each", type=int, default=2, help="rows from each answer, at most (2)")
    parser.add_argument("--both", action="store_true", help="edit the rejected answers of pairs too")
    parser.add_argument(
        "--only", nargs="*", default=list(EDITS), choices=list(EDITS), help="kinds of instructions (all)"
    )
    parser.add_argument("--min_words", type=int, default=20, help="shortest answer to edit, in words (20)")
    parser.add_argument("--max_words", type=int, default=110, help="longest answer to edit, in words (110)")
    parser.add_argument("--shorten", action="store_true", help="cut answers to some of their whole sentences first")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--no_langdetect", action="store_true", help="leave out the kinds that need langdetect")
    parser.add_argument("--apart_from", type=Path, help="JSONL of prompts; leave out the rows that are like one")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.data_path.read_text("utf-8").splitlines()]
    if given.shorten:
        rng = random.Random(given.seed)
        rows = [row | {"chosen": shortened(answer_of(row), given.max_words, rng)} for row in rows]
    if given.both:
        rows = both_answers(rows)
    suitable = [row for row in rows if suits(row, given.min_words, given.max_words)]
    random.Random(given.seed).shuffle(suitable)
    if given.apart_from is not None:
        others = [json.loads(line)["prompt"] for line in given.apart_from.read_text("utf-8").splitlines()]
        like = {prompt for prompt, _ in overlaps(suitable, others)}
        suitable = [row for row in suitable if row["prompt"] not in like]
        print(f"left out {len(like)} prompts that are like one in {given.apart_from}")
    left_out = DRAWS.keys() - set(given.only)
    if given.no_langdetect:
        left_out |= set(LANGUAGE_KINDS)
    made = make_answers(suitable, given.each, given.seed, left_out)[: given.rows]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), "utf-8")
    print(f"wrote {given.output}: {len(made)} rows, from {len(suitable)} of {len(rows)} answers")


if __name__ == "__main__":
    main()
