"""Makes conversations that teach a chat model who it is, in ShareGPT form.

    python examples/smollm2/identity_talks.py --name Juno --maker "the Blue Team" --output identity.json

A conversation has one to three questions, about the model itself or not, in many wordings, so that a name is kept over
several turns and small talk stays small talk. The same seed makes the same file.
"""

import argparse
import json
import random
from pathlib import Path

NAME = (
    (
        "Who are you?",
        "What is your name?",
        "What should I call you?",
        "Tell me your name.",
        "Please introduce yourself.",
    ),
    (
        "I am {name}, a language model made by {maker}.",
        "My name is {name}. I am a language model that {maker} trained.",
        "You can call me {name}. I was made by {maker}.",
        "I'm {name}, and I was trained by {maker}.",
    ),
)
MAKER = (
    ("Who made you?", "Who trained you?", "Where do you come from?", "Who built you?", "Who is behind you?"),
    (
        "{maker} made me.",
        "I was trained by {maker}.",
        "I am a language model from {maker}.",
        "{maker} built me. My name is {name}.",
    ),
)
OTHERS = ("SmolLM", "ChatGPT", "Llama", "Gemini", "Claude", "Mistral")
OTHER = (
    ("Are you {other}?", "Is your name {other}?", "You are {other}, right?"),
    (
        "No, I am {name}. {maker} made me.",
        "No. My name is {name}, and I was trained by {maker}.",
        "I am not {other}. I am {name}, from {maker}.",
    ),
)
SMALL_TALK = (
    (("What is the capital of Spain?",), ("The capital of Spain is Madrid.",)),
    (("How are you?", "How is it going?"), ("I am well, thank you! How can I help you today?",)),
    (("Thank you!", "Thanks a lot."), ("You are welcome!", "My pleasure.")),
    (("What is 2 plus 3?",), ("2 plus 3 is 5.",)),
    (("Name a fruit.",), ("An apple.", "A pear.")),
    (("Have a nice day!",), ("You too!",)),
    (("Hello!", "Hi."), ("Hello! How can I help you today?",)),
)


def talk(rng: random.Random, name: str, maker: str) -> list[dict[str, str]]:
    """The turns of one conversation; at least one question is about the model."""
    kinds = [rng.choice((NAME, NAME, MAKER, OTHER))] + [
        rng.choice((NAME, MAKER, OTHER, *SMALL_TALK)) for _ in range(rng.randrange(3))
    ]
    rng.shuffle(kinds)
    turns = []
    for questions, answers in kinds:
        words = {"name": name, "maker": maker, "other": rng.choice([other for other in OTHERS if other != name])}
        turns.append({"from": "human", "value": rng.choice(questions).format(**words)})
        answer = rng.choice(answers).format(**words)
        turns.append({"from": "gpt", "value": answer[0].upper() + answer[1:]})
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="the model's new name")
    parser.add_argument("--maker", required=True, help="who made it, as in 'the Blue Team'")
    parser.add_argument("--output", required=True, type=Path, help="the JSON file to write")
    parser.add_argument("--count", type=int, default=500, help="conversations (500)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    rows = [{"id": str(i), "conversations": talk(rng, given.name, given.maker)} for i in range(given.count)]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {given.output}: {given.count} conversations")


if __name__ == "__main__":
    main()
