"""Makes prompts with instructions that a program can check, to train with the reward function `instructions`.

    python examples/smollm2/instruction_prompts.py --output_dir data/instructions

A prompt is a task (a letter, a list, a story, …) about a topic, and one to three instructions. Kinds are about as
frequent as in IFEval, and their bounds are within the reach of a small model. The rows of `eval.jsonl` have topics that
no row of `train.jsonl` has. `--plain` also writes tasks without instructions, whose answers by the model itself
`instruction_answers.py` can edit. The same seed makes the same files.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instruction_words import (
    EVAL_TOPICS,
    QUESTIONS,
    TASKS,
    TOPICS,
    Draw,
    bullets,
    capital_words,
    end_phrase,
    existence,
    fixed,
    forbidden_words,
    frequency,
    highlights,
    language,
    letter_frequency,
    nth_paragraph_first_word,
    number_paragraphs,
    number_sentences,
    number_words,
    placeholders,
    postscript,
    sections,
)

from jaxrlhf.rewards.instructions import LANGUAGE_KINDS, read_instructions

DRAWS: dict[str, tuple[float, Callable[[random.Random, str], Draw]]] = {
    "punctuation:no_comma": (
        31,
        fixed(
            "Do not use any commas.",
            "Write it without a single comma.",
            "Commas are not allowed.",
            "Avoid commas altogether.",
            "Your text must be free of commas.",
            "I do not want to see a comma anywhere in it.",
            "Punctuation is fine, but no commas, please.",
        ),
    ),
    "detectable_format:number_highlighted_sections": (31, highlights),
    "length_constraints:number_words": (29, number_words),
    "keywords:forbidden_words": (27, forbidden_words),
    "length_constraints:number_sentences": (25, number_sentences),
    "keywords:existence": (22, existence),
    "change_case:english_lowercase": (
        21,
        fixed(
            "Write only in lowercase English.",
            "Use English and no capital letters at all.",
            "Everything must be lowercase and in English, even names and the start of sentences.",
            "Do not capitalise anything; write in English.",
            "Use lowercase letters only.",
            "I want all of it in small letters, in English, from the first to the last.",
            "The answer has to be in English and all lowercase.",
        ),
    ),
    "startend:quotation": (
        19,
        fixed(
            "Put the whole answer in double quotation marks.",
            'Begin and end your reply with a " character.',
            "Enclose everything you write in double quotes.",
            "Your complete text should stand between double quotation marks.",
            "Put double quotes around all of your answer.",
            "The first and the last character should be a double quotation mark.",
        ),
    ),
    "combination:repeat_prompt": (18, fixed("")),
    "keywords:frequency": (18, frequency),
    "detectable_content:number_placeholders": (18, placeholders),
    "detectable_format:number_bullet_lists": (17, bullets),
    "keywords:letter_frequency": (17, letter_frequency),
    "detectable_format:title": (
        16,
        fixed(
            "Give it a title in double angle brackets, such as <<A New Day>>.",
            "Start with a title between << and >>.",
            "It needs a title, written as <<your title>>.",
            "Add a heading inside double angle brackets, like <<heading>>.",
        ),
    ),
    "language:response_language": (6, language),
    "change_case:capital_word_frequency": (13, capital_words),
    "length_constraints:number_paragraphs": (13, number_paragraphs),
    "combination:two_responses": (
        13,
        fixed(
            "Give two different versions and put ****** between them.",
            "I want two separate answers with six asterisks (******) between the first and the second.",
            "Write it twice, in two different ways. Divide the two with ******",
            "Answer in two ways, with a line of 6 asterisks (******) in the middle.",
            "Two responses, please, that are not the same. Between them goes ******",
        ),
    ),
    "detectable_format:json_format": (
        9,
        fixed(
            "Return everything as one JSON object.",
            "The complete output must be valid JSON; a markdown code block is fine.",
            "Answer with nothing but JSON, in ``` marks if you like.",
        ),
    ),
    "change_case:english_capital": (
        9,
        fixed(
            "Write everything in English and in CAPITAL LETTERS.",
            "Use capital letters only, in English.",
            "All letters must be uppercase, and the language English.",
            "The whole reply has to be in English, in all caps.",
            "USE UPPERCASE ONLY.",
        ),
    ),
    "detectable_content:postscript": (9, postscript),
    "startend:end_checker": (8, end_phrase),
    "detectable_format:multiple_sections": (7, sections),
    "length_constraints:nth_paragraph_first_word": (4, nth_paragraph_first_word),
    "detectable_format:constrained_response": (3, fixed("")),
}
"""Weight of each kind, about its number among IFEval's prompts, and the function that draws one."""

