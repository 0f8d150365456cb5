"""Pictures of an evaluation."""

from __future__ import annotations

from pathlib import Path

from rpg.evaluation.results import EvaluationResult, NetworkScores
from tokenization.files import atomic_file

# Okabe and Ito's palette, told apart with any colour vision; markers differ too, for print without colour.
ORIGINAL, GENERATED, AVERAGE = "#0072B2", "#D55E00", "#000000"
NOISE = ("#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#999999")
NOISE_MARKERS = ("v", "^", "<", ">", "P")


def plot_accuracy_similarity(result: EvaluationResult, path: Path | str) -> None:
    """Draw accuracy against similarity, one point a network, as a PNG (p-diff, arXiv 2402.13144, figure 4a).

    The upper left is where one wants to be: accurate, and unlike every original.

    Args:
        result: what ``evaluate`` measured.
        path: the file to write.

    Raises:
        InputError: the file cannot be written.
    """
    # imported here: slow, and only needed for pictures; the figure is made without pyplot's global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    def scatter(scores: NetworkScores, label: str, color: str, marker: str, order: int) -> None:
        axes.scatter(
            scores.similarities, scores.accuracies, s=26, c=color, marker=marker, alpha=0.65, linewidths=0,
            label=label, zorder=order,
        )  # fmt: skip

    for index, noise in enumerate(result.noise):
        color, marker = NOISE[index % len(NOISE)], NOISE_MARKERS[index % len(NOISE_MARKERS)]
        scatter(noise, f"noise added, σ {noise.sigma:g}", color, marker, 2)
    scatter(result.original, "original", ORIGINAL, "o", 3)
    scatter(result.generated, "generated", GENERATED, "D", 4)
    axes.scatter(
        [result.ensemble.similarity], [result.ensemble.accuracy], s=170, c=AVERAGE, marker="*", zorder=5,
        edgecolors="white", label='weight average ("ensemble")',
    )  # fmt: skip

    axes.set_xlabel("similarity: greatest IoU of wrong predictions with any (other) original")
    axes.set_ylabel(f"accuracy on {result.num_images} {result.split} images")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    relative = any(noise.relative for noise in result.noise)
    title = "σ in units of each layer's standard deviation" if relative else None
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, title=title, title_fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")
