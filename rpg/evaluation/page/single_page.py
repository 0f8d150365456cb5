"""``report.html``: one self-contained page, readable in light and dark, on a phone and on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rpg.evaluation.page.charts import (
    Chart,
    histogram,
    lines,
    principal_components,
    scatter,
    training_loss,
    trajectories,
)
from rpg.evaluation.page.drawing import AVERAGE, GENERATED, ORIGINAL, Axis, Series, accuracy_by_similarity
from rpg.evaluation.page.template import render_page
from rpg.evaluation.results import (
    AT_DISTANCE,
    TRAINED_FROM,
    EvaluationResult,
    NetworkScores,
    NoveltyReport,
)

TEMPLATE = "single.html.j2"


@dataclass
class ReportData:
    """What a report shows beside the scores; parts that are empty are left out.

    Attributes:
        title: of the page.
        provenance: rows of the last table.
        losses: (optimizer steps, losses) of training.
        trajectories: (sampling steps taken, accuracy ``[networks]`` then).
        components: first two principal components ``[num, 2]`` by kind of networks, and what share they explain.
        original_distances: of each original to its nearest neighbour, in their median.
        heatmap: rows of values to compare ``[rows, columns]`` with a label each.
    """

    title: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[Sequence[float], Sequence[float]] = ((), ())
    trajectories: Sequence[tuple[int, Tensor]] = ()
    components: Mapping[str, Tensor] = field(default_factory=dict)
    explained: float = 0.0
    original_distances: Sequence[float] = ()
    heatmap: tuple[Sequence[str], Tensor] | None = None


def write_page(path: Path | str, result: EvaluationResult, data: ReportData) -> None:
    """Write the report. Raises InputError if the file cannot be written."""
    rows: list[tuple[str, NetworkScores]] = [(noise.label, noise) for noise in result.noise]
    rows += [(_name(name), scores) for name, scores in result.baselines.items()]
    novelty = result.novelty_details
    shown: dict[str, Any] = {
        "data": data,
        "result": result,
        "verdict": _verdict(result),
        "scores": [("generated", result.generated), ("original", result.original), *rows],
        "novelty": novelty,
        "novelty_rows": [(_name(name), novelty.sets[name]) for name in reversed(_by_weight(novelty))]
        if novelty
        else [],
        "similarity_chart": _similarity(result),
        "novelty_chart": _novelty(novelty) if novelty else None,
        "distances_chart": _distances(novelty, data) if novelty else None,
        "heatmap": data.heatmap and heat_png(data.heatmap[1]),
        "trajectories_chart": _trajectories(result, data),
        "components_chart": _components(data),
        "losses_chart": training_loss(data.losses),
    }
    render_page(path, TEMPLATE, **shown)


def _name(key: str) -> str:
    label = key.removesuffix(AT_DISTANCE).replace("_", " ")
    return label + (" (at equal distance)" if key.endswith(AT_DISTANCE) else "")


def _verdict(result: EvaluationResult) -> list[str]:
    """What the figures say, in words."""
    generated, original = result.generated.accuracy, result.original.accuracy
    lines = [
        f"Generated networks are {100 * generated.mean:.1f} % accurate on average (best {100 * generated.max:.1f} %), "
        f"the originals {100 * original.mean:.1f} % (best {100 * original.max:.1f} %), "
        f"and the average of all originals {100 * result.ensemble.accuracy:.1f} %."
    ]
    novelty = result.novelty_details
    if novelty is not None:
        own = novelty.sets["generated"]
        middle = float(np.median(own.matched_distances))
        kind = "lie" if middle >= 1 else "are closer than the originals are to one another: they lie"
        lines.append(
            f"They {kind} {middle:.1f} of the zoo’s nearest-neighbour distances from the nearest original (median)."
        )
        lines += _rivals(novelty)
    return lines


def _rivals(novelty: NoveltyReport) -> list[str]:
    """How the generated networks do at τ = 2 beside the best of each kind of baselines, in words."""
    index = min(range(len(novelty.taus)), key=lambda i: abs(novelty.taus[i] - 2))
    shares = {name: each.novel_and_performant[index] for name, each in novelty.sets.items()}
    share = shares.pop("generated")
    control = {name for name in shares if TRAINED_FROM in name}
    kinds = {
        "trivial baseline": shares.keys() - control,
        "trivial baseline as far from the zoo as they are": {n for n in shares if AT_DISTANCE in n} - control,
        "baseline trained on images": control,
    }
    lines = [f"At τ = {novelty.taus[index]:g}, {100 * share:.0f} % of them are new and good."]
    for kind, names in kinds.items():
        if names:
            best = max(sorted(names), key=lambda name: shares[name])
            than = "more than" if share > shares[best] else "as many as" if share == shares[best] else "fewer than"
            lines.append(f"That is {than} the {100 * shares[best]:.0f} % of the best {kind}, {_name(best)}.")
    return [" ".join(lines)]


def _similarity(result: EvaluationResult) -> Chart:
    caption = "Accuracy of each network against its similarity to the nearest original, by kind; upper left is best."
    return scatter(*accuracy_by_similarity(result), caption)


def _by_weight(novelty: NoveltyReport) -> list[str]:
    """Names in the order in which they are drawn: the generated networks last, what is compared with them before."""
    return sorted(novelty.sets, key=lambda name: (name == "generated", AT_DISTANCE in name))


def _novelty(novelty: NoveltyReport) -> Chart:
    series = []
    for index, name in enumerate(_by_weight(novelty)):
        each = novelty.sets[name]
        low, high = ([bounds[i] for bounds in each.ci95] for i in (0, 1)) if name == "generated" else ((), ())
        kind = GENERATED if name == "generated" else 1 + index
        faint = name != "generated" and AT_DISTANCE not in name
        series.append(Series(_name(name), novelty.taus, each.novel_and_performant, kind, low, high, faint))
    caption = (
        "Share of networks at least τ nearest-neighbour distances from every original (hidden units matched) and at "
        f"least {100 * novelty.accuracy_threshold:.1f} % accurate, by kind; the band is the 95 % interval. "
        "Dashed: baselines at distances of their own."
    )
    across = Axis("τ", log=min(novelty.taus) > 0, ticks=novelty.taus)
    return lines(series, across, Axis("new and good", -0.02, 1.02, percent=True), caption)


def _distances(novelty: NoveltyReport, data: ReportData) -> Chart:
    sets = novelty.sets
    shown = [name for name in ("average_of_16", "coordinate_gaussian", "covariance_gaussian") if name in sets]
    series = [Series("original, to another original", data.original_distances, (), ORIGINAL)]
    series += [Series(_name(n), sets[n].matched_distances, (), 3 + i) for i, n in enumerate(shown)]
    series.append(Series("generated", sets["generated"].matched_distances, (), GENERATED))
    # Gaussians over several runs lie so far away that the rest would be one bar.
    limit = 3 * max(1.0, *sets["generated"].matched_distances)
    series = [s for s in series if s.x and float(np.median(s.x)) < limit]
    caption = "Distances to the nearest original in the zoo’s median nearest-neighbour distances, hidden units matched."
    return histogram(series, Axis("distance"), caption)


def heat_png(values: Tensor) -> str:
    """``[rows, columns]`` in -3 … 3 as a base64 PNG on a diverging scale, one pixel a value."""
    from matplotlib import colormaps  # imported here: slow
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, colormaps["RdBu_r"]((values.clamp(-3, 3).numpy() + 3) / 6), format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _trajectories(result: EvaluationResult, data: ReportData) -> Chart | None:
    num = len(data.trajectories[0][1]) if data.trajectories else 0
    caption = f"Accuracy on {result.split} images of {num} networks after each sampling step, noise included."
    shown = [(step, values.tolist()) for step, values in data.trajectories]
    return trajectories(shown, "accuracy", caption, percent=True)


def _components(data: ReportData) -> Chart | None:
    if not data.components:
        return None
    colors = {"generated": GENERATED, "original": ORIGINAL, "average of all originals": AVERAGE}
    series = [
        Series(name, points[:, 0].tolist(), points[:, 1].tolist(), colors.get(name, 3 + i))
        for i, (name, points) in enumerate(data.components.items())
    ]
    series.sort(key=lambda each: each.label in colors)  # the others are below
    return principal_components(series, data.explained)
