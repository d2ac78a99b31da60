"""The page that `jaxrlhf eval --html` writes: one file, no network. `../eval.html.jinja` is its template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from jaxrlhf.commands.evaluation.comparison import Comparison
from jaxrlhf.commands.evaluation.report import (
    comparison_tables,
    pair_lines,
    pair_tables,
    prompt_text,
    short_names,
    text_lines,
    text_tables,
)
from jaxrlhf.commands.evaluation.reward_models import PairReport, TextReport
from jaxrlhf.commands.transcripts import conversation_text, facts_of
from jaxrlhf.runs.console import format_number
from jaxrlhf.runs.plots import draw_histogram
from jaxrlhf.runs.report import page_template

CARDS = 500  # prompts or rows on a page


class Card(NamedTuple):
    """A prompt with what was written to it: (name, scores, text) of each response."""

    place: str
    prompt: str
    sides: list[tuple[str, str, str]]


def page_of(found: Comparison | PairReport | TextReport) -> str:
    """The page as text."""
    size = len(found.prompts) if isinstance(found, Comparison) else len(found.data)
    values = {Comparison: comparison_page, PairReport: pair_page, TextReport: text_page}[type(found)](found)
    return page_template(Path(__file__).parents[1] / "eval.html.jinja").render(
        shown=lambda value: "–" if value is None else format_number(value),
        more=size if size > CARDS else 0,
        **values,
    )


def comparison_page(found: Comparison) -> dict[str, object]:
    """The values of the page that compares models."""
    names = short_names(found.models)
    facts = f"{len(found.prompts):,} prompts, {found.samples} response(s) each"
    facts += "".join(f"; left out: {count} rows, {what}" for what, count in found.left_out.items())
    return {
        "title": " · ".join(names),
        "facts": facts,
        "tables": comparison_tables(found),
        "lines": [],
        "plots": [],
        "rows_title": "Responses",
        "cards": list(comparison_cards(found, names)),
    }


def comparison_cards(found: Comparison, names: list[str]) -> Iterator[Card]:
    """Each prompt with all responses."""
    for i in range(min(CARDS, len(found.prompts))):
        sides = []
        for m, name in enumerate(names):
            for j, text in enumerate(found.responses[m].texts[i]):
                facts = [f"{scorer} {s[m, i, j]:.4g}" for scorer, s in found.scores.items()]
                episodes = found.responses[m].episodes
                if episodes is not None:
                    facts, text = [facts_of(episodes[i][j]), *facts], conversation_text(episodes[i][j].messages)
                sides.append((name, ", ".join(facts), text))
        yield Card(found.prompts.places[i], prompt_text(found.prompts.prompts[i]), sides)


def pair_page(found: PairReport) -> dict[str, object]:
    """The values of the page of a reward model on pairs."""
    margins = found.summary["margins"]
    plot = draw_histogram(margins["counts"].tolist(), margins["edges"].tolist(), 0, "margins", "margin")
    rows = [found.row(i) for i in range(min(CARDS, len(found.data)))]
    cards = [
        Card(
            row["place"],
            row["prompt"],
            [(side, f"{row[f'{side}_score']:.4g}", row[side]) for side in ("chosen", "rejected")],
        )
        for row in rows
    ]
    return {
        "title": f"{found.model} on pairs",
        "facts": f"{len(found.pairs):,} pairs",
        "tables": pair_tables(found),
        "lines": pair_lines(found)[:-1],
        "plots": [("score of the chosen minus score of the rejected response", Markup(plot))],
        "rows_title": "Pairs",
        "cards": cards,
    }


def text_page(found: TextReport) -> dict[str, object]:
    """The values of the page of a reward model's scores of texts."""
    rows = [found.row(i) for i in range(min(CARDS, len(found.data)))]
    return {
        "title": f"{found.model} on texts",
        "facts": f"{len(found.scores):,} texts",
        "tables": text_tables(found),
        "lines": text_lines(found),
        "plots": [],
        "rows_title": "Texts",
        "cards": [Card(r["place"], r["prompt"], [("response", f"{r['score']:.4g}", r["response"])]) for r in rows],
    }
