"""Pictures of the comparison on unseen tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpg.evaluation.plots import GENERATED, ORIGINAL
from rpg.tasks.side_by_side import Stacked
from tokenization.files import atomic_file

METHODS = {
    "original": (ORIGINAL, "o"),
    "generated": (GENERATED, "D"),
    "kernel_ridge": ("#009E73", "^"),
    "nearest_seen": ("#999999", "v"),
}
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
    figure, axes = _figure(7.5, 5)
    rng = torch.Generator().manual_seed(0)
    distances = hamming_to_seen.float()
    for number, (name, (color, marker)) in enumerate(METHODS.items()):
        jitter = (torch.rand(len(distances), generator=rng) - 0.5) * 0.12
        places = distances + (number - 1.5) * 0.16 + jitter
        axes.scatter(
            places,
            accuracies[name],
            s=14,
            c=color,
            marker=marker,
            alpha=0.6,
            linewidths=0,
            label=name.replace("_", " "),
        )
    axes.set_xlabel("Hamming distance to the nearest seen task")
    axes.set_ylabel("accuracy on test images, one point a task")
    axes.set_xticks(sorted(set(hamming_to_seen.tolist())))
    axes.legend(loc="lower left", frameon=False)
    _save(figure, path)


def plot_parameters(networks: Mapping[str, tuple[Stacked, Stacked]], path: Path | str) -> None:
    """Draw values of original and generated networks as heat maps (arXiv 2501.11587, figure 5), as a PNG.

    One row a task; columns are the values of the largest tensor that vary most over the tasks.

    Args:
        networks: (original, generated) stacked weights by split.
        path: the file to write.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * len(networks) + 0.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
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
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # imported here: slow, and only needed for pictures; the figure is made without pyplot's global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path | str) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
