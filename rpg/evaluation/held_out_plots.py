"""Pictures of the comparison on unseen tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.drawing import GENERATED, ORIGINAL, Axis, Series, save_png, save_points
from rpg.tasks.side_by_side import Stacked

METHODS = {"original": ORIGINAL, "generated": GENERATED, "kernel_ridge": 3, "nearest_seen": 8}
"""Those that are drawn, with their kinds of `Series`."""

TASKS_SHOWN, VALUES_SHOWN = 8, 200


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


def plot_parameters(networks: Mapping[str, tuple[Stacked, Stacked]], path: Path | str) -> None:
    """Draw values of original and generated networks as heat maps (arXiv 2501.11587, figure 5), as a PNG.

    One row a task; columns are the values of the largest tensor that vary most over the tasks.

    Args:
        networks: (original, generated) stacked weights by split.
        path: the file to write.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(networks) + 0.6), dpi=150, layout="constrained")
    panels: Any = figure.subplots(2 * len(networks), 1)
    first = next(iter(networks.values()))[0]
    name = max(first, key=lambda each: first[each][0].numel())
    spread = first[name].flatten(1).std(0)
    columns = spread.topk(min(VALUES_SHOWN, len(spread))).indices.sort().values
    limit = float(first[name].flatten(1)[:, columns].abs().quantile(0.99))
    for number, (split, pair) in enumerate(networks.items()):
        for offset, (kind, weights) in enumerate(zip(("original", "generated"), pair, strict=True)):
            axes = panels[2 * number + offset]
            rows = torch.linspace(0, len(weights[name]) - 1, TASKS_SHOWN).long()  # tasks far apart
            values = weights[name].flatten(1)[rows][:, columns]
            image = axes.imshow(values, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set_title(f"{split} tasks, {kind}", fontsize=9, loc="left")
            axes.set_yticks([])
            axes.set_xticks([])
    panels[-1].set_xlabel(f"{len(columns)} values of {name}; one row a task, the same in both pictures of a split")
    figure.colorbar(image, ax=list(panels), shrink=0.6)
    save_png(figure, path)
