"""An evaluation by figures in the terminal, as a picture and as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import Tensor

from rpg.console import FiguresTable
from rpg.evaluation.page.charts import (
    Chart,
    histogram,
    lines,
    principal_components,
    scatter,
    training_loss,
    trajectories,
)
from rpg.evaluation.page.drawing import AVERAGE, GENERATED, ORIGINAL, Axis, Series, save_points
from rpg.evaluation.page.template import render_page
from rpg.evaluation.results import AT_DISTANCE
from rpg.evaluation.scores.results import ScoredNetworks, ScoreResult

KINDS = {"generated": GENERATED, "original": ORIGINAL, "average": AVERAGE}


@dataclass
class ScorePage:
    """What a page shows beside the result.

    Attributes:
        title: of the page.
        provenance: rows of the last table.
        losses: (optimizer steps, losses) of training; empty without a run.
        trajectory: (sampling steps taken, a figure of each network then), for the condition that the user named.
        condition: in the user's words.
    """

    title: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[Sequence[float], Sequence[float]] = ((), ())
    trajectory: Sequence[tuple[int, Tensor]] = ()
    condition: str = ""


def label_of(kind: str) -> str:
    """What tables and pictures call a kind of networks."""
    label = kind.removesuffix(AT_DISTANCE).replace("_", " ")
    return label + (" (at equal distance)" if kind.endswith(AT_DISTANCE) else "")


def print_scores(result: ScoreResult, console: Console | None = None) -> None:
    """Print the comparison, one row a kind of networks, then what is new and good.

    Args:
        result: what was measured.
        console: where to print; standard output when None.
    """
    console = console or Console()
    first = result.first
    title = f"{first} ({result.better[first]} is better), by {result.scorer}" if first else f"by {result.scorer}"
    heads = ["networks", "count", *(["mean", "best", "worst"] if first else [])]
    heads += [f"mean {name}" for name in list(result.better)[1:]]
    rows = [[_short(kind), *cells_of(result, kind)] for kind in result.sets]
    console.print(FiguresTable([*heads, *distance_heads(result)], rows, title))
    if result.unit and any(each.novel_and_performant for each in result.sets.values()):
        console.print(_novelty_table(result))


def means_of(result: ScoreResult) -> dict[str, dict[str, float | None]]:
    """The mean of every figure and the median distance, of every kind of networks."""
    return {
        kind: {name: mean_of(each, name) for name in result.better} | {"distance": median_of(each.distances)}
        for kind, each in result.sets.items()
    }


def distance_heads(result: ScoreResult) -> list[str]:
    """The columns of distances: to the nearest original, and to the one of the condition."""
    if not result.unit:
        return []
    return ["distance", *(["to its own"] if any(each.own_distances for each in result.sets.values()) else [])]


def cells_of(result: ScoreResult, kind: str) -> list[str]:
    """A row of the table: number of networks, figures, distances."""
    each, first = result.sets[kind], result.first
    cells = [str(each.count), *(spread_of(each, first, result.better[first]) if first else [])]
    cells += [number(mean_of(each, name)) for name in list(result.better)[1:]]
    medians = [number(median_of(values), 3) for values in (each.distances, each.own_distances)]
    return cells + medians[: len(distance_heads(result))]


def _novelty_table(result: ScoreResult) -> FiguresTable:
    title = "new (%): distance over"
    if result.first:
        at_least = "at least" if result.better[result.first] == "more" else "at most"
        title = f"new and good (%): {result.first} {at_least} {number(result.threshold)} and distance over"
    rows = [
        [_short(kind), *(f"{100 * share:.0f}" for share in each.novel_and_performant)]
        for kind, each in reversed(in_drawing_order(result))
        if each.novel_and_performant and kind != "original"
    ]
    caption = (
        "distances in the zoo's median nearest-neighbour distances, hidden units unmatched; * at the generated "
        "networks' distance"
    )
    return FiguresTable(("networks", *(f"{tau:g}" for tau in result.taus)), rows, title, caption)


def _short(kind: str) -> str:
    return label_of(kind).replace(" (at equal distance)", " *")


def draw_scores(result: ScoreResult, path: Path | str) -> None:
    """The first figure against the distance to the nearest original, or by kind, as a PNG; without figures where the
    networks lie.
    """
    save_points(*score_by_distance(result), path)


def score_by_distance(result: ScoreResult) -> tuple[list[Series], Axis, Axis]:
    """Points and axes of the first figure against distance, one point a network; of a zoo without spread by kind.

    Without figures the distance to the condition's own original takes their place, without conditions the zoo's second
    principal component.
    """
    if not result.first and not any(each.own_distances for each in result.sets.values()):
        return component_series(result), Axis("first principal component"), Axis("second principal component")
    series = []
    for index, (kind, each) in enumerate(in_drawing_order(result)):
        across = each.distances if result.unit else [index] * each.count
        values = each.figures[result.first] if result.first else each.own_distances
        pairs = [(x, y) for x, y in zip(across, values, strict=False) if None not in (x, y)]  # originals are their own
        xs, ys = ([pair[i] for pair in pairs] for i in (0, 1))
        series.append(Series(label_of(kind), xs, ys, KINDS.get(kind, AVERAGE + 1 + index)))  # type: ignore[arg-type]
    title = "distance to the nearest (other) original, in the zoo's median" if result.unit else "kind of networks"
    up = f"{result.first} ({result.better[result.first]} is better)" if result.first else "distance to its own original"
    return series, Axis(title), Axis(up)


def in_drawing_order(result: ScoreResult) -> list[tuple[str, ScoredNetworks]]:
    """The kinds of networks, generated ones last, above all others."""
    return sorted(result.sets.items(), key=lambda each: each[0] == "generated")


def write_score_page(path: Path | str, result: ScoreResult, page: ScorePage) -> None:
    """Write ``report.html``. Raises InputError if the file cannot be written."""
    first = result.first
    kinds = sorted(result.sets, key=lambda kind: kind != "generated")
    rows = [[label_of(kind), *cells_of(result, kind)] for kind in kinds]
    heads = ["networks", "number", *([f"mean {first}", "best", "worst"] if first else [])]
    heads += [f"mean {name}" for name in list(result.better)[1:]]
    heads += [f"median {name}" if name == "distance" else f"median distance {name}" for name in distance_heads(result)]
    conditional = any(each.own_distances for each in result.sets.values())
    up = f"The figure {first}" if first else "The distance to the original of its condition"
    caption = f"{up} of each network against its distance from the originals, by kind."
    render_page(
        path,
        "scores.html.j2",
        data=page,
        result=result,
        verdict=verdict_of(result),
        heads=heads,
        rows=rows,
        scatter_chart=scatter(*score_by_distance(result), caption) if first or conditional else None,
        novelty_chart=_novelty(result),
        distances_chart=_distances(result),
        components_chart=_components(result),
        trajectory_chart=_trajectory(page, result),
        losses_chart=training_loss(page.losses),
    )


def verdict_of(result: ScoreResult) -> list[str]:
    """What the figures say, in words."""
    first, sets, said = result.first, result.sets, []
    if first:
        means = {kind: mean for kind, each in sets.items() if (mean := mean_of(each, first)) is not None}
        shown = ", ".join(f"{label_of(kind)} {number(means[kind])}" for kind in KINDS if kind in means)
        said = [f"Mean {first}, of which {result.better[first]} is better: {shown}."]
    own = {kind: middle for kind, each in sets.items() if (middle := median_of(each.own_distances)) is not None}
    if "generated" in own:
        best = min((kind for kind in own if kind != "generated"), key=lambda kind: own[kind], default="generated")
        said.append(
            f"From the original of their condition generated networks lie {number(own['generated'], 3)} of the zoo’s "
            f"nearest-neighbour distances (median), {label_of(best)}, the nearest baseline, {number(own[best], 3)}."
        )
    generated = sets.get("generated")
    if generated is None or not result.unit or not generated.novel_and_performant:
        return said
    middle = median_of(generated.distances)
    if middle is not None:
        said.append(
            f"Generated networks lie {middle:.1f} of the zoo’s nearest-neighbour distances from the nearest original "
            "(median); hidden units are not matched, so that a reordered copy looks new."
        )
    index = min(range(len(result.taus)), key=lambda i: abs(result.taus[i] - 2))
    rivals = {k: e.novel_and_performant[index] for k, e in sets.items() if k not in KINDS and e.novel_and_performant}
    share = generated.novel_and_performant[index]
    good = " and as good as the median original" if first else ""
    line = f"At τ = {result.taus[index]:g}, {100 * share:.0f} % of them are new{good}"
    rivals = rivals if first else {}  # distance alone is no merit
    if rivals:
        best = max(sorted(rivals), key=lambda kind: rivals[kind])
        line += f"; of the best trivial baseline, {label_of(best)}, {100 * rivals[best]:.0f} %"
    return [*said, line + "."]


def mean_of(each: ScoredNetworks, name: str) -> float | None:
    """Mean of a figure over the networks where it is finite."""
    summary = each.summaries[name]
    return None if summary is None else summary.mean


def spread_of(each: ScoredNetworks, name: str, better: str) -> list[str]:
    """Mean, best and worst of a figure, as they are shown."""
    summary = each.summaries[name]
    if summary is None:
        return ["", "", ""]
    best, worst = (summary.max, summary.min) if better == "more" else (summary.min, summary.max)
    return [number(summary.mean), number(best), number(worst)]


def median_of(values: Sequence[float | None]) -> float | None:
    """Median of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def number(value: float | None, digits: int = 4) -> str:
    """A figure as it is shown."""
    return "" if value is None else f"{value:.{digits}g}"


