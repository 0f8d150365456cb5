"""Charts as inline SVG: they follow the page's light or dark colours, scale to any width and print sharply."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 46
MARKERS = ("circle", "diamond", "triangle", "square", "cross", "down")


@dataclass(frozen=True)
class Series:
    """One kind of points or one line.

    Attributes:
        label: its name in the legend.
        x, y: coordinates; values that are not finite are left out.
        color: number of the page's palette colour.
        low, high: a band around the line, or empty.
        dashed: a line of lesser weight.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A title, the limits (found from the data when None), and how ticks are written."""

    title: str
    low: float | None = None
    high: float | None = None
    percent: bool = False
    log: bool = False

    def write(self, value: float) -> str:
        """A tick's text."""
        if self.percent:
            return f"{100 * value:.4g} %"
        return f"{value:.4g}"


class _Scale:
    """Data to places in the picture along one axis."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, stop: float) -> None:
        self.axis = axis
        finite = [v for v in values if math.isfinite(v) and (not axis.log or v > 0)]
        low = min(finite, default=0.0) if axis.low is None else axis.low
        high = max(finite, default=1.0) if axis.high is None else axis.high
        if low == high:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        if axis.log:
            low, high = math.log10(max(low, 1e-12)), math.log10(max(high, 1e-12))
        margin = 0.03 * (high - low)
        self.low = low - (margin if axis.low is None else 0)
        self.high = high + (margin if axis.high is None else 0)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        value = math.log10(max(value, 1e-12)) if self.axis.log else value
        share = min(max((value - self.low) / (self.high - self.low), -0.02), 1.02)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within the limits."""
        if self.axis.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            steps = (1, 2, 3, 4, 6, 8) if self.high - self.low < 2 else (1,)
            ticks = [m * 10.0**k for k in decades for m in steps]
            return [tick for tick in ticks if self.low - 1e-9 <= math.log10(tick) <= self.high + 1e-9]
        span = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(span))
        step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span), 10 * power)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scatter(series: Sequence[Series], x: Axis, y: Axis, description: str) -> str:
    """Points of several kinds, told apart by colour and shape."""
    across, up = _scales(series, x, y)
    body = []
    for each in series:
        marker = MARKERS[each.color % len(MARKERS)]
        points = "".join(_marker(marker, across(a), up(b)) for a, b in _finite(each))
        body.append(f'<g class="c{each.color} point">{points}</g>')
    return _picture(body, across, up, description) + legend(series)


def lines(series: Sequence[Series], x: Axis, y: Axis, description: str, *, markers: bool = True) -> str:
    """Lines, with a band around those that have one."""
    across, up = _scales(series, x, y)
    body = []
    for each in series:
        if each.low:
            there = [f"{across(a):.1f},{up(b):.1f}" for a, b in zip(each.x, each.high, strict=True)]
            back = [f"{across(a):.1f},{up(b):.1f}" for a, b in zip(each.x, each.low, strict=True)]
            body.append(f'<polygon class="c{each.color} band" points="{" ".join(there + back[::-1])}"/>')
        points = [(across(a), up(b)) for a, b in _finite(each)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        dashed = " dashed" if each.dashed else ""
        body.append(f'<polyline class="c{each.color} line{dashed}" points="{path}"/>')
        if markers:
            shape = MARKERS[each.color % len(MARKERS)]
            body.append(f'<g class="c{each.color} point">{"".join(_marker(shape, a, b) for a, b in points)}</g>')
    return _picture(body, across, up, description) + legend(series)


def histogram(series: Sequence[Series], x: Axis, description: str, num_bins: int = 24) -> str:
    """Distributions of the ``x`` of each series, as outlines that may overlap; the height is a share of the series."""
    values = [v for each in series for v in each.x if math.isfinite(v)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    high = high if high > low else low + 1
    edges = [low + (high - low) * i / num_bins for i in range(num_bins + 1)]
    outlines = []
    for each in series:
        shares = [0.0] * num_bins
        for value in each.x:
            if math.isfinite(value):
                shares[min(int((value - low) / (high - low) * num_bins), num_bins - 1)] += 1 / len(each.x)
        xs = [edge for i in range(num_bins) for edge in edges[i : i + 2]]
        ys = [share for share in shares for _ in range(2)]
        outlines.append(Series(each.label, xs, ys, each.color, [0.0] * len(xs), ys))
    return lines(
        outlines, Axis(x.title, low, high), Axis("share of the networks", 0.0, percent=True), description, markers=False
    )


def legend(series: Sequence[Series]) -> str:
    """Names with the colour and shape of each, below the picture."""
    items = []
    for each in series:
        shape = _marker(MARKERS[each.color % len(MARKERS)], 7, 7)
        line = f'<line class="c{each.color} line dashed" x1="0" x2="14" y1="7" y2="7"/>' if each.dashed else ""
        items.append(
            f'<li><svg viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">{line}'
            f'<g class="c{each.color} point">{shape}</g></svg> {html.escape(each.label)}</li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _finite(series: Series) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(series.x, series.y, strict=True) if math.isfinite(a) and math.isfinite(b)]


def _scales(series: Sequence[Series], x: Axis, y: Axis) -> tuple[_Scale, _Scale]:
    across = _Scale(x, [v for each in series for v in each.x], LEFT, WIDTH - RIGHT)
    heights = [v for each in series for part in (each.y, each.low, each.high) for v in part]
    return across, _Scale(y, heights, HEIGHT - BOTTOM, TOP)


def _marker(shape: str, x: float, y: float) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    corners = {
        "diamond": ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0)),
        "triangle": ((0, -4.4), (4.2, 3.2), (-4.2, 3.2)),
        "down": ((0, 4.4), (4.2, -3.2), (-4.2, -3.2)),
        "square": ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
        "cross": ((-1.3, -4), (1.3, -4), (1.3, -1.3), (4, -1.3), (4, 1.3), (1.3, 1.3), (1.3, 4), (-1.3, 4),
                  (-1.3, 1.3), (-4, 1.3), (-4, -1.3), (-1.3, -1.3)),
    }[shape]  # fmt: skip
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon points="{points}"/>'


def _picture(body: Sequence[str], across: _Scale, up: _Scale, description: str) -> str:
    frame = []
    for tick in across.ticks():
        place = across(tick)
        frame.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        text = html.escape(across.axis.write(tick))
        frame.append(f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    for tick in up.ticks():
        place = up(tick)
        frame.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        text = html.escape(up.axis.write(tick))
        frame.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    frame.append(
        f'<text class="title" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(across.axis.title)}</text>"
        f'<text class="title up" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(up.axis.title)}</text>"
    )
    label = html.escape(description, quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
        + "".join([*frame, *body])
        + "</svg>"
    )
