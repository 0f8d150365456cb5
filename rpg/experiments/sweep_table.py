"""The tables of a sweep: one row per experiment, as JSON and Markdown, and the similarity to the originals.

Similarity is a network's greatest IoU of wrong answers with any (other) original (arXiv 2402.13144, equation 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rpg.console import FiguresTable
from rpg.evaluation.page.charts import COLORS, GENERATED, ORIGINAL, Axis, draw_figure, save_png
from rpg.evaluation.report import FILE, Report, label_of, nearest_of, shown
from rpg.generation.generator import Generator
from tokenization.errors import InputError
from tokenization.files import write_text

_COLUMNS = {
    "original_best": "original best", "original_mean": "mean", "average": "average", "best": "generated best",
    "mean": "mean", "worst": "worst", "similarity": "IoU", "distance": "distance", "one_nna": "1-NNA",
    "coverage": "coverage", "nearest_training": "nearest", "seconds_per_network": "s a network",
    "training_seconds": "s training",
}  # fmt: skip
METRICS = ("original_best", "original_mean", "average", "best", "mean", "worst")
"""Columns in the unit of the first metric."""


def row_of(name: str, overrides: Sequence[str], folder: Path, failure: str | None = None) -> dict[str, Any]:
    """The table's row of an experiment."""
    row: dict[str, Any] = {"name": name, "set": list(overrides)}
    if failure is not None or not (folder / FILE).is_file():
        return {**row, "failure": failure or "not run"}
    try:
        report = Report.load(folder)
    except InputError as error:
        return {**row, "failure": str(error)}
    row |= _of_kind(report, "generated") | {"training_seconds": _training_seconds(folder)}
    if report.kinds["original"].summaries.get(report.first):
        originals = _of_kind(report, "original")
        row |= {"original_best": originals["best"], "original_mean": originals["mean"]}
    row |= {"average": report.mean("average"), "seconds_per_network": report.facts.get("seconds_per_network")}
    if novel := report.kinds["generated"].novel:
        row["novelty"] = dict(zip(map(str, report.taus), novel, strict=True))
    return row


def _of_kind(report: Report, kind: str) -> dict[str, Any]:
    each = report.kinds[kind]
    found: dict[str, Any] = {"metric": report.first, "distance": nearest_of(each)}
    if summary := each.summaries.get(report.first):
        best, worst = (summary.max, summary.min)[:: report.sign]
        found |= {"best": best, "mean": summary.mean, "worst": worst}
    found["similarity"] = each.extras.get("error_iou", report.mean(kind, "similarity"))
    return found | {name: each.extras.get(name) for name in ("one_nna", "coverage", "nearest_training")}


def rows_of_rivals(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for every baseline, of the first evaluation that compares it in what networks compute."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        try:
            report = Report.load(folder)
        except InputError:
            continue
        names = [n for n, each in report.kinds.items() if {"one_nna", "error_iou"} & each.extras.keys()]
        rivals = {name: _of_kind(report, name) for name in names if name != "generated"}
        found = {name: {"name": name, "set": [], **each} for name, each in rivals.items()} | found
    return list(found.values())


def _training_seconds(folder: Path) -> float | None:
    seconds = Generator.from_pretrained(folder).facts.get("training seconds")
    return None if seconds is None else float(seconds)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, without empty columns."""
    columns = [each for each in _COLUMNS if any(row.get(each) is not None for row in rows)]
    lines = ["| run | " + " | ".join(_COLUMNS[each] for each in columns) + " | overrides |"]
    lines.append("| --- |" + " ---: |" * len(columns) + " --- |")
    for row in rows:
        cells = [_cell(row, key) for key in columns]
        if "failure" in row:
            cells = [row["failure"].replace("|", "/"), *[""] * (len(columns) - 1)]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + f" | {' '.join(row['set'])} |")
    return "\n".join(lines) + "\n"


def print_sweep(rows: list[dict[str, Any]], console: Console) -> None:
    """The same on the screen; overrides are in ``table.md``."""
    columns = [each for each in _COLUMNS if any(row.get(each) is not None for row in rows)]
    done = [row for row in rows if "failure" not in row]
    if done:
        cells = [[row["name"], *(_cell(row, key) for key in columns)] for row in done]
        console.print(FiguresTable(("run", *(_COLUMNS[each] for each in columns)), cells))
    for row in rows:
        if "failure" in row:
            console.print(f"{row['name']}: {row['failure']}", markup=False, highlight=False)


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if key in METRICS:
        return shown(value, row.get("metric", "")).removesuffix(" %")
    return "" if value is None else f"{value:.2f}"


def write_similarities(folders: Mapping[str, Path], folder: Path) -> None:
    """Write ``similarity.md`` and ``similarity.png`` of those runs that were scored by similarity, if any."""
    reports: dict[str, Report] = {}
    for name, each in folders.items():
        try:
            reports[name] = Report.load(each)
        except InputError:
            continue
    reports = {name: each for name, each in reports.items() if "similarity" in each.kinds["generated"].metrics}
    if reports:
        write_text(folder / "similarity.md", similarity_table(reports))
        draw_similarities(reports, folder / "similarity.png")


def similarity_table(reports: Mapping[str, Report]) -> str:
    """A row for each run and for originals, noise and generated: best and mean accuracy, and range of similarity."""
    lines = ["| run | networks | best | mean | similarity, range | mean |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for run, report in reports.items():
        for kind in ("original", *(name for name in report.kinds if name.startswith("noise_0")), "generated"):
            right, alike = (report.kinds[kind].summaries.get(name) for name in (report.first, "similarity"))
            if right and alike and "_at_" not in kind:
                lines.append(
                    f"| {run} | {label_of(kind)} | {100 * right.max:.1f} | {100 * right.mean:.1f} "
                    f"| {alike.min:.2f} … {alike.max:.2f} | {alike.mean:.2f} |"
                )
    return "\n".join(lines) + "\n"


def draw_similarities(reports: Mapping[str, Report], path: Path) -> None:
    """The distributions of similarity of originals and generated networks, side by side for each run (figure 5c)."""

    def draw(axes: Any) -> None:
        for kind, name, shift in ((ORIGINAL, "original", -0.2), (GENERATED, "generated", 0.2)):
            places = [place + shift for place in range(len(reports))]
            values = [each.kinds[name].metrics["similarity"] for each in reports.values()]
            drawn = axes.violinplot(values, places, widths=0.36)
            for part in (*drawn["bodies"], *(drawn[each] for each in ("cmins", "cmaxes", "cbars"))):
                part.set_color(COLORS[kind])
            axes.plot([], [], color=COLORS[kind], linewidth=6, label=name)
        axes.set_xticks(range(len(reports)), list(reports))
        axes.legend(frameon=False, ncols=2, loc="lower left")

    size = (max(4.0, 1.3 * len(reports)), 3.5)
    save_png(draw_figure(draw, Axis("run"), Axis("similarity to the nearest (other) original"), size), path)
