"""A report as files: ``evaluation.json``, ``scatter.png``, and ``report.html``, one self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from rpg.evaluation.page.charts import (
    AVERAGE,
    GENERATED,
    ORIGINAL,
    Axis,
    Chart,
    Series,
    denoising_paths,
    draw_lines,
    draw_points,
    histogram,
    lines,
    principal_components,
    save_series,
    scatter,
    training_loss,
)
from rpg.evaluation.report import AT_DISTANCE, PERCENT, Curve, Report
from rpg.evaluation.table import cells_of, novelty_cells
from tokenization.files import make_folder, write_text

COLORS = {"generated": GENERATED, "original": ORIGINAL, "average": AVERAGE}


@dataclass
class Heatmap:
    """Values of networks as colours ``[rows, columns]``, with a label each and a caption."""

    labels: Sequence[str]
    values: Tensor
    caption: str


@dataclass
class PageTable:
    """A further table of the page."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    below: str = ""


@dataclass
class Page:
    """What the page shows beside the report; parts that are empty are left out.

    Attributes:
        losses: (optimizer steps, losses) of training.
        denoising_path: (sampling steps taken, first metric of each network then).
        condition: of the denoising_path, in words.
        pictures: PNG files to show, by title.
    """

    title: str
    provenance: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[Sequence[float], Sequence[float]] = ((), ())
    denoising_path: Sequence[tuple[int, Tensor]] = ()
    condition: str = ""
    heatmaps: Sequence[Heatmap] = ()
    tables: Sequence[PageTable] = ()
    pictures: Mapping[str, Path] = field(default_factory=dict)


def write_report(folder: Path | str, report: Report, page: Page) -> Path:
    """Write ``evaluation.json``, ``report.html``, ``scatter.png`` and a PNG of every curve, by its title.

    Raises:
        InputError: the folder refuses.
    """
    folder = Path(folder)
    make_folder(folder)
    report.save(folder)
    save_series(draw_points, *points_of(report), folder / "scatter.png")
    for title, curve in report.curves.items():
        save_series(draw_lines, *series_of(report, curve), folder / f"{title.lower().replace(' ', '_')}.png")
    write_page(folder / "report.html", report, page)
    return folder / "report.html"