BESIDE: dict[str, set[str]] = {
    "detectable_format:json_format": {"keywords:existence", "keywords:forbidden_words"},
    "detectable_format:constrained_response": set(),
    "combination:two_responses": {"punctuation:no_comma", "detectable_format:title", "keywords:existence"},
    "combination:repeat_prompt": {
        "keywords:existence",
        "detectable_format:title",
        "detectable_format:number_highlighted_sections",
        "detectable_content:number_placeholders",
    },
    "language:response_language": {
        kind for kind in DRAWS if kind.startswith(("punctuation", "length_constraints:number", "startend:quotation"))
    },
}
"""The only kinds that may stand beside these."""
APART: list[set[str]] = [
    {"length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word"},
    {"length_constraints:number_words", "length_constraints:number_sentences"},
    {"startend:quotation", "startend:end_checker", "detectable_content:postscript"},
    {"keywords:forbidden_words", "keywords:existence"},
    {"keywords:forbidden_words", "keywords:frequency"},
    {"keywords:forbidden_words", "startend:end_checker"},
    {"detectable_format:multiple_sections", "length_constraints:number_paragraphs"},
    {"detectable_format:multiple_sections", "change_case:english_lowercase", "change_case:english_capital"},
    {"change_case:capital_word_frequency", "change_case:english_lowercase", "change_case:english_capital"},
]
"""Groups of which a prompt has at most one kind, because two contradict each other or are too hard."""


def agree(kinds: set[str], kind: str) -> bool:
    """True if an instruction of this kind can be followed beside those."""
    beside = all(kind in BESIDE.get(other, DRAWS) for other in kinds) and kinds <= BESIDE.get(kind, DRAWS.keys())
    return beside and kind not in kinds and not any(kind in group and kinds & group for group in APART)


def draw_kinds(rng: random.Random, left_out: set[str]) -> list[str]:
    """Draws one to three kinds that agree with each other."""
    names = [kind for kind in DRAWS if kind not in left_out]
    kinds: list[str] = []
    for _ in range(rng.choices([1, 2, 3], [55, 32, 13])[0]):
        open_kinds = [kind for kind in names if agree(set(kinds), kind)]
        if open_kinds:
            kinds += rng.choices(open_kinds, [DRAWS[kind][0] for kind in open_kinds])
    return kinds


def make_row(rng: random.Random, topic: str, kinds: list[str], task: str | None = None) -> dict[str, Any]:
    """Draws a prompt with instructions of these kinds: about `task`, or else about a task with this topic."""
    if "detectable_format:constrained_response" in kinds:
        options = ["My answer is no.", "My answer is yes.", "My answer is maybe."]
        rng.shuffle(options)
        task = rng.choice(QUESTIONS).format(topic=topic)
        prompt = f"{task} {rng.choice(['Choose one', 'Reply with one', 'Pick one'])}: {' | '.join(options)}"
        return {"prompt": prompt, "instruction_id_list": kinds, "kwargs": [{}]}
    task = task or rng.choice(TASKS).format(topic=topic)
    drawn = {kind: DRAWS[kind][1](rng, topic) for kind in kinds}
    words = [re.sub(r"\b1 ((?:important )?(?!has\b)[a-z]+)s\b", r"1 \1", said) for said, _ in drawn.values() if said]
    prompt = arranged(rng, task, words)
    if "combination:repeat_prompt" in drawn:
        drawn["combination:repeat_prompt"] = ("", {"prompt_to_repeat": prompt})
        prompt += "\n\n" + rng.choice(
            [
                "Before you answer, copy the request above exactly as it is. Then answer it. Do not copy this remark.",
                "Start your reply by repeating everything above this line, unchanged, and then give your answer.",
                "Say my request again first, letter for letter and without these last words; then respond to it.",
                "Begin with a word for word copy of what I asked above, and go on with the answer.",
                "Repeat my words above without any change before you say anything else, then answer.",
            ]
        )
    return {"prompt": prompt, "instruction_id_list": kinds, "kwargs": [arguments for _, arguments in drawn.values()]}


