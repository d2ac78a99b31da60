"""Curves and histograms as inline SVG. The colours come from the page, so that one drawing suits light and dark."""

import html
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 600  # per curve; more would only make the file large
SMOOTH_FROM = 12  # curves with fewer points are drawn as they are

# Stand-ins for the page's CSS variables, which replace them at the end.
INK, GRID = "#010203", "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03")
VARIABLES = {INK: "--muted", GRID: "--line", SERIES[0]: "--first", SERIES[1]: "--second", SERIES[2]: "--third"}


class Curve(NamedTuple):
    """Values of one metric at ascending steps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    """NaN where not finite."""
    points: bool = False
    """Draw dots, as for evaluations."""


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Averages the exponential moving averages from both sides, which leaves no lag.

    Args:
        values: Values; NaN entries do not count.
        span: Number of values that each average covers. It has no bias to its first value.
    """
    backward = _moving_average(values[::-1], span)[::-1]
    return [(a + b) / 2 for a, b in zip(_moving_average(values, span), backward, strict=True)]


def _moving_average(values: Sequence[float], span: float) -> list[float]:
    decay = 1 - 1 / max(span, 1.0)
    total = weight = 0.0
    result = []
    for value in values:
        if not math.isnan(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(total / weight if weight else math.nan)
    return result


def thin_out(
    steps: Sequence[float], values: Sequence[float], limit: int = MAX_POINTS
) -> tuple[list[float], list[float]]:
    """Keeps about `limit` points: the smallest and largest value of each stretch, so that spikes stay visible."""
    if len(values) <= limit:
        return list(steps), list(values)
    stretch = math.ceil(2 * len(values) / limit)
    kept: set[int] = {0, len(values) - 1}
    for start in range(0, len(values), stretch):
        window = range(start, min(start + stretch, len(values)))
        finite = [i for i in window if not math.isnan(values[i])]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else {window[0]}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def draw(curves: Sequence[Curve], number: int) -> str:
    """Draws one plot as an `<svg>` element: raw curves faint, smoothed ones strong, evaluations as dots.

    Args:
        curves: Up to three curves.
        number: Number of the plot on the page, which makes its ids unique.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(fname=Path(__file__).with_suffix(".mplstyle")):
        canvas = FigureCanvasSVG(Figure())
        axes = canvas.figure.add_subplot(xlabel="step")
        for curve, colour in zip(curves, SERIES, strict=False):
            _draw_curve(axes, curve, colour)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=False)
        buffer = io.StringIO()
        canvas.print_svg(buffer)
    label = html.escape(" and ".join(curve.name for curve in curves)) + " by step"
    return _inline(buffer.getvalue(), f"p{number}-").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def draw_histogram(counts: Sequence[int], edges: Sequence[float], number: int, name: str, label: str = "tokens") -> str:
    """Draws bars as an `<svg>` element.

    Args:
        counts: Height of each bar.
        edges: Bounds of the intervals, one more than bars.
        number: Number of the plot on the page, which makes its ids unique.
        name: What is counted, for the figure's description.
        label: Label of the axis.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(fname=Path(__file__).with_suffix(".mplstyle")):
        canvas = FigureCanvasSVG(Figure())
        axes = canvas.figure.add_subplot(xlabel=label)
        axes.stairs(counts, edges, fill=True, color=SERIES[0])
        axes.set_ylim(bottom=0)
        buffer = io.StringIO()
        canvas.print_svg(buffer)
    described = html.escape(f"{name}: rows by {label}")
    return _inline(buffer.getvalue(), f"p{number}-").replace("<svg", f'<svg role="img" aria-label="{described}"', 1)


def _draw_curve(axes: "Axes", curve: Curve, colour: str) -> None:
    finite = sum(not math.isnan(value) for value in curve.values)
    if curve.points or finite < 3:
        axes.plot(curve.steps, curve.values, "o-", color=colour, markersize=3.6, linewidth=1.0, zorder=4)
        return
    smoothed = len(curve.values) >= SMOOTH_FROM and _is_noisy(curve.values)
    alpha, width = (0.42, 0.9) if smoothed else (1.0, 1.5)
    steps, values = thin_out(curve.steps, curve.values)
    axes.plot(steps, values, color=colour, alpha=alpha, linewidth=width, zorder=2)
    if smoothed:
        values = smooth(curve.values, span=max(4.0, len(curve.values) / 15))
        axes.plot(*thin_out(curve.steps, values, MAX_POINTS // 2), color=colour, linewidth=1.8, zorder=3)


def _is_noisy(values: Sequence[float]) -> bool:
    """Tells noise from a schedule or a counter, which an average would only shift."""
    finite = [value for value in values if not math.isnan(value)]
    bends = sorted(abs(a - 2 * b + c) for a, b, c in zip(finite, finite[1:], finite[2:], strict=False))
    return bool(bends) and bends[len(bends) // 2] > 0.005 * (max(finite) - min(finite))


def _inline(svg: str, prefix: str) -> str:
    """The bare `<svg>` element, without prologue, metadata, name spaces and size, with unique ids and CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = svg.replace('id="', f'id="{prefix}').replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'="[^"]*"', lambda match: re.sub(r"(\.\d{2})\d+", r"\1", match[0]), svg)  # coordinates, not labels
    svg = re.sub(r"font: [^;\"]*?(\d[\d.]*)px[^;\"]*", r"font-size: \1px", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
