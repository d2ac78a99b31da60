"""Makes prompts with instructions that a program can check, to train with the reward function `instructions`.

    python examples/smollm2/instruction_prompts.py --output_dir data/instructions

A prompt is a task (a letter, a list, a story, …) about a topic, and one to three instructions. Kinds are about as
frequent as in IFEval, and their bounds are within the reach of a small model. The rows of `eval.jsonl` have topics that
no row of `train.jsonl` has. The same seed makes the same files.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instruction_words import COMMON, ENDINGS, EVAL_TOPICS, FIRST_WORDS, QUESTIONS, TASKS, TOPICS, WORDS

from jaxrlhf.rewards.instructions import CHECKS, read_instructions

LANGUAGES = {"es": "Spanish", "fr": "French", "de": "German", "it": "Italian", "pt": "Portuguese", "fi": "Finnish"}
LANGUAGES |= {"ru": "Russian", "hi": "Hindi", "ko": "Korean", "vi": "Vietnamese", "sw": "Swahili", "fa": "Persian"}

Draw = tuple[str, dict[str, Any]]
"""The words of an instruction, and its arguments."""


def bounded(rng: random.Random, relation: str, bound: int, thing: str) -> str:
    """Words for "less than" or "at least" so many things."""
    if relation == "less than":
        words = [f"fewer than {bound} {thing}", f"less than {bound} {thing}", f"no more than {bound - 1} {thing}"]
    else:
        words = [f"at least {bound} {thing}", f"{bound} {thing} or more", f"a minimum of {bound} {thing}"]
    return rng.choice(words)


def number_words(rng: random.Random, topic: str) -> Draw:
    relation = rng.choice(["at least", "less than"])
    bound = rng.choice([30, 50, 80, 100, 120, 150, 200, 250] if relation == "at least" else [30, 40, 60, 80, 100, 150])
    words = bounded(rng, relation, bound, "words")
    said = rng.choice(["Use {}.", "Your text should have {}.", "Write {}.", "The answer needs {}.", "Keep to {}."])
    return said.format(words), {"num_words": bound, "relation": relation}


def number_sentences(rng: random.Random, topic: str) -> Draw:
    relation = rng.choice(["at least", "less than"])
    bound = rng.choice([3, 4, 5, 6, 8, 10, 12] if relation == "at least" else [3, 4, 5, 6, 8, 10])
    words = bounded(rng, relation, bound, "sentences")
    said = rng.choice(["Use {}.", "Write {}.", "Your reply should consist of {}.", "The text must have {}."])
    return said.format(words), {"num_sentences": bound, "relation": relation}


def number_paragraphs(rng: random.Random, topic: str) -> Draw:
    count = rng.choice([2, 2, 3, 3, 4, 5])
    said = rng.choice(
        [
            "Write exactly {} paragraphs and put *** between them.",
            "The text must have {} paragraphs, with the divider *** between one and the next.",
            "Split your answer into {} paragraphs. Separate them by a line with ***",
            "I want {} paragraphs, divided by three asterisks (***).",
        ]
    )
    return said.format(count), {"num_paragraphs": count}


def nth_paragraph_first_word(rng: random.Random, topic: str) -> Draw:
    count = rng.choice([2, 2, 3, 4])
    number, word = rng.randint(1, count), rng.choice(FIRST_WORDS)
    said = rng.choice(
        [
            "Write {} paragraphs with one empty line between them. The first word of paragraph {} must be {}.",
            "There must be {} paragraphs, each set off by a blank line, and paragraph {} has to begin with “{}”.",
            "Use exactly {} paragraphs separated by two line breaks. Start paragraph number {} with the word {}.",
        ]
    )
    arguments = {"num_paragraphs": count, "nth_paragraph": number, "first_word": word}
    return said.format(count, number, word), arguments


def topic_words(topic: str) -> list[str]:
    """The longer words of a topic."""
    return [word for word in re.findall(r"[a-z]+", topic) if len(word) > 3]


def existence(rng: random.Random, topic: str) -> Draw:
    words = rng.sample(sorted({*topic_words(topic), *rng.sample(WORDS, 3)}), rng.choice([1, 2, 2, 3]))
    named = ", ".join(f"“{word}”" for word in words) if rng.random() < 0.5 else " and ".join(words)
    said = rng.choice(
        [
            "Make sure to use: {}.",
            "The text must contain {}.",
            "Work in the following: {}.",
            "Include {} somewhere.",
            "Mention {} in your answer.",
        ]
    )
    return said.format(named), {"keywords": words}


def frequency(rng: random.Random, topic: str) -> Draw:
    relation = rng.choice(["at least", "at least", "less than"])
    word, bound = rng.choice([*topic_words(topic), rng.choice(WORDS)]), rng.choice([2, 2, 3, 3, 4])
    words = bounded(rng, relation, bound, "times")
    said = rng.choice(["Use the word {} {}.", "The word “{}” should come up {}.", "Say {} {} in the text."])
    return said.format(word, words), {"keyword": word, "frequency": bound, "relation": relation}


def forbidden_words(rng: random.Random, topic: str) -> Draw:
    pool = sorted({*topic_words(topic), *rng.sample(COMMON, 4), rng.choice(WORDS)})
    words = rng.sample(pool, rng.choice([1, 2, 2, 3]))
    said = rng.choice(
        [
            "Do not use these words: {}.",
            "Avoid the following words: {}.",
            "The text must not contain: {}.",
            "Never say any of these: {}.",
            "Leave out the words {}.",
        ]
    )
    return said.format(", ".join(words)), {"forbidden_words": words}


def letter_frequency(rng: random.Random, topic: str) -> Draw:
    relation = rng.choice(["at least", "at least", "less than"])
    letter = rng.choice("abcdefghiklmnoprstuwy" if relation == "at least" else "jkqvwxzbpf")
    bound = rng.choice([3, 5, 8, 10, 15, 20] if relation == "at least" else [2, 3, 4, 5])
    words = bounded(rng, relation, bound, "times")
    said = rng.choice(["Use the letter {} {}.", "The letter “{}” should occur {}.", "Let the letter {} appear {}."])
    return said.format(letter, words), {"letter": letter, "let_frequency": bound, "let_relation": relation}


def capital_words(rng: random.Random, topic: str) -> Draw:
    relation = rng.choice(["at least", "at least", "less than"])
    bound = rng.choice([1, 2, 3, 5] if relation == "at least" else [3, 5, 10, 15])
    words = bounded(rng, relation, bound, "words in capital letters")
    said = rng.choice(["Use {}.", "Write {}, such as STOP.", "Stress your points: have {}.", "There should be {}."])
    return said.format(words), {"capital_frequency": bound, "capital_relation": relation}


def placeholders(rng: random.Random, topic: str) -> Draw:
    count = rng.choice([1, 2, 2, 3, 3, 4])
    said = rng.choice(
        [
            "Leave at least {} blanks to fill in, each in square brackets like [name].",
            "Use {} or more placeholders in square brackets, for example [date].",
            "Write it as a template: at least {} parts must be in square brackets, such as [place].",
        ]
    )
    return said.format(count), {"num_placeholders": count}


def postscript(rng: random.Random, topic: str) -> Draw:
    marker = rng.choice(["P.S.", "P.S.", "P.P.S"])
    said = rng.choice(
        [
            "End with a postscript that starts with {}",
            "Add a postscript at the end; begin it with {}",
            "Close with {} and a last remark.",
        ]
    )
    return said.format(marker), {"postscript_marker": marker}


def bullets(rng: random.Random, topic: str) -> Draw:
    count = rng.choice([2, 3, 3, 4, 5, 6])
    said = rng.choice(
        [
            "Your answer must have exactly {} bullet points, each on a line that starts with * and a space.",
            "Give precisely {} markdown bullets, written like this:\n* one point",
            "Use {} bullet points, no more and no fewer. Begin each with “* ”.",
            "Present it as {} bullets (- like this).",
        ]
    )
    return said.format(count), {"num_bullets": count}


def highlights(rng: random.Random, topic: str) -> Draw:
    count = rng.choice([1, 2, 2, 3, 3, 4, 5])
    said = rng.choice(
        [
            "Highlight {} or more phrases with asterisks, *like this*.",
            "Put at least {} important parts between asterisks, for example *this part*.",
            "Mark no fewer than {} passages in markdown italics, as in *a passage*.",
            "Emphasise at least {} pieces of the text with markdown, such as *this piece*.",
        ]
    )
    return said.format(count), {"num_highlights": count}


def sections(rng: random.Random, topic: str) -> Draw:
    count, mark = rng.choice([2, 2, 3, 3, 4]), rng.choice(["Section", "SECTION", "Part", "Chapter"])
    said = rng.choice(
        [
            "Divide it into {0} sections with the headings {1} 1, {1} 2 and so on.",
            "Structure the text in {0} parts. Start each part with {1} and its number, as in “{1} 1”.",
            "It needs {0} sections; write {1} X at the beginning of each, where X is its number.",
        ]
    )
    return said.format(count, mark), {"section_spliter": mark, "num_sections": count}


def end_phrase(rng: random.Random, topic: str) -> Draw:
    phrase = rng.choice(ENDINGS)
    said = rng.choice(
        [
            "The very last words must be: {}",
            "Finish with the sentence “{}” and nothing after it.",
            "Close your text with exactly this: {}",
            "End on these words: {}",
        ]
    )
    return said.format(phrase), {"end_phrase": phrase}


def language(rng: random.Random, topic: str) -> Draw:
    code = rng.choice(sorted(LANGUAGES))
    said = rng.choice(["Answer only in {}.", "Write everything in {}.", "Please use no language but {}."])
    return said.format(LANGUAGES[code]), {"language": code}


def fixed(*words: str) -> Callable[[random.Random, str], Draw]:
    """An instruction without arguments, in one of several wordings."""

    def draw(rng: random.Random, topic: str) -> Draw:
        return rng.choice(words), {}

    return draw


DRAWS: dict[str, tuple[float, Callable[[random.Random, str], Draw]]] = {
    "punctuation:no_comma": (
        31,
        fixed(
            "Do not use any commas.",
            "Write it without a single comma.",
            "Commas are not allowed.",
            "Avoid commas altogether.",
            "Your text must be free of commas.",
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
        ),
    ),
    "startend:quotation": (
        19,
        fixed(
            "Put the whole answer in double quotation marks.",
            'Begin and end your reply with a " character.',
            "Enclose everything you write in double quotes.",
            "Your complete text should stand between double quotation marks.",
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
        ),
    ),
    "detectable_content:postscript": (9, postscript),
    "startend:end_checker": (8, end_phrase),
    "detectable_format:multiple_sections": (7, sections),
    "length_constraints:nth_paragraph_first_word": (4, nth_paragraph_first_word),
    "detectable_format:constrained_response": (3, fixed("")),
}
"""Weight of each kind, about its number among IFEval's prompts, and the function that draws one."""

