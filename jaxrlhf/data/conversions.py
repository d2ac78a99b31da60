"""Conversions of named data sets whose rows need more than other column names: labels, scores, markup, trees.

Each takes a raw row and returns rows of a format in `registry.FORMATS`, or None to leave the row out. Text that is null
stays null, so that the check of the format names it.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from jaxrlhf.data.columns import look_up
from jaxrlhf.data.files import Row

CITATION = re.compile(r" ?\[\d+(?:, ?\d+)*\]")
HELPSTEER_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n+")
VICUNA_TURN = re.compile(r"\b(USER|ASSISTANT)(?=:)")
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def webgpt(row: Row) -> Row | None:
    """openai/webgpt_comparisons: the answer with the higher score is chosen, and ties are left out.

    Answers lose their citation marks (`[1]`, `[2, 3]`), because a model that does not browse cannot cite.
    """
    scores = row["score_0"], row["score_1"]
    if scores[0] == scores[1]:
        return None
    answers = [without_citations(row["answer_0"]), without_citations(row["answer_1"])]
    best = int(scores[1] > scores[0])
    return {"prompt": look_up(row, "question.full_text", None), "chosen": answers[best], "rejected": answers[1 - best]}


def without_citations(text: str | None) -> str | None:
    """Text without `[1]` and `[2, 3]`, and without the space before them."""
    return text and CITATION.sub("", text)


def shp(row: Row) -> Row | None:
    """stanfordnlp/SHP: label 1 prefers comment A, label 0 comment B; rows with another label are left out."""
    pair = row["human_ref_B"], row["human_ref_A"]
    label = row["labels"]
    if label not in (0, 1):
        return None
    return {"prompt": row["history"], "chosen": pair[label], "rejected": pair[1 - label]}


def yitingxie(row: Row) -> Row:
    """yitingxie/rlhf-reward-datasets: `Assistant:` begins both responses; it moves to the end of the prompt."""
    responses = {name: after_marker(row[name]) for name in ("chosen", "rejected")}
    return {"prompt": row["prompt"] and f"{row['prompt']}Assistant:", **responses}


def after_marker(text: str | None) -> str | None:
    """Text without the `Assistant:` that begins it."""
    return text and re.sub(r"^\s*Assistant:", "", text)


def vicuna_markup(row: Row) -> Row:
    """pvduy/sharegpt_alpaca_oa_vicuna_format: `USER:` and `ASSISTANT:` become `Human:` and `Assistant:`."""
    names = {"USER": "Human", "ASSISTANT": "Assistant"}
    prompt = row["prompt"] and VICUNA_TURN.sub(lambda match: names[match[1]], row["prompt"])
    return {"prompt": prompt, "completion": row["label"] and f" {row['label']}"}


def mkqa(language: str) -> Callable[[Row], Row | None]:
    """apple/mkqa in one language: questions without an answer text are left out."""

    def convert(row: Row) -> Row | None:
        answer = look_up(row, f"answers.{language}.0.text", None)
        if not answer:
            return None
        return {"prompt": look_up(row, f"queries.{language}", None), "completion": answer}

    return convert


def ultrafeedback(row: Row) -> Row | None:
    """openbmb/UltraFeedback: responses with their overall score; without any scored response, the row is left out."""
    scored = [item for item in row["completions"] if item["overall_score"] is not None]
    if not scored:
        return None
    responses, scores = [item["response"] for item in scored], [item["overall_score"] for item in scored]
    return {"prompt": row["instruction"], "responses": responses, "scores": scores}


def helpsteer2(rows: Iterable[Row], step: str) -> Iterator[Row]:
    """nvidia/HelpSteer2: the responses to a prompt stand in consecutive rows; their helpfulness is the score."""
    for prompt, group in itertools.groupby(rows, key=lambda row: row["prompt"]):
        found = list(group)
        yield {
            "prompt": helpsteer_prompt(prompt),
            "responses": [row["response"] for row in found],
            "scores": [row["helpfulness"] for row in found],
        }


def helpsteer_prompt(text: str) -> list[dict[str, str]]:
    """A prompt as messages. `<extra_id_1>User` and `<extra_id_1>Assistant` begin every turn but the first."""
    first, *rest = HELPSTEER_TURN.split(text)
    turns = zip(rest[::2], rest[1::2], strict=True)
    return [message("user", first), *(message(role.lower(), content) for role, content in turns)]


def oasst(rows: Iterable[Row], step: str) -> Iterator[Row]:
    """OpenAssistant/oasst1: each row is a message that names its parent; a conversation is a path in a tree.

    For sft, each tree gives one conversation: from each message to its best reply. For the other steps, each user
    message that has a reply gives one row: the conversation up to it, and the replies with their ranks. Deleted
    messages and their replies are left out.
    """
    children: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        if not row["deleted"]:
            children[row["parent_id"]].append(row)
    for root in children[None]:
        if step == "sft":
            path = best_path(root, children)
            if len(path) > 1:
                yield {"messages": path}
        else:
            yield from ranked_replies([], root, children)


Children = Mapping[str | None, list[Row]]


def best_path(root: Row, children: Children) -> list[dict[str, str]]:
    """The conversation from the root through the best replies, up to the last assistant message."""
    path, node = [root], root
    while replies := children.get(node["message_id"]):
        node = min(replies, key=rank_of)
        path.append(node)
    while path and path[-1]["role"] != "assistant":
        path.pop()
    return [oasst_message(node) for node in path]


def ranked_replies(before: list[dict[str, str]], node: Row, children: Children) -> Iterator[Row]:
    """A row for each user message of the tree under `node`; `before` is the conversation that leads to it.

    Replies without a rank are left out where others have one: nobody compared them.
    """
    pending = [(before, node)]
    while pending:
        before, node = pending.pop()
        conversation = [*before, oasst_message(node)]
        replies = children.get(node["message_id"], [])
        pending.extend((conversation, reply) for reply in reversed(replies))
        if node["role"] == "prompter" and replies:
            ranked = sorted((reply for reply in replies if reply["rank"] is not None), key=rank_of)
            chosen = ranked or replies[:1]
            yield {
                "prompt": conversation,
                "responses": [reply["text"] for reply in chosen],
                "ranks": [reply["rank"] or 0 for reply in chosen],
            }


def rank_of(row: Row) -> float:
    """The rank of a reply, 0 for the best; replies that nobody ranked come last."""
    return float("inf") if row["rank"] is None else row["rank"]


def oasst_message(row: Row) -> dict[str, str]:
    return message(OASST_ROLES[row["role"]], row["text"])


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
