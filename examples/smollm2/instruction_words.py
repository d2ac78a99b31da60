"""Topics, tasks and the words of instructions, of which `instruction_prompts.py` makes prompts."""

import random
import re
from collections.abc import Callable
from typing import Any


def parts(text: str, separator: str | None = None) -> list[str]:
    """The parts of a text between separators, or its words, without line breaks."""
    return [part.strip() for part in text.replace("\n", " ").split(separator)]


TOPICS = parts(
    """
growing tomatoes on a balcony; learning to play the violin; a lost umbrella; the first day at a new job; making
bread at home; a stormy night at sea; keeping bees; moving to a small town; planning a birthday party; a broken
washing machine; the first bicycles; walking in the forest; a lonely lighthouse; repairing old furniture;
teaching a dog to sit; a trip through the desert; writing a diary; how rainbows form; living without a car; a school
play; the life of penguins; learning a new language; an old train station; saving water at home; a chess tournament;
painting a kitchen; a rainy weekend; cooking for one person; the night sky; adopting a cat; a village market;
swimming in cold water; the invention of paper; a noisy neighbour; packing for a long journey; a garden in winter;
riding a horse; a forgotten password; public libraries; making friends as an adult; a robot that paints; baking an
apple pie; volcanoes; working from home; a bus that is always late; collecting stamps; a mountain cabin; healthy
breakfasts; a visit to the dentist; running a first race; the ocean at night; learning to drive; a secret recipe;
building a tree house; morning routines; a lost suitcase; city parks; an honest mistake; watching birds; the moon
landing; knitting a scarf; a long phone call; sleeping better; a surprising letter; summer camps; street musicians;
growing up on a farm; a flooded cellar; electric buses; a good teacher; camping with children; a mysterious key;
public speaking; the taste of coffee; a broken promise; making soap; visiting a museum; a snowman that melts;
recycling glass; a family dinner; the sound of rain; starting a book club; an empty theatre; fixing a flat tyre; how
bridges are built; a talking parrot; learning to cook rice; a late flight; spring cleaning; a hidden waterfall;
taking photographs; a first apartment; dancing the tango; the colours of autumn; an online course; a grumpy baker;
wild mushrooms; writing thank-you notes; a trip by night train; solar panels; a curious fox; planting trees; playing
the drums; a missing painting; city traffic; the smell of old books; a picnic by the river; brave firefighters;
learning to sew; a wooden boat; mental arithmetic; an unexpected guest; sharing a kitchen; a shy hedgehog; buying a
used car; a snow day; quiet mornings; homemade ice cream; a school garden; moving house with pets; deep breathing;
ancient maps; a job in a bakery; the last day of summer; growing herbs; a musical family; stray cats; a ride in a
balloon; the northern lights; a weekend without screens; making a budget; a clumsy wizard; riding the bus; a village
doctor; the game of football; paper planes; an early train; keeping a promise; glass blowing; a noisy classroom;
long winters; a walk with grandfather; making cheese; lost keys; the first snow; a cheap holiday; honey and tea;
learning to ski; an old photograph; a night in a museum; the price of bread; a friendly ghost; growing old; island
life; a broken clock; doing the laundry; a boat race; gardening with children; the art of listening; tide pools; a
quiet village; a jar of jam
""",
    ";",
)
EVAL_TOPICS = parts(
    """
raising chickens; a letter from the future; learning to juggle; the life of turtles; a power cut; making candles;
chocolate through the ages; a shy dragon; cycling to work; an orchestra rehearsal; growing potatoes; a wrong number;
desert plants; hosting a guest from abroad; a cracked phone screen; the smell of the sea; folding paper cranes; a
slow computer; city rooftops; ice fishing; a stubborn donkey; choosing a mattress; the invention of glasses; a
fishing village; learning to whistle; a surprise party; the job of a librarian; sleeping in a tent; a stolen
sandwich; frozen lakes; a friendly rival; washing a woollen jumper; the life of ants; an empty fridge; lighthouse
keepers; a garage sale; making lemonade; how clocks work; a long queue; a talent show
""",
    ";",
)
TASKS = """
Write a short poem about {topic}.
Write a poem for a child about {topic}.
Write a story about {topic}.
Tell me a short story with the subject: {topic}.
Write an email to a friend about {topic}.
Write a polite email to my neighbours about {topic}.
Write a letter to my aunt about {topic}.
Explain to a beginner what matters most about {topic}.
Give a brief introduction to the subject of {topic}.
Make a list of tips on {topic}.
List the good and the bad sides of {topic}.
Write a review of a book about {topic}.
Write a review of a documentary about {topic}.
Write a blog post about {topic}.
Write a diary entry about {topic}.
Write a speech about {topic} for a small audience.
Write a dialogue between two friends about {topic}.
Write an advertisement for a class on {topic}.
Write a news report about {topic}.
Write a song about {topic}.
Write a riddle about {topic}.
Describe {topic} to someone who knows nothing about it.
Give me ideas for a painting about {topic}.
Write an essay about {topic}.
Summarise what people like about {topic}.
Write an invitation to an evening about {topic}.
Write a joke about {topic}.
Write a short scene of a film about {topic}.
Write a social media post about {topic}.
Plan a lesson about {topic} for a school class.
Write the opening paragraph of a novel about {topic}.
Write a product description for a game about {topic}.
What would you say about {topic} in a short interview?
Compare {topic} with something similar.
""".strip().splitlines()
QUESTIONS = """
Is {topic} a good subject for a film?
Would you read a book about {topic}?
Could a child learn something from {topic}?
Is {topic} worth talking about?
Do most people have an opinion on {topic}?
Has {topic} become more popular lately?
""".strip().splitlines()
WORDS = parts("""
simple quiet bright together careful village window summer patient journey friend garden story music winter morning
river honest curious gentle learn travel family water colour dream light road heart smile teacher paper kitchen
promise weather letter wonder market bread season silver harvest mountain lantern neighbour basket holiday candle
whisper forest kindness tradition laughter adventure courage
""")
COMMON = parts("very good great important make also many new people time day different always best really often")
ENDINGS = parts(
    """
That is all for now. | Thank you for reading! | What do you think? | See you soon. | And that made all the
difference. | Have a wonderful day! | I hope this helps. | Let me know how it goes. | The end. | Can I do anything
else for you? | Stay curious! | Now it is your turn.
""",
    "|",
)
FIRST_WORDS = parts("today once sometimes imagine everyone yesterday perhaps finally nobody here")
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
    most = [30, 40, 60, 80, 100, 150, 200, 300, 400]
    bound = rng.choice([30, 50, 80, 100, 120, 150, 200, 250, 300] if relation == "at least" else most)
    words = bounded(rng, relation, bound, "words")
    said = rng.choice(["Use {}.", "Your text should have {}.", "Write {}.", "The answer needs {}.", "Keep to {}."])
    return said.format(words), {"num_words": bound, "relation": relation}


def number_sentences(rng: random.Random, topic: str) -> Draw:
    relation = rng.choice(["at least", "less than"])
    bound = rng.choice([3, 4, 5, 6, 8, 10, 12, 15, 20] if relation == "at least" else [3, 4, 5, 6, 8, 10, 15, 20, 30])
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
            "Give precisely {} markdown bullets; each line of the list starts like this: * one point",
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