def write_page(path: Path | str, report: Report, page: Page) -> None:
    """Write ``report.html``. Raises InputError if it cannot be written."""
    tables = [PageTable("Metrics", *cells_of(report, list(report.kinds)), _below(report))]
    if (curve := novelty_cells(report)) is not None:
        tables.append(PageTable("New and good, %", *curve))
    for name, kinds in report.parts.items():
        part = report.model_copy(update={"kinds": kinds})
        tables.append(PageTable(f"Metrics: {name}", *cells_of(part, list(kinds))))
    words = report.first.replace("_", " ") or "distance"
    series, x, y = points_of(report)
    caption = f"{y.title} of each network against {x.title}, by kind."
    charts = {
        f"{words.capitalize()} of each network": scatter(series, x, y, caption) if series else None,
        **{
            name.replace("_", " ").capitalize(): lines(*series_of(report, curve), f"{curve.up} by {curve.across}.")
            for name, curve in report.curves.items()
        },
        "New and good": _novelty(report),
        "Distance to the nearest original": _distances(report),
        "Where the networks lie": principal_components(_component_series(report), report.explained),
        "From noise to network": _denoising_path(page, words),
        "Training loss": training_loss(page.losses),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    shown: dict[str, Any] = {
        "page": page,
        "report": report,
        "tables": [*tables, *page.tables],
        "charts": {title: chart for title, chart in charts.items() if chart is not None},
        "heatmaps": [(each, heat_png(each.values)) for each in page.heatmaps],
        "pictures": {title: base64.b64encode(file.read_bytes()).decode() for title, file in page.pictures.items()},
    }
    write_text(path, environment.get_template("page.html.j2").render(shown))


def _below(report: Report) -> str:
    said = f"By {report.judge}, {report.split} data."
    if report.unit:
        how = "matched" if report.matched else "unmatched"
        said += f" Distances are in the zoo’s median nearest-neighbour distances, hidden units {how}."
    return said


def points_of(report: Report) -> tuple[list[Series], Axis, Axis]:
    """One point a network: the first metric against similarity, else against distance, else by kind.

    Without metrics the distance to the condition's own original takes their place, without conditions the zoo's second
    principal component.
    """
    kinds = {name: each for name, each in in_drawing_order(report) if each.count}
    first, own = report.first, any(each.distances.get("own") for each in kinds.values())
    if not first and not own:
        return _component_series(report), Axis("first principal component"), Axis("second principal component")
    alike = first and any("similarity" in each.metrics for each in kinds.values())
    series = []
    for index, (name, each) in enumerate(kinds.items()):
        values = each.metrics.get(first, ()) if first else each.distances.get("own", ())
        across = each.metrics.get("similarity", ()) if alike else each.distances.get("nearest", ())
        across = across or each.distances.get("hamming", ())
        across = across if alike or report.unit or across else [float(index)] * each.count
        pairs = [(x, y) for x, y in zip(across, values, strict=False) if x is not None and y is not None]
        if pairs:
            series.append(Series(report.label(name), [x for x, _ in pairs], [y for _, y in pairs], _color(name, index)))
    x = Axis("kind of networks")
    if alike:
        x = Axis("similarity to the nearest (other) original: IoU of wrong predictions")
    elif any("hamming" in each.distances for each in kinds.values()):
        x = Axis("Hamming distance to the nearest seen task")
    elif report.unit:
        x = Axis("distance to the nearest (other) original, in the zoo's median")
    words = f"{first.replace('_', ' ')} ({report.better[first]} is better)" if first else "distance to its own original"
    return series, x, Axis(words, percent=bool(first and PERCENT.search(first)))


def in_drawing_order(report: Report) -> list[tuple[str, Any]]:
    """The kinds, generated networks last, above all others, what is at their distance before."""
    return sorted(report.kinds.items(), key=lambda each: (each[0] == "generated", AT_DISTANCE in each[0]))


def _color(kind: str, index: int) -> int:
    return COLORS.get(kind, AVERAGE + 1 + index)


def series_of(report: Report, curve: Curve) -> tuple[list[Series], Axis, Axis]:
    """The lines of a report's curve, and its axes."""
    series = []
    for index, (name, values) in enumerate(curve.lines.items()):
        pairs = [(x, y) for x, y in zip(curve.x, values, strict=False) if y is not None]
        series.append(Series(report.label(name), [x for x, _ in pairs], [y for _, y in pairs], _color(name, index)))
    return series, Axis(curve.across, log=curve.log), Axis(curve.up, percent=bool(PERCENT.search(curve.up)))


def _novelty(report: Report) -> Chart | None:
    kinds = [(name, each) for name, each in in_drawing_order(report) if each.novel and name != "original"]
    if not report.unit or not kinds:
        return None
    series = []
    for index, (name, each) in enumerate(kinds):
        low, high = ([ends[i] for ends in each.novel_ci95] for i in (0, 1)) if name == "generated" else ((), ())
        faint = name != "generated" and AT_DISTANCE not in name
        series.append(Series(report.label(name), report.taus, each.novel, _color(name, index), low, high, faint))
    good = f" with {report.first} as good as the median original’s" if report.first else ""
    caption = f"Share of networks at least τ from every original{good}. Dashed: baselines at distances of their own."
    up = Axis("new and good" if report.first else "new", -0.02, 1.02, percent=True)
    return lines(series, Axis("τ", log=min(report.taus) > 0, ticks=report.taus), up, caption)


def _distances(report: Report) -> Chart | None:
    series = []
    for index, kind in enumerate(("original", "held_out", "coordinate_gaussian", "covariance_gaussian", "generated")):
        known = [each for each in _nearest(report, kind) if each is not None]
        if known:
            series.append(Series(report.label(kind), known, (), _color(kind, index)))
    # Gaussians over several runs lie so far away that the rest would be one bar
    ends = [each for kind in ("generated", "original") for each in _nearest(report, kind) if each is not None]
    limit = 3 * max(1.0, *ends) if ends else float("inf")
    series = [each for each in series if float(np.median(each.x)) <= limit]
    if not series:
        return None
    caption = "Distances to the nearest (other) original in the zoo’s median nearest-neighbour distances."
    return histogram(series, Axis("distance"), caption)


def _nearest(report: Report, kind: str) -> Sequence[float | None]:
    return report.kinds[kind].distances.get("nearest", ()) if kind in report.kinds else ()


def _component_series(report: Report) -> list[Series]:
    found = [(name, each.components) for name, each in in_drawing_order(report) if AT_DISTANCE not in name]
    return [
        Series(report.label(name), [x for x, _ in points], [y for _, y in points], _color(name, index))
        for index, (name, points) in enumerate((name, points) for name, points in found if points)
    ]


def _denoising_path(page: Page, words: str) -> Chart | None:
    about = f" for {page.condition}" if page.condition else ""
    caption = f"Networks{about} after each sampling step, noise included."
    shown = [(step, values.tolist()) for step, values in page.denoising_path]
    return denoising_paths(shown, words, caption, percent=bool(PERCENT.search(words.replace(" ", "_"))))


def heat_png(values: Tensor) -> str:
    """``[rows, columns]`` in -3 … 3 as a base64 PNG on a diverging scale, one pixel a value."""
    from matplotlib import colormaps  # imported here: slow
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, colormaps["RdBu_r"]((values.clamp(-3, 3).numpy() + 3) / 6), format="png")
    return base64.b64encode(buffer.getvalue()).decode()
