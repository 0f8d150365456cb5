"""The table of a sweep: one row an experiment, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    ("seconds_per_network", "s a network", 1),
    ("training_seconds", "s training", 1),
)


def row_of(name: str, overrides: Sequence[str], folder: Path, failure: str | None = None) -> dict[str, Any]:
    """What the table says of an experiment with its run folder; accuracies in 0 … 1."""
    row: dict[str, Any] = {"name": name, "set": list(overrides)}
    path = folder / EVALUATION
    if failure is not None or not path.is_file():
        return {**row, "failure": failure or "not run"}
    scores = json.loads(path.read_text())
    row |= {
        "original_best": scores["original"]["accuracy"]["max"],
        "original_mean": scores["original"]["accuracy"]["mean"],
        "average": scores["ensemble"]["accuracy"],
        "best": scores["generated"]["accuracy"]["max"],
        "mean": scores["generated"]["accuracy"]["mean"],
        "min": scores["generated"]["accuracy"]["min"],
        "similarity": scores["generated"]["similarity"]["mean"],
        "seconds_per_network": scores["generated"]["seconds_per_network"],
        "training_seconds": _training_seconds(folder),
    }
    if scores.get("novelty_details"):
        distances = scores["novelty_details"]["sets"]["generated"]["matched_distances"]
        row["distance"] = sorted(distances)[len(distances) // 2]
        row["novelty"] = dict(zip(map(str, scores["novelty"]["tau"]), scores["novelty"]["generated"], strict=True))
    return row


def _training_seconds(folder: Path) -> float | None:
    seconds = Generator.from_pretrained(folder).facts.get("training seconds")
    return None if seconds is None else float(seconds)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; accuracies in per cent."""
    lines = ["| run | " + " | ".join(title for _, title, _ in _COLUMNS) + " | overrides |"]
    lines.append("| --- |" + " ---: |" * len(_COLUMNS) + " --- |")
    for row in rows:
        if "failure" in row:
            figures = [row["failure"].replace("|", "/"), *[""] * (len(_COLUMNS) - 1)]
        else:
            figures = [_figure(row.get(key), factor) for key, _, factor in _COLUMNS]
        lines.append(f"| {row['name']} | " + " | ".join(figures) + f" | {' '.join(row['set'])} |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, factor: float) -> str:
    if value is None:
        return ""
    return f"{factor * value:.1f}" if factor == 100 else f"{value:.2f}"
