"""A report in the terminal: the main rows and the verdict, or everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from rpg.console import FiguresTable
from rpg.evaluation.report import FILE, Networks, Report, nearest_of, shown

FIGURES = {"one_nna": "1-NNA", "coverage": "coverage"}
"""Figures of a whole kind that have a column, where a kind has them."""

NUM_FAMILIES = 3
"""Baselines in the short table."""


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
