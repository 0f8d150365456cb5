"""A report in the terminal, and as files: ``evaluation.json``, ``scatter.png``, and ``report.html``, one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from torch import Tensor

from rpg.console import FiguresTable
from rpg.evaluation.page.charts import (
    AVERAGE,
    GENERATED,
    ORIGINAL,
    Axis,
    Chart,
    Series,
    draw_lines,
    draw_points,
    histogram,
    lines,
    save_series,
    scatter,
)
from rpg.evaluation.report import AT_DISTANCE, FILE, PERCENT, Curve, Networks, Report, nearest_of, shown
from tokenization.files import make_folder, write_text

FIGURES = {"one_nna": "1-NNA", "coverage": "coverage"}
"""Figures of a whole kind that have a column, where a kind has them."""

NUM_FAMILIES = 3
"""Baselines in the short table."""

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
        "Where the networks lie": _components(report),
        "From noise to network": _denoising_path(page, words),
        "Training loss": _training_loss(page),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    values: dict[str, Any] = {
        "page": page,
        "report": report,
        "tables": [*tables, *page.tables],
        "charts": {title: chart for title, chart in charts.items() if chart is not None},
        "heatmaps": [(each, heat_png(each.values)) for each in page.heatmaps],
        "pictures": {title: base64.b64encode(file.read_bytes()).decode() for title, file in page.pictures.items()},
    }
    write_text(path, environment.get_template("page.html.j2").render(values))


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
            series.append(_series(report, name, pairs, index))
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


def _series(report: Report, kind: str, points: Sequence[tuple[float, float]], index: int) -> Series:
    return Series(report.label(kind), [x for x, _ in points], [y for _, y in points], _color(kind, index))


def _color(kind: str, index: int) -> int:
    return COLORS.get(kind, AVERAGE + 1 + index)


def series_of(report: Report, curve: Curve) -> tuple[list[Series], Axis, Axis]:
    """The lines of a report's curve, and its axes."""
    pairs = {
        name: [(x, y) for x, y in zip(curve.x, values, strict=False) if y is not None]
        for name, values in curve.lines.items()
    }
    series = [_series(report, *each, index) for index, each in enumerate(pairs.items())]
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
    return [_series(report, *each, index) for index, each in enumerate(each for each in found if each[1])]


def _components(report: Report) -> Chart | None:
    if not (series := _component_series(report)):
        return None
    caption = (
        "First two principal components of the originals’ weights, which hold "
        f"{100 * report.explained:.0f} % of their variance, with the other networks projected on them."
    )
    return scatter(series, Axis("first component"), Axis("second component"), caption)


def _training_loss(page: Page) -> Chart | None:
    steps, losses = page.losses
    if len(steps) < 2:
        return None
    series = [Series("loss", steps, losses, GENERATED)]
    caption = "Training loss at each logged optimizer step."
    return lines(series, Axis("step"), Axis("loss", log=min(losses) > 0), caption, markers=False)


def _denoising_path(page: Page, words: str) -> Chart | None:
    steps, values = [step for step, _ in page.denoising_path], [each.tolist() for _, each in page.denoising_path]
    if len(steps) < 2:
        return None
    series = [Series(f"network {i}", steps, each, i) for i, each in enumerate(zip(*values, strict=True))]
    up = Axis(words, -0.02, 1.02, percent=True) if PERCENT.search(words.replace(" ", "_")) else Axis(words)
    about = f" for {page.condition}" if page.condition else ""
    caption = f"Networks{about} after each sampling step, noise included."
    return lines(series, Axis("sampling step", ticks=steps if len(steps) < 12 else ()), up, caption)


