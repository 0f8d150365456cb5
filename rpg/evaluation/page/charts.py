"""Charts as inline SVG: matplotlib draws them, the page's style sheet colours them for light, dark and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from rpg.evaluation.page.drawing import (
    COLORS,
    GENERATED,
    GRID,
    STYLE,
    TEXT,
    Axis,
    Series,
    draw_figure,
    draw_lines,
    draw_points,
)


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


def training_loss(logged: tuple[Sequence[float], Sequence[float]]) -> Chart | None:
    """A run's loss at each logged step; None where fewer than two were."""
    steps, losses = logged
    if len(steps) < 2:
        return None
    caption = "Training loss at each logged optimizer step."
    series = [Series("loss", steps, losses, GENERATED)]
    return lines(series, Axis("step"), Axis("loss", log=min(losses) > 0), caption, markers=False)


def denoising_paths(
    shown: Sequence[tuple[int, Sequence[float]]], name: str, caption: str, *, percent: bool = False
) -> Chart | None:
    """A figure of networks on their way from noise, one line a network.

    Args:
        shown: (sampling steps taken, the figure of each network then); one step is no way, and gives None.
        name: of the figure.
        caption: below the chart.
        percent: whether it is a share.
    """
    if len(shown) < 2:
        return None
    steps = [step for step, _ in shown]
    num = len(shown[0][1])
    series = [Series(f"network {i}", steps, [float(values[i]) for _, values in shown], i) for i in range(num)]
    up = Axis(name, -0.02, 1.02, percent=True) if percent else Axis(name)
    return lines(series, Axis("sampling step", ticks=steps if len(steps) < 12 else ()), up, caption)


def principal_components(series: Sequence[Series], explained: float) -> Chart:
    """Networks in the first two principal components of the originals, which hold ``explained`` of their variance."""
    caption = (
        "First two principal components of the originals’ weights, which hold "
        f"{100 * explained:.0f} % of their variance, with the other networks projected on them."
    )
    return scatter(series, Axis("first component"), Axis("second component"), caption)


def histogram(series: Sequence[Series], x: Axis, caption: str, num_bins: int = 24) -> Chart:
    """Distributions of the ``x`` of each series, as outlines that may overlap; the height is a share of the series."""
    finite = [np.asarray(each.x)[np.isfinite(each.x)] for each in series]
    edges = np.histogram_bin_edges(np.concatenate(finite), num_bins)

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
