"""The charts of a page and of picture files: colours, markers, axes, points and lines."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from tokenization.files import atomic_file

COLORS = ("#d55e00", "#0072b2", "#1c1f24", "#009e73", "#b3457f", "#b07d00", "#2b9bd0", "#7a5195", "#6b7280", "#8c564b")
"""The light palette, by which matplotlib's colours are found again and replaced by the style sheet's ``--c0`` …"""

GENERATED, ORIGINAL, AVERAGE = 0, 1, 2
"""Their kinds of `Series`: orange, blue and the colour of text."""

NUM_BINS = 24
"""Bars of a histogram."""

TEXT, GRID = "#5b6470", "#d9dee5"
MARKERS = {"o": "●", "D": "◆", "^": "▲", "s": "■", "P": "✚", "v": "▼"}
"""matplotlib's markers and the signs that stand for them in the legend."""

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "report",  # the same figures give the same bytes
    "font.size": 8,
    "text.color": TEXT,
    "axes.labelcolor": COLORS[2],
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "xtick.major.pad": 6,
    "axes.labelpad": 7,
}


@dataclass(frozen=True)
class Series:
    """One kind of points or one line.

    Attributes:
        label: its name in the legend.
        x, y: coordinates; values that are not finite are left out.
        kind: decides colour and marker; from 10 on the palette's last eight colours return with other markers.
        low, high: a band around the line, or empty.
        dashed: a line of lesser weight.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    kind: int
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False

    @property
    def color(self) -> int:
        """Number of the palette's colour."""
        return self.kind if self.kind < len(COLORS) else 2 + (self.kind - 2) % (len(COLORS) - 2)

    @property
    def marker(self) -> str:
        """matplotlib's."""
        return list(MARKERS)[(self.kind + self.kind // len(COLORS)) % len(MARKERS)]

    @property
    def sign(self) -> str:
        """What stands for it in the legend."""
        return MARKERS[self.marker]


@dataclass(frozen=True)
class Axis:
    """A title, the limits (found from the data when None), and how ticks are written; ``ticks`` only if given."""

    title: str
    low: float | None = None
    high: float | None = None
    percent: bool = False
    log: bool = False
    ticks: Sequence[float] = ()


def draw_figure(draw: Callable[[Any], None], x: Axis, y: Axis, size: tuple[float, float]) -> Any:
    """A figure of ``size`` inches, without pyplot's global state; ``draw`` fills its only axes."""
    from matplotlib import rc_context  # imported here: slow, and only needed for pictures
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        _format(axes, "x", x)
        _format(axes, "y", y)
    return figure


def draw_points(axes: Any, series: Sequence[Series]) -> None:
    """Points of several kinds, told apart by colour and shape."""
    for each in series:
        size = 4 if len(each.x) > 1 else 8
        points = {"color": COLORS[each.color], "marker": each.marker, "markersize": size, "markeredgewidth": 0}
        axes.plot(each.x, each.y, linestyle="none", alpha=0.8, label=each.label, **points)


def draw_lines(axes: Any, series: Sequence[Series], markers: bool = True) -> None:
    """Lines, with a band around those that have one."""
    for each in series:
        if each.low:
            axes.fill_between(each.x, each.low, each.high, color=COLORS[each.color], alpha=0.18, linewidth=0)
        style = {"linestyle": (0, (4, 3)), "linewidth": 0.9} if each.dashed else {"linewidth": 1.4}
        if markers:
            style |= {"marker": each.marker, "markersize": 4, "markeredgewidth": 0}
        axes.plot(each.x, each.y, color=COLORS[each.color], label=each.label, **style)


def save_series(
    draw: Callable[[Any, Sequence[Series]], None], series: Sequence[Series], x: Axis, y: Axis, path: Path | str
) -> None:
    """Write points or lines with a legend below them as a PNG. Raises InputError if the file cannot be written."""
    from matplotlib import rc_context

    figure = draw_figure(lambda axes: draw(axes, series), x, y, (7.5, 5))
    with rc_context(STYLE):
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_png(figure, path)


def save_png(figure: Any, path: Path | str) -> None:
    """Write a figure. Raises InputError if the file cannot be written."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _format(axes: Any, name: str, axis: Axis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

    axes.set(**{f"{name}label": axis.title, f"{name}scale": "log" if axis.log else "linear"})
    side = axes.xaxis if name == "x" else axes.yaxis
    if axis.log:
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
        side.set_minor_formatter(NullFormatter())
    if axis.ticks:
        side.set_ticks(axis.ticks)
    if axis.percent:
        side.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.set(**{f"{name}lim": (axis.low, axis.high)})


@dataclass(frozen=True)
class Chart:
    """A picture, what its colours mean, and the words below it."""

    svg: Markup
    series: Sequence[Series]
    caption: str


def scatter(series: Sequence[Series], x: Axis, y: Axis, caption: str) -> Chart:
    """Points of several kinds, told apart by colour and shape."""
    return Chart(_svg(lambda axes: draw_points(axes, series), x, y, caption), series, caption)


def lines(series: Sequence[Series], x: Axis, y: Axis, caption: str, *, markers: bool = True) -> Chart:
    """Lines, with a band around those that have one."""
    return Chart(_svg(lambda axes: draw_lines(axes, series, markers), x, y, caption), series, caption)


def histogram(series: Sequence[Series], x: Axis, caption: str) -> Chart:
    """Distributions of the ``x`` of each series, as outlines that may overlap; the height is a share of the series."""
    finite = [np.asarray(each.x)[np.isfinite(each.x)] for each in series]
    edges = np.histogram_bin_edges(np.concatenate(finite), NUM_BINS)

    def draw(axes: Any) -> None:
        for each, values in zip(series, finite, strict=True):
            shares = np.histogram(values, edges)[0] / len(each.x)
            axes.stairs(shares, edges, fill=True, color=COLORS[each.color], alpha=0.18)
            axes.stairs(shares, edges, color=COLORS[each.color], linewidth=1.4)

    return Chart(_svg(draw, x, Axis("share of the networks", 0.0, percent=True), caption), series, caption)


def _svg(draw: Any, x: Axis, y: Axis, label: str) -> Markup:
    """Draw into axes ``x`` and ``y``; ``label`` says what is seen to those who do not see it."""
    from matplotlib import rc_context  # imported here: slow

    figure = draw_figure(draw, x, y, (6.4, 3.6))
    figure.axes[0].yaxis.label.set_gid("up")
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(buffer.getvalue(), label)


def _for_page(svg: str, label: str) -> Markup:
    """Cut what a page need not have, and leave colours to its style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' clip-path="[^"]*"', "", svg)
    svg = re.sub(r' id="up"', ' class="up"', svg)
    svg = re.sub(r' id="\w+_\d+"', "", svg)  # the same in every chart
    svg = re.sub(r"\n\s*", "\n", svg)
    for number, color in enumerate(COLORS):
        svg = svg.replace(color, f"var(--c{number})")
    svg = svg.replace(TEXT, "var(--soft)").replace(GRID, "var(--rule)")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None, "matplotlib always says how large its drawing is"
    opening = Markup('<svg class="chart" {} role="img" aria-label="{}">').format(Markup(view.group()), label)
    return opening + Markup(svg[svg.index(">") + 1 :].strip())
