"""Pictures of the comparison on unseen tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.page.drawing import GENERATED, ORIGINAL, Axis, Series, save_png, save_points

METHODS = {"original": ORIGINAL, "generated": GENERATED, "kernel_ridge": 3, "nearest_seen": 8}
"""Those that are drawn, with their kinds of `Series`."""

TASKS_SHOWN, VALUES_SHOWN = 8, 100


def plot_distance(accuracies: Mapping[str, Tensor], hamming_to_seen: Tensor, path: Path | str) -> None:
    """Draw each task's accuracy against the Hamming distance to the nearest seen task, as a PNG.

    Args:
        accuracies: of every task ``[T]``, by method.
        hamming_to_seen: ``[T]``.
        path: the file to write.

    Raises:
        InputError: the file cannot be written.
    """
    rng = torch.Generator().manual_seed(0)
    series = []
    for number, (name, kind) in enumerate(METHODS.items()):
        jitter = (torch.rand(len(hamming_to_seen), generator=rng) - 0.5) * 0.12
        places = hamming_to_seen.float() + (number - 1.5) * 0.16 + jitter
        series.append(Series(name.replace("_", " "), places.tolist(), accuracies[name].tolist(), kind))
    x = Axis("Hamming distance to the nearest seen task", ticks=sorted(set(hamming_to_seen.tolist())))
    y = Axis("accuracy on test images, one point a task", percent=True)
    save_points(series, x, y, path)


def plot_parameters(heads: Mapping[str, tuple[Tensor, Tensor]], path: Path | str) -> None:
    """Draw the classifier of original and generated networks as heat maps (arXiv 2501.11587, figure 5), as a PNG.

    One row a task; columns are the values of the classifier's matrix that vary most, each less its mean and divided by
    its spread over the tasks of its panel; the titles say how the spreads compare.

    Args:
        heads: (original, generated) matrices ``[T, V]`` by split.
        path: the file to write.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(heads) + 0.6), dpi=150, layout="constrained")
    panels: Any = figure.subplots(2 * len(heads), 1)
    first = next(iter(heads.values()))[0]
    spread = first.std(0).mean()
    columns = first.std(0).topk(min(VALUES_SHOWN, first.shape[1])).indices.sort().values
    for number, (split, pair) in enumerate(heads.items()):
        for offset, (kind, values) in enumerate(zip(("original", "generated"), pair, strict=True)):
            axes = panels[2 * number + offset]
            rows = torch.linspace(0, len(values) - 1, TASKS_SHOWN).long()  # tasks far apart
            shown = ((values - values.mean(0)) / values.std(0).clamp(min=1e-12))[rows][:, columns]
            times = f"; spread {values.std(0).mean() / spread:.2g} times the first panel's" if number or offset else ""
            image = axes.imshow(shown, aspect="auto", cmap="RdBu", vmin=-2.5, vmax=2.5, interpolation="nearest")
            axes.set_title(f"{split} tasks, {kind}{times}", fontsize=9, loc="left")
            axes.set_yticks([])
            axes.set_xticks([])
    panels[-1].set_xlabel(
        f"{len(columns)} values of the classifier, each in its spread over the panel's tasks; one row a task, the "
        "same in both panels of a split"
    )
    figure.colorbar(image, ax=list(panels), shrink=0.6)
    save_png(figure, path)
