"""The table of a sweep: one row an experiment, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rpg.console import FiguresTable
from rpg.generation.generator import Generator

EVALUATION = "evaluation.json"

_COLUMNS: tuple[tuple[str, str, float], ...] = (
    ("original_best", "original best", 100),
    ("original_mean", "mean", 100),
    ("average", "average", 100),
    ("best", "generated best", 100),
    ("mean", "mean", 100),
    ("min", "worst", 100),
    ("similarity", "IoU", 1),
    ("distance", "distance", 1),
    ("one_nna", "1-NNA", 1),
    ("coverage", "coverage", 1),
    ("nearest", "nearest", 1),
    ("seconds_per_network", "s a network", 1),
    ("training_seconds", "s training", 1),
)

GENERATED = "generated"


def row_of(name: str, overrides: Sequence[str], folder: Path, failure: str | None = None) -> dict[str, Any]:
    """What the table says of an experiment with its run folder; accuracies in 0 … 1."""
    row: dict[str, Any] = {"name": name, "set": list(overrides)}
    path = folder / EVALUATION
    if failure is not None or not path.is_file():
        return {**row, "failure": failure or "not run"}
    scores = json.loads(path.read_text())
    row |= figures_of(scores)[GENERATED] | {"training_seconds": _training_seconds(folder)}
    if "ensemble" not in scores:
        return row
    row |= {
        "original_best": scores["original"]["accuracy"]["max"],
        "original_mean": scores["original"]["accuracy"]["mean"],
        "average": scores["ensemble"]["accuracy"],
        "seconds_per_network": scores[GENERATED]["seconds_per_network"],
    }
    if scores.get("novelty_details"):
        distances = scores["novelty_details"]["sets"][GENERATED]["matched_distances"]
        row["distance"] = sorted(distances)[len(distances) // 2]
        row["novelty"] = dict(zip(map(str, scores["novelty"]["tau"]), scores["novelty"][GENERATED], strict=True))
    return row


def rows_of_rivals(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for every method that is no generator, of the first evaluation that has it."""
    found: dict[str, dict[str, Any]] = {}
    for path in (folder / EVALUATION for folder in folders):
        if path.is_file():
            methods = figures_of(json.loads(path.read_text()))
            found = {name: {"name": name, "set": [], **each} for name, each in methods.items()} | found
    compared = ("one_nna", "similarity")
    return [row for name, row in found.items() if name != GENERATED and any(each in row for each in compared)]


def figures_of(scores: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of each method in a report on a single task, on unseen tasks or on fields; accuracies in 0 … 1."""
    if "unseen" in scores:
        found = {name: _accuracies(each) for name, each in scores["unseen"].items() if "accuracy" in each}
        several = (scores.get("per_task") or {}).get("methods", {})
        for name, each in several.items():
            found[name] |= {"similarity": each["error_iou"]} | _two_sample(each)
        return found
    if "held_out" in scores:
        kinds = {name: each for name, each in scores.items() if isinstance(each, dict) and "one_nna" in each}
        return {name: {**each, "mean": each["class_accuracy"]} for name, each in kinds.items()}
    found = {name: _accuracies(each) for name, each in (scores.get("baselines") or {}).items()}
    found[GENERATED] = _accuracies(scores[GENERATED]) | {"similarity": scores[GENERATED]["similarity"]["mean"]}
    for name, each in ((scores.get("two_sample") or {}).get("sets") or {}).items():
        found[name] = found.get(name, {}) | _two_sample(each)
    return found


def _accuracies(scores: Mapping[str, Any]) -> dict[str, float]:
    summary = scores["accuracy"]
    return {"best": summary["max"], "mean": summary["mean"], "min": summary["min"]}


def _two_sample(scores: Mapping[str, Any]) -> dict[str, float]:
    """Of several networks a task the nearest original is the task's; else any that was learned from."""
    names = {"nearest_neighbour_accuracy": "one_nna", "coverage": "coverage"}
    names |= {"nearest": "nearest", "nearest_training": "nearest"}
    return {short: scores[name] for name, short in names.items() if scores.get(name) is not None}


def _training_seconds(folder: Path) -> float | None:
    seconds = Generator.from_pretrained(folder).facts.get("training seconds")
    return None if seconds is None else float(seconds)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, without columns that none has; accuracies in per cent."""
    columns = [each for each in _COLUMNS if any(row.get(each[0]) is not None for row in rows)]
    lines = ["| run | " + " | ".join(title for _, title, _ in columns) + " | overrides |"]
    lines.append("| --- |" + " ---: |" * len(columns) + " --- |")
    for row in rows:
        if "failure" in row:
            figures = [row["failure"].replace("|", "/"), *[""] * (len(columns) - 1)]
        else:
            figures = [_figure(row.get(key), factor) for key, _, factor in columns]
        lines.append(f"| {row['name']} | " + " | ".join(figures) + f" | {' '.join(row['set'])} |")
    return "\n".join(lines) + "\n"


def print_sweep(rows: list[dict[str, Any]], console: Console) -> None:
    """The same on the screen; overrides are in ``table.md``."""
    columns = [each for each in _COLUMNS if any(row.get(each[0]) is not None for row in rows)]
    done = [row for row in rows if "failure" not in row]
    cells = [[row["name"], *(_figure(row.get(key), factor) for key, _, factor in columns)] for row in done]
    if done:
        console.print(FiguresTable(("run", *(title for _, title, _ in columns)), cells))
    for row in rows:
        if "failure" in row:
            console.print(f"{row['name']}: {row['failure']}", markup=False, highlight=False)


def _figure(value: float | None, factor: float) -> str:
    if value is None:
        return ""
    return f"{factor * value:.1f}" if factor == 100 else f"{value:.2f}"
