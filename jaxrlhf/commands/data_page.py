"""The page that `jaxrlhf data --html` writes: one file, no network. `data.html.jinja` beside it is the page."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from jaxrlhf.commands.data_report import Inspection
from jaxrlhf.commands.data_terminal import LABELS, TITLES, facts_of, near, reports_of
from jaxrlhf.runs.plots import draw_histogram
from jaxrlhf.runs.report import page_template

PADDING = {"batches": "padding in batches", "packed": "padding packed", "sorted": "padding sorted by length"}


def page_of(found: Inspection) -> str:
    """The page as text."""
    plots = [
        (source.name, Markup(draw_histogram(source.train.histogram, found.edges, number, source.name)))
        for number, source in enumerate(found.sources)
        if source.train is not None and any(source.train.histogram)
    ]
    reports = list(reports_of(found))
    return page_template(Path(__file__).parent / "data.html.jinja").render(
        found=found,
        near=near,
        facts={source.name: list(facts_of(source, found.step)) for source in found.sources},
        reports=[(source, LABELS[label], report) for source, label, report in reports],
        several=sum(source.train is not None for source in found.sources) > 1,
        ways=dict.fromkeys(way for _, _, report in reports for way in report.padding),
        padding=PADDING,
        plots=plots,
        duplicates=[(title, found.duplicates[name]) for name, title in TITLES.items()],
        used=sum(segment.tokens for segment in found.packed),
    )
