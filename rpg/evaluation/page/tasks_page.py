"""``report.html`` of an experiment on unseen tasks, from what its ``evaluation.json`` holds and a few networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.page.charts import Chart, scatter, training_loss, trajectories
from rpg.evaluation.page.drawing import GENERATED, ORIGINAL, Axis, Series
from rpg.evaluation.page.single_page import heat_png
from rpg.evaluation.page.template import render_page

DRAWN = {"original": ORIGINAL, "kernel_ridge": 3, "nearest_seen": 8, "generated": GENERATED}
"""Methods that are drawn, with their kinds of `Series`; the generated networks above all others."""

NUM_WORST = 8


@dataclass
class TasksPage:
    """What the page shows beside the report of the experiment.

    Attributes:
        title: of the page.
        names: of the condition's bits; may be empty.
        provenance: rows of the last table.
        losses: (optimizer steps, losses) of training.
        heatmaps: by split, rows of normalised values ``[rows, columns]`` with a label each.
        head: name of the tensor that these are of.
        trajectory: (sampling steps taken, figure ``[networks]`` then), for the task that ``condition`` names.
        condition: in words.
        chosen: whether the user named that task, which may be any.
    """

    title: str
    names: Sequence[str] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    losses: tuple[Sequence[float], Sequence[float]] = ((), ())
    heatmaps: Mapping[str, tuple[Sequence[str], Tensor]] = field(default_factory=dict)
    head: str = ""
    trajectory: Sequence[tuple[int, Tensor]] = ()
    condition: str = ""
    chosen: bool = False


def write_tasks_page(path: Path | str, report: Mapping[str, Any], page: TasksPage) -> None:
    """Write the page.

    Args:
        path: the file.
        report: what ``evaluation.json`` of ``rpg unseen`` or ``rpg lora`` holds.
        page: what else is shown.

    Raises:
        InputError: the file cannot be written.
    """
    figure = first_figure(report)
    shown = {
        split: [
            _row(name, methods[name][figure_of(methods[name])], report, split) for name in _generated_first(methods)
        ]
        for split, methods in (("unseen", report["unseen"]), ("seen", report["seen"]))
    }
    render_page(
        path,
        "tasks.html.j2",
        data=page,
        verdict=_verdict(report, figure),
        figure_name=figure.replace("_", " "),
        methods=shown,
        distance_chart=_distance(report, figure),
        worst=worst_of(report, page.names),
        heatmaps=[(split, labels, heat_png(values)) for split, (labels, values) in page.heatmaps.items()],
        trajectory_chart=_trajectory(page, figure),
        losses_chart=training_loss(page.losses),
    )


def first_figure(report: Mapping[str, Any]) -> str:
    """The figure that methods are compared by."""
    return figure_of(report["unseen"]["generated"])


def figure_of(method: Mapping[str, Any]) -> str:
    """The first figure of a method."""
    return next(iter(method))


def each_of(method: Mapping[str, Any]) -> Sequence[float]:
    """The first figure of a method for every task."""
    return method["accuracies"] if "accuracies" in method else method["each"][figure_of(method)]


def task_name(bits: Sequence[int], names: Sequence[str]) -> str:
    """A task in words: its positive classes, or its bits where these have no names."""
    if len(names) == len(bits):
        return ", ".join(name for name, bit in zip(names, bits, strict=True) if bit)
    return "".join(map(str, bits))


def worst_of(report: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The unseen tasks at which generated networks do worst, with the originals' figure beside theirs."""
    generated, originals = (each_of(report["unseen"][name]) for name in ("generated", "original"))
    tasks = report["unseen_tasks"]
    known = {tuple(each["bits"]): each["accuracy_of_class"] for each in tasks.get("worst", [])}
    order = sorted(range(len(generated)), key=lambda place: generated[place])[:NUM_WORST]
    found = []
    for place in order:
        bits = tasks["tasks"][place]
        shares = known.get(tuple(bits))
        least = min(range(len(shares)), key=lambda i: shares[i]) if shares else None
        found.append(
            {
                "task": task_name(bits, names),
                "generated": generated[place],
                "original": originals[place],
                "hamming": tasks["hamming_to_seen"][place],
                "class": None if least is None else names[least] if len(names) > least else str(least),
                "share": None if least is None or shares is None else shares[least],
            }
        )
    return found


def _generated_first(methods: Mapping[str, Any]) -> list[str]:
    return sorted(methods, key=lambda name: name != "generated")


def _row(name: str, summary: Mapping[str, Any], report: Mapping[str, Any], split: str) -> dict[str, Any]:
    better = report[f"{split}_tasks"].get("better_than", {}).get(name)
    return {"name": name.replace("_", " "), "summary": summary, "better": better}


def _verdict(report: Mapping[str, Any], figure: str) -> list[str]:
    unseen = {name: each[figure_of(each)] for name, each in report["unseen"].items()}
    own = unseen["generated"]
    rivals = {name: each["mean"] for name, each in unseen.items() if name not in ("generated", "original")}
    best = max(sorted(rivals), key=lambda name: rivals[name])
    return [
        f"Networks generated for {len(report['unseen_tasks']['tasks'])} tasks that nobody trained have "
        f"{100 * own['mean']:.1f} % {figure.replace('_', ' ')} (worst {100 * own['min']:.1f} %), networks trained for "
        f"them {100 * unseen['original']['mean']:.1f} %.",
        f"The best of everything trivial, {best.replace('_', ' ')}, has {100 * rivals[best]:.1f} %; generated networks "
        f"are better than kernel ridge on {100 * report['unseen_tasks']['beats_kernel_ridge']:.0f} % of the tasks.",
    ]


def _distance(report: Mapping[str, Any], figure: str) -> Chart:
    hamming = report["unseen_tasks"]["hamming_to_seen"]
    rng, series = torch.Generator().manual_seed(0), []
    for number, (name, kind) in enumerate((name, kind) for name, kind in DRAWN.items() if name in report["unseen"]):
        jitter = (torch.rand(len(hamming), generator=rng) - 0.5) * 0.12 + (number - 1.5) * 0.16
        places = (torch.tensor(hamming).float() + jitter).tolist()
        series.append(Series(name.replace("_", " "), places, each_of(report["unseen"][name]), kind))
    words = figure.replace("_", " ")
    caption = f"The {words} for each unseen task against the Hamming distance to the nearest seen task."
    across = Axis("Hamming distance to the nearest seen task", ticks=sorted(set(hamming)))
    return scatter(series, across, Axis(f"{words}, one point a task", percent=True), caption)


def _trajectory(page: TasksPage, figure: str) -> Chart | None:
    kind = "task" if page.chosen else "unseen task"
    caption = f"Networks for the {kind} {page.condition} after each sampling step, noise included."
    shown = [(step, values.tolist()) for step, values in page.trajectory]
    return trajectories(shown, figure.replace("_", " "), caption, percent=True)
