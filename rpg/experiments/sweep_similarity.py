"""What a sweep says of novelty, as p-diff shows it: how like the originals each kind of networks is, run by run.

Similarity is a network's greatest IoU of wrong answers with any (other) original (arXiv 2402.13144, equation 7).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rpg.evaluation.page.drawing import COLORS, GENERATED, ORIGINAL, Axis, draw_figure, save_png
from rpg.experiments.sweep_table import EVALUATION
from tokenization.files import write_text

Scores = Mapping[str, Any]


def kinds_of(scores: Scores) -> dict[str, Scores]:
    """Accuracies and similarities of originals, of originals with noise and of generated networks, by name."""
    noise = {f"noise {each['sigma']:g}": each for each in scores["noise"]}
    return {"original": scores["original"], **noise, "generated": scores["generated"]}


def similarity_table(reports: Mapping[str, Scores]) -> str:
    """A row for each run and kind: best and mean accuracy in per cent; least, mean and greatest similarity."""
    lines = ["| run | networks | best | mean | similarity, range | mean |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for run, scores in reports.items():
        for kind, each in kinds_of(scores).items():
            right, alike = each["accuracy"], each["similarity"]
            lines.append(
                f"| {run} | {kind} | {100 * right['max']:.1f} | {100 * right['mean']:.1f} "
                f"| {alike['min']:.2f} … {alike['max']:.2f} | {alike['mean']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def draw_similarities(reports: Mapping[str, Scores], path: Path) -> None:
    """The distributions of similarity of originals and generated networks, side by side for each run (figure 5c)."""

    def draw(axes: Any) -> None:
        for kind, name, shift in ((ORIGINAL, "original", -0.2), (GENERATED, "generated", 0.2)):
            places = [place + shift for place in range(len(reports))]
            drawn = axes.violinplot([each[name]["similarities"] for each in reports.values()], places, widths=0.36)
            for part in (*drawn["bodies"], *(drawn[each] for each in ("cmins", "cmaxes", "cbars"))):
                part.set_color(COLORS[kind])
            axes.plot([], [], color=COLORS[kind], linewidth=6, label=name)
        axes.set_xticks(range(len(reports)), list(reports))
        axes.legend(frameon=False, ncols=2, loc="lower left")

    size = (max(4.0, 1.3 * len(reports)), 3.5)
    save_png(draw_figure(draw, Axis("run"), Axis("similarity to the nearest (other) original"), size), path)


def write_similarities(folders: Mapping[str, Path], folder: Path) -> None:
    """Write ``similarity.md`` and ``similarity.png`` of those runs that were scored by similarity, if any."""
    found = {name: each / EVALUATION for name, each in folders.items() if (each / EVALUATION).is_file()}
    reports = {name: json.loads(path.read_text()) for name, path in found.items()}
    reports = {name: each for name, each in reports.items() if _has_similarities(each)}
    if reports:
        write_text(folder / "similarity.md", similarity_table(reports))
        draw_similarities(reports, folder / "similarity.png")


def _has_similarities(scores: Scores, kinds: Sequence[str] = ("original", "generated")) -> bool:
    return "noise" in scores and all("similarities" in scores.get(kind, {}) for kind in kinds)