FORMATS = {"detectable_format:json_format", "combination:two_responses", "detectable_format:constrained_response"}
PARAGRAPHS = {"length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word"}
CASES = {kind for kind in CHECKS if kind.startswith("change_case:")}
ENGLISH = CASES | {"keywords:existence", "keywords:frequency", "keywords:forbidden_words", "startend:end_checker"}
STRICT_ENDS = {"startend:quotation", "startend:end_checker", "detectable_content:postscript"}
"""Kinds of which two make a prompt too hard or contradictory."""


def agree(kinds: set[str], kind: str) -> bool:
    """True if an instruction of this kind can be followed beside those."""
    if kind in kinds or (FORMATS & kinds and kind not in ("punctuation:no_comma", "detectable_format:title")):
        return False
    if kind in FORMATS and kinds - {"keywords:existence", "keywords:forbidden_words"}:
        return False
    groups = [PARAGRAPHS | {"detectable_format:multiple_sections"}, STRICT_ENDS]
    groups += [CASES, {"combination:repeat_prompt", *CASES, "startend:quotation", "detectable_format:json_format"}]
    groups += [{"length_constraints:number_words", "length_constraints:number_sentences", "combination:repeat_prompt"}]
    groups += [{"change_case:english_lowercase", "change_case:english_capital", "detectable_content:postscript"}]
    if "language:response_language" in {*kinds, kind}:
        groups.append({"language:response_language", "detectable_format:multiple_sections", *ENGLISH})
    return not any(kind in group and kinds & group for group in groups)