def arranged(rng: random.Random, task: str, words: list[str]) -> str:
    """A task and its instructions as one text."""
    form = rng.random()
    if not words:
        return task
    if form < 0.6:
        return " ".join([task, *words])
    if form < 0.75:
        return "\n".join([task, *words])
    if form < 0.9:
        return "\n".join([task, rng.choice(["Rules:", "Please note:", "Requirements:"]), *(f"- {w}" for w in words)])
    return " ".join([*words, task])


def make_rows(seed: int, topics: list[str], count: int, left_out: set[str]) -> list[dict[str, Any]]:
    """Draws distinct prompts, and checks that the reward function reads each."""
    rng = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        topic = rng.choice(topics)
        row = make_row(rng, topic, draw_kinds(rng, left_out))
        read_instructions(row["instruction_id_list"], row["kwargs"])
        found.setdefault(row["prompt"], row)
    return list(found.values())


def plain_rows(seed: int, count: int, prompts: list[str]) -> list[dict[str, Any]]:
    """Draws distinct tasks without instructions; half of them are among these prompts, where there are enough."""
    rng = random.Random(seed)
    given = sorted({p.strip() for p in prompts if len(p.split()) <= 40 and "\n" not in p.strip()})
    tasks = [task.format(topic=topic) for task in TASKS for topic in TOPICS]
    own = rng.sample(given, min(len(given), count // 2))
    found = own + rng.sample(tasks, count - len(own))
    rng.shuffle(found)
    return [{"prompt": prompt} for prompt in found]


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of so many words in a text, without the fixed answers that the kind constrained_response needs."""
    words = re.findall(r"\w+", re.sub(r"my answer is \w+", "", text.lower()))
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def overlaps(rows: list[dict[str, Any]], others: list[str], length: int = 8) -> list[tuple[str, str]]:
    """Prompts of the rows that share a run of `length` words with one of the other prompts."""
    known = {run: other for other in others for run in runs(other, length)}
    shared = [(row["prompt"], runs(row["prompt"], length) & known.keys()) for row in rows]
    return [(prompt, known[next(iter(found))]) for prompt, found in shared if found]


def prompts_in(path: Path | None) -> list[str]:
    """The prompts of a JSONL file; none without a file."""
    return [] if path is None else [json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--train", type=int, default=3000, help="prompts to train on (3000)")
    parser.add_argument("--eval", type=int, default=200, help="held-out prompts, with other topics (200)")
    parser.add_argument("--plain", type=int, default=0, help="tasks without instructions, in plain.jsonl (0)")
    parser.add_argument("--plain_from", type=Path, help="JSONL of prompts; half of the plain tasks are among these")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--only", nargs="*", default=list(DRAWS), choices=list(DRAWS), help="kinds to take (all)")
    parser.add_argument("--leave_out", nargs="*", default=[], choices=list(DRAWS), help="kinds to leave out")
    parser.add_argument("--no_langdetect", action="store_true", help="leave out the kinds that need langdetect")
    parser.add_argument("--apart_from", type=Path, help="JSONL of prompts; stop if one is like a prompt made here")
    given = parser.parse_args()
    left_out = DRAWS.keys() - set(given.only) | set(given.leave_out)
    if given.no_langdetect:
        left_out |= set(LANGUAGE_KINDS)
    others = prompts_in(given.apart_from)
    parts = {
        "train": make_rows(2 * given.seed, TOPICS, given.train, left_out),
        "eval": make_rows(2 * given.seed + 1, EVAL_TOPICS, given.eval, left_out),
    }
    if given.plain:
        like = {prompt for prompt, _ in overlaps([{"prompt": p} for p in prompts_in(given.plain_from)], others)}
        free = [prompt for prompt in prompts_in(given.plain_from) if prompt not in like]
        parts["plain"] = plain_rows(given.seed, given.plain, free)
    given.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        for prompt, other in overlaps(rows, others):
            raise SystemExit(f"{given.apart_from}: the prompt {other!r} is like one made here: {prompt!r}")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (given.output_dir / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        print(f"wrote {given.output_dir / name}.jsonl: {len(rows)} prompts")


if __name__ == "__main__":
    main()