def _trajectory(page: ScorePage, result: ScoreResult) -> Chart | None:
    caption = f"Networks for {page.condition} after each sampling step, noise included."
    shown = [(step, values.tolist()) for step, values in page.trajectory]
    return trajectories(shown, result.first or "distance to the nearest original", caption)


def _novelty(result: ScoreResult) -> Chart | None:
    kinds = [
        (kind, each) for kind, each in in_drawing_order(result) if each.novel_and_performant and kind != "original"
    ]
    if not result.unit or not kinds:
        return None
    series = [
        Series(
            label_of(kind), result.taus, each.novel_and_performant, KINDS.get(kind, AVERAGE + 1 + index), dashed=dashed
        )
        for index, (kind, each) in enumerate(kinds)
        for dashed in [kind != "generated" and not kind.endswith(AT_DISTANCE)]
    ]
    good = f" whose {result.first} is as good as {number(result.threshold)}, the median original’s" * bool(result.first)
    caption = (
        "Share of networks at least τ nearest-neighbour distances from every original (hidden units unmatched)"
        f"{good}. Dashed: baselines at distances of their own."
    )
    across = Axis("τ", log=min(result.taus) > 0, ticks=result.taus)
    return lines(series, across, Axis("new and good" if result.first else "new", -0.02, 1.02, percent=True), caption)


def _distances(result: ScoreResult) -> Chart | None:
    shown = ("original", "held_out", "coordinate_gaussian", "covariance_gaussian", "generated")
    series = []
    for index, kind in enumerate(each for each in shown if each in result.sets):
        known = [value for value in result.sets[kind].distances if value is not None]
        if known:
            series.append(Series(label_of(kind), known, (), KINDS.get(kind, AVERAGE + 1 + index)))
    if not series:
        return None
    caption = "Distances to the nearest (other) original in the zoo’s median nearest-neighbour distances."
    return histogram(series, Axis("distance"), caption)


def _components(result: ScoreResult) -> Chart | None:
    if not result.components:
        return None
    return principal_components(component_series(result), result.explained)


def component_series(result: ScoreResult) -> list[Series]:
    """Each network in the zoo's first two principal components, by kind; none of a zoo without spread."""
    shown = [kind for kind, _ in in_drawing_order(result) if AT_DISTANCE not in kind and kind in result.components]
    return [
        Series(label_of(kind), [x for x, _ in points], [y for _, y in points], KINDS.get(kind, AVERAGE + 1 + index))
        for index, (kind, points) in enumerate((kind, result.components[kind]) for kind in shown)
    ]