def make_row(rng: random.Random, topics: list[str], left_out: set[str]) -> dict[str, Any]:
    """Draws a prompt."""
    topic = rng.choice(topics)
    names = [kind for kind in DRAWS if kind not in left_out]
    kinds: list[str] = []
    for _ in range(rng.choices([1, 2, 3], [55, 32, 13])[0]):
        open_kinds = [kind for kind in names if agree(set(kinds), kind)]
        if open_kinds:
            kinds += rng.choices(open_kinds, [DRAWS[kind][0] for kind in open_kinds])
    if "detectable_format:constrained_response" in kinds:  # a question, and no other instruction
        kinds = ["detectable_format:constrained_response"]
        options = ["My answer is no.", "My answer is yes.", "My answer is maybe."]
        rng.shuffle(options)
        task = rng.choice(QUESTIONS).format(topic=topic)
        prompt = f"{task} {rng.choice(['Choose one', 'Reply with one', 'Pick one'])}: {' | '.join(options)}"
        return {"prompt": prompt, "instruction_id_list": kinds, "kwargs": [{}]}
    task = rng.choice(TASKS).format(topic=topic)
    drawn = {kind: DRAWS[kind][1](rng, topic) for kind in kinds}
    words = [said for said, _ in drawn.values() if said]
    prompt = arranged(rng, task, words)
    if "combination:repeat_prompt" in drawn:
        drawn["combination:repeat_prompt"] = ("", {"prompt_to_repeat": prompt})
        prompt += "\n\n" + rng.choice(
            [
                "Before you answer, copy the request above exactly as it is. Then answer it. Do not copy this remark.",
                "Start your reply by repeating everything above this line, unchanged, and then give your answer.",
                "Say my request again first, letter for letter and without these last words; then respond to it.",
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
        row = make_row(rng, topics, left_out)
        read_instructions(row["instruction_id_list"], row["kwargs"])
        found.setdefault(row["prompt"], row)
    return list(found.values())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of so many words in a text, without the fixed answers that the kind constrained_response needs."""
    words = re.findall(r"\w+", re.sub(r"my answer is \w+", "", text.lower()))
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def overlaps(rows: list[dict[str, Any]], others: list[str], length: int = 8) -> list[tuple[str, str]]:
    """Prompts of the rows that share a run of `length` words with one of the other prompts."""
    known = {run: other for other in others for run in runs(other, length)}
    shared = [(row["prompt"], runs(row["prompt"], length) & known.keys()) for row in rows]
    return [(prompt, known[next(iter(found))]) for prompt, found in shared if found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--train", type=int, default=3000, help="prompts to train on (3000)")
    parser.add_argument("--eval", type=int, default=200, help="held-out prompts, with other topics (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--leave_out", nargs="*", default=[], choices=list(DRAWS), help="kinds to leave out")
    parser.add_argument("--apart_from", type=Path, help="JSONL of prompts; stop if one is like a prompt made here")
    given = parser.parse_args()
    parts = {"train": (TOPICS, given.train), "eval": (EVAL_TOPICS, given.eval)}
    given.output_dir.mkdir(parents=True, exist_ok=True)
    for k, (name, (topics, count)) in enumerate(parts.items()):
        rows = make_rows(2 * given.seed + k, topics, count, set(given.leave_out))
        if given.apart_from is not None:
            others = [json.loads(line)["prompt"] for line in given.apart_from.read_text("utf-8").splitlines()]
            for prompt, other in overlaps(rows, others):
                raise SystemExit(f"{given.apart_from}: the prompt {other!r} is like one made here: {prompt!r}")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (given.output_dir / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        print(f"wrote {given.output_dir / name}.jsonl: {len(rows)} prompts")


if __name__ == "__main__":
    main()