def heat_png(values: Tensor) -> str:
    """``[rows, columns]`` in -3 … 3 as a base64 PNG on a diverging scale, one pixel a value."""
    from matplotlib import colormaps  # imported here: slow
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, colormaps["RdBu_r"]((values.clamp(-3, 3).numpy() + 3) / 6), format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def print_report(
    report: Report, console: Console, *, folder: Path | str | None = None, full: bool = False, then: str = ""
) -> None:
    """Print a report: a table of at most twelve lines with verdict, page and next command, or all of it.

    Args:
        folder: where the report was written, to be named.
        full: every kind and metric, the novelty curve, and the other parts.
    """
    kinds = [name for name, each in report.kinds.items() if each.count or each.metrics]
    if not full:
        best = [name for name in report.best_of_families() if name in kinds][:NUM_FAMILIES]
        if report.experiment == "sensors":
            best = ["kernel_ridge", "nearest_seen", "generalist"]
        kinds = [name for name in ("generated", "original", *best) if name in kinds]
    console.print(FiguresTable(*cells_of(report, kinds, full), title_of(report)))
    if full:
        _print_rest(report, console)
    said = [report.verdict]
    # What is evaluated for a choice is not written.
    written = [each for name in ("report.html", FILE) if folder and (each := Path(folder) / name).is_file()]
    if written:
        said.append(f"report: {written[0]}{'' if full else '; all with --full'}")
    said += [f"next: {then}"] if then else []
    for line in said:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_rest(report: Report, console: Console) -> None:
    if (curve := novelty_cells(report)) is not None:
        limit = f"{'at least' if report.sign > 0 else 'at most'} {shown(report.threshold, report.first)}"
        good = f" and {report.first} {limit}" if report.first else ""
        title = f"new and good (%): distance over τ{good}"
        caption = "distances in the zoo's median nearest-neighbour distances; * at the generated networks' distance"
        console.print(FiguresTable(*curve, title, caption))
    for name, kinds in report.parts.items():
        part = report.model_copy(update={"kinds": kinds})
        console.print(FiguresTable(*cells_of(part, list(kinds), True), f"{name}: {title_of(part)}"))
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


def title_of(report: Report) -> str:
    """The table's title."""
    first = report.first.replace("_", " ")
    return f"{first} ({report.better[report.first]} is better), {report.judge}" if first else report.judge


def cells_of(report: Report, kinds: Sequence[str], full: bool = True) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of some kinds."""
    chosen = {kind: report.kinds[kind] for kind in kinds}
    others = list(report.better)[1:] if full else []
    place = min(range(len(report.taus)), key=lambda i: abs(report.taus[i] - 2)) if report.taus else None
    figures = [name for name in FIGURES if any(name in each.extras for each in chosen.values())]
    far = {name: any(nearest_of(each, name) is not None for each in chosen.values()) for name in ("nearest", "own")}
    new = place is not None and any(each.novel for each in chosen.values())
    heads = ["networks", *(["count"] if full else []), *(["mean", "best", "worst"] if report.first else [])]
    heads += [f"mean {name.replace('_', ' ')}" for name in others]
    heads += ["distance"] * far["nearest"] + ["to its own"] * far["own"] + [FIGURES[name] for name in figures]
    heads += [f"new, good at {report.taus[place]:g}"] if new and place is not None else []
    rows = []
    for kind, each in chosen.items():
        row = [report.label(kind), *([str(each.count)] if full else [])]
        row += _spread(each, report) if report.first else []
        row += [shown(summary.mean, name) if (summary := each.summaries.get(name)) else "" for name in others]
        row += [shown_distance(each, name) for name in ("nearest", "own") if far[name]]
        row += [f"{each.extras[name]:.3f}" if each.extras.get(name) is not None else "" for name in figures]
        row += [f"{100 * each.novel[place]:.0f} %" if each.novel else ""] if new and place is not None else []
        rows.append(row)
    return heads, rows


def novelty_cells(report: Report) -> tuple[list[str], list[list[str]]] | None:
    """Heads and rows of the novelty curve; None without one."""
    curves = {name: each.novel for name, each in report.kinds.items() if each.novel and name != "original"}
    if not curves:
        return None
    rows = [[report.label(name), *(f"{100 * share:.0f}" for share in shares)] for name, shares in curves.items()]
    return ["networks", *(f"{tau:g}" for tau in report.taus)], rows


def _spread(each: Networks, report: Report) -> list[str]:
    summary, name = each.summaries.get(report.first), report.first
    if summary is None:
        return ["", "", ""]
    ends = (summary.max, summary.min)[:: report.sign]
    return [shown(value, name) for value in (summary.mean, *ends)]


def shown_distance(each: Networks, name: str) -> str:
    """Median distance of a kind."""
    middle = nearest_of(each, name)
    return "" if middle is None else f"{middle:.3g}"


def print_checkpoints(scores: Mapping[str, Mapping[str, Mapping[str, float]]], console: Console) -> None:
    """Print the metrics of single checkpoints, one row a checkpoint and task."""
    several = any(task for tasks in scores.values() for task in tasks)
    names = list(dict.fromkeys(name for tasks in scores.values() for each in tasks.values() for name in each))
    rows = [
        [checkpoint, *((task,) if several else ()), *(f"{metrics[n]:.6g}" if n in metrics else "" for n in names)]
        for checkpoint, tasks in scores.items()
        for task, metrics in tasks.items()
    ]
    heads = ("checkpoint", *(("task",) if several else ()), *(column.replace("_", " ") for column in names))
    console.print(FiguresTable(heads, rows, "scores"))
