"""Writes rows for the examples: `make_rows.py FOLDER` makes arithmetic.jsonl and secrets.jsonl in it."""

import json
import random
import sys
from pathlib import Path

NAMES = ("Ana", "Ben", "Chen", "Dina", "Emil", "Fatou")
THINGS = ("apples", "stamps", "marbles", "cards", "shells")


def arithmetic(rng):
    """A word problem with two-digit numbers, and its answer."""
    name, thing, other = rng.choice(NAMES), rng.choice(THINGS), rng.choice(NAMES)
    a, b, c = rng.randint(11, 99), rng.randint(11, 99), rng.randint(2, 9)
    start = f"{name} has {c} boxes of {a} {thing}"
    kinds = {
        f"{start} and finds {b} more. How many {thing} does {name} have now?": c * a + b,
        f"{start}, and {other} takes {min(b, c * a)} of them. How many are left?": c * a - min(b, c * a),
    }
    question = rng.choice(list(kinds))
    return {"prompt": question, "answer": str(kinds[question])}


def secret(rng):
    """A number to guess. Prompts differ, because rows of one prompt are not split into training and evaluation."""
    return {"prompt": f"Let us play game {rng.randrange(10**6)}.", "secret": rng.randint(1, 100)}


def main(folder: Path, rows: int = 2000) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("arithmetic", arithmetic), ("secrets", secret)):
        lines = [json.dumps(make(rng)) for _ in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
