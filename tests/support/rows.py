"""Rows for tests of data, their files, and what a loaded data set holds."""

import json


def pairs(n, first=0):
    """Preference rows of `n` prompts."""
    return [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(first, first + n)]


def write_lines(path, rows):
    """Writes JSON lines; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prompts(data):
    """The decoded prompts of all rows."""
    return [data.text(i)["prompt"] for i in range(len(data))]


def encoded(data, units=None):
    """Every sequence of every unit as (prompt length, ids, mask), lists of Python numbers."""
    names = [f"{kind}_{j}" for j in range(len(data.sequence_names)) for kind in ("ids", "mask")]
    rows = data.values(range(len(data)) if units is None else units, ["prompt_length", *names])
    return [
        [(int(row["prompt_length"]), *(list(map(int, row[name])) for name in names)) for row in unit] for unit in rows
    ]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}
