"""Writes rows for the examples: `make_rows.py FOLDER` makes {arithmetic,calls,answers,secrets}.jsonl in it."""

import json
import random
import sys
from pathlib import Path

from jaxrlhf.environments import load_tool

CALCULATOR = Path(__file__).with_name("calculator.py")
NAMES = ("Ana", "Ben", "Chen", "Dina", "Emil", "Fatou")
THINGS = ("apples", "stamps", "marbles", "cards", "shells")


def problem(rng):
    """A word problem with two-digit numbers: question, expression, value, and the answer in words."""
    name, thing, other = rng.choice(NAMES), rng.choice(THINGS), rng.choice(NAMES)
    a, b, c = rng.randint(11, 99), rng.randint(11, 99), rng.randint(2, 9)
    start, fewer = f"{name} has {c} boxes of {a} {thing}", min(b, c * a)
    more = f"{start} and finds {b} more. How many {thing} does {name} have now?", f"{c} * {a} + {b}", c * a + b
    less = f"{start}, and {other} takes {fewer} of them. How many are left?", f"{c} * {a} - {fewer}", c * a - fewer
    return rng.choice([(*more, f"{name} has {c * a + b} {thing} now."), (*less, f"{c * a - fewer} {thing} are left.")])


def arithmetic(rng):
    """A problem and its answer."""
    question, _, value, _ = problem(rng)
    return {"prompt": question, "answer": str(value)}


def call(rng, tools):
    """A problem that the calculator solves, as a conversation."""
    question, expression, value, answer = problem(rng)
    function = {"name": "calculate", "arguments": {"expression": expression}}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "calculate", "content": str(value)},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "tools": tools}


def answer(rng):
    """A problem that is answered at once, without tools, as a conversation."""
    question, _, _, text = problem(rng)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


def secret(rng):
    """A number to guess. Prompts differ, because rows of one prompt are not split into training and evaluation."""
    return {"prompt": f"Let us play game {rng.randrange(10**6)}.", "secret": rng.randint(1, 100)}


def main(folder: Path, rows: int = 2000) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    made = {"arithmetic": [arithmetic(rng) for _ in range(rows)], "secrets": [secret(rng) for _ in range(rows)]}
    tools, known = [load_tool(f"{CALCULATOR}:calculate").schema], {row["prompt"] for row in made["arithmetic"]}
    calls = [call(rng, tools) for _ in range(rows)]
    for name, talks in {"calls": calls, "answers": [answer(rng) for _ in range(rows)]}.items():
        made[name] = [row for row in talks if row["messages"][0]["content"] not in known]
    for name, lines in made.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
